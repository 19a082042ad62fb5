//! The file of guest RAM: blocks of zeroes are holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::memory::Memory;

/// What is a hole or not: a page.
const BLOCK: usize = 4096;
/// Blocks that are read at a time.
const BATCH: usize = 256;

/// Writes the RAM of `memory`, whose guest stands still, into the empty `file`. Gives its [`checksum`].
pub fn write(memory: &Memory, file: &File) -> io::Result<u32> {
    file.set_len(memory.size())?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BATCH * BLOCK];
    let mut at = 0;
    for region in memory.ram().iter() {
        for touched in memory.touched(region)? {
            let mut offset = touched.start;
            while offset < touched.end {
                let len = buffer.len().min((touched.end - offset) as usize);
                let bytes = &mut buffer[..len];
                region.read_slice(bytes, MemoryRegionAddress(offset)).map_err(io::Error::other)?;
                for run in runs(bytes) {
                    file.write_all_at(&bytes[run.clone()], at + offset + run.start as u64)?;
                    add(&mut hasher, at + offset + run.start as u64, &bytes[run]);
                }
                offset += len as u64;
            }
        }
        at += region.len();
    }
    file.sync_data()?;
    Ok(hasher.finalize())
}

/// The stretches of `bytes` that are not blocks of zeroes.
fn runs(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (block, start) in bytes.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = start + block.len(),
            _ => runs.push(start..start + block.len()),
        }
    }
    runs
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
            runs(bytes).into_iter().for_each(|run| add(&mut hasher, at + run.start as u64, &bytes[run]));
            at += len as u64;
        }
    }
    Ok(hasher.finalize())
}

/// The next stretch of `file` from `at` on that is no hole.
fn next_data(file: &File, at: u64) -> io::Result<Option<std::ops::Range<u64>>> {
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
        let sum = write(&memory, &file).unwrap();
        assert_eq!(checksum(&file).unwrap(), sum);
        let copy = Memory::private_copy(&config, file.try_clone().unwrap()).unwrap();
        let read = |memory: &Memory, address| memory.ram().read_obj::<u8>(GuestAddress(address)).unwrap();
        for address in [0, 0x1fff, 0x70_0000, (16 << 20) - 1, 0x50_0000, 5] {
            assert_eq!(read(&copy, address), read(&memory, address), "{address:#x}");
        }
        // That of a copy that has changed is another, and so is that of a file that has.
        let again = tempfile::tempfile().unwrap();
        assert_eq!(write(&copy, &again).unwrap(), sum);
        copy.ram().write_obj(9u8, GuestAddress(0x60_0000)).unwrap();
        assert_ne!(write(&copy, &tempfile::tempfile().unwrap()).unwrap(), sum);
        again.write_all_at(&[1], 0x123_456).unwrap();
        assert_ne!(checksum(&again).unwrap(), sum);
    }
}
