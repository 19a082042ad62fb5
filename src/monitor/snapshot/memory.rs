//! The file of guest RAM: blocks of zeroes are holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::memory::Memory;
use crate::memory::frozen::Frozen;

/// What is a hole or not: a page.
const BLOCK: usize = 4096;
/// Blocks that are read at a time.
const BATCH: usize = 256;

/// RAM on its way into a file.
pub enum Writing {
    /// By a child, which has it as it was.
    Frozen(Frozen),
    /// It is there already. Its [`checksum`].
    Done(u32),
}

impl Writing {
    /// Writes the RAM of `memory`, whose guest stands still, into the empty `file`. The guest may go on when this returns if that
    /// `may_last`, which costs it page faults.
    ///
    /// # Errors
    /// The file's.
    pub fn begin(memory: &Memory, file: &File, may_last: bool) -> io::Result<Self> {
        if may_last && memory.is_private() {
            let base = memory.ram().iter().filter_map(|region| region.file_offset());
            let keep: Vec<_> = base.map(|base| base.file().as_fd()).chain([file.as_fd()]).collect();
            match Frozen::begin(&keep, || write(memory, file)) {
                Ok(frozen) => return Ok(Self::Frozen(frozen)),
                Err(error) => log::warn!("the guest stands still until its memory is written: {error}"),
            }
        }
        write(memory, file).map(Self::Done)
    }

    /// Waits until it is written. Its [`checksum`].
    ///
    /// # Errors
    /// The file's.
    pub fn finish(self) -> io::Result<u32> {
        match self {
            Self::Frozen(frozen) => frozen.finish(),
            Self::Done(checksum) => Ok(checksum),
        }
    }
}

fn write(memory: &Memory, file: &File) -> io::Result<u32> {
    file.set_len(memory.size())?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BATCH * BLOCK];
    let mut start = 0;
    for region in memory.ram().iter() {
        for range in memory.touched(region)? {
            for offset in range.clone().step_by(buffer.len()) {
                let len = buffer.len().min((range.end - offset) as usize);
                let bytes = &mut buffer[..len];
                region.read_slice(bytes, MemoryRegionAddress(offset)).map_err(io::Error::other)?;
                for run in runs(bytes) {
                    let at = start + offset + run.start as u64;
                    file.write_all_at(&bytes[run.clone()], at)?;
                    add(&mut hasher, at, &bytes[run]);
                }
            }
        }
        start += region.len();
    }
    Ok(hasher.finalize())
}

/// The stretches of `bytes` that are not blocks of zeroes.
fn runs(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    // Stretches of 64 bytes are added up by vectors; byte by byte it is a tenth as fast.
    let is_zero = |at: usize| {
        let mut parts = bytes[at..bytes.len().min(at + BLOCK)].chunks(64);
        parts.all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let blocks = |from| (from..bytes.len()).step_by(BLOCK);
        let start = blocks(at).find(|at| !is_zero(*at))?;
        at = blocks(start).find(|at| is_zero(*at)).unwrap_or(bytes.len());
        Some(start..at)
    })
}

/// Adds each block with its place, so that it makes no difference what is a hole and what reads as zeroes.
fn add(hasher: &mut Hasher, at: u64, bytes: &[u8]) {
    for (block, place) in bytes.chunks(BLOCK).zip((at..).step_by(BLOCK)) {
        hasher.update(&place.to_le_bytes());
        hasher.update(block);
    }
}

/// CRC-32 of all that is in `file` and not zero.
pub fn checksum(file: &File) -> io::Result<u32> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BATCH * BLOCK];
    let mut at = 0;
    while let Some(data) = next_data(file, at)? {
        at = data.start;
        while at < data.end {
            let len = buffer.len().min((data.end - at) as usize);
            let bytes = &mut buffer[..len];
            file.read_exact_at(bytes, at)?;
            runs(bytes).for_each(|run| add(&mut hasher, at + run.start as u64, &bytes[run]));
            at += len as u64;
        }
    }
    Ok(hasher.finalize())
}

/// The next stretch of `file` from `at` on that is no hole.
fn next_data(file: &File, at: u64) -> io::Result<Option<Range<u64>>> {
    let start = match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        start => start?,
    };
    Ok(Some(start..seek(file, SeekFrom::Hole(start))?))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn ram_comes_back_from_its_file_and_the_checksum_tells_of_every_byte() {
        let config = "16M".parse().unwrap();
        let memory = Memory::new(&config).unwrap();
        for (address, byte) in [(0u64, 1u8), (0x1fff, 2), (0x70_0000, 3), ((16 << 20) - 1, 4)] {
            memory.ram().write_obj(byte, GuestAddress(address)).unwrap();
        }
        // Touched, and zero.
        memory.ram().write_obj(0u8, GuestAddress(0x50_0000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let write = |memory: &Memory, file: &File, may_last| Writing::begin(memory, file, may_last)?.finish();
        let sum = write(&memory, &file, false).unwrap();
        assert_eq!(write(&memory, &tempfile::tempfile().unwrap(), true).unwrap(), sum, "by a child");
        assert_eq!(checksum(&file).unwrap(), sum);
        let copy = Memory::private_copy(&config, file.try_clone().unwrap()).unwrap();
        let read = |memory: &Memory, address| memory.ram().read_obj::<u8>(GuestAddress(address)).unwrap();
        for address in [0, 0x1fff, 0x70_0000, (16 << 20) - 1, 0x50_0000, 5] {
            assert_eq!(read(&copy, address), read(&memory, address), "{address:#x}");
        }
        // That of a copy that has changed is another, and so is that of a file that has.
        let again = tempfile::tempfile().unwrap();
        assert_eq!(write(&copy, &again, true).unwrap(), sum);
        copy.ram().write_obj(9u8, GuestAddress(0x60_0000)).unwrap();
        assert_ne!(write(&copy, &tempfile::tempfile().unwrap(), false).unwrap(), sum);
        again.write_all_at(&[1], 0x123_456).unwrap();
        assert_ne!(checksum(&again).unwrap(), sum);
    }
}
