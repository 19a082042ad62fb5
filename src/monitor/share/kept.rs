//! [`Kept`]: owner, mode and kind that a guest gave a file and that its host's cannot have, in an extended attribute of it. The form is that
//! of containers' tools (containers/storage, `user.containers.override_stat`), which read it as well.

use std::ffi::CStr;
use std::fmt::Write as _;

use rustix::fs::{FileType, Statx, XattrFlags, getxattr, removexattr, setxattr};
use rustix::io::Errno;

/// What it is kept in. No guest reads or writes it by that name.
pub const NAME: &CStr = c"user.containers.override_stat";

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    pub uid: u32,
    pub gid: u32,
    /// Without the kind.
    pub mode: u32,
    pub kind: FileType,
    /// Of a device's kind: major and minor number.
    pub device: (u32, u32),
}

impl Kept {
    /// What a guest sees of a file.
    pub fn of(seen: &Statx) -> Self {
        Self {
            uid: seen.stx_uid,
            gid: seen.stx_gid,
            mode: u32::from(seen.stx_mode) & 0o7777,
            kind: FileType::from_raw_mode(seen.stx_mode.into()),
            device: (seen.stx_rdev_major, seen.stx_rdev_minor),
        }
    }

    /// What is kept of the file at `path`, if anything is.
    ///
    /// # Errors
    /// As getxattr(2) has them. EOPNOTSUPP: nothing can be, there.
    pub fn read(path: &str) -> Result<Option<Self>, Errno> {
        let mut text = [0; 64];
        match getxattr(path, NAME, &mut text[..]) {
            Ok(len) => Ok(text.get(..len).and_then(|text| Self::parse(str::from_utf8(text).ok()?))),
            Err(Errno::NODATA) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (uid, gid) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let mode = u32::from_str_radix(parts.next()?, 8).ok()? & 0o7777;
        let mut kind = parts.next().unwrap_or("file").split('-');
        let (name, mut number) = (kind.next()?, || kind.next()?.parse().ok());
        let (kind, device) = match name {
            "dir" => (FileType::Directory, (0, 0)),
            "symlink" => (FileType::Symlink, (0, 0)),
            "pipe" => (FileType::Fifo, (0, 0)),
            "socket" => (FileType::Socket, (0, 0)),
            "char" => (FileType::CharacterDevice, (number()?, number()?)),
            "block" => (FileType::BlockDevice, (number()?, number()?)),
            _ => (FileType::RegularFile, (0, 0)),
        };
        Some(Self { uid, gid, mode, kind, device })
    }

    fn text(&self) -> String {
        let Self { uid, gid, mode, kind, device: (major, minor) } = self;
        let mut text = format!("{uid}:{gid}:{mode:o}:");
        // A text takes what is written to it.
        let _ = match kind {
            FileType::Directory => write!(text, "dir"),
            FileType::Symlink => write!(text, "symlink"),
            FileType::Fifo => write!(text, "pipe"),
            FileType::Socket => write!(text, "socket"),
            FileType::CharacterDevice => write!(text, "char-{major}-{minor}"),
            FileType::BlockDevice => write!(text, "block-{major}-{minor}"),
            _ => write!(text, "file"),
        };
        text
    }

    /// Keeps it for the file at `path`.
    ///
    /// # Errors
    /// As setxattr(2) has them.
    pub fn write(&self, path: &str) -> Result<(), Errno> {
        setxattr(path, NAME, self.text().as_bytes(), XattrFlags::empty())
    }

    /// Keeps nothing for the file at `path`.
    ///
    /// # Errors
    /// As removexattr(2) has them.
    pub fn remove(path: &str) -> Result<(), Errno> {
        match removexattr(path, NAME) {
            Err(Errno::NODATA) => Ok(()),
            result => result,
        }
    }

    /// Has `seen`, a host's file as a guest would see it without, be so. The kind is kept of a regular file alone: a folder is one.
    pub fn apply(&self, seen: &mut Statx) {
        (seen.stx_uid, seen.stx_gid) = (self.uid, self.gid);
        let own = FileType::from_raw_mode(seen.stx_mode.into());
        let kind = match (own, self.kind) {
            (FileType::RegularFile, FileType::Directory | FileType::Symlink) => own,
            (FileType::RegularFile, kind) => kind,
            _ => own,
        };
        seen.stx_mode = (kind.as_raw_mode() | self.mode) as u16;
        if kind != own {
            (seen.stx_rdev_major, seen.stx_rdev_minor) = self.device;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_reads_back_and_so_does_what_others_wrote() {
        let kept = |kind, device| Kept { uid: 5, gid: 6, mode: 0o4755, kind, device };
        for (text, kept) in [
            ("5:6:4755:file", kept(FileType::RegularFile, (0, 0))),
            ("5:6:4755:dir", kept(FileType::Directory, (0, 0))),
            ("5:6:4755:pipe", kept(FileType::Fifo, (0, 0))),
            ("5:6:4755:socket", kept(FileType::Socket, (0, 0))),
            ("5:6:4755:char-1-3", kept(FileType::CharacterDevice, (1, 3))),
            ("5:6:4755:block-8-17", kept(FileType::BlockDevice, (8, 17))),
        ] {
            assert_eq!((Kept::parse(text), kept.text()), (Some(kept), text.to_owned()));
        }
        assert_eq!(Kept::parse("5:6:04755"), Some(kept(FileType::RegularFile, (0, 0))));
        for bad in ["", "5", "5:6", "5:6:x", "-1:6:755", "5:6:755:char", "5:6:755:char-1", "5:6:755:char-1-x"]
        {
            assert_eq!(Kept::parse(bad), None, "{bad}");
        }
    }
}
