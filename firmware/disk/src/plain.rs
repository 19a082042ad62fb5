//! A system without boot loader: kernels in /boot, and Debian's symlinks /vmlinuz and /initrd.img to the one to boot.

use crate::entries::{Entries, Entry, order};
use crate::text::Text;
use crate::volume::{Kind, Volume};
use crate::{Error, Result};

/// The kernel's and initrd's names in /boot, around the version.
const KERNEL: &[u8] = b"vmlinuz-";
const INITRDS: [(&[u8], &[u8]); 3] = [(b"initrd.img-", b""), (b"initramfs-", b".img"), (b"initrd-", b"")];
/// The most versions that are looked at.
const MAX_KERNELS: usize = 256;

/// What a root file system has.
const ROOT: [&[u8]; 3] = [b"/etc/os-release", b"/usr/lib/os-release", b"/etc/fstab"];

/// Adds the kernels of a volume, the newest first; the symlink's is the default.
///
/// # Errors
/// There is none.
pub fn read(volumes: &[Option<Volume>], at: usize, scratch: &mut [u8], entries: &mut Entries) -> Result<()> {
    let Some(Some(volume)) = volumes.get(at) else { return Err(Error::Missing) };
    // Where /boot is a file system of its own, the root is another. It may be one that cannot be read here:
    // then the initrd has to find it.
    let is_root = |volume: &&Volume| ROOT.iter().any(|path| volume.find(path).is_ok());
    let own = volume.find(b"/boot").is_ok_and(|node| node.kind == Kind::Folder);
    let root = if own { Some(volume) } else { volumes.iter().flatten().find(is_root) };
    let options = options(root, scratch)?;
    let mut found = false;
    for folder in [&b"/boot"[..], b"/"] {
        let Ok(node) = volume.find(folder) else { continue };
        let mut count = 0;
        volume.list(&node, &mut |name, _| {
            if let Some(version) = name.strip_prefix(KERNEL)
                && let Ok(entry) = versioned(volume, folder, version, options)
            {
                entries.insert(entry, order);
                (found, count) = (true, count + 1);
            }
            count >= MAX_KERNELS
        })?;
    }
    for (kernel, initrd) in [("/vmlinuz", "/initrd.img"), ("/boot/vmlinuz", "/boot/initrd.img")] {
        if let Ok(target) = volume.link(kernel.as_bytes()) {
            let name = target.bytes().rsplit(|byte| *byte == b'/').next().unwrap_or_default();
            let version = name.strip_prefix(KERNEL).unwrap_or_default();
            if let Some(at) = entries.all().iter().position(|entry| entry.version.bytes() == version) {
                entries.default = at;
                return Ok(());
            }
        }
        if !found && volume.find(kernel.as_bytes()).is_ok() {
            let mut entry = Entry { options, volume: usize::MAX, ..Entry::default() };
            entry.linux = Text::whole(kernel.as_bytes())?;
            entry.id = Text::clipped(b"vmlinuz");
            if volume.find(initrd.as_bytes()).is_ok() {
                entry.add_initrd(initrd.as_bytes())?;
            }
            entries.push(entry);
            return Ok(());
        }
    }
    if found { Ok(()) } else { Err(Error::Missing) }
}

fn versioned(volume: &Volume, folder: &[u8], version: &[u8], options: Text<1024>) -> Result<Entry> {
    let mut entry = Entry { options, volume: usize::MAX, ..Entry::default() };
    entry.version = Text::clipped(version);
    entry.id = Text::clipped(version);
    entry.title = Text::clipped(b"Linux");
    entry.linux = path(folder, &[KERNEL, version])?;
    for (before, after) in INITRDS {
        let initrd: Text<192> = path(folder, &[before, version, after])?;
        if volume.find(initrd.bytes()).is_ok() {
            entry.add_initrd(initrd.bytes())?;
            break;
        }
    }
    Ok(entry)
}

fn path(folder: &[u8], parts: &[&[u8]]) -> Result<Text<192>> {
    let mut path = Text::whole(folder)?;
    path.push(b"/")?;
    parts.iter().try_for_each(|part| path.push(part))?;
    Ok(path)
}

/// The /etc/kernel/cmdline of the root, where kernel-install has it, else that the root is this file system.
fn options(root: Option<&Volume>, scratch: &mut [u8]) -> Result<Text<1024>> {
    let mut options = Text::EMPTY;
    let Some(volume) = root else { return Ok(options) };
    if let Ok(text) = volume.read_file(b"/etc/kernel/cmdline", scratch) {
        text.split(u8::is_ascii_whitespace).try_for_each(|word| options.push_word(word))?;
    }
    if options.is_empty() {
        options.push(b"root=UUID=")?;
        options.push(volume.uuid().bytes())?;
        options.push(b" ro")?;
    }
    Ok(options)
}
