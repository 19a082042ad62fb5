//! [`Store`]: bytes in a file or a block device, by plain system calls on the calling thread. Knows no request.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use crate::memory::Buffers;

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
    pub fn transfer(&self, mut offset: u64, buffers: &Buffers, write: bool) -> io::Result<u32> {
        // The guards keep the mapping in place while the kernel has its addresses.
        let guards: Vec<_> = buffers.slices().map(|slice| (slice.ptr_guard_mut(), slice.len())).collect();
        let mut vectors: Vec<libc::iovec> = guards
            .iter()
            .map(|(guard, len)| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: *len })
            .collect();
        let mut left = &mut vectors[..];
        let mut moved = 0;
        while !left.is_empty() {
            let count = left.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
            let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            let fd = self.file.as_raw_fd();
            // SAFETY: the vectors are what is left of slices of guest RAM, which `buffers` keeps mapped; the kernel
            // copies to or from them while the guest may write them too, which is a race only for the guest: no Rust
            // reference to that memory exists. `count` is at most their number, and the descriptor is open.
            let n = unsafe {
                if write {
                    libc::pwritev(fd, left.as_ptr(), count, at)
                } else {
                    libc::preadv(fd, left.as_ptr(), count, at)
                }
            };
            match usize::try_from(n) {
                // The image was cut behind our back.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    offset += n as u64;
                    moved += n as u32;
                    advance(&mut left, n);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(moved)
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

/// Drops `n` bytes from the front of `vectors`.
fn advance(vectors: &mut &mut [libc::iovec], mut n: usize) {
    while let Some(first) = vectors.first_mut() {
        if n < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(n).cast();
            first.iov_len -= n;
            return;
        }
        n -= first.iov_len;
        *vectors = &mut std::mem::take(vectors)[1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn partial_transfers_go_on_in_the_middle_of_a_vector() {
        let mut bytes = [0u8; 10];
        let base: *mut u8 = bytes.as_mut_ptr();
        let vector =
            |from: usize, len| libc::iovec { iov_base: base.wrapping_add(from).cast(), iov_len: len };
        let mut vectors = [vector(0, 3), vector(3, 0), vector(3, 4), vector(7, 3)];
        let mut left = &mut vectors[..];
        advance(&mut left, 5);
        assert_eq!((left.len(), left[0].iov_len, left[0].iov_base as usize), (2, 2, base as usize + 5));
        advance(&mut left, 2);
        assert_eq!((left.len(), left[0].iov_len), (1, 3));
        advance(&mut left, 3);
        assert!(left.is_empty());
    }
}
