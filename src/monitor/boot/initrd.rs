//! Where the initial RAM disk goes: as high as the kernel allows, clear of the kernel itself.
//!
//! The loaders call it once they know what the kernel takes. High, because the kernel frees the low memory around
//! itself early and hands it out; that is where every boot loader puts it.

use std::ops::Range;

use super::Boot;
use super::error::Error;
use crate::memory::layout;

const PAGE: u64 = 0x1000;

/// What the boot protocol says of the place.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// First byte below 4 GiB that the initrd must not touch.
    pub below: u64,
    /// It may lie above 4 GiB if there is no room below.
    pub above_4g: bool,
}

/// Loads the initrd, if there is one, beside a kernel that takes `kernel`. Gives its place; empty if there is none.
///
/// # Errors
/// [`Error::InitrdTooBig`], and what reading the file gives.
pub(super) fn load(boot: &Boot, kernel: &Range<u64>, limits: Limits) -> Result<Range<u64>, Error> {
    let Some(initrd) = boot.initrd else { return Ok(0..0) };
    let size = initrd.len();
    let start = place(size, kernel, &layout::ram(boot.memory.size()), limits).ok_or_else(|| {
        let needed = needed(size, kernel, limits);
        Error::InitrdTooBig { path: initrd.path().to_owned(), size, needed }
    })?;
    initrd.load(0, size, boot.memory.ram(), start, "the initrd")?;
    Ok(start..start + size)
}

/// The highest page-aligned place for `size` bytes: below 4 GiB if possible, since all kernels take it there.
pub(super) fn place(size: u64, kernel: &Range<u64>, ram: &[Range<u64>], limits: Limits) -> Option<u64> {
    let low_end = ram.first()?.end.min(limits.below);
    let above_kernel = kernel.end.next_multiple_of(PAGE)..low_end;
    let above_4g = ram.get(1).filter(|_| limits.above_4g).cloned().unwrap_or(0..0);
    let below_kernel = layout::HIGH_RAM..kernel.start.min(low_end);
    [above_kernel, above_4g, below_kernel].into_iter().find_map(|free| {
        let start = free.end.checked_sub(size)? & !(PAGE - 1);
        (start >= free.start).then_some(start)
    })
}

/// The least guest memory, in bytes, that makes room.
pub(super) fn needed(size: u64, kernel: &Range<u64>, limits: Limits) -> Option<u64> {
    let pages = size.checked_next_multiple_of(PAGE)?;
    let low = kernel.end.next_multiple_of(PAGE).checked_add(pages)?;
    if low <= limits.below.min(layout::HOLE.start) {
        return Some(low);
    }
    limits.above_4g.then(|| pages.checked_add(layout::HOLE.start)).flatten().filter(|n| *n <= layout::MAX_RAM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const ANY: Limits = Limits { below: layout::HOLE.start, above_4g: true };

    #[test]
    fn goes_as_high_as_allowed() {
        let kernel = 16 * MIB..80 * MIB;
        let at = |size, mem, limits| place(size, &kernel, &layout::ram(mem), limits);
        assert_eq!(at(10 * MIB, 128 * MIB, ANY), Some(118 * MIB));
        assert_eq!(at(1, 128 * MIB, ANY), Some(128 * MIB - PAGE));
        assert_eq!(at(48 * MIB, 128 * MIB, ANY), Some(80 * MIB));
        assert_eq!(at(10 * MIB, 85 * MIB, ANY), Some(6 * MIB), "below the kernel");
        assert_eq!(at(48 * MIB + 1, 128 * MIB, ANY), None);
        let two_gib = Limits { below: 0x7fff_ffff + 1, above_4g: false };
        assert_eq!(at(MIB, 8192 * MIB, two_gib), Some(2047 * MIB));
        assert_eq!(at(MIB, 8192 * MIB, ANY), Some(layout::HOLE.start - MIB));
        assert_eq!(at(3072 * MIB, 8192 * MIB, ANY), Some(layout::HOLE.end + 2048 * MIB));
        assert_eq!(at(3072 * MIB, 8192 * MIB, two_gib), None);
    }

    proptest! {
        /// What is found is free RAM within the limits, and `needed` tells the truth.
        #[test]
        fn place_and_needed_agree(
            size in prop_oneof![1..4096u64 * MIB, any::<u64>()],
            start in MIB..64 * MIB,
            span in 1..512 * MIB,
            mem in 2..16384u64,
            below in prop_oneof![Just(layout::HOLE.start), MIB..layout::HOLE.start],
            above_4g: bool,
        ) {
            let kernel = start..start + span;
            let limits = Limits { below, above_4g };
            let ram = layout::ram(mem * MIB);
            if let Some(at) = place(size, &kernel, &ram, limits) {
                let end = at + size;
                prop_assert!(at % PAGE == 0 && (end <= kernel.start || at >= kernel.end));
                prop_assert!(at >= layout::HIGH_RAM && ram.iter().any(|r| r.start <= at && end <= r.end));
                prop_assert!(end <= below || (above_4g && at >= layout::HOLE.end));
            }
            if let Some(enough) = needed(size, &kernel, limits) {
                prop_assert!(place(size, &kernel, &layout::ram(enough), limits).is_some());
            }
        }
    }
}
