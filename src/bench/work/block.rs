//! Work for a disk: requests of 4 KiB, one after the other, in order or at random, past the page cache unless asked otherwise.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::measure::Random;

const BLOCK: usize = 4096;

/// An open file or disk.
pub struct Disk {
    file: File,
    write: bool,
    blocks: u64,
    /// Twice what is needed: O_DIRECT wants it aligned.
    space: Vec<u8>,
}

impl Disk {
    /// Opens it: to be read, or to be written over.
    pub fn open(path: &Path, write: bool, cached: bool) -> io::Result<Self> {
        let name = |what: &str, error: io::Error| {
            io::Error::new(error.kind(), format!("{what} {}: {error}", path.display()))
        };
        let flags = if cached { OFlags::empty() } else { OFlags::DIRECT };
        let mut options = OpenOptions::new();
        options.read(!write).write(write).custom_flags(flags.bits() as i32);
        let mut file = options.open(path).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) if !cached => {
                io::Error::other(format!("{}: its file system knows no O_DIRECT", path.display()))
            }
            _ => name("open", error),
        })?;
        let blocks = file.seek(SeekFrom::End(0)).map_err(|error| name("seek in", error))? / BLOCK as u64;
        if blocks == 0 {
            return Err(io::Error::other(format!("{}: less than {BLOCK} bytes", path.display())));
        }
        Ok(Self { file, write, blocks, space: vec![0; 2 * BLOCK] })
    }

    /// Makes so many requests, and the fsync that makes writes count. Returns the sum of the first bytes.
    pub fn work(&mut self, random: bool, count: u64) -> io::Result<u64> {
        let mut order = Random::new(2);
        let start = self.space.as_ptr().align_offset(BLOCK);
        let buffer = &mut self.space[start..start + BLOCK];
        let mut sum = 0;
        for number in 0..count {
            let block = if random { order.below(self.blocks as usize) as u64 } else { number % self.blocks };
            let at = block * BLOCK as u64;
            if self.write {
                buffer[..8].copy_from_slice(&number.to_le_bytes());
                self.file.write_all_at(buffer, at)?;
            } else {
                self.file.read_exact_at(buffer, at)?;
            }
            sum += u64::from(buffer[0]);
        }
        if self.write {
            self.file.sync_data()?;
        }
        Ok(sum)
    }
}
