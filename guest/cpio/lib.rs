//! Writes "newc" cpio archives, the format of an initramfs (kernel documentation, driver-api/early-userspace/buffer-format).
//! Called by `vmm bench` and by the guest builder. Reproducible: entries are sorted by path, times are 0, owner is root,
//! inode numbers count up.

use std::collections::BTreeMap;
use std::io::{self, Write};

/// What an entry is. Permission bits are the low 12 of a mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A regular file and its content.
    File {
        /// Permission bits.
        mode: u32,
        /// Content.
        data: Vec<u8>,
    },
    /// A directory.
    Directory {
        /// Permission bits.
        mode: u32,
    },
    /// A symbolic link to this target.
    Symlink(String),
    /// A character device.
    CharDevice {
        /// Permission bits.
        mode: u32,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// Why an entry was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Paths are relative to the archive's root and without `.`, `..` or empty parts.
    #[error("not a plain path inside of an archive: {0:?}")]
    Path(String),
    /// A path is a directory and something else.
    #[error("{0:?} is in the archive twice, with different kinds")]
    Conflict(String),
    /// The format has 32 bits for a file's size.
    #[error("{0:?} is larger than a cpio archive can hold (4 GiB)")]
    TooLarge(String),
}

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry at `path` (a leading `/` is ignored) and the directories above it. A later file or link replaces
    /// an earlier one.
    pub fn add(&mut self, path: &str, entry: Entry) -> Result<(), Error> {
        let path = path.strip_prefix('/').unwrap_or(path);
        if path.is_empty()
            || path.contains('\0')
            || path.split('/').any(|part| matches!(part, "" | "." | ".."))
        {
            return Err(Error::Path(path.to_owned()));
        }
        if let Entry::File { data, .. } = &entry
            && u32::try_from(data.len()).is_err()
        {
            return Err(Error::TooLarge(path.to_owned()));
        }
        for (at, _) in path.match_indices('/') {
            let above = self.entries.entry(path[..at].to_owned()).or_insert(Entry::Directory { mode: 0o755 });
            if !matches!(above, Entry::Directory { .. }) {
                return Err(Error::Conflict(path[..at].to_owned()));
            }
        }
        let is_directory = |entry: &Entry| matches!(entry, Entry::Directory { .. });
        match self.entries.get(path) {
            Some(old) if is_directory(old) != is_directory(&entry) => Err(Error::Conflict(path.to_owned())),
            _ => {
                self.entries.insert(path.to_owned(), entry);
                Ok(())
            }
        }
    }

    /// The number of entries, directories included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Writes the whole archive with its trailer, padded to 4 bytes.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        // Sorted order puts each directory before what is in it, as the kernel needs it.
        for (inode, (path, entry)) in self.entries.iter().enumerate() {
            let (kind, mode, data, device): (u32, u32, &[u8], (u32, u32)) = match entry {
                Entry::File { mode, data } => (0o100_000, *mode, data, (0, 0)),
                Entry::Directory { mode } => (0o040_000, *mode, &[], (0, 0)),
                Entry::Symlink(target) => (0o120_000, 0o777, target.as_bytes(), (0, 0)),
                Entry::CharDevice { mode, major, minor } => (0o020_000, *mode, &[], (*major, *minor)),
            };
            let links = if kind == 0o040_000 { 2 } else { 1 };
            write_entry(&mut out, path, inode as u32 + 1, kind | (mode & 0o7777), links, data, device)?;
        }
        write_entry(&mut out, "TRAILER!!!", 0, 0, 1, &[], (0, 0))?;
        out.flush()
    }
}

/// One header of 13 hexadecimal fields, the name and the data, each padded to 4 bytes.
fn write_entry(
    out: &mut impl Write,
    path: &str,
    inode: u32,
    mode: u32,
    links: u32,
    data: &[u8],
    (major, minor): (u32, u32),
) -> io::Result<()> {
    const HEADER: usize = 6 + 13 * 8;
    const PADDING: [u8; 3] = [0; 3];
    let padding = |length: usize| &PADDING[..length.wrapping_neg() % 4];
    let name_size = path.len() + 1;
    write!(
        out,
        "070701{inode:08x}{mode:08x}{uid:08x}{gid:08x}{links:08x}{mtime:08x}{size:08x}\
         {dev_major:08x}{dev_minor:08x}{major:08x}{minor:08x}{name_size:08x}{check:08x}",
        uid = 0,
        gid = 0,
        mtime = 0,
        size = data.len(),
        dev_major = 0,
        dev_minor = 0,
        check = 0,
    )?;
    out.write_all(path.as_bytes())?;
    out.write_all(&[0])?;
    out.write_all(padding(HEADER + name_size))?;
    out.write_all(data)?;
    out.write_all(padding(data.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(data: &[u8]) -> Entry {
        Entry::File { mode: 0o644, data: data.to_vec() }
    }

    #[test]
    fn the_order_of_adding_does_not_show() {
        let write = |paths: &[&str]| {
            let mut archive = Archive::new();
            for path in paths {
                archive.add(path, file(path.trim_start_matches('/').as_bytes())).unwrap();
            }
            let mut bytes = Vec::new();
            archive.write(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(write(&["b/c", "a", "b/a"]), write(&["a", "/b/a", "b/c"]));
        assert_eq!(write(&["x"]).len() % 4, 0);
    }

    #[test]
    fn paths_stay_inside_and_kinds_do_not_clash() {
        let mut archive = Archive::new();
        for path in ["", "/", "..", "a/../b", "a//b", "./a", "a/", "//a"] {
            assert!(matches!(archive.add(path, file(b"")), Err(Error::Path(_))), "{path}");
        }
        archive.add("a/b", file(b"")).unwrap();
        assert!(matches!(archive.add("a", file(b"")), Err(Error::Conflict(_))));
        assert!(matches!(archive.add("a/b/c", file(b"")), Err(Error::Conflict(_))));
        archive.add("a", Entry::Directory { mode: 0o700 }).unwrap();
        assert_eq!(archive.len(), 2);
    }
}
