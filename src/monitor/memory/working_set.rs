//! [`WorkingSet`]: the pages that the guest of a saved machine needs first, so that the next one need not wait for each.
//!
//! Memory of a restored machine is a private mapping of a file. Each page that its guest touches first is a page fault, which may
//! wait for the disk; one that it writes to is copied besides. They are much the same pages each time. A working set is advice: a
//! wrong one costs time and memory, within bounds, and nothing else.

use std::io::{self, IoSliceMut};
use std::ops::Range;

use rustix::io::{ReadWriteFlags, preadv2};
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Memory;
use super::touched::{OF_FILE, PAGE, PRESENT, Pagemap, SWAPPED};

/// Most pages that are copied ahead: 16 MiB, which the machine then has of its own.
pub const MOST_WRITTEN: u64 = 4096;
/// Most pages that are read ahead: 64 MiB of a file that all machines of it share.
pub const MOST_READ: u64 = 16384;
/// Most stretches.
pub const MOST_RUNS: usize = 16384;

/// Pages that one call copies at most: whoever changes the process's mappings, as KVM and a new thread do, waits for its end.
const AT_ONCE: usize = 64;
/// Pages between two stretches that are read with them: fewer and longer reads are quicker.
const GAP: u64 = 16;

/// Stretches of which a page is looked for in the host's cache.
const SAMPLES: usize = 16;
/// Fewer pages than this are copied as quickly one by one.
const FEW: u64 = 16;

/// Pages in a row, by their numbers in the file: RAM from address 0 on, its regions end to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Which.
    pub pages: Range<u64>,
    /// The guest writes to them.
    pub written: bool,
}

/// See the module's text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<Run>,
}

impl WorkingSet {
    /// Of `runs`, which are in the order of their pages. None if they are not, one is empty, or they are beyond the bounds.
    pub fn of(runs: Vec<Run>) -> Option<Self> {
        let end = runs.iter().try_fold(0, |end, Run { pages, .. }| {
            (end <= pages.start && pages.start < pages.end).then_some(pages.end)
        });
        let set = Self { runs };
        let is_small = set.count(true) <= MOST_WRITTEN && set.count(false) <= MOST_READ;
        (end.is_some() && is_small && set.runs.len() <= MOST_RUNS).then_some(set)
    }

    /// The stretches, in order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Pages that are `written` to, or those that are only read.
    pub fn count(&self, written: bool) -> u64 {
        let runs = self.runs.iter().filter(|run| run.written == written);
        runs.map(|run| run.pages.end - run.pages.start).fold(0, u64::saturating_add)
    }

    /// What to read of the file, in pages.
    fn reads(&self) -> Vec<Range<u64>> {
        let mut reads: Vec<Range<u64>> = Vec::new();
        for Run { pages, .. } in &self.runs {
            match reads.last_mut() {
                Some(last) if pages.start - last.end <= GAP => last.end = pages.end,
                _ => reads.push(pages.clone()),
            }
        }
        reads
    }
}

/// What has been touched of a memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Pages that were read, as [`Memory::working_set`] has them.
    pub read: u64,
    /// Pages that were written to.
    pub written: u64,
    /// The guest addresses of those: [`MOST_RUNS`] stretches at most, the lowest.
    pub stretches: Vec<Range<u64>>,
}

impl Memory {
    /// What has been touched of this memory, if it is a private mapping of a file.
    pub fn touched_pages(&self, pagemap: &Pagemap) -> Option<Touched> {
        let mut touched = Touched::default();
        let Touched { read, written, stretches } = &mut touched;
        for region in self.ram.iter() {
            region.file_offset().filter(|_| self.is_private())?;
            let base = region.start_addr().0;
            let seen = pagemap.each(region, |page, entry| match entry {
                _ if entry & (PRESENT | SWAPPED) == 0 => {}
                _ if entry & OF_FILE != 0 => *read += 1,
                _ => {
                    *written += 1;
                    let (at, is_full) = (base + page * PAGE, stretches.len() == MOST_RUNS);
                    match stretches.last_mut() {
                        Some(last) if last.end == at => last.end += PAGE,
                        _ if is_full => {}
                        _ => stretches.push(at..at + PAGE),
                    }
                }
            });
            seen.ok()?;
        }
        Some(touched)
    }

    /// The guest addresses of the pages of `set` that are written to.
    pub fn written_in(&self, set: &WorkingSet) -> Vec<Range<u64>> {
        let mut stretches = Vec::new();
        for Run { pages, .. } in set.runs.iter().filter(|run| run.written) {
            for (place, region) in self.places() {
                let (start, end) = ((pages.start * PAGE).max(place.start), (pages.end * PAGE).min(place.end));
                if start < end {
                    let guest = region.start_addr().0;
                    stretches.push(guest + (start - place.start)..guest + (end - place.start));
                }
            }
        }
        stretches
    }

    /// The pages that have been touched of this memory, which is a private mapping of a file. The kernel maps some around those
    /// that are read, and they count as read. What is beyond the bounds is left out.
    ///
    /// # Errors
    /// They cannot be read from `pagemap`.
    pub fn working_set(&self, pagemap: &Pagemap) -> io::Result<WorkingSet> {
        let (mut runs, mut base): (Vec<Run>, u64) = Default::default();
        for region in self.ram.iter() {
            pagemap.each(region, |page, entry| {
                let (at, written) = (base + page, entry & OF_FILE == 0);
                match runs.last_mut() {
                    _ if entry & (PRESENT | SWAPPED) == 0 => {}
                    Some(run) if run.pages.end == at && run.written == written => run.pages.end += 1,
                    _ => runs.push(Run { pages: at..at + 1, written }),
                }
            })?;
            base += region.len() / PAGE;
        }
        let mut room = [MOST_READ, MOST_WRITTEN];
        runs.retain(|Run { pages, written }| {
            let room = &mut room[usize::from(*written)];
            let left = room.checked_sub(pages.end - pages.start);
            *room = left.unwrap_or(*room);
            left.is_some()
        });
        runs.truncate(MOST_RUNS);
        Ok(WorkingSet { runs })
    }

    /// Whether it is quicker to [`Memory::fetch`] the pages of `set` than to let the guest wait for each.
    pub fn lacks(&self, set: &WorkingSet) -> bool {
        set.count(true) >= FEW || !self.is_cached(set)
    }

    /// Has the host begin to read the pages of `set` if it lacks any, then copies those that will be written to.
    ///
    /// # Errors
    /// The host lacks memory, cannot read the file, or knows no such call (before Linux 5.14).
    pub fn fetch(&self, set: &WorkingSet) -> io::Result<()> {
        if !self.is_cached(set) {
            for pages in set.reads() {
                self.advise(pages, Advice::WillNeed)?;
            }
        }
        for Run { pages, .. } in set.runs.iter().filter(|run| run.written) {
            for start in pages.clone().step_by(AT_ONCE) {
                let end = pages.end.min(start + AT_ONCE as u64);
                self.advise(start..end, Advice::LinuxPopulateWrite)?;
            }
        }
        Ok(())
    }

    /// Whether the host has pages of `set` in memory, by some of them: to ask for all takes as long as to read them again. Where it
    /// does not say, it has not.
    fn is_cached(&self, set: &WorkingSet) -> bool {
        let every = set.runs.len().div_ceil(SAMPLES).max(1);
        let mut samples = set.runs.iter().step_by(every);
        samples.all(|run| {
            let (at, mut byte) = (run.pages.start * PAGE, [0]);
            let layer = self.layers.iter().rev().find(|layer| {
                let next = layer.runs.partition_point(|run| run.end <= at);
                layer.runs.get(next).is_some_and(|run| run.start <= at)
            });
            let bottom = self.ram.iter().next().and_then(|region| region.file_offset());
            let file = layer.map(|layer| layer.file.file()).or_else(|| Some(bottom?.file()));
            file.is_some_and(|file| {
                preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT).is_ok()
            })
        })
    }

    /// Gives the host `advice` on `pages`, as far as there are such.
    fn advise(&self, pages: Range<u64>, advice: Advice) -> io::Result<()> {
        let mut base = 0;
        for region in self.ram.iter() {
            let all = base..base + region.len() / PAGE;
            base = all.end;
            let (start, end) = (pages.start.max(all.start), pages.end.min(all.end));
            if start >= end {
                continue;
            }
            // SAFETY: `start` to `end` lies in the region's mapping; neither advice that is given changes contents.
            unsafe {
                let host = region.as_ptr().add(((start - all.start) * PAGE) as usize);
                madvise(host.cast(), ((end - start) * PAGE) as usize, advice)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn run(pages: Range<u64>, written: bool) -> Run {
        Run { pages, written }
    }

    fn saved() -> (Memory, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        for page in 0..4096u32 {
            file.write_all_at(&page.to_le_bytes(), u64::from(page) * PAGE).unwrap();
        }
        (Memory::private_copy(&"16M".parse().unwrap(), file.try_clone().unwrap().into()).unwrap(), file)
    }

    #[test]
    fn what_one_machine_touches_is_there_in_the_next() {
        let ((first, file), pagemap) = (saved(), Pagemap::open().unwrap());
        for page in [3, 4, 5, 1000] {
            first.ram().write_obj(7u8, GuestAddress(page * PAGE + 9)).unwrap();
        }
        first.ram().read_obj::<u8>(GuestAddress(2000 * PAGE)).unwrap();
        let set = first.working_set(&pagemap).unwrap();
        let written: Vec<_> = set.runs().iter().filter(|run| run.written).cloned().collect();
        assert_eq!(written, [run(3..6, true), run(1000..1001, true)]);
        let touched = first.touched_pages(&pagemap).unwrap();
        assert_eq!((touched.written, touched.read), (4, set.count(false)));
        assert_eq!(touched.stretches, [3 * PAGE..6 * PAGE, 1000 * PAGE..1001 * PAGE]);
        assert_eq!(first.written_in(&set), touched.stretches);
        let read = set.runs().iter().find(|run| run.pages.contains(&2000)).unwrap();
        assert!(!read.written && set.count(false) <= 64, "with some around it: {set:?}");
        assert_eq!(WorkingSet::of(set.runs().to_vec()), Some(set.clone()));

        let next = Memory::private_copy(&"16M".parse().unwrap(), file.into()).unwrap();
        assert_eq!(next.working_set(&pagemap).unwrap(), WorkingSet::default());
        assert!(next.is_cached(&set) && !next.lacks(&set), "four pages to write to");
        next.fetch(&set).unwrap();
        assert_eq!(next.working_set(&pagemap).unwrap().runs(), written, "read ahead is not mapped");
        for page in [3, 1000, 2000] {
            assert_eq!(next.ram().read_obj::<u32>(GuestAddress(page * PAGE)).unwrap(), page as u32);
        }
    }

    #[test]
    fn more_than_the_bounds_is_left_out() {
        let (memory, _file) = saved();
        for page in (0..4096).filter(|page| page % 512 != 0) {
            memory.ram().write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let set = memory.working_set(&Pagemap::open().unwrap()).unwrap();
        assert_eq!(set.count(true), 4088);
        assert!(WorkingSet::of(vec![run(0..MOST_WRITTEN, true)]).is_some());
        for runs in [
            vec![run(0..MOST_WRITTEN + 1, true)],
            vec![run(0..1, true), run(9..MOST_READ + 10, false)],
            (0..=MOST_RUNS as u64).map(|page| run(page..page + 1, page % 8 == 0)).collect(),
            vec![run(5..5, true)],
            vec![run(5..6, true), run(4..5, true)],
            vec![run(0..u64::MAX, false), run(u64::MAX..u64::MAX, true)],
        ] {
            assert_eq!(WorkingSet::of(runs), None);
        }
    }

    proptest! {
        #[test]
        fn a_set_of_anything_changes_no_contents(
            lens in prop::collection::vec((0u64..900, 1u64..300, any::<bool>()), 0..20),
            before in prop::collection::vec(0u32..4096, 0..5),
        ) {
            let (memory, _file) = saved();
            for page in &before {
                memory.ram().write_obj(!*page, GuestAddress(u64::from(*page) * PAGE)).unwrap();
            }
            let mut end = 0;
            let runs = lens.into_iter().map(|(gap, len, written)| {
                let start = end + gap;
                end = start + len;
                run(start..end, written)
            });
            if let Some(set) = WorkingSet::of(runs.collect()) {
                memory.fetch(&set).unwrap();
            }
            for page in 0..4096u32 {
                let expected = if before.contains(&page) { !page } else { page };
                prop_assert_eq!(memory.ram().read_obj::<u32>(GuestAddress(u64::from(page) * PAGE)).unwrap(), expected);
            }
        }
    }
}
