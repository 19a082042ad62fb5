//! Which pages of RAM may hold something else than zeroes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::Memory;

const PAGE: u64 = 4096;
/// Entries of pagemap that are read at a time.
const BATCH: u64 = 4096;
/// Of an entry: the page is in memory, or was swapped out (Documentation/admin-guide/mm/pagemap.rst).
const HELD: u64 = 1 << 63 | 1 << 62;

impl Memory {
    /// The stretches of `region`, in bytes from its start, of which somebody has touched a page or which come from a file.
    ///
    /// # Errors
    /// The file cannot be asked.
    pub fn touched(&self, region: &GuestRegionMmap) -> io::Result<Vec<Range<u64>>> {
        let of_file = match region.file_offset() {
            Some(object) => data(object.file(), object.start(), region.len())?,
            None => Vec::new(),
        };
        if super::shared_object(region).is_some() {
            return Ok(of_file);
        }
        // Without it, all of it may have been touched.
        let held = held(region).unwrap_or_else(|_| vec![0..region.len()]);
        Ok(union(of_file.into_iter().chain(held).collect()))
    }
}

/// What is no hole of `len` bytes of `file` from `base` on, from there.
fn data(file: &File, base: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
    let (mut all, mut at) = (Vec::new(), base);
    while at < base + len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            start => start?,
        };
        if start >= base + len {
            break;
        }
        at = seek(file, SeekFrom::Hole(start))?.min(base + len);
        all.push(start / PAGE * PAGE - base..(at - base).next_multiple_of(PAGE));
    }
    Ok(all)
}

/// The pages that this process has of a private mapping.
fn held(region: &GuestRegionMmap) -> io::Result<Vec<Range<u64>>> {
    let map = File::open("/proc/self/pagemap")?;
    let first = region.as_ptr().addr() as u64 / PAGE;
    let pages = region.len() / PAGE;
    let mut all: Vec<Range<u64>> = Vec::new();
    let mut bytes = vec![0; BATCH as usize * 8];
    for batch in (0..pages).step_by(BATCH as usize) {
        let count = BATCH.min(pages - batch) as usize;
        let bytes = &mut bytes[..count * 8];
        map.read_exact_at(bytes, (first + batch) * 8)?;
        for (entry, page) in bytes.chunks_exact(8).zip(batch..) {
            if entry[7] & (HELD >> 56) as u8 == 0 {
                continue;
            }
            let at = page * PAGE;
            match all.last_mut() {
                Some(run) if run.end == at => run.end = at + PAGE,
                _ => all.push(at..at + PAGE),
            }
        }
    }
    Ok(all)
}

fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}
