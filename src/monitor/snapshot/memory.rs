//! The file of guest RAM: blocks of zeroes are holes.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::memory::frozen::Frozen;
use crate::memory::packed::Packer;
use crate::memory::{Memory, Pagemap, RamFile, SavedRam, union, within};

/// What is a hole or not: a page.
const BLOCK: usize = 4096;
/// Blocks that are read at a time.
const BATCH: usize = 256;
/// Stretches of a file that lie over another.
pub const MOST_RUNS: usize = 1000;

/// RAM on its way into a file.
pub struct Writing {
    /// Its [`checksum`].
    sum: Sum,
    /// What is below it, and the file that tells which of its pages are in this one.
    base: Option<(SavedRam, File)>,
}

enum Sum {
    /// A child has the RAM as it was, and writes it.
    Frozen(Frozen),
    /// It is there already.
    Done(u32),
}

/// What was written.
#[derive(Debug, PartialEq, Eq)]
pub struct Written {
    /// Its [`checksum`].
    pub sum: u32,
    /// Which pages those are, if the others are in what is below: ascending, in bytes.
    pub runs: Vec<Range<u64>>,
}

impl Writing {
    /// Writes the RAM of `memory`, whose guest stands still, into the empty `file`, `packed` or as it is: what is not as in `base`, if there
    /// is one. If that `may_last` the guest may go on when this returns, which costs it page faults; all is written by then where a child
    /// would not keep memory as it is ([`Memory::stays_in_a_child`]).
    ///
    /// # Errors
    /// The file's.
    pub fn begin(
        memory: &Memory,
        file: &File,
        packed: bool,
        base: Option<SavedRam>,
        may_last: bool,
    ) -> io::Result<Self> {
        memory.must_be_whole();
        let unnamed =
            |base| Ok::<_, io::Error>((base, File::from(memfd_create("runs", MemfdFlags::CLOEXEC)?)));
        let base = base.map(unnamed).transpose()?;
        let over = base.as_ref().map(|(base, runs)| (base, runs));
        if may_last && memory.stays_in_a_child() {
            let ours = memory.ram().iter().filter_map(|region| region.file_offset());
            let ours = ours.map(|object| object.file().as_fd());
            let bases = base.iter().flat_map(|(base, _)| base.files()).map(|file| file.file().as_fd());
            let pagemap = Pagemap::open().ok();
            let keep = ours.chain(bases).chain([file.as_fd()]).chain(pagemap.as_ref().map(AsFd::as_fd));
            let keep: Vec<_> = keep.chain(base.as_ref().map(|(_, runs)| runs.as_fd())).collect();
            match Frozen::begin(&keep, || write(memory, file, packed, over)) {
                Ok(frozen) => return Ok(Self { sum: Sum::Frozen(frozen), base }),
                Err(error) => log::warn!("the guest stands still until its memory is written: {error}"),
            }
        }
        let sum = Sum::Done(write(memory, file, packed, over)?);
        Ok(Self { sum, base })
    }

    /// Waits until it is written.
    ///
    /// # Errors
    /// The file's.
    pub fn finish(self) -> io::Result<Written> {
        let sum = match self.sum {
            Sum::Frozen(frozen) => frozen.finish()?,
            Sum::Done(sum) => sum,
        };
        let runs = self.base.map_or_else(|| Ok(Vec::new()), |(_, runs)| read_runs(&runs))?;
        Ok(Written { sum, runs })
    }
}

/// Where blocks go, in order.
enum Sink<'a> {
    Plain(&'a File),
    Packed(Packer<'a>),
}

impl Sink<'_> {
    fn put(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(file) => file.write_all_at(bytes, at),
            Self::Packed(packer) => packer.put(at, bytes),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Packed(packer) => packer.finish(),
        }
    }
}

fn write(memory: &Memory, file: &File, packed: bool, over: Option<(&SavedRam, &File)>) -> io::Result<u32> {
    let mut sink = if packed {
        Sink::Packed(Packer::new(file, memory.size())?)
    } else {
        file.set_len(memory.size())?;
        Sink::Plain(file)
    };
    let mut hasher = Hasher::new();
    let mut put = |at: u64, bytes: &[u8]| {
        for run in runs(bytes) {
            let at = at + run.start as u64;
            sink.put(at, &bytes[run.clone()])?;
            add(&mut hasher, at, &bytes[run]);
        }
        Ok(())
    };
    match over {
        None => each(memory, &touched(memory)?, &mut put)?,
        Some((base, runs)) => {
            let differing = few(differing(memory, base)?, MOST_RUNS);
            each(memory, &differing, &mut put)?;
            write_runs(runs, &differing)?;
        }
    }
    sink.finish()?;
    Ok(hasher.finalize())
}

/// The stretches of RAM that may hold something else than zeroes, as they lie in a file.
fn touched(memory: &Memory) -> io::Result<Vec<Range<u64>>> {
    let mut all = Vec::new();
    for (place, region) in memory.places() {
        let touched = memory.touched(region)?.into_iter();
        all.extend(touched.map(|range| place.start + range.start..place.start + range.end));
    }
    Ok(all)
}

/// Calls `found` with the bytes of each stretch in `ranges`, in whole blocks, and where in a file they lie.
fn each(
    memory: &Memory,
    ranges: &[Range<u64>],
    mut found: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; BATCH * BLOCK];
    for (place, region) in memory.places() {
        for part in ranges.iter().filter_map(|range| within(range, &place)) {
            for offset in part.clone().step_by(buffer.len()) {
                let len = buffer.len().min((part.end - offset) as usize);
                let bytes = &mut buffer[..len];
                region.read_slice(bytes, MemoryRegionAddress(offset)).map_err(io::Error::other)?;
                found(place.start + offset, bytes)?;
            }
        }
    }
    Ok(())
}

/// The blocks of `memory` that are not as in `base`, which is as long.
fn differing(memory: &Memory, base: &SavedRam) -> io::Result<Vec<Range<u64>>> {
    let either = union(touched(memory)?.into_iter().chain(base.data()?).collect());
    let mut all: Vec<Range<u64>> = Vec::new();
    let mut other = vec![0; BATCH * BLOCK];
    each(memory, &either, |at, bytes| {
        let other = &mut other[..bytes.len()];
        base.read(at, other)?;
        let blocks = bytes.chunks(BLOCK).zip(other.chunks(BLOCK)).zip((at..).step_by(BLOCK));
        for ((_, _), at) in blocks.filter(|((ours, theirs), _)| ours != theirs) {
            match all.last_mut() {
                Some(run) if run.end == at => run.end += BLOCK as u64,
                _ => all.push(at..at + BLOCK as u64),
            }
        }
        Ok(())
    })?;
    Ok(all)
}

/// At most `most` stretches with all that is in `runs`, and of what is between them the least: each is a mapping of every machine that
/// goes on from them, and a process has room for so many.
fn few(runs: Vec<Range<u64>>, most: usize) -> Vec<Range<u64>> {
    let Some(surplus) = runs.len().checked_sub(most).filter(|surplus| *surplus > 0) else { return runs };
    let mut gaps: Vec<_> = runs.windows(2).map(|pair| pair[1].start - pair[0].end).collect();
    gaps.sort_unstable();
    let (least, mut left) = (gaps[surplus - 1], surplus);
    let mut all: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match all.last_mut() {
            Some(last) if left > 0 && run.start - last.end <= least => {
                last.end = run.end;
                left -= 1;
            }
            _ => all.push(run),
        }
    }
    all
}

/// Tells who has the other end of `file`, an empty one without a name.
fn write_runs(mut file: &File, runs: &[Range<u64>]) -> io::Result<()> {
    let bytes: Vec<_> = runs.iter().flat_map(|run| [run.start, run.end]).flat_map(u64::to_le_bytes).collect();
    file.write_all(&bytes)
}

fn read_runs(mut file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    let numbers: Vec<_> = bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    Ok(numbers.as_chunks::<2>().0.iter().map(|[start, end]| *start..*end).collect())
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
pub fn checksum(file: &RamFile) -> io::Result<u32> {
    let mut hasher = Hasher::new();
    in_batches(file.data()?, |at, bytes| {
        file.read(at, bytes)?;
        runs(bytes).for_each(|run| add(&mut hasher, at + run.start as u64, &bytes[run]));
        Ok(())
    })?;
    Ok(hasher.finalize())
}

/// Copies what `saved` has to the empty `file`, each byte to its place, and zeroes as holes. Its [`checksum`].
pub fn flatten(saved: &SavedRam, size: u64, file: &File) -> io::Result<u32> {
    file.set_len(size)?;
    let mut hasher = Hasher::new();
    in_batches(saved.data()?, |at, bytes| {
        saved.read(at, bytes)?;
        runs(bytes).try_for_each(|run| {
            add(&mut hasher, at + run.start as u64, &bytes[run.clone()]);
            file.write_all_at(&bytes[run.clone()], at + run.start as u64)
        })
    })?;
    Ok(hasher.finalize())
}

/// Calls `fill` for `ranges`, a piece at a time, with room for what is there.
fn in_batches(
    ranges: Vec<Range<u64>>,
    mut fill: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; BATCH * BLOCK];
    for range in ranges {
        for at in range.clone().step_by(buffer.len()) {
            let len = buffer.len().min((range.end - at) as usize);
            fill(at, &mut buffer[..len])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::Layer;

    fn written(memory: &Memory, file: &File, base: Option<SavedRam>, may_last: bool) -> Written {
        Writing::begin(memory, file, false, base, may_last).unwrap().finish().unwrap()
    }

    fn plain(file: &File) -> RamFile {
        RamFile::plain(file.try_clone().unwrap(), Path::new("memory"))
    }

    fn put(memory: &Memory, address: u64, byte: u8) {
        memory.ram().write_obj(byte, GuestAddress(address)).unwrap();
    }

    fn byte(memory: &Memory, address: u64) -> u8 {
        memory.ram().read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn ram_comes_back_from_its_file_and_the_checksum_tells_of_every_byte() {
        let config = "16M".parse().unwrap();
        let memory = Memory::new(&config).unwrap();
        for (address, byte) in [(0u64, 1u8), (0x1fff, 2), (0x70_0000, 3), ((16 << 20) - 1, 4)] {
            put(&memory, address, byte);
        }
        // Touched, and zero.
        put(&memory, 0x50_0000, 0);
        let file = tempfile::tempfile().unwrap();
        let sum = written(&memory, &file, None, false).sum;
        assert_eq!(written(&memory, &tempfile::tempfile().unwrap(), None, true).sum, sum, "by a child");
        assert_eq!(checksum(&plain(&file)).unwrap(), sum);
        let copy = Memory::private_copy(&config, file.try_clone().unwrap().into()).unwrap();
        for address in [0, 0x1fff, 0x70_0000, (16 << 20) - 1, 0x50_0000, 5] {
            assert_eq!(byte(&copy, address), byte(&memory, address), "{address:#x}");
        }
        // That of a copy that has changed is another, and so is that of a file that has.
        let again = tempfile::tempfile().unwrap();
        assert_eq!(written(&copy, &again, None, true).sum, sum);
        put(&copy, 0x60_0000, 9);
        assert_ne!(written(&copy, &tempfile::tempfile().unwrap(), None, false).sum, sum);
        again.write_all_at(&[1], 0x123_456).unwrap();
        assert_ne!(checksum(&plain(&again)).unwrap(), sum);
    }

    #[test]
    fn a_layer_has_what_differs_and_zeroes_too() {
        let config = "5G".parse().unwrap();
        let memory = Memory::new(&config).unwrap();
        // The last is above the hole below 4 GiB.
        let high = 0x1_0000_0000 + (1 << 20);
        for address in [0x1000, 0x5000, 0x9000, high] {
            put(&memory, address, 1);
        }
        let bottom = tempfile::tempfile().unwrap();
        written(&memory, &bottom, None, false);
        let mut saved = SavedRam::from(bottom);
        // Each generation goes on from the one before.
        let changes: [&[(u64, u8)]; 3] = [&[(0x1000, 0), (0x7000, 7)], &[(high, 3), (0x7000, 7)], &[]];
        let runs: [&[Range<u64>]; 3] =
            [&[0x1000..0x2000, 0x7000..0x8000], &[high - (1 << 30)..high - (1 << 30) + 0x1000], &[]];
        for ((changes, runs), may_last) in changes.into_iter().zip(runs).zip([true, false, true]) {
            let memory = Memory::private_copy(&config, saved.clone()).unwrap();
            changes.iter().for_each(|(address, byte)| put(&memory, *address, *byte));
            let file = tempfile::tempfile().unwrap();
            let written = written(&memory, &file, Some(saved.clone()), may_last);
            assert_eq!(written.runs, runs);
            assert_eq!(checksum(&plain(&file)).unwrap(), written.sum);
            saved.layers.push(Layer { file: plain(&file), runs: written.runs });
        }
        let copy = Memory::private_copy(&config, saved).unwrap();
        let bytes = [0x1000, 0x5000, 0x7000, 0x9000, high].map(|address| byte(&copy, address));
        assert_eq!(bytes, [0, 1, 7, 1, 3]);
    }

    proptest! {
        #[test]
        fn few_stretches_have_all_that_many_had(blocks in prop::collection::btree_set(0u64..200, 0..60), most in 1usize..20) {
            let block = |at: &u64| at * 0x1000..(at + 1) * 0x1000;
            let runs = union(blocks.iter().map(block).collect());
            let few = few(runs.clone(), most);
            prop_assert_eq!(few.len(), runs.len().min(most));
            for run in &runs {
                prop_assert!(few.iter().any(|few| few.start <= run.start && run.end <= few.end));
            }
            prop_assert!(few.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
