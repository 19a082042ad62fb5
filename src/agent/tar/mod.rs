//! Tar streams as files travel in them: POSIX pax archives, with hard links, sparse files, extended attributes and times to the
//! nanosecond, which GNU tar and others read and write, too.
//!
//! Who unpacks does not trust the archive: nothing is made outside of the folder that was named, whatever links and names it has.

mod header;
mod pack;
mod unpack;

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub use pack::pack;
pub use unpack::{Policy, unpack};

/// A block; archives are made of them.
const BLOCK: usize = 512;

/// Why an archive was not made or unpacked, or not wholly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, or what should become one.
    #[error("cannot {what} {}: {}", path.display(), no_number(error))]
    File {
        /// What was tried.
        what: &'static str,
        /// With it.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The stream itself.
    #[error("cannot {} the archive: {}", .0, no_number(.1))]
    Stream(&'static str, io::Error),
    /// What is read is no archive, or one with what is not known here.
    #[error("this is no tar archive that can be unpacked: {0}")]
    Format(&'static str),
    /// It has no end.
    #[error("the archive ends too soon")]
    Cut,
    /// Where it should go.
    #[error("cannot copy to {}: {what}", path.display())]
    Target {
        /// The place.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// All else was done.
    #[error("{} {what}", path.display())]
    Left {
        /// The first of those.
        path: PathBuf,
        /// What came of it.
        what: &'static str,
    },
}

/// An error in words: its number is the system's, which may be another one's.
fn no_number(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.clone(), |(words, _)| words.to_owned())
}

fn path_of(bytes: &[u8]) -> PathBuf {
    Path::new(std::ffi::OsStr::from_bytes(bytes)).to_owned()
}

/// The zeros that fill a block after `size` bytes.
fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}

#[cfg(test)]
mod tests;
