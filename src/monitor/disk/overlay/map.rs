//! [`Map`]: which clusters are in an overlay. Clusters only ever come; several threads may look and add at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a block of the map, in memory and in a file.
pub const BLOCK: usize = 4096;
const WORD_BITS: u64 = 64;
const WORDS: usize = BLOCK / size_of::<u64>();
/// Clusters that a block tells of.
const CLUSTERS: u64 = 8 * BLOCK as u64;

type Block = [AtomicU64; WORDS];

/// A bit per cluster, in blocks that are made when a cluster of theirs comes: what is not written to costs 16 bytes
/// for each 128 MiB of the disk.
#[derive(Debug)]
pub struct Map(Vec<OnceLock<Box<Block>>>);

impl Map {
    /// One of `clusters`, none of which is there.
    pub fn new(clusters: u64) -> Self {
        Self((0..Self::blocks(clusters)).map(|_| OnceLock::new()).collect())
    }

    /// How many blocks tell of `clusters`.
    pub fn blocks(clusters: u64) -> u64 {
        clusters.div_ceil(CLUSTERS)
    }

    fn word(&self, index: u64) -> u64 {
        let (block, word) = (index as usize / WORDS, index as usize % WORDS);
        let block = self.0.get(block).and_then(OnceLock::get);
        // What was written to a cluster before it came is to be seen with it.
        block.map_or(0, |block| block[word].load(Ordering::Acquire))
    }

    fn block(&self, index: usize) -> Option<&Block> {
        let block = self.0.get(index)?;
        Some(block.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS])))
    }

    /// Whether `cluster` is there, and the first one after it, at most `end`, of which that is not true.
    pub fn run(&self, cluster: u64, end: u64) -> (bool, u64) {
        let is_there = self.word(cluster / WORD_BITS) >> (cluster % WORD_BITS) & 1 != 0;
        let mut at = cluster + 1;
        while at < end {
            let word = self.word(at / WORD_BITS);
            let others = if is_there { !word } else { word } >> (at % WORD_BITS);
            if others != 0 {
                at += u64::from(others.trailing_zeros());
                break;
            }
            at += WORD_BITS - at % WORD_BITS;
        }
        (is_there, at.min(end))
    }

    /// The clusters from `first` to before `end` are there now. Calls `changed` with each block that this changes.
    pub fn add(&self, first: u64, end: u64, mut changed: impl FnMut(usize)) {
        let mut at = first;
        while at < end {
            let index = (at / WORD_BITS) as usize;
            let next = (at / WORD_BITS + 1) * WORD_BITS;
            let above = !0 << (at % WORD_BITS);
            let bits = if next <= end { above } else { above & !(!0 << (end % WORD_BITS)) };
            let Some(block) = self.block(index / WORDS) else { return };
            if block[index % WORDS].fetch_or(bits, Ordering::Release) & bits != bits {
                changed(index / WORDS);
            }
            at = next;
        }
    }

    /// The blocks that were made.
    pub fn made(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().filter(|(_, block)| block.get().is_some()).map(|(index, _)| index)
    }

    /// A block as it is in a file.
    pub fn bytes(&self, block: usize) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        for (word, bytes) in bytes.chunks_exact_mut(size_of::<u64>()).enumerate() {
            bytes.copy_from_slice(&self.word((block * WORDS + word) as u64).to_le_bytes());
        }
        bytes
    }

    /// Adds the clusters of a block as it is in a file.
    pub fn load(&self, block: usize, bytes: &[u8; BLOCK]) {
        let words = bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        for (index, word) in words.enumerate().filter(|(_, word)| *word != 0) {
            if let Some(block) = self.block(block) {
                block[index].fetch_or(word, Ordering::Release);
            }
        }
    }

    /// Whether a cluster from `clusters` on is there, of which there should be none.
    pub fn goes_beyond(&self, clusters: u64) -> bool {
        let all = (self.0.len() as u64) * CLUSTERS;
        clusters < all && self.run(clusters, all) != (false, all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_come_and_runs_end_where_they_should() {
        let map = Map::new(CLUSTERS + 100);
        let end = CLUSTERS + 100;
        assert_eq!(map.run(0, end), (false, end));
        for (first, last) in [(3, 4), (60, 70), (128, 256), (CLUSTERS - 1, CLUSTERS + 1)] {
            let mut changed = Vec::new();
            map.add(first, last, |block| changed.push(block));
            assert!(changed.contains(&((first / CLUSTERS) as usize)));
            map.add(first, last, |block| panic!("block {block} had it all"));
            assert_eq!(map.run(first, end), (true, last));
            assert_eq!(map.run(first, first + 1), (true, first + 1));
        }
        map.add(7, 7, |_| panic!("none is none"));
        for (cluster, run) in [(0, (false, 3)), (4, (false, 60)), (61, (true, 70)), (70, (false, 128))] {
            assert_eq!(map.run(cluster, end), run);
        }
        assert_eq!(map.run(256, end), (false, CLUSTERS - 1));
        assert!(!map.goes_beyond(end) && !map.goes_beyond(CLUSTERS + 1) && map.goes_beyond(CLUSTERS));
    }

    #[test]
    fn a_block_reads_back() {
        let (map, again) = (Map::new(2 * CLUSTERS), Map::new(2 * CLUSTERS));
        map.add(CLUSTERS + 9, CLUSTERS + 700, |_| {});
        let bytes = map.bytes(1);
        assert_eq!((bytes[0], bytes[1]), (0, 0b1111_1110), "bit 9 is in byte 1");
        again.load(1, &bytes);
        assert_eq!(again.run(CLUSTERS + 9, 2 * CLUSTERS), (true, CLUSTERS + 700));
        assert_eq!(again.run(0, 2 * CLUSTERS), (false, CLUSTERS + 9));
    }
}
