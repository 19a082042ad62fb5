//! A kernel that the cache holds: what `stock` and `tuned` return, and what the command line prints.

use anyhow::{Context, Result, bail};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Debian's cloud kernel, as packaged: 6.1.
    Stock,
    /// Debian's newer cloud kernel for the same release.
    #[value(name = "cloud-6.12")]
    Cloud612,
    /// Debian's kernel for PCs.
    #[value(name = "generic-6.1")]
    Generic61,
    /// The newer one.
    #[value(name = "generic-6.12")]
    Generic612,
    /// Ours: guest/kernel/tuned.config over Debian's source.
    Tuned,
}

impl Kind {
    /// Its name on the command line, in the cache and in a bundle.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Cloud612 => "cloud-6.12",
            Self::Generic61 => "generic-6.1",
            Self::Generic612 => "generic-6.12",
            Self::Tuned => "tuned",
        }
    }

    /// Debian's, which has its drivers in modules.
    pub fn is_debians(self) -> bool {
        self != Self::Tuned
    }
}

/// The files of one kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// The compressed image with the Linux/x86 boot protocol.
    pub bzimage: PathBuf,
    /// The ELF file: PVH and 64-bit entry; the tuned one's has symbols.
    pub vmlinux: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// Symbols as text. Debian's package does not have them (its System.map is a stub).
    pub system_map: Option<PathBuf>,
    /// `lib/modules/RELEASE`, with depmod's lists; the tuned kernel has no modules.
    pub modules: Option<PathBuf>,
}

impl Kernel {
    /// Fetches or builds, or takes what the cache has. `refresh` looks for a newer one.
    pub fn get(kind: Kind, refresh: bool) -> Result<Self> {
        match kind {
            Kind::Tuned => crate::tuned::get(refresh),
            debians => crate::stock::get(debians, refresh),
        }
    }

    /// From a cached folder with bzImage, vmlinux, config, release, perhaps System.map and modules/.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let file = |name: &str| {
            let path = folder.join(name);
            if !path.is_file() {
                bail!("{} is missing; remove {} and try again", path.display(), folder.display());
            }
            Ok(path)
        };
        let release = fs::read_to_string(file("release")?).context("read the kernel's release")?;
        Ok(Self {
            release: release.trim_end().to_owned(),
            bzimage: file("bzImage")?,
            vmlinux: file("vmlinux")?,
            config: file("config")?,
            system_map: file("System.map").ok(),
            modules: Some(folder.join("modules")).filter(|path| path.is_dir()),
        })
    }
}

/// One `name path` line each, for scripts.
impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "release {}", self.release)?;
        write!(f, "\nbzimage {}", self.bzimage.display())?;
        write!(f, "\nvmlinux {}", self.vmlinux.display())?;
        write!(f, "\nconfig {}", self.config.display())?;
        if let Some(path) = &self.system_map {
            write!(f, "\nsystem-map {}", path.display())?;
        }
        if let Some(path) = &self.modules {
            write!(f, "\nmodules {}", path.display())?;
        }
        Ok(())
    }
}
