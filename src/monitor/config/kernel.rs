//! [`Kernel`]: what a machine starts with, which is decided here and nowhere else.

use std::path::{Path, PathBuf};

use super::{BootProtocol, Firmware, Invalid, VmConfig};

/// The kernel that the monitor loads, or hands to firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    /// A file.
    File(PathBuf),
    /// The monitor's own program that finds a kernel on a disk (`firmware/disk`).
    BootDisk,
}

impl Kernel {
    /// The file's path, or what stands for it in messages.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::BootDisk => Path::new("boot-disk (built-in)"),
        }
    }
}

impl From<PathBuf> for Kernel {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

impl VmConfig {
    /// What to start with: the kernel that is named, else what boots a disk if there is one. None where firmware of
    /// the user's has neither, and may know what to do.
    ///
    /// # Errors
    /// [`Invalid`]: there is nothing to boot, or something that belongs to a kernel and no kernel.
    pub fn to_boot(&self) -> Result<Option<Kernel>, Invalid> {
        let invalid = |what: &str, hint: &str| Err(Invalid { what: what.to_owned(), hint: hint.to_owned() });
        if let Some(path) = &self.kernel {
            return Ok(Some(Kernel::File(path.clone())));
        }
        if self.initrd.is_some() {
            return invalid(
                "`initrd=` without `kernel=`: an initrd needs its kernel",
                "add `kernel=FILE`, or drop `initrd=`: a system installed on a disk brings its own",
            );
        }
        if self.boot != BootProtocol::Auto {
            return invalid(
                "`boot=` without `kernel=`: there is no kernel to enter",
                "add `kernel=FILE`, or drop `boot=`",
            );
        }
        match self.firmware {
            _ if !self.disk.is_empty() => Ok(Some(Kernel::BootDisk)),
            Some(Firmware::File(_)) => Ok(None),
            _ => Err(nothing_to_boot()),
        }
    }
}

/// There is neither kernel nor disk.
pub(crate) fn nothing_to_boot() -> Invalid {
    Invalid {
        what: "nothing to boot: no kernel, and no disk to find one on".to_owned(),
        hint: "give a kernel, `kernel=FILE`, or a disk with an installed system, `disk=FILE`".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_boot(json: &str) -> Result<Option<Kernel>, String> {
        let config: VmConfig = serde_json::from_str(json).unwrap();
        config.to_boot().map_err(|error| error.to_string())
    }

    #[test]
    fn a_kernel_is_named_or_on_a_disk_or_the_firmwares_affair() {
        let file = |path: &str| Ok(Some(Kernel::File(path.into())));
        assert_eq!(to_boot(r#"{"kernel": "k", "initrd": "i", "disk": ["d"], "boot": "pvh"}"#), file("k"));
        assert_eq!(to_boot(r#"{"disk": ["d"]}"#), Ok(Some(Kernel::BootDisk)));
        assert_eq!(to_boot(r#"{"disk": ["d"], "firmware": "rom"}"#), Ok(Some(Kernel::BootDisk)));
        assert_eq!(to_boot(r#"{"firmware": "rom"}"#), Ok(None));
        for (json, word) in [
            ("{}", "no disk"),
            (r#"{"firmware": "built-in"}"#, "no disk"),
            (r#"{"initrd": "i", "disk": ["d"]}"#, "`initrd=`"),
            (r#"{"initrd": "i", "firmware": "rom"}"#, "`initrd=`"),
            (r#"{"boot": "linux64", "disk": ["d"]}"#, "`boot=`"),
        ] {
            assert!(to_boot(json).unwrap_err().contains(word), "{json}");
        }
    }
}
