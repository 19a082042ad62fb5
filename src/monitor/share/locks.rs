//! [`Locks`]: locks of the guest's programs on parts of files, held here, so that the host's programs and other guests see them.
//!
//! Each program of the guest that locks a file has an open file description of its own for it, whose locks (`F_OFD_SETLK`, fcntl(2)) are that
//! program's: the host's kernel knows who is in whose way, and closing it unlocks all.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Programs that have locks, a descriptor each.
const OWNERS_MOST: usize = 1024;
/// Parts of a file that one has.
const RANGES_MOST: usize = 1024;
/// Where all files end (OFFSET_MAX).
const END: u64 = i64::MAX as u64;

/// What a part of a file is locked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Many at a time.
    Read,
    /// One alone.
    Write,
}

/// A part of a file, its last byte included, and how it is locked; by nobody if that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    pub start: u64,
    pub end: u64,
    pub kind: Option<Kind>,
}

/// A file and a program of the guest's.
pub type Owner = (u64, u64);

/// [`Locks`] without what the host has of them: for each owner, the handle and the parts.
pub type Saved = Vec<(Owner, u64, Vec<(u64, u64, Kind)>)>;

#[derive(Debug)]
struct Held {
    file: OwnedFd,
    /// By which the guest locked the last.
    handle: u64,
    /// None in another.
    ranges: Vec<(u64, u64, Kind)>,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Locks(BTreeMap<Owner, Held>);

impl Lock {
    /// # Errors
    /// EINVAL: there is no such part, or lock.
    pub fn new(start: u64, end: u64, kind: u32) -> Result<Self, Errno> {
        let kind = match kind.cast_signed() {
            libc::F_RDLCK => Some(Kind::Read),
            libc::F_WRLCK => Some(Kind::Write),
            libc::F_UNLCK => None,
            _ => return Err(Errno::INVAL),
        };
        if start > end || end > END { Err(Errno::INVAL) } else { Ok(Self { start, end, kind }) }
    }

    /// `l_type`
    pub fn number(&self) -> u32 {
        (match self.kind {
            Some(Kind::Read) => libc::F_RDLCK,
            Some(Kind::Write) => libc::F_WRLCK,
            None => libc::F_UNLCK,
        }) as u32
    }

    fn for_host(&self) -> libc::flock {
        let len = if self.end == END { 0 } else { self.end - self.start + 1 };
        libc::flock {
            l_type: self.number() as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start.cast_signed(),
            l_len: len.cast_signed(),
            l_pid: 0,
        }
    }
}

fn host(result: nix::Result<i32>) -> Result<(), Errno> {
    result.map(drop).map_err(|error| Errno::from_raw_os_error(error as i32))
}

impl Locks {
    /// Whether there is a descriptor for `owner`.
    pub fn has(&self, owner: Owner) -> bool {
        self.0.contains_key(&owner)
    }

    /// The lock that is in the way of `lock`, if any is. `file` is the file where this owner has none.
    ///
    /// # Errors
    /// As fcntl(2) has them.
    pub fn in_the_way(&self, owner: Owner, lock: Lock, file: Option<OwnedFd>) -> Result<Option<Lock>, Errno> {
        let mut asked = lock.for_host();
        let held = self.0.get(&owner).map(|held| &held.file);
        let file = held.or(file.as_ref()).ok_or(Errno::NOLCK)?;
        host(fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked)))?;
        let start = asked.l_start.cast_unsigned();
        let end = if asked.l_len == 0 { END } else { start + asked.l_len.cast_unsigned() - 1 };
        let other = Lock::new(start, end, asked.l_type as u32)?;
        Ok(other.kind.is_some().then_some(other))
    }

    /// Locks or unlocks a part of a file, which the guest has open as `handle`, and is `file` where this owner has none.
    ///
    /// # Errors
    /// EAGAIN: another has it. ENOLCK: there are too many. Or as fcntl(2) has them.
    pub fn set(&mut self, owner: Owner, handle: u64, lock: Lock, file: Option<OwnedFd>) -> Result<(), Errno> {
        if let (false, Some(file)) = (self.has(owner), file) {
            if self.0.len() >= OWNERS_MOST {
                return Err(Errno::NOLCK);
            }
            self.0.insert(owner, Held { file, handle, ranges: Vec::new() });
        }
        // Nothing is unlocked by who has no locks.
        let Some(held) = self.0.get_mut(&owner) else { return Ok(()) };
        let ranges = with(&held.ranges, lock);
        let done = match ranges.len() {
            0..=RANGES_MOST => host(fcntl(&held.file, FcntlArg::F_OFD_SETLK(&lock.for_host()))),
            _ => Err(Errno::NOLCK),
        };
        if done.is_ok() {
            (held.handle, held.ranges) = (handle, ranges);
        }
        if held.ranges.is_empty() {
            self.0.remove(&owner);
        }
        done
    }

    /// A program of the guest's closes a file, and with it its locks.
    pub fn drop_all(&mut self, owner: Owner) {
        self.0.remove(&owner);
    }

    /// The guest has `handle` open no more. Of locks that belong to what is open, and not to a program (fcntl(2)), it tells no more than that;
    /// a program's are gone by then.
    pub fn closed(&mut self, handle: u64) {
        self.0.retain(|_, held| held.handle != handle);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn save(&self) -> Saved {
        self.0.iter().map(|(owner, held)| (*owner, held.handle, held.ranges.clone())).collect()
    }
}

/// What is locked when `lock` is, too.
fn with(ranges: &[(u64, u64, Kind)], lock: Lock) -> Vec<(u64, u64, Kind)> {
    let mut all = Vec::with_capacity(ranges.len() + 2);
    for &(start, end, kind) in ranges {
        if start < lock.start {
            all.push((start, end.min(lock.start - 1), kind));
        }
        if end > lock.end {
            all.push((start.max(lock.end + 1), end, kind));
        }
    }
    all.extend(lock.kind.map(|kind| (lock.start, lock.end, kind)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_part_is_unlocked_or_locked_otherwise() {
        let lock = |start, end, kind| Lock { start, end, kind };
        let first = with(&[], lock(10, 19, Some(Kind::Write)));
        assert_eq!(first, [(10, 19, Kind::Write)]);
        let inner = [(10, 12, Kind::Write), (16, 19, Kind::Write)];
        assert_eq!(with(&first, lock(13, 15, None)), inner);
        assert_eq!(
            with(&first, lock(13, 15, Some(Kind::Read))),
            [&inner[..], &[(13, 15, Kind::Read)]].concat()
        );
        assert_eq!(with(&first, lock(0, END, None)), []);
        assert_eq!(with(&first, lock(0, 9, None)), first);
        assert_eq!(with(&first, lock(0, 10, None)), [(11, 19, Kind::Write)]);
        assert_eq!(with(&first, lock(19, END, None)), [(10, 18, Kind::Write)]);
        for bad in [(2, 1, 0), (0, u64::MAX, 0), (0, 1, 3)] {
            assert_eq!(Lock::new(bad.0, bad.1, bad.2), Err(Errno::INVAL));
        }
    }
}
