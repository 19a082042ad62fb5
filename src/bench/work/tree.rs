//! Work in a folder of small files: what programs do that people run in theirs, call by call, without what else they do.

use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

/// Files of each folder.
const IN_EACH: u64 = 32;
/// Bytes of a file.
const LEN: usize = 2048;
const PAGE: usize = 4096;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `tar x`: makes each file, writes it, sets its mode and time.
    Unpack,
    /// `git status`: each file by its path, in order, then what each folder has.
    Status,
    /// `find -size`: what each folder has, and each of that.
    Find,
    /// `cat`: each file opened and read.
    Cat,
    /// `rm -r`.
    Remove,
    /// Pages of one file by a mapping, in order.
    Map,
}

impl Act {
    /// All, by their names in a step.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Unpack, "unpack"),
        (Self::Status, "status"),
        (Self::Find, "find"),
        (Self::Cat, "cat"),
        (Self::Remove, "remove"),
        (Self::Map, "map"),
    ];

    /// As in a step.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(act, _)| *act == self).map_or("", |(_, name)| name)
    }

    /// Does it with `count` files (or pages) at `path`. Returns something that depends on all of them.
    pub fn run(self, count: u64, path: &Path) -> io::Result<u64> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let done = match self {
            Self::Unpack => unpack(count, path),
            Self::Status => status(count, path),
            Self::Find => find(path),
            Self::Cat => cat(count, path),
            Self::Remove => remove(path),
            Self::Map => map(count, path),
        };
        done.map_err(named)
    }
}

fn folder(path: &Path, number: u64) -> PathBuf {
    path.join(format!("d{number:03}"))
}

fn file(path: &Path, number: u64) -> PathBuf {
    folder(path, number / IN_EACH).join(format!("f{number:05}"))
}

fn unpack(count: u64, path: &Path) -> io::Result<u64> {
    fs::create_dir(path)?;
    let time = FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000));
    for number in 0..count {
        if number % IN_EACH == 0 {
            fs::create_dir(folder(path, number / IN_EACH))?;
        }
        let mut made = File::create_new(file(path, number))?;
        made.write_all(&[number as u8; LEN])?;
        made.set_permissions(Permissions::from_mode(0o640))?;
        made.set_times(time)?;
    }
    Ok(count)
}

fn status(count: u64, path: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for number in 0..count {
        bytes += fs::symlink_metadata(file(path, number))?.len();
    }
    for entry in fs::read_dir(path)? {
        bytes += fs::read_dir(entry?.path())?.count() as u64;
    }
    Ok(bytes)
}

fn find(path: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    let mut left = vec![path.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let found = entry.metadata()?;
            if found.is_dir() {
                left.push(entry.path());
            } else {
                bytes += found.len();
            }
        }
    }
    Ok(bytes)
}

fn cat(count: u64, path: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for number in 0..count {
        let data = fs::read(file(path, number))?;
        sum += data.len() as u64 + u64::from(data.first().copied().unwrap_or_default());
    }
    Ok(sum)
}

fn remove(path: &Path) -> io::Result<u64> {
    let mut removed = 0;
    for folder in fs::read_dir(path)? {
        let folder = folder?.path();
        for entry in fs::read_dir(&folder)? {
            fs::remove_file(entry?.path())?;
            removed += 1;
        }
        fs::remove_dir(folder)?;
    }
    fs::remove_dir(path)?;
    Ok(removed)
}

/// Mapped anew when all of it has been read.
fn map(count: u64, path: &Path) -> io::Result<u64> {
    let len = fs::metadata(path)?.len() as usize / PAGE * PAGE;
    if len == 0 {
        return Err(io::Error::other(format!("less than {PAGE} bytes")));
    }
    let (mut sum, mut left) = (0, count as usize);
    while left > 0 {
        let file = Some(FileOffset::new(File::open(path)?, 0));
        let mapped = MmapRegion::<()>::build(file, len, libc::PROT_READ, libc::MAP_SHARED);
        let mapped = mapped.map_err(io::Error::other)?;
        let pages = left.min(len / PAGE);
        for page in 0..pages {
            let mut byte = [0u8];
            mapped.get_slice(page * PAGE, 1).map_err(io::Error::other)?.copy_to(&mut byte);
            sum += u64::from(byte[0]);
        }
        left -= pages;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unpacked_is_found_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tree");
        let does = |act: Act| act.run(70, &path).unwrap();
        assert_eq!(does(Act::Unpack), 70);
        assert_eq!(does(Act::Status), 70 * 2048 + 70);
        assert_eq!(does(Act::Find), 70 * 2048);
        assert_eq!(does(Act::Cat), (0..70).sum::<u64>() + 70 * 2048);
        assert_eq!(does(Act::Remove), 70);
        assert!(!path.exists());
        fs::write(&path, vec![3; 8192]).unwrap();
        assert_eq!(Act::Map.run(5, &path).unwrap(), 15);
        fs::write(&path, "short").unwrap();
        assert!(Act::Map.run(3, &path).is_err() && Act::Find.run(1, &path.join("none")).is_err());
    }
}
