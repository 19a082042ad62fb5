//! Linux's setup header (Documentation/arch/x86/boot.rst), and where kernel and initrd go in memory.

use crate::bytes::{u8_at, u16_at, u32_at, u64_at};
use crate::{Error, Result};
use core::ops::Range;

/// How much of a kernel's file [`Setup::parse`] wants.
pub const HEAD: usize = 1024;
/// Where the setup header lies, in the file and in boot_params.
pub const HEADER: usize = 0x1f1;
const PAGE: u64 = 4096;

/// What the setup header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Where the protected-mode part begins in the file.
    pub start: u64,
    /// Where the header ends.
    pub header_end: usize,
    /// Where the kernel wants to lie.
    pub preferred: u64,
    /// Memory that it needs from there until it has read its memory map.
    pub init_size: u64,
    /// What its address must be a multiple of; 0 if it can lie nowhere else.
    pub alignment: u64,
    /// The initrd's last byte may lie here.
    pub initrd_max: u64,
    /// The longest command line, without its NUL.
    pub cmdline_max: usize,
}

impl Setup {
    /// Parses the first [`HEAD`] bytes of a kernel of `size` bytes.
    ///
    /// # Errors
    /// No bzImage with a 64-bit entry.
    pub fn parse(head: &[u8], size: u64) -> Result<Self> {
        if head.len() < HEAD || head.get(0x202..0x206) != Some(b"HdrS") || u16_at(head, 0x1fe) != 0xaa55 {
            return Err(Error::Unsupported("a kernel that is no bzImage"));
        }
        // xloadflags, with the 64-bit entry's bit, came with 2.12.
        if u16_at(head, 0x206) < 0x20c || u16_at(head, 0x236) & 1 == 0 {
            return Err(Error::Unsupported("a kernel without 64-bit entry"));
        }
        let sectors = match u8_at(head, HEADER) {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let alignment = u64::from(u32_at(head, 0x230));
        let setup = Self {
            start: (sectors + 1) * 512,
            header_end: (0x202 + usize::from(u8_at(head, 0x201))).min(0x290),
            preferred: u64_at(head, 0x258),
            init_size: u64::from(u32_at(head, 0x260)),
            alignment: if u8_at(head, 0x234) != 0 { alignment } else { 0 },
            initrd_max: u64::from(u32_at(head, 0x22c)),
            cmdline_max: u32_at(head, 0x238) as usize,
        };
        let good = setup.alignment == 0 || setup.alignment.is_power_of_two();
        if !good || setup.header_end <= HEADER || size <= setup.start || size - setup.start > setup.init_size
        {
            return Err(Error::Damaged("the kernel's setup header"));
        }
        Ok(setup)
    }

    /// Where the kernel goes: where it prefers to be, else the lowest address that will do. `taken` are ranges of `ram` that
    /// are not free.
    pub fn place(&self, ram: &[Range<u64>], taken: &[Range<u64>]) -> Option<u64> {
        if is_free(self.preferred, self.init_size, ram, taken) {
            return Some(self.preferred);
        }
        if self.alignment == 0 {
            return None;
        }
        // It lies at the beginning of free memory: of a range, or behind something that is taken.
        let starts = ram.iter().map(|range| range.start).chain(taken.iter().map(|range| range.end));
        let aligned = starts.filter_map(|start| start.checked_next_multiple_of(self.alignment));
        aligned.filter(|start| is_free(*start, self.init_size, ram, taken)).min()
    }
}

/// Where `size` bytes go whose last one may lie at `max`: as high as there is room.
pub fn place_initrd(size: u64, max: u64, ram: &[Range<u64>], taken: &[Range<u64>]) -> Option<u64> {
    let limit = max.saturating_add(1);
    let ends = ram.iter().map(|range| range.end).chain(taken.iter().map(|range| range.start));
    let starts = ends.filter_map(|end| Some(end.min(limit).checked_sub(size)? / PAGE * PAGE));
    starts.filter(|start| is_free(*start, size, ram, taken)).max()
}

fn is_free(start: u64, size: u64, ram: &[Range<u64>], taken: &[Range<u64>]) -> bool {
    let Some(end) = start.checked_add(size) else { return false };
    ram.iter().any(|range| range.start <= start && end <= range.end)
        && taken.iter().all(|range| end <= range.start || range.end <= start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::slice;

    const SETUP: Setup = Setup {
        start: 0,
        header_end: 0x270,
        preferred: 16 << 20,
        init_size: 40 << 20,
        alignment: 2 << 20,
        initrd_max: (2 << 30) - 1,
        cmdline_max: 2047,
    };

    #[test]
    fn the_kernel_goes_where_it_prefers_or_where_there_is_room() {
        let ours = 1 << 20..3 << 20;
        let ram = |mib: u64| [0..640 << 10, 1 << 20..mib << 20];
        assert_eq!(SETUP.place(&ram(1024), slice::from_ref(&ours)), Some(16 << 20));
        assert_eq!(SETUP.place(&ram(48), slice::from_ref(&ours)), Some(4 << 20));
        assert_eq!(SETUP.place(&ram(40), slice::from_ref(&ours)), None);
        let (kernel, size) = (16 << 20..56 << 20, 5 << 20);
        let taken = [ours, kernel];
        assert_eq!(place_initrd(size, SETUP.initrd_max, &ram(1024), &taken), Some(1019 << 20));
        assert_eq!(place_initrd(size, SETUP.initrd_max, &ram(4096), &taken), Some(2043 << 20));
        assert_eq!(place_initrd(size, SETUP.initrd_max, &ram(60), &taken), Some(11 << 20));
        assert_eq!(place_initrd(60 << 20, SETUP.initrd_max, &ram(60), &taken), None);
    }
}
