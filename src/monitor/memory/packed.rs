//! [`Packed`]: RAM in a file, compressed in pieces of 64 KiB, each on its own: any of them can be read without the others.
//!
//! The file is a head (`VMMPACK` and the format's version, bytes of RAM, where the index is, the CRC-32 of the index and of the head),
//! the pieces that are not zeroes, and the index: for each piece where it is, its length there and the CRC-32 of what it expands to. A
//! length of 0 is zeroes, and that of the piece itself is one that is not compressed.
//!
//! Such a file is as untrusted as the rest of a snapshot: whatever it says, a piece is read from within the file, and never expands
//! beyond the 64 KiB that it has room for.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

use super::touched::union;

/// RAM that is compressed at once, and expanded at once.
pub const PIECE: u64 = 64 << 10;
/// Where the last byte is the format's version.
const MAGIC: [u8; 8] = *b"VMMPACK\x01";
const HEAD: u64 = 32;
/// An entry of the index, in bytes.
const ENTRY: usize = 16;
/// Of zstd's: the quickest of the usual ones.
const LEVEL: i32 = 1;

/// See the module's text.
#[derive(Debug)]
pub struct Packed {
    file: File,
    size: u64,
    index: Vec<Entry>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    at: u64,
    len: u32,
    sum: u32,
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..].copy_from_slice(&self.sum.to_le_bytes());
        bytes
    }

    fn of(bytes: &[u8; ENTRY]) -> Self {
        let number =
            |range: Range<usize>| bytes[range].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
        Self { at: number(0..8), len: number(8..12) as u32, sum: number(12..16) as u32 }
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Bytes of the piece that begins at `at`.
fn piece_len(size: u64, at: u64) -> usize {
    PIECE.min(size - at) as usize
}

impl Packed {
    /// The one in `file`, of `size` bytes of RAM.
    ///
    /// # Errors
    /// It is none, not all of it, or of another size.
    pub fn open(file: File, size: u64) -> io::Result<Self> {
        let mut head = [0; HEAD as usize];
        let len = file.metadata()?.len();
        file.read_exact_at(&mut head, 0).map_err(|_| damaged("cut short"))?;
        let [magic, its_size, index_at, sums] = head.as_chunks::<8>().0 else {
            return Err(damaged("cut short"));
        };
        let (its_size, index_at) = (u64::from_le_bytes(*its_size), u64::from_le_bytes(*index_at));
        let [index_sum, head_sum] =
            [0, 4].map(|at| sums[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)));
        if *magic != MAGIC || crc32fast::hash(&head[..HEAD as usize - 4]) != head_sum {
            return Err(damaged("not compressed memory"));
        }
        if its_size != size {
            return Err(damaged(&format!("{its_size} bytes, and {size} were saved")));
        }
        let index_len = size.div_ceil(PIECE).checked_mul(ENTRY as u64);
        if index_len.is_none() || len.checked_sub(index_at) != index_len {
            return Err(damaged("cut short"));
        }
        // No longer than the file is.
        let mut index = vec![0; (len - index_at) as usize];
        file.read_exact_at(&mut index, index_at)?;
        if crc32fast::hash(&index) != index_sum {
            return Err(damaged("the checksum of its index is wrong"));
        }
        let index: Vec<_> = index.as_chunks().0.iter().map(Entry::of).collect();
        let is_possible = |(entry, at): (&Entry, u64)| {
            let end = entry.at.checked_add(u64::from(entry.len));
            let is_inside = HEAD <= entry.at && end.is_some_and(|end| end <= index_at);
            entry.len == 0 || is_inside && entry.len as usize <= piece_len(size, at)
        };
        if !index.iter().zip((0..).step_by(PIECE as usize)).all(is_possible) {
            return Err(damaged("its index is impossible"));
        }
        Ok(Self { file, size, index })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The pieces that are not zeroes.
    pub fn data(&self) -> Vec<Range<u64>> {
        let pieces = self.index.iter().zip((0..).step_by(PIECE as usize)).filter(|(entry, _)| entry.len > 0);
        union(pieces.map(|(_, at)| at..at + piece_len(self.size, at) as u64).collect())
    }

    /// Reads the `bytes` from `at` on: quickest in whole pieces.
    ///
    /// # Errors
    /// The file's, or it is damaged.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(bytes.len() as u64).filter(|end| *end <= self.size);
        let end = end.ok_or_else(|| damaged("it is shorter"))?;
        let mut decompressor = None;
        let mut whole = Vec::new();
        let mut here = at;
        while here < end {
            let start = here / PIECE * PIECE;
            let len = piece_len(self.size, start);
            let next = end.min(start + len as u64);
            let part = &mut bytes[(here - at) as usize..(next - at) as usize];
            if part.len() == len {
                self.expand(start, part, &mut decompressor)?;
            } else {
                whole.resize(len, 0);
                self.expand(start, &mut whole, &mut decompressor)?;
                part.copy_from_slice(&whole[(here - start) as usize..(next - start) as usize]);
            }
            here = next;
        }
        Ok(())
    }

    /// Reads what the file has at `place`.
    fn get(&self, bytes: &mut [u8], place: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, place).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it was cut short"),
            _ => error,
        })
    }

    /// Reads the piece from `at` on, which is as long as `piece`.
    fn expand(
        &self,
        at: u64,
        piece: &mut [u8],
        decompressor: &mut Option<Decompressor<'static>>,
    ) -> io::Result<()> {
        let Entry { at: place, len, sum } = self.index[(at / PIECE) as usize];
        if len == 0 {
            piece.fill(0);
            return Ok(());
        }
        if len as usize == piece.len() {
            self.get(piece, place)?;
        } else {
            let mut packed = vec![0; len as usize];
            self.get(&mut packed, place)?;
            let decompressor = match decompressor {
                Some(decompressor) => decompressor,
                None => decompressor.insert(Decompressor::new()?),
            };
            // It writes no further than `piece` is long.
            let expanded = decompressor.decompress_to_buffer(&packed, &mut *piece);
            if expanded.map_err(|_| damaged("a piece of it does not expand to what it was"))? != piece.len() {
                return Err(damaged("a piece of it expands to less than it was"));
            }
        }
        match crc32fast::hash(piece) == sum {
            true => Ok(()),
            false => Err(damaged("the checksum of a piece is wrong")),
        }
    }
}

/// Makes such a file of what it is given in order.
pub struct Packer<'a> {
    file: &'a File,
    size: u64,
    /// Where the next piece goes.
    end: u64,
    index: Vec<Entry>,
    compressor: Compressor<'static>,
    /// The piece that is being filled, and its number.
    piece: Vec<u8>,
    number: Option<u64>,
    packed: Vec<u8>,
}

impl<'a> Packer<'a> {
    /// In the empty `file`, of `size` bytes of RAM, which are zeroes as far as they are not [put](Self::put).
    ///
    /// # Errors
    /// The host is out of memory.
    pub fn new(file: &'a File, size: u64) -> io::Result<Self> {
        Ok(Self {
            file,
            size,
            end: HEAD,
            index: vec![Entry::default(); size.div_ceil(PIECE) as usize],
            compressor: Compressor::new(LEVEL)?,
            piece: Vec::new(),
            number: None,
            packed: Vec::with_capacity(compress_bound(PIECE as usize)),
        })
    }

    /// Takes `bytes`, which are at `at` and behind all that it was given before.
    ///
    /// # Errors
    /// The file's.
    pub fn put(&mut self, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let number = at / PIECE;
            if self.number != Some(number) {
                self.write()?;
                self.number = Some(number);
                self.piece.clear();
                self.piece.resize(piece_len(self.size, number * PIECE), 0);
            }
            let offset = (at - number * PIECE) as usize;
            let (here, rest) = bytes.split_at(bytes.len().min(self.piece.len() - offset));
            self.piece[offset..offset + here.len()].copy_from_slice(here);
            (at, bytes) = (at + here.len() as u64, rest);
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(number) = self.number.take() else { return Ok(()) };
        self.packed.clear();
        let len = self.compressor.compress_to_buffer(&self.piece, &mut self.packed)?;
        let bytes = if len < self.piece.len() { &self.packed[..len] } else { &self.piece };
        self.file.write_all_at(bytes, self.end)?;
        let (len, sum) = (bytes.len() as u32, crc32fast::hash(&self.piece));
        self.index[number as usize] = Entry { at: self.end, len, sum };
        self.end += u64::from(len);
        Ok(())
    }

    /// Completes the file.
    ///
    /// # Errors
    /// The file's.
    pub fn finish(mut self) -> io::Result<()> {
        self.write()?;
        let index: Vec<u8> = self.index.iter().flat_map(|entry| entry.to_bytes()).collect();
        self.file.write_all_at(&index, self.end)?;
        let mut head = [&MAGIC[..], &self.size.to_le_bytes(), &self.end.to_le_bytes()].concat();
        head.extend(crc32fast::hash(&index).to_le_bytes());
        head.extend(crc32fast::hash(&head).to_le_bytes());
        self.file.write_all_at(&head, 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RAM that compresses well, badly and not at all, and ends within a piece.
    fn ram() -> Vec<u8> {
        let mut ram = vec![0; (4 * PIECE + 0x3000) as usize];
        let mut random = 1u64;
        for (at, byte) in ram.iter_mut().enumerate() {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = match at as u64 / PIECE {
                0 | 3 => (at / 100) as u8,
                2 | 4 => (random >> 56) as u8,
                _ => 0,
            };
        }
        ram
    }

    fn packed(ram: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        let mut packer = Packer::new(&file, ram.len() as u64).unwrap();
        for (at, block) in (0..).step_by(4096).zip(ram.chunks(4096)) {
            if block.iter().any(|byte| *byte != 0) {
                packer.put(at, block).unwrap();
            }
        }
        packer.finish().unwrap();
        file
    }

    fn copy_with(file: &File, change: impl FnOnce(&mut Vec<u8>)) -> File {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        change(&mut bytes);
        let copy = tempfile::tempfile().unwrap();
        copy.write_all_at(&bytes, 0).unwrap();
        copy
    }

    #[test]
    fn what_was_put_comes_back_from_anywhere() {
        let ram = ram();
        let size = ram.len() as u64;
        let file = packed(&ram);
        assert!(file.metadata().unwrap().len() < size / 2);
        let packed = Packed::open(file, size).unwrap();
        assert_eq!(packed.data(), [0..PIECE, 2 * PIECE..size]);
        for range in [0..size, 0..4096, PIECE - 4096..2 * PIECE + 4096, size - 4096..size, 5..5] {
            let mut bytes = vec![9; (range.end - range.start) as usize];
            packed.read(range.start, &mut bytes).unwrap();
            assert!(bytes == ram[range.start as usize..range.end as usize], "{range:?}");
        }
        assert!(packed.read(size - 4, &mut [0; 8]).is_err());
    }

    #[test]
    fn another_size_and_a_file_that_is_cut_are_refused() {
        let file = packed(&ram());
        let size = ram().len() as u64;
        for size in [0, size - 4096, size + 4096, u64::MAX] {
            assert!(Packed::open(file.try_clone().unwrap(), size).is_err(), "{size}");
        }
        for len in [0, 8, HEAD as usize, HEAD as usize + 100] {
            let cut = copy_with(&file, |bytes| bytes.truncate(len));
            assert!(Packed::open(cut, size).is_err(), "{len}");
        }
    }

    #[test]
    fn an_index_that_is_right_by_its_checksums_leads_nowhere_else() {
        let (file, size) = (packed(&ram()), ram().len() as u64);
        let index = file.metadata().unwrap().len() as usize - 5 * ENTRY;
        let with = |entry: Entry| {
            copy_with(&file, |bytes| {
                bytes[index..index + ENTRY].copy_from_slice(&entry.to_bytes());
                let sum = crc32fast::hash(&bytes[index..]).to_le_bytes();
                bytes[24..28].copy_from_slice(&sum);
                let sum = crc32fast::hash(&bytes[..28]).to_le_bytes();
                bytes[28..32].copy_from_slice(&sum);
            })
        };
        let entry = |at: u64, len: u32| Entry { at, len, sum: 0 };
        for entry in [entry(0, 9), entry(index as u64, 9), entry(u64::MAX, 9), entry(32, PIECE as u32 + 1)] {
            assert!(Packed::open(with(entry), size).is_err(), "{entry:?}");
        }
        // Another piece's bytes, and such as would expand beyond all bounds.
        let bomb = zstd::bulk::compress(&vec![7; 64 << 20], 1).unwrap();
        let bombed = copy_with(&with(entry(32, bomb.len() as u32)), |bytes| {
            bytes[32..32 + bomb.len()].copy_from_slice(&bomb);
        });
        for file in [with(entry(40, 100)), bombed] {
            let packed = Packed::open(file, size).unwrap();
            let mut bytes = vec![0; PIECE as usize];
            assert!(packed.read(0, &mut bytes).is_err());
            assert!(packed.read(3 * PIECE, &mut bytes).is_ok(), "the others are whole");
        }
    }

    proptest! {
        #[test]
        fn a_bit_that_fell_over_is_seen_or_makes_no_difference(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let ram = ram();
            let file = packed(&ram);
            let changed = copy_with(&file, |bytes| {
                let at = at.index(bytes.len());
                bytes[at] ^= 1u8 << bit;
            });
            let mut bytes = vec![0; ram.len()];
            let read = Packed::open(changed, ram.len() as u64).and_then(|packed| packed.read(0, &mut bytes));
            prop_assert!(read.is_err());
        }
    }
}
