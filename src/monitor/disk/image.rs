//! [`Image`]: the file of a raw disk. One request at a time, on the calling thread; long ones in pieces. Knows no queue.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation};

use super::{Error, Foreign, Info, Io};
use crate::config;
use crate::memory::Buffers;

/// The unit of offsets and lengths.
const SECTOR: u64 = 512;
/// Bytes of a discard or write-zeroes that are done at once: first, at least, and at most. On a fragmented
/// image a MiB can take more than 100 ms.
const PIECE: u64 = 4 << 20;
const PIECE_MIN: u64 = 1 << 20;
const PIECE_MAX: u64 = 64 << 20;

/// An open image, locked.
#[derive(Debug)]
pub struct Image {
    file: File,
    device: bool,
    pub info: Info,
    /// Requests under way, those of a disk that was dropped meanwhile among them.
    pub begun: AtomicUsize,
    /// fdatasync; a test counts its calls.
    pub sync: fn(&File) -> rustix::io::Result<()>,
}

/// How far a request has come.
pub enum Step {
    /// To its end, with so many bytes moved.
    Done(u32),
    /// This is left of it.
    Left(Io),
}

/// Locks the open image. The lock goes with the file, however the process ends.
fn lock_image(file: &File, path: &Path, readonly: bool) -> Result<(), Error> {
    let how = if readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(file, how) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked { path: path.to_owned() }),
        Err(error) => {
            // Some network file systems know no locks.
            log::warn!("disk image {} cannot be locked: {error}", path.display());
            Ok(())
        }
    }
}

/// Does `part` of `range` (offset, length) piece by piece, and returns how many bytes are done: all, unless
/// `stop` said so between two.
fn in_pieces(
    range: (u64, u64),
    stop: &dyn Fn() -> bool,
    part: impl Fn(u64, u64) -> io::Result<()>,
) -> io::Result<u64> {
    let (offset, len) = range;
    let (mut done, mut piece) = (0, PIECE);
    while done < len && (done == 0 || !stop()) {
        let now = piece.min(len - done);
        let start = Instant::now();
        part(offset + done, now)?;
        done += now;
        piece = next_piece(piece, start.elapsed());
    }
    Ok(done)
}

/// Bytes of the piece after one of `piece` bytes that took `took`.
fn next_piece(piece: u64, took: Duration) -> u64 {
    match took.as_millis() {
        0..10 => (2 * piece).min(PIECE_MAX),
        10..100 => piece,
        _ => (piece / 2).max(PIECE_MIN),
    }
}

impl Image {
    /// Opens the image that `config` names, and locks it.
    pub fn open(config: &config::Disk) -> Result<Self, Error> {
        let path = &config.path;
        let failed = |source: io::Error| Error::Open { path: path.clone(), source };
        // Without O_NONBLOCK a FIFO would be waited for; files and block devices do not know it.
        let mut options = OpenOptions::new();
        let file = options.read(true).write(!config.readonly).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotAnImage { path: path.clone() });
        }
        lock_image(&file, path, config.readonly)?;

        let device = kind.is_block_device();
        let native =
            if device { rustix::fs::ioctl_blksszget(&file).map_err(|e| failed(e.into()))? } else { 512 };
        let block_size = config.block_size.map_or(native, |size| size.bytes() as u32);
        if block_size < native || !block_size.is_power_of_two() {
            return Err(Error::BlockSize { path: path.clone(), block_size, native });
        }
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
        if let (None, Some(format)) = (config.format, Foreign::find(&file, size)) {
            return Err(Error::Foreign { path: path.clone(), format });
        }
        if size == 0 || !size.is_multiple_of(u64::from(block_size)) {
            return Err(Error::Size { path: path.clone(), size, block_size });
        }
        let physical = if device { rustix::fs::ioctl_blkpbszget(&file).unwrap_or(native) } else { 4096 };
        // A partition or a sparse file may end in the middle of a physical block: that costs speed, nothing else.
        let physical_block_size =
            if physical.is_power_of_two() { physical.max(block_size) } else { block_size };
        let info = Info {
            size,
            readonly: config.readonly,
            block_size,
            physical_block_size,
            discard: !config.readonly,
        };
        let (begun, sync) = (AtomicUsize::new(0), |file: &File| rustix::fs::fdatasync(file));
        Ok(Self { file, device, info, begun, sync })
    }

    /// Does `io`, or a part of it if it is long and `stop` says so meanwhile.
    pub fn perform(&self, io: Io, stop: &dyn Fn() -> bool) -> io::Result<Step> {
        match &io {
            Io::Read { offset, to } => {
                self.check(*offset, to.len() as u64, false)?;
                self.transfer(*offset, to, false).map(Step::Done)
            }
            Io::Write { offset, from } => {
                self.check(*offset, from.len() as u64, true)?;
                self.transfer(*offset, from, true).map(Step::Done)
            }
            Io::Flush => self.flush().map(Step::Done),
            &Io::Discard { offset, len } => {
                self.check(offset, len, true)?;
                let done = in_pieces((offset, len), stop, |offset, len| self.discard(offset, len))?;
                let left = Io::Discard { offset: offset + done, len: len - done };
                Ok(if done == len { Step::Done(0) } else { Step::Left(left) })
            }
            &Io::WriteZeroes { offset, len, unmap } => {
                self.check(offset, len, true)?;
                let part = |offset, len| self.write_zeroes(offset, len, unmap);
                let done = in_pieces((offset, len), stop, part)?;
                let left = Io::WriteZeroes { offset: offset + done, len: len - done, unmap };
                Ok(if done == len { Step::Done(0) } else { Step::Left(left) })
            }
        }
    }

    fn check(&self, offset: u64, len: u64, write: bool) -> io::Result<()> {
        if write && self.info.readonly {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let end = offset.checked_add(len);
        let fits = end.is_some_and(|end| end <= self.info.size)
            && offset.is_multiple_of(SECTOR)
            && len.is_multiple_of(SECTOR);
        if fits { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Moves all of `buffers` to or from the file at `offset`.
    fn transfer(&self, mut offset: u64, buffers: &Buffers, write: bool) -> io::Result<u32> {
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

    /// What was written before is on stable storage afterwards.
    fn flush(&self) -> io::Result<u32> {
        (self.sync)(&self.file)?;
        Ok(0)
    }

    /// The whole blocks in a range, as offset and length.
    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = u64::from(self.info.block_size);
        let (from, to) = (offset.next_multiple_of(block), offset + len);
        (from, (to - to % block).saturating_sub(from))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
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

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
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
        use std::os::unix::fs::FileExt;
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
    fn a_long_request_stops_between_pieces_when_held_and_goes_on_where_it_was() {
        let parts = std::cell::RefCell::new(Vec::new());
        let part = |offset, len| {
            parts.borrow_mut().push((offset, len));
            Ok(())
        };
        // Held already: one piece, so that it comes on however often it is held.
        assert_eq!(in_pieces((512, 1 << 30), &|| true, part).unwrap(), PIECE);
        assert_eq!(parts.take(), [(512, PIECE)]);
        assert_eq!(in_pieces((512, 1 << 30), &|| parts.borrow().len() == 3, part).unwrap(), 7 * PIECE);
        assert_eq!(in_pieces((0, 0), &|| false, part).unwrap(), 0);
        parts.take();
        assert_eq!(in_pieces((512, 1 << 30), &|| false, part).unwrap(), 1 << 30);
        let mut at = 512;
        for (offset, len) in parts.take() {
            assert!(offset == at && len <= PIECE_MAX);
            at += len;
        }
        assert_eq!(at, 512 + (1 << 30));
        // Pieces fit how fast the host is.
        let after = |millis| next_piece(PIECE, Duration::from_millis(millis));
        assert_eq!((after(0), after(50), after(500)), (2 * PIECE, PIECE, PIECE / 2));
        assert_eq!(next_piece(PIECE_MAX, Duration::ZERO), PIECE_MAX);
        assert_eq!(next_piece(PIECE_MIN, Duration::MAX), PIECE_MIN);
    }

    #[test]
    fn zeroes_are_written_where_the_file_system_cannot_make_them() {
        let keep = tempfile::tempdir().unwrap();
        let path = keep.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let config = config::Disk {
            path: path.clone(),
            readonly: false,
            format: None,
            serial: None,
            block_size: None,
        };
        let image = Image::open(&config).unwrap();
        image.write_zeroes_plainly(512, 100 << 10).unwrap();
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
