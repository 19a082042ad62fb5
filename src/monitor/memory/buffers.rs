//! [`Buffers`]: a list of guest memory ranges that someone may read or write, checked once.
//!
//! Made by virtqueues from descriptor chains; consumed by devices and disk back ends, also after the guest has
//! changed the descriptors, because nothing here refers to them any more.

use std::io::{self, Read, Write};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestRam;

/// Ranges of guest memory, in order, each known to lie in RAM. Reading and writing consume from the front.
#[derive(Debug, Clone)]
pub struct Buffers {
    ram: Arc<GuestRam>,
    ranges: Vec<(GuestAddress, usize)>,
    /// The first range that is not wholly consumed.
    next: usize,
    left: usize,
}

/// A range that is not in guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at guest address {address:#x} are not in RAM")]
pub struct NotRam {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: usize,
}

impl Buffers {
    /// No memory at all.
    pub fn empty(ram: Arc<GuestRam>) -> Self {
        Self { ram, ranges: Vec::new(), next: 0, left: 0 }
    }

    /// Adds a range at the end.
    ///
    /// # Errors
    /// [`NotRam`]; nothing was added.
    pub fn push(&mut self, address: u64, len: usize) -> Result<(), NotRam> {
        let not_ram = NotRam { address, len };
        // A range may cross two regions only if they touch; vm-memory's slices then come in parts, and the layout
        // has a hole between its regions, so one slice is all there can be.
        self.ram.get_slice(GuestAddress(address), len).map_err(|_| not_ram)?;
        self.left = self.left.checked_add(len).ok_or(not_ram)?;
        if len > 0 {
            self.ranges.push((GuestAddress(address), len));
        }
        Ok(())
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.left
    }

    /// Nothing left.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Takes the last `len` bytes off as buffers of their own; all of them if there are fewer.
    pub fn split_off_back(&mut self, len: usize) -> Self {
        let mut back = Self::empty(self.ram.clone());
        while back.left < len && self.left > 0 {
            let Some((address, size)) = self.ranges.pop() else { break };
            let take = size.min(len - back.left);
            back.ranges.insert(0, (GuestAddress(address.0 + (size - take) as u64), take));
            back.left += take;
            self.left -= take;
            if take < size {
                self.ranges.push((address, size - take));
            }
        }
        back
    }

    /// Takes the first `len` bytes off as buffers of their own; all of them if there are fewer.
    pub fn split_off_front(&mut self, len: usize) -> Self {
        let mut front = Self::empty(self.ram.clone());
        // Only what it calls could fail.
        let _ = self.consume(len, |_, address, part| {
            front.ranges.push((address, part.len()));
            front.left += part.len();
            Ok(())
        });
        front
    }

    /// The memory as host slices, in order, for vectored I/O. They live as long as the RAM that `self` shares.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        // get_slice succeeded in push and RAM never shrinks, so nothing is left out.
        self.ranges[self.next..].iter().filter_map(|(address, len)| self.ram.get_slice(*address, *len).ok())
    }

    /// Calls `copy` with the guest address, the length and the position in the caller's buffer of each piece, until
    /// `want` bytes are consumed.
    fn consume(
        &mut self,
        want: usize,
        mut copy: impl FnMut(&GuestRam, GuestAddress, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut done = 0;
        while done < want {
            let Some((address, len)) = self.ranges.get_mut(self.next) else { break };
            let take = (*len).min(want - done);
            copy(&self.ram, *address, done..done + take)?;
            done += take;
            self.left -= take;
            *address = GuestAddress(address.0 + take as u64);
            *len -= take;
            if *len == 0 {
                self.next += 1;
            }
        }
        Ok(done)
    }
}

impl Read for Buffers {
    /// Copies out of guest memory, each byte once.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.consume(buf.len(), |ram, at, part| ram.read_slice(&mut buf[part], at).map_err(io::Error::other))
    }
}

impl Write for Buffers {
    /// Copies into guest memory. Writes 0 bytes at the end.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.consume(buf.len(), |ram, at, part| ram.write_slice(&buf[part], at).map_err(io::Error::other))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers() -> Buffers {
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x2000), 0x1000)]).unwrap();
        let mut buffers = Buffers::empty(Arc::new(ram));
        buffers.push(0x10, 3).unwrap();
        buffers.push(0x2000, 0).unwrap();
        buffers.push(0x2ffe, 2).unwrap();
        buffers
    }

    #[test]
    fn reads_and_writes_across_ranges_and_stops_at_the_end() {
        let mut out = buffers();
        assert_eq!(out.write(b"ab").unwrap() + out.write(b"cdefg").unwrap(), 5);
        assert!(out.is_empty());
        let mut back = buffers();
        back.ram = out.ram.clone();
        let mut all = Vec::new();
        back.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"abcde");
    }

    #[test]
    fn refuses_what_is_not_ram() {
        let mut b = buffers();
        for (address, len) in [(0xfff, 2), (0x1000, 1), (u64::MAX, 2), (0x2fff, usize::MAX)] {
            assert!(b.push(address, len).is_err(), "{address:#x}+{len}");
        }
        assert_eq!(b.len(), 5);
    }

    #[test]
    fn splits_from_the_back() {
        let mut front = buffers();
        let back = front.split_off_back(3);
        assert_eq!((front.len(), back.len()), (2, 3));
        assert_eq!(back.slices().map(|s| s.len()).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(front.split_off_back(9).len(), 2);
    }

    #[test]
    fn splits_from_the_front() {
        let mut back = buffers();
        let front = back.split_off_front(4);
        assert_eq!((front.len(), back.len()), (4, 1));
        assert_eq!(front.slices().map(|s| s.len()).collect::<Vec<_>>(), [3, 1]);
        assert_eq!(back.slices().map(|s| s.len()).collect::<Vec<_>>(), [1]);
        assert_eq!((back.split_off_front(9).len(), back.len()), (1, 0));
    }
}
