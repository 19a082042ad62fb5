//! Folders and files of the host's, and where the kernel command line says that they are to be mounted: `vmm.share=TAG:PLACE[:file][:ro]`, once
//! for each.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdir, open, openat, stat, statfs, unlinkat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_remount, move_mount, open_tree,
    unmount,
};

/// Of any FUSE file system (linux/magic.h).
const FUSE_SUPER_MAGIC: u32 = 0x6573_5546;
/// Where a folder with a file is mounted for a moment: devtmpfs takes it, whatever is read-only elsewhere.
const ASIDE: &[u8] = b"/dev/.vmm-share";
/// How all of them are mounted.
const FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// A folder or a file, and where it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share<'a> {
    /// The virtio-fs device's.
    pub tag: &'a [u8],
    /// An absolute path.
    pub place: &'a [u8],
    /// It is a file. The device has a folder with it, where it is called what it is called at its place.
    pub is_file: bool,
    /// Nothing in it is to be changed. (The host sees to that; this tells programs.)
    pub read_only: bool,
}

/// Those that `line`, the text of /proc/cmdline, asks for.
pub fn all(line: &[u8]) -> impl Iterator<Item = Share<'_>> {
    let words = line.split(u8::is_ascii_whitespace).take_while(|word| *word != b"--");
    words.filter_map(|word| Share::parse(word.strip_prefix(b"vmm.share=")?))
}

impl<'a> Share<'a> {
    fn parse(value: &'a [u8]) -> Option<Self> {
        let mut parts = value.split(|byte| *byte == b':').peekable();
        let (tag, place) = (parts.next()?, parts.next()?);
        let is_file = parts.next_if_eq(&&b"file"[..]).is_some();
        let read_only = parts.next_if(|how| matches!(*how, b"ro" | b"rw")) == Some(b"ro");
        let is_one = !tag.is_empty() && place.starts_with(b"/") && parts.next().is_none();
        is_one.then_some(Self { tag, place, is_file, read_only })
    }

    /// Mounts it, and makes the folders where it is to be. One that is mounted already stays.
    ///
    /// # Errors
    /// There is no such device, no driver for it, or no place.
    pub fn mount(&self) -> Result<(), Errno> {
        if self.is_mounted() {
            return Ok(());
        }
        let (above, name) = self.parts();
        let last = if self.is_file { above.len() } else { self.place.len() };
        let ends = (1..=last).filter(|end| matches!(self.place.get(*end), None | Some(b'/')));
        for folder in ends.filter_map(|end| self.place.get(..end)) {
            // If it cannot be, the mount says so.
            let _ = mkdir(folder, Mode::from_raw_mode(0o755));
        }
        if self.is_file {
            let make = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            // What is there may be read-only: the mount says whether it will do.
            let _ = open(self.place, make, Mode::from_raw_mode(0o644));
            return with_aside(self.tag, |aside| self.move_from(&aside, name));
        }
        mount(self.tag, self.place, c"virtiofs", FLAGS, None)?;
        self.forbid_changes()
    }

    /// Mounts the file `name` of the folder `aside` at its place.
    fn move_from(&self, aside: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let file = open_tree(aside, name, flags)?;
        move_mount(file.as_fd(), c"", CWD, self.place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        self.forbid_changes()
    }

    /// Makes what is mounted at the place read-only if that is wanted: there alone, for the agent has the same folder elsewhere.
    fn forbid_changes(&self) -> Result<(), Errno> {
        let flags = MountFlags::BIND | MountFlags::RDONLY | FLAGS;
        if self.read_only { mount_remount(self.place, flags, c"") } else { Ok(()) }
    }

    /// The folder of the place, and its name there.
    fn parts(&self) -> (&'a [u8], &'a [u8]) {
        let at = self.place.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        (self.place.get(..at.max(1)).unwrap_or(b"/"), self.place.get(at + 1..).unwrap_or_default())
    }

    /// A folder or a file of the host's is there already. It may lie in another one, which is FUSE as well.
    fn is_mounted(&self) -> bool {
        let device = |path: &[u8]| stat(path).map(|found| found.st_dev);
        let is_fuse = statfs(self.place).is_ok_and(|found| found.f_type as u32 == FUSE_SUPER_MAGIC);
        is_fuse && device(self.place) != device(self.parts().0)
    }
}

/// The folder of the device `tag`, mounted where nobody sees it for as long as this is open. Whatever else it is mounted as, it can be changed
/// here as far as the host allows.
///
/// # Errors
/// There is no such device, or no driver for it.
pub fn aside(tag: &[u8]) -> Result<OwnedFd, Errno> {
    with_aside(tag, Ok)
}

/// Does `act` while the folder of the device `tag` is mounted aside.
fn with_aside<T>(tag: &[u8], act: impl FnOnce(OwnedFd) -> Result<T, Errno>) -> Result<T, Errno> {
    let _ = mkdir(ASIDE, Mode::from_raw_mode(0o700));
    let done = mount(tag, ASIDE, c"virtiofs", FLAGS, None).and_then(|()| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let done = openat(CWD, ASIDE, flags, Mode::empty()).and_then(act);
        // What is open stays.
        unmount(ASIDE, UnmountFlags::DETACH).and(done)
    });
    let _ = unlinkat(CWD, ASIDE, AtFlags::REMOVEDIR);
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn a_share_has_a_tag_and_a_place() {
        let line = b"vmm.share=a:/a vmm.share=b:/b/c:ro quiet vmm.share=c vmm.share=:/d vmm.share=e:f vmm.share=g:/g:x \
            vmm.share=h:/h/i:file vmm.share=j:/j:file:ro vmm.share=k:/k:ro:file\n";
        let all: Vec<_> =
            all(line).map(|share| (share.tag, share.place, share.is_file, share.read_only)).collect();
        let (a, b) = ((&b"a"[..], &b"/a"[..], false, false), (&b"b"[..], &b"/b/c"[..], false, true));
        assert_eq!(all, [a, b, (b"h", b"/h/i", true, false), (b"j", b"/j", true, true)]);
        assert_eq!(super::all(b"console=hvc0 -- vmm.share=a:/a").count(), 0);
        assert_eq!(super::all(b"vmm.share=a:/a:rw\n").count(), 1);
    }

    #[test]
    fn a_place_has_a_folder_and_a_name() {
        for (place, parts) in
            [(&b"/a"[..], (&b"/"[..], &b"a"[..])), (b"/a/b", (b"/a", b"b")), (b"/a/b/c.d", (b"/a/b", b"c.d"))]
        {
            assert_eq!(Share { tag: b"t", place, is_file: true, read_only: false }.parts(), parts);
        }
    }
}
