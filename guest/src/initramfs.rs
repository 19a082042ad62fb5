//! Builds initramfs images: PID 1, busybox if asked, the modules that a stock kernel needs to find its devices, and
//! whatever files the caller adds. The same input gives the same bytes.

use crate::kernel::{Kernel, Kind};
use crate::modules::Modules;
use crate::programs::{self, Init};
use crate::run::Tool;
use anyhow::{Context, Result, bail};
use cpio::{Archive, Entry};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a stock kernel cannot do without a module: both virtio transports, and then the devices that a first boot wants.
/// button and evdev carry the power button to init; pvpanic_mmio tells the monitor of a panic.
pub const STOCK_MODULES: [&str; 11] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
    "virtio_balloon",
    "pvpanic_mmio",
];

/// What else it cannot do without if it mounts a folder of the host's.
const SHARE_MODULES: [&str; 1] = ["virtiofs"];

/// How the archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Compression {
    /// Not at all: the fastest to boot.
    #[default]
    None,
    /// LZ4, in the legacy frame that the kernel reads.
    Lz4,
    /// gzip.
    Gzip,
}

/// What to put in.
#[derive(Debug, Clone, Default)]
pub struct Recipe {
    /// Another program as PID 1 in place of ours.
    pub init: Option<PathBuf>,
    /// Our tiny PID 1: marker and power-off.
    pub tiny: bool,
    /// The kernel that it is for; `None` or tuned: no modules.
    pub kernel: Option<Kind>,
    /// Modules beyond [`STOCK_MODULES`].
    pub modules: Vec<String>,
    /// Busybox with links for all its applets.
    pub busybox: bool,
    /// Files or folders of the host, and where they go.
    pub add: Vec<(PathBuf, String)>,
}

impl Recipe {
    /// The archive, not yet packed.
    pub fn build(&self) -> Result<Archive> {
        let mut archive = Archive::new();
        let init = match &self.init {
            Some(path) => path.clone(),
            None => programs::init(if self.tiny { Init::Tiny } else { Init::Full })?,
        };
        add_program(&mut archive, "init", &init)?;
        if !self.tiny {
            // Mount points, so that init need not make them, and the console for a kernel that opens it before init does.
            for path in ["dev", "newroot", "proc", "root", "run", "sys", "tmp"] {
                archive.add(path, Entry::Directory { mode: 0o755 })?;
            }
            archive.add("dev/console", Entry::CharDevice { mode: 0o600, major: 5, minor: 1 })?;
        }
        if self.busybox {
            add_busybox(&mut archive)?;
            add_program(&mut archive, "sbin/guest-inotify", &programs::init(Init::Inotify)?)?;
            add_program(&mut archive, "sbin/guest-vsock", &programs::init(Init::Vsock)?)?;
            add_program(&mut archive, "sbin/vmm-agent", &programs::agent()?)?;
        }
        if let Some(kind) = self.kernel.filter(|kind| kind.is_debians()) {
            self.add_modules(&mut archive, &Kernel::get(kind, false)?)?;
            // The tuned kernel does not start others.
            add_program(&mut archive, "sbin/guest-kexec", &programs::init(Init::Kexec)?)?;
        } else if !self.modules.is_empty() {
            bail!("only Debian's kernels have modules");
        }
        for (host, guest) in &self.add {
            add_tree(&mut archive, host, guest)?;
        }
        Ok(archive)
    }

    fn add_modules(&self, archive: &mut Archive, kernel: &Kernel) -> Result<()> {
        let folder = kernel.modules.as_ref().context("the stock kernel has no modules folder")?;
        let names: Vec<&str> =
            STOCK_MODULES.into_iter().chain(self.modules.iter().map(String::as_str)).collect();
        let modules = Modules::read(folder)?;
        let mut added = HashSet::new();
        for (list, names) in [("load", names.as_slice()), ("share", &SHARE_MODULES)] {
            let mut paths = String::new();
            for file in modules.load_order(names)? {
                let place = add_module(archive, kernel, &folder.join(&file), &file, &mut added)?;
                paths.push_str(&format!("/{place}\n"));
            }
            let data = paths.into_bytes();
            archive.add(&format!("lib/modules.{list}"), Entry::File { mode: 0o644, data })?;
        }
        Ok(())
    }

    /// Builds and writes it to `out`, by way of a temporary file beside it.
    pub fn write(&self, out: &Path, compression: Compression) -> Result<()> {
        let mut bytes = Vec::new();
        self.build()?.write(&mut bytes)?;
        let bytes = match compression {
            Compression::None => bytes,
            Compression::Lz4 => {
                crate::debian::ensure_installed(&["lz4"])?;
                Tool::new("lz4").args(["-l", "-9", "-c"]).filter(&bytes)?
            }
            Compression::Gzip => Tool::new("gzip").args(["-n", "-9", "-c"]).filter(&bytes)?,
        };
        write_whole(out, &bytes)
    }
}

/// Adds the module `file`, which is at `path`, unpacked, unless it is `added` already. Its place.
fn add_module(
    archive: &mut Archive,
    kernel: &Kernel,
    path: &Path,
    file: &str,
    added: &mut HashSet<String>,
) -> Result<String> {
    let (stem, packer) = match file.rsplit_once(".ko") {
        Some((stem, ".xz")) => (stem, Some("xz")),
        Some((stem, ".zst")) => (stem, Some("zstd")),
        Some((stem, ".gz")) => (stem, Some("gzip")),
        Some((stem, "")) => (stem, None),
        _ => bail!("{file} is no module"),
    };
    let place = format!("lib/modules/{}/{stem}.ko", kernel.release);
    if added.insert(place.clone()) {
        let data = fs::read(path).with_context(|| format!("read module {}", path.display()))?;
        let data = match packer {
            Some(packer) => Tool::new(packer).args(["-d", "-c"]).filter(&data)?,
            None => data,
        };
        archive.add(&place, Entry::File { mode: 0o644, data })?;
    }
    Ok(place)
}

/// Writes a file so that it is either there and whole, or as it was.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file =
        tempfile::NamedTempFile::new_in(folder).with_context(|| format!("write in {}", folder.display()))?;
    std::io::Write::write_all(&mut file, bytes)?;
    // A temporary file is private to its owner; an image is as any file.
    fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.persist(path).with_context(|| format!("write {}", path.display()))?;
    Ok(())
}

fn add_program(archive: &mut Archive, place: &str, host: &Path) -> Result<()> {
    let data = fs::read(host).with_context(|| format!("read {}", host.display()))?;
    Ok(archive.add(place, Entry::File { mode: 0o755, data })?)
}

fn add_busybox(archive: &mut Archive) -> Result<()> {
    let busybox = programs::busybox()?;
    add_program(archive, "bin/busybox", &busybox)?;
    for applet in programs::busybox_applets(&busybox)? {
        // Ours is /init; busybox's own must not take its place for those who look for one in /sbin.
        if !matches!(applet.as_str(), "bin/busybox" | "sbin/init" | "linuxrc") {
            archive.add(&applet, Entry::Symlink("/bin/busybox".to_owned()))?;
        }
    }
    // Where Debian's busybox looks for it.
    let lease = Entry::File { mode: 0o755, data: include_bytes!("udhcpc.sh").to_vec() };
    archive.add("etc/udhcpc/default.script", lease)?;
    Ok(())
}

/// Adds a file, link or whole folder of the host at `guest`.
fn add_tree(archive: &mut Archive, host: &Path, guest: &str) -> Result<()> {
    let metadata = fs::symlink_metadata(host).with_context(|| format!("read {}", host.display()))?;
    let mode = metadata.mode() & 0o7777;
    let kind = metadata.file_type();
    let read = || fs::read(host).with_context(|| format!("read {}", host.display()));
    if kind.is_dir() {
        if !guest.trim_matches('/').is_empty() {
            archive.add(guest, Entry::Directory { mode })?;
        }
        for entry in fs::read_dir(host).with_context(|| format!("list {}", host.display()))? {
            let name = entry?.file_name();
            add_tree(
                archive,
                &host.join(&name),
                &format!("{}/{}", guest.trim_end_matches('/'), utf8(&name)?),
            )?;
        }
    } else if kind.is_symlink() {
        let target = fs::read_link(host)?;
        archive.add(guest, Entry::Symlink(utf8(target.as_os_str())?.to_owned()))?;
    } else if kind.is_file() {
        archive.add(guest, Entry::File { mode, data: read()? })?;
    } else if kind.is_char_device() {
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        archive.add(guest, Entry::CharDevice { mode, major, minor })?;
    } else {
        bail!("{} is neither file, folder, link nor character device", host.display());
    }
    Ok(())
}

fn utf8(name: &OsStr) -> Result<&str> {
    name.to_str().with_context(|| format!("{} is not UTF-8", name.display()))
}
