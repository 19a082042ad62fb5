//! [`DirtyPages`]: which pages of RAM were written to, as the hypervisor's log has it.

/// Bytes that a bit of the log stands for.
pub const PAGE: u64 = 4096;

/// Pages that the guest's processors wrote to between two looks at the log. What devices wrote is not in it: they write to
/// the monitor's own mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirtyPages {
    /// By region: its guest physical address, and a bit for each of its pages.
    regions: Vec<(u64, Vec<u64>)>,
}

impl DirtyPages {
    /// Adds the region at guest physical address `base`: a bit for each page, the lowest first.
    pub fn add(&mut self, base: u64, bitmap: Vec<u64>) {
        self.regions.push((base, bitmap));
    }

    /// The pages' guest physical addresses, in order within each region.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        self.regions.iter().flat_map(|(base, bitmap)| {
            let word = move |(index, word): (usize, &u64)| {
                let (first, word) = (base + index as u64 * 64 * PAGE, *word);
                (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit * PAGE)
            };
            bitmap.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(word)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_pages() {
        let mut dirty = DirtyPages::default();
        assert_eq!(dirty.pages().count(), 0);
        dirty.add(0, vec![0, 1 << 63 | 1]);
        dirty.add(1 << 32, vec![0b110]);
        let pages: Vec<_> = dirty.pages().collect();
        assert_eq!(pages, [64 * PAGE, 127 * PAGE, (1 << 32) + PAGE, (1 << 32) + 2 * PAGE]);
    }
}
