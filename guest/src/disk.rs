//! A disk as a machine of its own has it: GPT, a small Debian in an ext4 partition, and in that an installed stock kernel with
//! its initrd, which Debian's symlinks /vmlinuz and /initrd.img name. There is no boot loader: the firmware reads these.
//!
//! [`write()`] makes one with our init and a shell; [`write_stock`] one that debootstrap alone has made.

use crate::cache::Cache;
use crate::debian;
use crate::rootfs;
use crate::run::Tool;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What makes a Debian bootable.
const PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "initramfs-tools"];
/// What the initrd has to load, whatever udev finds: the disk.
const MODULES: &str = "virtio_mmio\nvirtio_blk\next4\n";
const CMDLINE: &str = "root=LABEL=root ro\n";
/// What makes a Debian that boots to a login prompt: the kernel brings its initrd's maker, and that udev.
const STOCK: [&str; 2] = ["linux-image-cloud-amd64", "systemd-sysv"];
/// Enough for Debian, its kernel, and one more after an update.
pub const MIB: u64 = 1536;
/// Where the partition begins, in MiB.
const START: u64 = 1;
/// What the backup of the partition table needs at the end, in MiB.
const END: u64 = 1;

/// Writes a disk of `mib` MiB with these packages more to `out`, by way of a temporary file beside it. It is sparse.
///
/// # Errors
/// Not root, a tool failed, or it is too small.
pub fn write(out: &Path, mib: u64, include: &[String]) -> Result<()> {
    debian::ensure_installed(&["e2fsprogs", "fdisk"])?;
    let packages: Vec<String> =
        PACKAGES.iter().map(|name| (*name).to_owned()).chain(include.iter().cloned()).collect();
    let archive = rootfs::debian_archive(&packages)?;
    let cache = Cache::open("unpacked")?;
    let work = cache.workplace()?;
    let root = work.path().join("root");
    fs::create_dir(&root)?;
    rootfs::unarchive(&archive, &root)?;
    rootfs::add_init(&root)?;
    fs::write(root.join("etc/initramfs-tools/modules"), MODULES)?;
    // Only these, in place of every driver that a PC may need.
    fs::write(root.join("etc/initramfs-tools/conf.d/guest"), "MODULES=list\n")?;
    fs::create_dir_all(root.join("etc/kernel"))?;
    fs::write(root.join("etc/kernel/cmdline"), CMDLINE)?;
    Tool::as_root("chroot")
        .arg(&root)
        .args(["update-initramfs", "-u", "-k", "all"])
        .quiet()
        .context("make the initrd")?;
    partitioned(&root, out, mib)
}

/// Writes a disk with what debootstrap installs by itself, nothing added or changed: Debian's kernel, initrd
/// and systemd.
///
/// # Errors
/// As [`write()`].
pub fn write_stock(out: &Path) -> Result<()> {
    debian::ensure_installed(&["e2fsprogs", "fdisk"])?;
    let archive = rootfs::debian_archive(&STOCK.map(str::to_owned))?;
    let cache = Cache::open("unpacked")?;
    let work = cache.workplace()?;
    let root = work.path().join("root");
    fs::create_dir(&root)?;
    rootfs::unarchive(&archive, &root)?;
    partitioned(&root, out, MIB)
}

/// Writes a disk of `mib` MiB whose only partition is an ext4 with what is in `root`.
fn partitioned(root: &Path, out: &Path, mib: u64) -> Result<()> {
    let beside = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let image = tempfile::Builder::new().suffix(".disk").tempfile_in(beside)?;
    image.as_file().set_len(mib << 20)?;
    let size = mib.checked_sub(START + END).context("a disk needs more than 2 MiB")?;
    Tool::new("sfdisk")
        .arg("-q")
        .arg(image.path())
        .filter(format!("label: gpt\nstart={START}MiB,size={size}MiB,type=L\n").as_bytes())
        .context("make the partition table")?;
    Tool::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", "root", "-d"])
        .arg(root)
        .args([
            "-E",
            &format!("offset={},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", START << 20),
        ])
        .arg(image.path())
        .arg(format!("{size}M"))
        .quiet()
        .with_context(|| format!("fill {size} MiB with Debian and a kernel (a larger --size?)"))?;
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o644))?;
    image.persist(out).with_context(|| format!("write {}", out.display()))?;
    Ok(())
}
