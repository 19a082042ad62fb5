//! A folder with everything that tests and `make run` boot, under fixed names. Called from the command line.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};

use crate::disk;
use crate::initramfs::{self, Compression};
use crate::kernel::{Kernel, Kind};
use crate::programs;
use crate::rootfs;

/// What the Debian root has beyond the minimum: a disk test that verifies what it wrote, and tools to look around.
const ROOT_PACKAGES: [&str; 3] = ["fio", "procps", "util-linux"];

/// Fills `out` with `NAME-bzImage`, `NAME-vmlinux` and `NAME.cpio` (busybox) for each of `kinds`,
/// `tiny.cpio`, the agent as `vmm-agent`, and, if `root`, two of Debian: `debian.ext4`, a root file system, and `debian-stock.img`, a
/// disk as debootstrap makes it. Those are made once; remove them to have them made anew.
///
/// # Errors
/// A package could not be fetched, or a tool failed.
pub fn write(out: &Path, kinds: &[Kind], root: bool) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("make folder {}", out.display()))?;
    for &kind in kinds {
        let kernel = Kernel::get(kind, false)?;
        let name = kind.name();
        link(&kernel.bzimage, &out.join(format!("{name}-bzImage")))?;
        link(&kernel.vmlinux, &out.join(format!("{name}-vmlinux")))?;
        recipe(Some(kind)).write(&out.join(format!("{name}.cpio")), Compression::default())?;
    }
    let tiny = initramfs::Recipe { tiny: true, busybox: false, ..recipe(None) };
    tiny.write(&out.join("tiny.cpio"), Compression::default())?;
    programs::write_agent(&out.join("vmm-agent"))?;
    let disk = out.join("debian.ext4");
    if root && !disk.exists() {
        let source = rootfs::Source::Debian { include: ROOT_PACKAGES.map(str::to_owned).to_vec() };
        rootfs::Recipe { source, size: "1G".to_owned(), label: "root".to_owned() }.write(&disk)?;
    }
    let disk = out.join("debian-stock.img");
    if root && !disk.exists() {
        disk::write_stock(&disk)?;
    }
    Ok(())
}

fn recipe(kernel: Option<Kind>) -> initramfs::Recipe {
    let (modules, add) = (Vec::new(), Vec::new());
    initramfs::Recipe { init: None, tiny: false, kernel, modules, busybox: true, add }
}

/// Makes `at` a link to `file`, in place of what was there.
fn link(file: &Path, at: &Path) -> Result<()> {
    let _ = fs::remove_file(at);
    symlink(file, at).with_context(|| format!("link {} to {}", at.display(), file.display()))
}
