//! The guest's memory map, in the terms of e820 (ACPI 6.5, 15.1), which PVH shares.
//!
//! The loaders pass it on to the kernel; a dry run prints it.

use std::fmt;
use std::ops::Range;

use crate::memory::layout;

/// What a range is for. The numbers are e820's and PVH's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM to use freely.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical addresses.
    pub range: Range<u64>,
    /// What they are for.
    pub kind: Kind,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.kind == Kind::Ram { "RAM" } else { "reserved" };
        write!(f, "{:#014x}..{:#014x} {kind}", self.range.start, self.range.end)
    }
}

/// The map of a guest with `size` bytes of RAM, lowest address first.
pub fn map(size: u64) -> Vec<Entry> {
    let tables = layout::ACPI..layout::HIGH_RAM;
    let mut map = vec![
        Entry { range: 0..layout::LOW_END, kind: Kind::Ram },
        Entry { range: tables, kind: Kind::Reserved },
    ];
    for range in layout::ram(size) {
        let range = range.start.max(layout::HIGH_RAM)..range.end;
        if !range.is_empty() {
            map.push(Entry { range, kind: Kind::Ram });
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ram_but_the_legacy_hole_and_the_tables_is_usable() {
        const GIB: u64 = 1 << 30;
        for size in [128 << 20, 3 * GIB, 5 * GIB, 1024 * GIB] {
            let map = map(size);
            assert!(map.windows(2).all(|w| w[0].range.end <= w[1].range.start), "{map:?}");
            let usable = map.iter().filter(|e| e.kind == Kind::Ram);
            let usable: u64 = usable.map(|e| e.range.end - e.range.start).sum();
            assert_eq!(usable, size - (layout::HIGH_RAM - layout::LOW_END));
            assert!(
                map.iter().all(|e| e.range.end <= layout::HOLE.start || e.range.start >= layout::HOLE.end)
            );
        }
        assert_eq!(map(5 * GIB).len(), 4);
        assert_eq!(map(GIB)[2].to_string(), "0x000000100000..0x000040000000 RAM");
    }
}
