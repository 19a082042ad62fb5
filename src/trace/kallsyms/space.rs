//! A guest's virtual memory, by its own page tables, read from RAM while its vCPUs stand still or are gone.
//!
//! SDM vol. 3, 4.5. The tables are the guest's, who may put anything into them: each walk is bounded by the levels, and what
//! leads out of RAM is not mapped.

use std::cell::RefCell;
use std::ops::Range;

use zerocopy::IntoBytes;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_monitor::memory::GuestRam;

use super::Budget;

/// CR4.LA57: five levels.
const LA57: u64 = 1 << 12;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// An address space.
#[derive(Debug)]
pub struct Space<'a> {
    ram: &'a GuestRam,
    root: u64,
    levels: u32,
    budget: &'a Budget<'a>,
    /// By level: the table that was walked last, and where it is. Nobody changes it any more.
    tables: RefCell<[(u64, Vec<u64>); 5]>,
}

/// Steps that finding a page takes.
const WALK: usize = 30;
/// Entries of a table.
const ENTRIES: usize = 512;

/// What an address leads to: a page that begins there, or nothing; and how many bytes share that fate.
type Page = (Option<u64>, u64);

impl<'a> Space<'a> {
    /// That of a vCPU with these registers, in long mode; as long as `budget` lasts.
    pub fn new(ram: &'a GuestRam, cr3: u64, cr4: u64, budget: &'a Budget<'a>) -> Self {
        let levels = if cr4 & LA57 != 0 { 5 } else { 4 };
        let tables = RefCell::new(std::array::from_fn(|_| (u64::MAX, Vec::new())));
        Self { ram, root: cr3 & ADDRESS, levels, budget, tables }
    }

    /// What reading it may take.
    pub fn budget(&self) -> &'a Budget<'a> {
        self.budget
    }

    /// Bytes of RAM that there are at most, however often they are mapped.
    pub fn size(&self) -> usize {
        let all = self.ram.iter().map(|region| region.len()).fold(0, u64::saturating_add);
        usize::try_from(all).unwrap_or(usize::MAX)
    }

    fn page(&self, address: u64) -> Page {
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * level;
            let size = 1 << shift;
            let entry = self.entry(level, table, (address >> shift) as usize % ENTRIES);
            if entry & PRESENT == 0 {
                return (None, size);
            }
            if level == 0 || (level < 3 && entry & LARGE != 0) {
                return (Some(entry & ADDRESS & !(size - 1)), size);
            }
            table = entry & ADDRESS;
        }
        (None, 1 << 12)
    }

    /// An entry of the table at `table`; one that is not present where that is no memory.
    fn entry(&self, level: u32, table: u64, number: usize) -> u64 {
        let (at, entries) = &mut self.tables.borrow_mut()[level as usize];
        if *at != table {
            entries.resize(ENTRIES, 0);
            if self.ram.read_slice(entries.as_mut_bytes(), GuestAddress(table)).is_err() {
                entries.fill(0);
            }
            *at = table;
        }
        u64::from_le(entries[number])
    }

    /// Fills `bytes` from `address`; false if not all of that is memory, or the budget is used up.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            if !self.budget.goes_on(WALK) {
                return false;
            }
            let Some(at) = address.checked_add(done as u64) else { return false };
            let (Some(page), size) = self.page(at) else { return false };
            let offset = at & (size - 1);
            let len = usize::try_from(size - offset).unwrap_or(usize::MAX).min(bytes.len() - done);
            // Of a large page all is read at once.
            let _ = self.budget.goes_on(len / 16);
            if self.ram.read_slice(&mut bytes[done..done + len], GuestAddress(page + offset)).is_err() {
                return false;
            }
            done += len;
        }
        true
    }

    /// The stretches of `range` that are mapped.
    pub fn mapped(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end && self.budget.goes_on(WALK) {
            let (page, size) = self.page(at);
            let end = (at & !(size - 1)).saturating_add(size).min(range.end);
            if page.is_some() {
                match found.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ => found.push(at..end),
                }
            }
            at = end;
        }
        found
    }
}
