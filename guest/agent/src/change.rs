//! What others than this guest have changed in a folder of the host's: asked for by an ioctl of the folder, one after the other, and done once
//! more here, which changes nothing there (docs/share.md). The guest's kernel then tells of it who has asked by inotify(7).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, chmodat, mkdirat, mknodat, open, renameat, stat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, ioctl, opcode};

/// Bytes of an answer.
const ROOM: usize = 8192;
const NEXT_CHANGE: Opcode = opcode::read::<[u8; ROOM]>(b'v', 1);

/// What has become of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// There is other data in it.
    Data,
    /// Its owner, mode or times.
    Attributes,
    /// Who had it open for writing has closed it.
    Written,
    Made,
    Removed,
    Moved,
}

/// What is to be done once more.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    pub kind: Kind,
    /// Of the file, with its type.
    pub mode: u32,
    /// Below the folder.
    pub path: OsString,
    /// Where it is now, if it was moved.
    pub to: OsString,
}

impl Change {
    /// The next in `folder`, the root of what is shared, if there is another.
    ///
    /// # Errors
    /// ENOTTY, ENOSYS: who serves the folder has no such request. EBUSY: another process asks. Or what its host said.
    pub fn next(folder: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        // SAFETY: NEXT_CHANGE writes at most as many bytes as its number says.
        let told = unsafe { ioctl(folder, Getter::<NEXT_CHANGE, [u8; ROOM]>::new()) }?;
        Self::parse(&told).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// None if it makes no sense.
    fn parse(told: &[u8]) -> Option<Option<Self>> {
        let word = |index: usize| Some(u32::from_le_bytes(*told.get(4 * index..)?.first_chunk()?));
        let kind = match word(0)? {
            0 => return Some(None),
            1 => Kind::Data,
            2 => Kind::Attributes,
            3 => Kind::Written,
            4 => Kind::Made,
            5 => Kind::Removed,
            6 => Kind::Moved,
            _ => return None,
        };
        let (path, rest) = told.get(16..)?.split_at_checked(word(2)? as usize)?;
        let to = rest.get(..word(3)? as usize)?;
        let text = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        Some(Some(Self { kind, mode: word(1)?, path: text(path), to: text(to) }))
    }

    /// Does it once more below `folder`. If the guest's kernel refuses, nobody hears of it.
    pub fn repeat(&self, folder: BorrowedFd<'_>) {
        let below = |path: &OsStr| {
            let mut full = OsString::from(format!("/proc/self/fd/{}/", folder.as_fd().as_raw_fd()));
            full.push(path);
            full
        };
        let (path, to) = (below(&self.path), below(&self.to));
        let kind = FileType::from_raw_mode(self.mode);
        let mode = Mode::from_raw_mode(self.mode & 0o7777);
        let is_file = kind == FileType::RegularFile;
        let attributes = || match kind {
            FileType::Symlink => Ok(()),
            _ => chmodat(CWD, &path, mode, AtFlags::empty()),
        };
        let _ = match self.kind {
            Kind::Data if is_file => stat(&path).and_then(|stat| {
                let same = nix::unistd::truncate(&*path, stat.st_size);
                same.map_err(|error| Errno::from_raw_os_error(error as i32))
            }),
            Kind::Written if is_file => {
                open(&path, OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).map(drop)
            }
            Kind::Data | Kind::Written => Ok(()),
            Kind::Attributes => attributes(),
            Kind::Made => {
                let made = match kind {
                    FileType::Directory => mkdirat(CWD, &path, mode),
                    FileType::Symlink => symlinkat("-", CWD, &path),
                    _ => mknodat(CWD, &path, kind, mode, 0),
                };
                // The guest has seen it a moment ago.
                made.or_else(|_| attributes())
            }
            Kind::Removed => {
                let flags = if kind == FileType::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                unlinkat(CWD, &path, flags)
            }
            Kind::Moved => renameat(CWD, &path, CWD, &to),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_change_or_none_or_makes_no_sense() {
        let told = |words: [u32; 4], rest: &[u8]| {
            let mut all: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            all.extend(rest);
            Change::parse(&all)
        };
        assert_eq!(told([0; 4], b""), Some(None));
        let moved = Change { kind: Kind::Moved, mode: 0o100_644, path: "a/b".into(), to: "c".into() };
        assert_eq!(told([6, 0o100_644, 3, 1], b"a/bc..."), Some(Some(moved)));
        for bad in [[7, 0, 0, 0], [1, 0, 8, 0], [6, 0, 3, 2], [1, 0, u32::MAX, 0]] {
            assert_eq!(told(bad, b"a/bc"), None, "{bad:?}");
        }
        assert_eq!(Change::parse(&[1, 0, 0, 0, 1]), None);
    }
}
