//! Files that may keep whoever opens them for ever: while one is opened, somebody else has to hear orders.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};

use crate::config::{Firmware, VmConfig};

/// Whether the machine of `config` starts from a file that is not, for all that the kernel knows at once, on a disk of this host, or
/// has a disk's image. A few microseconds; it never blocks.
pub(super) fn may_hang(config: &VmConfig) -> bool {
    let firmware = match &config.firmware {
        Some(Firmware::File(path)) => Some(path),
        Some(Firmware::BuiltIn) | None => None,
    };
    let mut inputs = config.kernel.iter().chain(&config.initrd).chain(firmware).chain(&config.option_rom);
    // What stores an image may stop at any time.
    !config.disk.is_empty() || inputs.any(|path| !is_local(path))
}

/// Asks no file system, because one that hangs does not answer: a path that is not all in the kernel's cache is not local, nor is
/// a file system without a block device. Those are FUSE, NFS, 9p and their like; tmpfs, overlayfs and btrfs are taken for one.
fn is_local(path: &Path) -> bool {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let about = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED).and_then(|file| {
        statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::empty())
    });
    about.is_ok_and(|about| about.stx_dev_major != 0)
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
        assert_eq!((0..100).any(|_| is_local(&exe)), on_block_device, "{}", exe.display());
        for path in ["/proc/version", "no/such/file"] {
            assert!(!is_local(Path::new(path)), "{path}");
        }
    }
}
