//! Which pages of RAM may hold something else than zeroes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::{Memory, within};

pub(super) const PAGE: u64 = 4096;
/// Entries of pagemap that are read at a time.
const BATCH: u64 = 4096;
/// Of an entry (Documentation/admin-guide/mm/pagemap.rst): the page is in memory.
pub(super) const PRESENT: u64 = 1 << 63;
/// It was swapped out.
pub(super) const SWAPPED: u64 = 1 << 62;
/// It is a file's, or shared.
pub(super) const OF_FILE: u64 = 1 << 61;

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
        let of_layers = region.file_offset().map_or_else(Vec::new, |object| {
            let place = object.start()..object.start() + region.len();
            self.layers.iter().flat_map(|layer| &layer.runs).filter_map(|run| within(run, &place)).collect()
        });
        // Without it, all of it may have been touched.
        let held = held(region).unwrap_or_else(|_| vec![0..region.len()]);
        Ok(union(of_file.into_iter().chain(of_layers).chain(held).collect()))
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
    // What was cut off looks like a hole.
    if file.metadata()?.len() < base + len {
        return Err(io::Error::other("the file of memory was cut short"));
    }
    Ok(all)
}

/// The pages that this process has of a private mapping; perhaps more.
fn held(region: &GuestRegionMmap) -> io::Result<Vec<Range<u64>>> {
    Pagemap::open().map_or_else(|_| resident(region), |pagemap| listed(&pagemap, region))
}

fn listed(pagemap: &Pagemap, region: &GuestRegionMmap) -> io::Result<Vec<Range<u64>>> {
    let mut all = Vec::new();
    pagemap.each(region, |page, entry| {
        if entry & (PRESENT | SWAPPED) != 0 {
            add(&mut all, page);
        }
    })?;
    Ok(all)
}

/// The same without asking for more than is in memory, so it fails where pages were swapped out. Of a file's mapping it may tell of
/// pages that others have in memory.
fn resident(region: &GuestRegionMmap) -> io::Result<Vec<Range<u64>>> {
    let mut all = Vec::new();
    let mut bytes = vec![0u8; BATCH as usize];
    let pages = region.len() / PAGE;
    for batch in (0..pages).step_by(BATCH as usize) {
        let bytes = &mut bytes[..BATCH.min(pages - batch) as usize];
        let first = region.as_ptr().wrapping_add((batch * PAGE) as usize);
        // SAFETY: the pages are the region's, which is mapped as long as it is there, and `bytes` has one byte for each.
        if unsafe { libc::mincore(first.cast(), bytes.len() * PAGE as usize, bytes.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        (batch..).zip(&*bytes).filter(|(_, byte)| **byte & 1 != 0).for_each(|(page, _)| add(&mut all, page));
    }
    // After that: what was swapped out before is swapped out still, because nobody touches it meanwhile.
    match swapped()? {
        0 => Ok(all),
        _ => Err(io::Error::other("some of it was swapped out")),
    }
}

/// KiB of this process that were swapped out (Documentation/filesystems/proc.rst, smaps_rollup). Counted page by page: sums that the
/// kernel keeps are not exact.
fn swapped() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Swap:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Adds a page to `all`, which are those before it.
fn add(all: &mut Vec<Range<u64>>, page: u64) {
    let at = page * PAGE;
    match all.last_mut() {
        Some(run) if run.end == at => run.end = at + PAGE,
        _ => all.push(at..at + PAGE),
    }
}

/// Which pages this process has.
#[derive(Debug, Clone, Copy)]
pub struct Pagemap(&'static File);

/// It stays open.
static PAGEMAP: OnceLock<File> = OnceLock::new();

impl Pagemap {
    /// Opens it. The first time has to be before the process closes itself to debuggers, because then its files in /proc are root's, and
    /// before it enters a jail.
    ///
    /// A child of the process that has been forked since sees its parent's: all pages that it has itself, and those that its parent has got
    /// since then, as long as the parent keeps the mapping.
    ///
    /// # Errors
    /// There is no /proc, or it is too late.
    pub fn open() -> io::Result<Self> {
        if let Some(open) = PAGEMAP.get() {
            return Ok(Self(open));
        }
        let file = File::open("/proc/self/pagemap")?;
        Ok(Self(PAGEMAP.get_or_init(|| file)))
    }

    /// Calls `see` with the number of each page of `region`, in order, and its entry.
    pub(super) fn each(&self, region: &GuestRegionMmap, mut see: impl FnMut(u64, u64)) -> io::Result<()> {
        let first = region.as_ptr().addr() as u64 / PAGE;
        let pages = region.len() / PAGE;
        let mut bytes = vec![0; BATCH as usize * 8];
        for batch in (0..pages).step_by(BATCH as usize) {
            let bytes = &mut bytes[..BATCH.min(pages - batch) as usize * 8];
            self.0.read_exact_at(bytes, (first + batch) * 8)?;
            let entries = bytes.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry));
            (batch..).zip(entries).for_each(|(page, entry)| see(page, entry));
        }
        Ok(())
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// All that is in `ranges`, ascending, in as few stretches as there can be.
pub fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
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

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    fn touched(memory: &Memory) -> Vec<Range<u64>> {
        memory.ram().iter().flat_map(|region| memory.touched(region).unwrap()).collect()
    }

    #[test]
    fn pages_that_were_written_to_are_told_whatever_memory_is_made_of() {
        for text in ["16M", "16M,backing=memfd"] {
            let memory = Memory::new(&text.parse().unwrap()).unwrap();
            assert_eq!(touched(&memory), [], "{text}");
            for address in [0x1000, 0x2fff, 0x10_0000] {
                memory.ram().write_obj(1u8, GuestAddress(address)).unwrap();
            }
            assert_eq!(touched(&memory), [0x1000..0x3000, 0x10_0000..0x10_1000], "{text}");
        }
    }

    #[test]
    fn who_may_not_read_pagemap_is_told_the_same() {
        let memory = Memory::new(&"64M".parse().unwrap()).unwrap();
        for address in [0x1000, 0x2fff, 0x10_0000, (64 << 20) - 1] {
            memory.ram().write_obj(1u8, GuestAddress(address)).unwrap();
        }
        let region = memory.ram().iter().next().unwrap();
        let listed = listed(&Pagemap::open().unwrap(), region).unwrap();
        assert!(listed.len() >= 3, "{listed:?}");
        match resident(region) {
            Ok(resident) => assert_eq!(resident, listed),
            Err(error) => assert!(error.to_string().contains("swapped out"), "{error}"),
        }
    }

    #[test]
    fn a_private_copy_has_the_pages_of_its_file_and_its_own() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        file.seek(SeekFrom::Start(0x2000)).unwrap();
        file.write_all(&[7; 0x1000]).unwrap();
        let config = "16M".parse().unwrap();
        let memory = Memory::private_copy(&config, file.try_clone().unwrap().into()).unwrap();
        memory.ram().write_obj(1u8, GuestAddress(0x3000)).unwrap();
        memory.ram().write_obj(1u8, GuestAddress(0x9000)).unwrap();
        assert_eq!(touched(&memory), [0x2000..0x4000, 0x9000..0xa000]);
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 7);
        memory.ram().write_obj(8u8, GuestAddress(0x2000)).unwrap();
        let other = Memory::private_copy(&config, file.into()).unwrap();
        assert_eq!(other.ram().read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 7, "each has its own");
        assert!(Memory::private_copy(&"32M".parse().unwrap(), tempfile::tempfile().unwrap().into()).is_err());
    }

    #[test]
    fn stretches_are_joined() {
        assert_eq!(union(vec![8..9, 1..3, 2..5, 5..6, 7..8]), [1..6, 7..9]);
    }
}
