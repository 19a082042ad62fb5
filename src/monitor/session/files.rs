//! Files that may keep whoever opens them for ever: while one is opened, somebody else has to hear orders.

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::io::Errno;

use crate::config::{CharTarget, Firmware, VmConfig};

/// Whether a run of `config`, whose owner writes `outputs` beside, opens a file that is not, for all that the kernel knows at once,
/// on a disk of this host, or has a disk's image. A few microseconds for each; it never blocks.
pub(super) fn may_hang(config: &VmConfig, outputs: &[PathBuf]) -> bool {
    let firmware = match &config.firmware {
        Some(Firmware::File(path)) => Some(path),
        Some(Firmware::BuiltIn) | None => None,
    };
    let mut inputs = config.kernel.iter().chain(&config.initrd).chain(firmware).chain(&config.option_rom);
    let console = config.console();
    let ends = [&console, &config.serial].into_iter().chain(config.port.iter().map(|port| &port.to));
    let others = config.net_dump.iter().map(|file| &file.path);
    let others = others.chain(config.vsock.iter().filter_map(|vsock| vsock.path.as_ref()));
    let mut outputs = outputs.iter().chain(others).chain(ends.filter_map(|end| match end {
        CharTarget::File(file) => Some(&file.path),
        CharTarget::Socket(path) => Some(path),
        CharTarget::Stdio | CharTarget::Pty | CharTarget::Off => None,
    }));
    // What stores an image may stop at any time.
    !config.disk.is_empty()
        || inputs.any(|path| is_local(path) != Ok(true))
        || outputs
            .any(|path| !is_local(path).unwrap_or_else(|error| error == Errno::NOENT && makes_locally(path)))
}

/// Whether a file that is not there would be on such a disk.
fn makes_locally(path: &Path) -> bool {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    is_local(folder.unwrap_or(Path::new("."))) == Ok(true)
}

/// Asks no file system, because one that hangs does not answer: a path that is not all in the kernel's cache is not local, nor is
/// a file system without a block device. Those are FUSE, NFS, 9p and their like; tmpfs, overlayfs and btrfs are taken for one.
fn is_local(path: &Path) -> Result<bool, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED)?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    Ok(statx(file, "", flags, StatxFlags::empty())?.stx_dev_major != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::fs::MetadataExt;

    #[test]
    fn only_a_file_on_a_block_device_is_local() {
        let exe = std::env::current_exe().unwrap();
        let on_block_device = rustix::fs::major(exe.metadata().unwrap().st_dev()) != 0;
        // The kernel's cache may be in a change at the moment, by a mount for instance.
        assert_eq!((0..100).any(|_| is_local(&exe) == Ok(true)), on_block_device, "{}", exe.display());
        assert_eq!((0..100).any(|_| makes_locally(&exe)), on_block_device, "{}", exe.display());
        for path in ["/proc/version", "no/such/file"] {
            assert_ne!(is_local(Path::new(path)), Ok(true), "{path}");
            assert!(!makes_locally(Path::new(path)), "{path}");
        }
    }
}
