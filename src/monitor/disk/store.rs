//! [`Store`]: bytes in a file or a block device, by plain system calls on the calling thread. Knows no request.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use crate::memory::{Buffers, Slices};

/// An open file or block device.
#[derive(Debug)]
pub struct Store {
    pub file: File,
    /// It is a block device.
    pub device: bool,
    /// Bytes of the smallest block that a device takes.
    pub block_size: u32,
}

impl Store {
    /// Moves all of `buffers` to or from `offset`.
    pub fn transfer(&self, offset: u64, buffers: &Buffers, write: bool) -> io::Result<u32> {
        let mut moved = 0;
        while moved < buffers.len() {
            let (left, at) = (Slices::of([buffers], moved), offset + moved as u64);
            moved += match if write { left.write_at(&self.file, at)? } else { left.read_at(&self.file, at)? }
            {
                // The image was cut behind our back.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                some => some,
            };
        }
        Ok(moved as u32)
    }

    /// The whole blocks in a range, as offset and length.
    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = u64::from(self.block_size);
        let (from, to) = (offset.next_multiple_of(block), offset + len);
        (from, (to - to % block).saturating_sub(from))
    }

    /// Forgets a range: the contents may be anything then.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let punched = if self.device {
            // The kernel takes no others.
            let (offset, len) = self.whole_blocks(offset, len);
            self.range_ioctl(BLKDISCARD, offset, len)
        } else {
            self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)
        };
        match punched {
            // The contents may be anything after a discard, what they were among it.
            Err(error) if unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Has a range read as zeroes. With `unmap` the space may be given back.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let fast = if self.device {
            let (from, whole) = self.whole_blocks(offset, len);
            if whole == 0 {
                return self.write_zeroes_plainly(offset, len);
            }
            self.write_zeroes_plainly(offset, from - offset)?;
            self.write_zeroes_plainly(from + whole, offset + len - from - whole)?;
            self.range_ioctl(BLKZEROOUT, from, whole)
        } else {
            let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
            self.fallocate(how, offset, len)
        };
        match fast {
            Err(error) if unsupported(&error) => self.write_zeroes_plainly(offset, len),
            result => result,
        }
    }

    fn write_zeroes_plainly(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        while len > 0 {
            let part = len.min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], offset)?;
            offset += part;
            len -= part;
        }
        Ok(())
    }

    fn fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        Ok(rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len)?)
    }

    /// BLKDISCARD and BLKZEROOUT take a byte range.
    fn range_ioctl(&self, request: libc::Ioctl, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        if len == 0 {
            return Ok(());
        }
        // SAFETY: both requests read two u64 from the pointer and keep none of it; the descriptor is open.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// `_IO(0x12, 119)`
const BLKDISCARD: libc::Ioctl = 0x1277;
/// `_IO(0x12, 127)`
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// The file system or device has not got this operation.
fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn zeroes_are_written_where_the_file_system_cannot_make_them() {
        let keep = tempfile::tempdir().unwrap();
        let path = keep.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let store = Store { file, device: false, block_size: 512 };
        store.write_zeroes_plainly(512, 100 << 10).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let end = 512 + (100 << 10);
        assert!(bytes[..512].iter().chain(&bytes[end..]).all(|b| *b == 7));
        assert!(bytes[512..end].iter().all(|b| *b == 0));
    }

    #[test]
    fn more_pieces_than_one_call_takes_are_moved_in_order() {
        let keep = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3000u32).map(|byte| byte as u8).collect();
        keep.write_all_at(&bytes, 512).unwrap();
        let store = Store { file: keep, device: false, block_size: 512 };
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap());
        // Each byte by itself, in front of the one before.
        let pieces = || {
            let mut buffers = Buffers::empty(ram.clone());
            (0..3000).rev().for_each(|at| buffers.push(at, 1).unwrap());
            buffers
        };
        assert_eq!(store.transfer(512, &pieces(), false).unwrap(), 3000);
        let mut there = vec![0; 3000];
        ram.read_slice(&mut there, GuestAddress(0)).unwrap();
        assert!(there.iter().rev().eq(&bytes));
        assert_eq!(store.transfer(8192, &pieces(), true).unwrap(), 3000);
        store.file.read_exact_at(&mut there, 8192).unwrap();
        assert_eq!(there, bytes);
        let cut = store.transfer(10_000, &pieces(), false).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }
}
