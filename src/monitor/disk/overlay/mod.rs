//! [`Overlay`]: what was written to a disk whose image, the base, is only read. By clusters: one is read from the overlay once
//! something was written to it, else from the base.
//!
//! **Order.** A cluster's data is in the file before the map in memory has the cluster, and on stable storage before the map
//! in the file has it: a flush syncs data, writes what is new in the map, and syncs that. Clusters never leave the map. So
//! whatever part of an unfinished write to the map survives a crash, a cluster reads as it was written at some time or as in
//! the base, and what was flushed is there. A file that is not kept needs no map, and a flush does nothing.

mod file;
mod map;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Error;
use super::copy;
use super::store::Store;
use crate::config;
use crate::memory::Buffers;
use map::Map;

pub use file::{Base, MAGIC, open_kept, open_lower, temporary, unnamed};

/// Bytes that come into the overlay together. What file systems write in, so that little has to be copied from the base.
pub const CLUSTER: u64 = 4096;
/// The largest disk, in bytes: its map may come to have half a gigabyte.
const LARGEST: u64 = 16 << 40;
/// Whether a disk of `size` bytes is too large to have one: then the largest.
pub fn too_small_for(size: u64) -> Option<u64> {
    (size > LARGEST).then_some(LARGEST)
}

/// Blocks of the map that are written between two syncs.
const BATCH: usize = 256;

/// See the module's text.
#[derive(Debug)]
pub struct Overlay {
    store: Store,
    /// Where the disk begins in `store`.
    data: u64,
    /// The disk's image.
    base: Base,
    /// What is read where this one has nothing, if not the base: one that is not written to.
    below: Option<Box<Overlay>>,
    map: Map,
    /// Blocks of the map that are not in the file as they are in memory. Who has clusters come holds it from the look at the map
    /// on, so that nobody else has the same ones come meanwhile.
    unsaved: Mutex<BTreeSet<usize>>,
    /// The file is for other runs too.
    kept: bool,
    /// A sync has failed: nobody knows what the file has, so it is told of no more clusters. Held while one is made.
    failed: Mutex<bool>,
}

/// Why a file cannot be the overlay of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// It is none.
    Foreign,
    /// It was made by another version.
    Version {
        /// Its version.
        found: u32,
        /// That of this vmm.
        known: u32,
    },
    /// How it shows.
    Damaged(&'static str),
    /// Its base was another, or has changed.
    OtherBase {
        /// What it was made for.
        was: Base,
        /// What it is to be over.
        is: Base,
    },
    /// It was cut or has grown.
    Length {
        /// Its bytes.
        len: u64,
        /// What it should have.
        wanted: u64,
    },
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("it is not an overlay of vmm's"),
            Self::Version { found, known } => {
                write!(f, "its format is version {found}, and this vmm knows version {known}")
            }
            Self::Damaged(how) => write!(f, "it is damaged: {how}"),
            Self::OtherBase { was, is } if was.size != is.size => {
                write!(f, "it was made for an image of {} bytes, and this one has {}", was.size, is.size)
            }
            Self::OtherBase { was, is } => {
                let ((was, was_ns), (is, is_ns)) = (was.modified, is.modified);
                write!(
                    f,
                    "the image was last changed at @{was}.{was_ns:09} when the overlay was made, and since then at @{is}.{is_ns:09}"
                )
            }
            Self::Length { len, wanted } => write!(f, "it has {len} bytes, and should have {wanted}"),
        }
    }
}

impl Unfit {
    /// What to try.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Foreign => {
                "name a file that is not there, or one that an earlier run with overlay= has made"
            }
            Self::Version { .. } => "use the vmm that made it",
            Self::Damaged(_) | Self::Length { .. } => "take another copy of it, or name a new file",
            Self::OtherBase { .. } => {
                "give the image that it was made for, as it was (date -d @SECONDS tells the time), or name a new file"
            }
        }
    }
}

impl Overlay {
    /// Those of `config`, in files that are open, over `base`, which is the disk's image.
    ///
    /// # Errors
    /// One does not belong to the image.
    pub fn of(
        config: &config::Disk,
        base: &Base,
        lower: Option<File>,
        overlay: Option<File>,
    ) -> Result<Option<Box<Self>>, Error> {
        let lower = match (&config.lower, lower) {
            (Some(path), Some(file)) => {
                Some(Self::over(file::load(file, path, base, true)?, *base, None, false))
            }
            _ => None,
        };
        Ok(match (&config.overlay, overlay) {
            (Some(config::Overlay::Temporary), Some(file)) => {
                Some(Self::over(file::Opened::empty(file, base), *base, lower, false))
            }
            (Some(config::Overlay::Kept(path)), Some(file)) => {
                Some(Self::over(file::load(file, path, base, false)?, *base, lower, true))
            }
            _ => lower,
        })
    }

    fn over(opened: file::Opened, base: Base, below: Option<Box<Self>>, kept: bool) -> Box<Self> {
        let file::Opened { file, data, map } = opened;
        let store = Store { file, device: false, block_size: 512 };
        let (unsaved, failed) = (Mutex::default(), Mutex::default());
        Box::new(Self { store, data, base, below, map, unsaved, kept, failed })
    }

    /// Reads from `offset` on, over `base`.
    pub fn read(&self, base: &Store, mut offset: u64, mut to: Buffers) -> io::Result<u32> {
        let end = offset + to.len() as u64;
        let mut moved = 0;
        while offset < end {
            let (is_here, next) = self.run(offset, end);
            let part = if next == end { None } else { Some(to.split_off_front((next - offset) as usize)) };
            let part = part.as_ref().unwrap_or(&to);
            moved += match is_here {
                true => self.store.transfer(self.data + offset, part, false),
                false => match &self.below {
                    None => base.transfer(offset, part, false),
                    Some(below) => below.read(base, offset, part.clone()),
                },
            }?;
            offset = next;
        }
        Ok(moved)
    }

    /// Writes from `offset` on.
    pub fn write(&self, base: &Store, offset: u64, from: &Buffers) -> io::Result<u32> {
        let range = (offset, offset + from.len() as u64);
        self.put(base, range, || self.store.transfer(self.data + offset, from, true))
    }

    /// Has a range read as zeroes.
    pub fn write_zeroes(&self, base: &Store, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.put(base, (offset, offset + len), || self.store.write_zeroes(self.data + offset, len, unmap))
    }

    /// Forgets what was written to a range, which then reads as zeroes there: as the base would do as well, but a cluster of
    /// which the map in the file is told must not be without data.
    pub fn discard(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        while offset < end {
            let (is_here, next) = self.run(offset, end);
            if is_here {
                self.store.discard(self.data + offset, next - offset)?;
            }
            offset = next;
        }
        Ok(())
    }

    /// Whether what is at `offset` is in the overlay, and the end of that part of the range, which is not empty.
    fn run(&self, offset: u64, end: u64) -> (bool, u64) {
        let (is_here, next) = self.map.run(offset / CLUSTER, end.div_ceil(CLUSTER));
        (is_here, end.min(next * CLUSTER))
    }

    /// Does `write`, which fills the range from the first offset to before the second, and has its clusters come.
    fn put<T: Default>(
        &self,
        base: &Store,
        (offset, end): (u64, u64),
        write: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if offset == end {
            return Ok(T::default());
        }
        if self.run(offset, end) == (true, end) {
            return write();
        }
        let mut unsaved = lock(&self.unsaved);
        let (first, last) = (offset / CLUSTER, (end - 1) / CLUSTER);
        self.fill(base, first * CLUSTER, offset)?;
        self.fill(base, end, self.base.size.min((last + 1) * CLUSTER))?;
        let done = write()?;
        self.map.add(first, last + 1, |block| {
            if self.kept {
                unsaved.insert(block);
            }
        });
        Ok(done)
    }

    /// Copies the range, a part of a cluster, from what is below, unless the cluster is there.
    fn fill(&self, base: &Store, offset: u64, end: u64) -> io::Result<()> {
        if offset >= end || self.run(offset, end).0 {
            return Ok(());
        }
        let mut bytes = [0; CLUSTER as usize];
        let bytes = &mut bytes[..(end - offset) as usize];
        match &self.below {
            Some(below) if below.run(offset, end).0 => {
                below.store.file.read_exact_at(bytes, below.data + offset)
            }
            _ => base.file.read_exact_at(bytes, offset),
        }?;
        self.store.file.write_all_at(bytes, self.data + offset)
    }

    /// Makes `to`, an empty file, the overlay of the base that has what this one and those below it have now. Nothing is written to
    /// it meanwhile.
    pub fn save(&self, to: &File) -> io::Result<()> {
        let bottom = self.below.as_deref().unwrap_or(self);
        copy::whole(&bottom.store.file, to)?;
        let copy = Store { file: to.try_clone()?, device: false, block_size: 512 };
        let mut at = 0;
        while self.below.is_some() && at < self.base.size {
            let (is_here, next) = self.run(at, self.base.size);
            if is_here {
                // Holes are zeroes here, and not what is below.
                copy.write_zeroes(self.data + at, next - at, true)?;
                copy::range(&self.store.file, to, self.data + at, next - at)?;
            }
            at = next;
        }
        file::write_header(to, &self.base)?;
        for block in self.map.made().chain(bottom.map.made()) {
            let mut bytes = self.map.bytes(block);
            bytes.iter_mut().zip(bottom.map.bytes(block)).for_each(|(byte, below)| *byte |= below);
            to.write_all_at(&bytes, file::place(block))?;
        }
        Ok(())
    }

    /// Whether there are clusters that the next run would not find.
    pub fn is_unsaved(&self) -> bool {
        !lock(&self.unsaved).is_empty()
    }

    /// What was written before is found by the next run, also after a crash of the host. `sync` is fdatasync.
    pub fn flush(&self, sync: impl Fn(&File) -> rustix::io::Result<()>) -> io::Result<()> {
        if !self.kept {
            return Ok(());
        }
        let mut failed = lock(&self.failed);
        if *failed {
            return Err(io::Error::other("an earlier flush of the overlay failed"));
        }
        let mut left = std::mem::take(&mut *lock(&self.unsaved));
        loop {
            // As it is before the sync: what comes meanwhile waits for the next.
            let blocks: Vec<_> =
                left.iter().take(BATCH).map(|block| (*block, self.map.bytes(*block))).collect();
            if let Err(error) = sync(&self.store.file) {
                *failed = true;
                return Err(error.into());
            }
            if blocks.is_empty() {
                return Ok(());
            }
            for (block, bytes) in blocks {
                if let Err(error) = self.store.file.write_all_at(&bytes, file::place(block)) {
                    lock(&self.unsaved).append(&mut left);
                    return Err(error);
                }
                left.remove(&block);
            }
        }
    }
}

/// Nothing in these can be left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
