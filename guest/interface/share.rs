//! Folders of the host's, and where the kernel command line says that they are to be mounted: `vmm.share=TAG:PLACE[:ro]`, once for each.

use rustix::fs::{Mode, mkdir, stat, statfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

/// Of any FUSE file system (linux/magic.h).
const FUSE_SUPER_MAGIC: u32 = 0x6573_5546;

/// A folder, and where it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share<'a> {
    /// The virtio-fs device's.
    pub tag: &'a [u8],
    /// An absolute path.
    pub place: &'a [u8],
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
        let mut parts = value.split(|byte| *byte == b':');
        let (tag, place, how) = (parts.next()?, parts.next()?, parts.next());
        let is_one = !tag.is_empty() && place.starts_with(b"/") && matches!(how, None | Some(b"ro" | b"rw"));
        let share = Self { tag, place, read_only: how == Some(b"ro") };
        (is_one && parts.next().is_none()).then_some(share)
    }

    /// Mounts it, and makes the folders where it is to be. One that is mounted already stays.
    ///
    /// # Errors
    /// There is no such device, no driver for it, or no place.
    pub fn mount(&self) -> Result<(), Errno> {
        if self.is_mounted() {
            return Ok(());
        }
        let ends = (1..=self.place.len()).filter(|end| matches!(self.place.get(*end), None | Some(b'/')));
        for folder in ends.filter_map(|end| self.place.get(..end)) {
            // If it cannot be, the mount says so.
            let _ = mkdir(folder, Mode::from_raw_mode(0o755));
        }
        let read_only = if self.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        let flags = MountFlags::NOSUID | MountFlags::NODEV | read_only;
        mount(self.tag, self.place, c"virtiofs", flags, None)
    }

    /// A folder of the host's is there already. It may lie in another one, which is FUSE as well.
    fn is_mounted(&self) -> bool {
        let end = self.place.iter().rposition(|byte| *byte == b'/').unwrap_or(0).max(1);
        let above = self.place.get(..end).unwrap_or(b"/");
        let device = |path: &[u8]| stat(path).map(|found| found.st_dev);
        let is_fuse = statfs(self.place).is_ok_and(|found| found.f_type as u32 == FUSE_SUPER_MAGIC);
        is_fuse && device(self.place) != device(above)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn a_share_has_a_tag_and_a_place() {
        let line = b"vmm.share=a:/a vmm.share=b:/b/c:ro quiet vmm.share=c vmm.share=:/d vmm.share=e:f vmm.share=g:/g:x\n";
        let all: Vec<_> = all(line).map(|share| (share.tag, share.place, share.read_only)).collect();
        assert_eq!(all, [(&b"a"[..], &b"/a"[..], false), (b"b", b"/b/c", true)]);
        assert_eq!(super::all(b"console=hvc0 -- vmm.share=a:/a").count(), 0);
        assert_eq!(super::all(b"vmm.share=a:/a:rw\n").count(), 1);
    }
}
