//! What a disk's content means to who boots from it: partitions, file systems, boot entries, the kernel's header.
//!
//! Everything here reads what a guest may have written, so it is pure and total: no panic, no loop that the disk
//! decides the end of, no memory but what the caller gave. The hardware is in `main.rs` and beside it.
//!
//! [`entries::find`] is the way through: disk -> [`partition`] -> [`volume`] ([`fat`], [`ext4`]) -> [`bls`]
//! with [`unified`], [`grub`], [`syslinux`] or [`plain`] -> [`entries::Entries`]; then [`linux`] says where
//! the kernel goes, and [`cmdline`] with what. [`unknown`] names what cannot be read.
#![cfg_attr(not(test), no_std)]

pub mod bls;
pub mod bytes;
pub mod cmdline;
pub mod entries;
pub mod ext4;
pub mod fat;
pub mod grub;
pub mod linux;
pub mod partition;
pub mod plain;
pub mod syslinux;
pub mod text;
pub mod unified;
pub mod unknown;
pub mod variables;
pub mod version;
pub mod volume;

use core::fmt;

/// Why something could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The disk failed, or what was asked for lies behind its end.
    Read,
    /// No file of that name.
    Missing,
    /// It contradicts itself.
    Damaged(&'static str),
    /// It is right as far as can be told, but this program does not know it.
    Unsupported(&'static str),
    /// More than there is room for.
    TooLarge(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, what) = match self {
            Self::Read => ("read error", ""),
            Self::Missing => ("no such file", ""),
            Self::Damaged(what) => ("damaged: ", *what),
            Self::Unsupported(what) => ("not known here: ", *what),
            Self::TooLarge(what) => ("too large: ", *what),
        };
        f.write_str(before)?;
        f.write_str(what)
    }
}

/// A result of this crate.
pub type Result<T> = core::result::Result<T, Error>;

/// A disk, read at any byte.
pub trait Disk {
    /// Its size in bytes.
    fn size(&self) -> u64;
    /// Fills `into` from `offset`.
    ///
    /// # Errors
    /// [`Error::Read`], also for what lies behind the end.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()>;
}

/// A disk image in memory.
impl Disk for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let from = usize::try_from(offset).ok().and_then(|start| self.get(start..)?.get(..into.len()));
        into.copy_from_slice(from.ok_or(Error::Read)?);
        Ok(())
    }
}
