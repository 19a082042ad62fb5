//! [`Slices`]: pieces of guest memory for one vectored system call, with bytes of our own before and behind them.
//!
//! Made of [`Buffers`] by who moves bytes between the guest and files or sockets. The kernel copies straight between a descriptor and the guest.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use super::Buffers;

/// The most pieces: one system call takes 1024, and a few are the caller's own.
const MOST: usize = libc::UIO_MAXIOV as usize - 8;

/// Pieces of guest memory, in order. Consumes nothing of the buffers that it was made of.
#[derive(Debug)]
pub struct Slices<'a> {
    list: Vec<VolatileSlice<'a>>,
    len: usize,
    whole: bool,
}

impl<'a> Slices<'a> {
    /// All that is left of `buffers`, one after the other, without the first `skip` bytes.
    pub fn of(buffers: impl IntoIterator<Item = &'a Buffers>, mut skip: usize) -> Self {
        let mut slices = Self { list: Vec::new(), len: 0, whole: true };
        for slice in buffers.into_iter().flat_map(Buffers::slices) {
            let left_out = skip.min(slice.len());
            skip -= left_out;
            let Ok(slice) = slice.offset(left_out) else { continue };
            if slice.is_empty() {
                continue;
            }
            if slices.list.len() == MOST {
                slices.whole = false;
                break;
            }
            slices.len += slice.len();
            slices.list.push(slice);
        }
        slices
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether nothing was left out for want of room in one system call.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Writes `before`, then all of the slices, by one call of writev. Returns what it returned.
    ///
    /// # Errors
    /// The host's.
    pub fn write_to(&self, fd: impl AsFd, before: &[u8]) -> io::Result<usize> {
        let before = IoSlice::new(before);
        let guards: Vec<_> = self.list.iter().map(|slice| (slice.ptr_guard(), slice.len())).collect();
        let mut vectors = Vec::with_capacity(guards.len() + 1);
        if !before.is_empty() {
            vectors.push(libc::iovec { iov_base: before.as_ptr().cast_mut().cast(), iov_len: before.len() });
        }
        vectors.extend(
            guards.iter().map(|(guard, len)| libc::iovec {
                iov_base: guard.as_ptr().cast_mut().cast(),
                iov_len: *len,
            }),
        );
        let fd = fd.as_fd();
        retried(|| {
            // SAFETY: the vectors are the bytes of `before` and slices of guest RAM, which `self` borrows from what keeps it
            // mapped; the kernel only reads them, while the guest may write, which is a race for the guest alone: no Rust
            // reference to that memory exists. There are at most UIO_MAXIOV, and the descriptor is open.
            unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }

    /// Reads into `before`, then into `limit` bytes of the slices at most, then into `after`, by one call of readv. Returns what
    /// it returned.
    ///
    /// # Errors
    /// The host's.
    pub fn read_from(
        &self,
        fd: impl AsFd,
        before: &mut [&mut [u8]],
        limit: usize,
        after: &mut [u8],
    ) -> io::Result<usize> {
        let guards: Vec<_> = self.list.iter().map(|slice| (slice.ptr_guard_mut(), slice.len())).collect();
        let mut vectors = Vec::with_capacity(guards.len() + before.len() + 1);
        let own = |bytes: &mut [u8]| {
            let mut bytes = IoSliceMut::new(bytes);
            libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
        };
        vectors.extend(before.iter_mut().map(|bytes| own(bytes)));
        let mut left = limit;
        for (guard, len) in &guards {
            let take = left.min(*len);
            left -= take;
            if take > 0 {
                vectors.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: take });
            }
        }
        vectors.push(own(after));
        let fd = fd.as_fd();
        retried(|| {
            // SAFETY: the vectors are bytes of the caller's, borrowed mutably until the call is over, and parts of slices of guest
            // RAM, which `self` borrows from what keeps it mapped; the guest may use these meanwhile, which is a race for the
            // guest alone: no Rust reference to that memory exists. There are at most UIO_MAXIOV, and the descriptor is open.
            unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) }
        })
    }

    /// Reads from `offset` of a file into the slices, by one call of preadv. Returns what it returned.
    ///
    /// # Errors
    /// The host's.
    pub fn read_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.transfer(file.as_fd(), offset, false)
    }

    /// Writes the slices to `offset` of a file, by one call of pwritev. Returns what it returned.
    ///
    /// # Errors
    /// The host's.
    pub fn write_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.transfer(file.as_fd(), offset, true)
    }

    fn transfer(&self, file: BorrowedFd<'_>, offset: u64, write: bool) -> io::Result<usize> {
        let at = offset.try_into().map_err(io::Error::other)?;
        let guards: Vec<_> = self.list.iter().map(|slice| (slice.ptr_guard_mut(), slice.len())).collect();
        let vectors: Vec<_> = guards
            .iter()
            .map(|(guard, len)| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: *len })
            .collect();
        let (fd, count) = (file.as_raw_fd(), vectors.len() as libc::c_int);
        retried(|| {
            // SAFETY: the vectors are slices of guest RAM, which `self` borrows from what keeps it mapped; the guest may use them
            // meanwhile, which is a race for the guest alone: no Rust reference to that memory exists. There are at most UIO_MAXIOV,
            // and the descriptor is open.
            unsafe {
                match write {
                    true => libc::pwritev(fd, vectors.as_ptr(), count, at),
                    false => libc::preadv(fd, vectors.as_ptr(), count, at),
                }
            }
        })
    }

    /// Copies out of the slices from byte `from` on, as far as `bytes` and they go.
    pub fn copy_to(&self, mut from: usize, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.list {
            let left_out = from.min(slice.len());
            from -= left_out;
            let Ok(slice) = slice.offset(left_out) else { continue };
            let take = slice.len().min(bytes.len() - done);
            slice.copy_to(&mut bytes[done..done + take]);
            done += take;
        }
        done
    }

    /// Copies `bytes` into the slices, as far as they go.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.list {
            let take = slice.len().min(bytes.len() - done);
            slice.copy_from(&bytes[done..done + take]);
            done += take;
        }
        done
    }
}

fn retried(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::GuestRam;
    use super::*;

    fn buffers(ram: &Arc<GuestRam>, ranges: &[(u64, usize)]) -> Buffers {
        let mut buffers = Buffers::empty(ram.clone());
        ranges.iter().for_each(|(at, len)| buffers.push(*at, *len).unwrap());
        buffers
    }

    #[test]
    fn bytes_go_between_descriptor_and_guest_in_order() {
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap());
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ram.write_slice(b"skipped;one two", GuestAddress(0x100)).unwrap();
        let both = [buffers(&ram, &[(0x100, 12)]), buffers(&ram, &[(0x10c, 1), (0x10d, 2)])];
        let slices = Slices::of(&both, 8);
        assert_eq!((slices.len(), slices.is_whole()), (7, true));
        assert_eq!(slices.write_to(&ours, b"head ").unwrap(), 12);
        let mut got = [0; 12];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"head one two");

        theirs.write_all(b"0123456789abc").unwrap();
        let (mut one, mut two, mut after) = ([0; 2], [0; 1], [0; 9]);
        let n = slices.read_from(&ours, &mut [&mut one, &mut two], 5, &mut after).unwrap();
        assert_eq!((n, &one, &two, &after), (13, b"01", b"2", b"89abc\0\0\0\0"));
        let mut there = [0; 7];
        ram.read_slice(&mut there, GuestAddress(0x108)).unwrap();
        assert_eq!(&there, b"34567wo");
        let mut out = [0; 9];
        assert_eq!((slices.copy_to(3, &mut out), &out[..4]), (4, &b"67wo"[..]));
        assert_eq!(slices.copy_from(b"ABCDEFGHIJ"), 7);
        ram.read_slice(&mut there, GuestAddress(0x108)).unwrap();
        assert_eq!(&there, b"ABCDEFG");
        ours.write_all(b"x").unwrap();
    }

    #[test]
    fn what_one_system_call_cannot_take_is_left_out_and_told() {
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap());
        let many = buffers(&ram, &vec![(0, 1); 3000]);
        let slices = Slices::of([&many], 0);
        assert_eq!((slices.len(), slices.is_whole()), (MOST, false));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(slices.write_to(&ours, b"x").unwrap(), MOST + 1);
    }
}
