//! Raw disks: an image file or a block device, served by a few I/O threads with plain system calls.
//!
//! A front end submits through the [`Disk`] trait. The threads start with the first request, so that a disk that nobody
//! uses costs none. A faster engine can stand behind the same trait.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation};

use super::{Disk, Error, Foreign, Info, Io};
use crate::config;
use crate::event_loop::Event;
use crate::memory::Buffers;
use crate::threads::{self, Role};

/// The unit of offsets and lengths.
const SECTOR: u64 = 512;
/// I/O threads of one disk: with two, a slow flush does not hold up a read.
const THREADS: usize = 2;
/// A disk that is dropped waits for its threads this long. One that hangs keeps its thread, and what that
/// has, to itself.
const LAST_WAIT: Duration = Duration::from_millis(500);

/// Bytes of a discard or write-zeroes that are done at once: first, at least, and at most. On a fragmented
/// image a MiB can take more than 100 ms.
const PIECE: u64 = 4 << 20;
const PIECE_MIN: u64 = 1 << 20;
const PIECE_MAX: u64 = 64 << 20;

/// An open raw image.
#[derive(Debug)]
pub struct Raw {
    info: Info,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// The images of one configuration, opened once and kept over the guest's resets: the lock is never let go, and a file that was put
/// in an image's place meanwhile is not taken for it.
#[derive(Debug, Default)]
pub struct Images(BTreeMap<usize, Arc<Image>>);

impl Images {
    /// The `index`th disk, on an image that is opened if this is the first time that it is asked for.
    ///
    /// # Errors
    /// As [`Raw::open`]; or a request of the disk before is still under way, and could overwrite what this one writes.
    pub fn disk(&mut self, index: usize, config: &config::Disk) -> Result<Raw, Error> {
        let image = match self.0.get(&index) {
            Some(image) if image.begun.load(Ordering::SeqCst) > 0 => {
                return Err(Error::Busy { path: config.path.clone() });
            }
            Some(image) => image.clone(),
            None => {
                let image = Arc::new(Image::open(config)?);
                self.0.insert(index, image.clone());
                image
            }
        };
        Raw::on(image, config)
    }
}

/// What the I/O threads and the front end share.
#[derive(Debug)]
struct Shared {
    image: Arc<Image>,
    work: Mutex<Work>,
    arrived: Condvar,
    /// An I/O thread has nothing to do.
    idle: Condvar,
    ready: Event,
}

#[derive(Debug, Default)]
struct Work {
    queue: VecDeque<(u16, Io)>,
    done: VecDeque<(u16, io::Result<u32>)>,
    /// Requests that threads are at.
    begun: usize,
    held: bool,
    closing: bool,
}

impl Raw {
    /// Opens the image that `config` names and locks it: shared if read-only, else for this process alone.
    ///
    /// # Errors
    /// [`Error`] names the image, and [`Error::hint`] what to do.
    pub fn open(config: &config::Disk) -> Result<Self, Error> {
        Self::on(Arc::new(Image::open(config)?), config)
    }

    fn on(image: Arc<Image>, config: &config::Disk) -> Result<Self, Error> {
        let ready = Event::new().map_err(|source| Error::Open { path: config.path.clone(), source })?;
        let (info, work, arrived, idle) = (image.info, Mutex::default(), Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { image, work, arrived, idle, ready });
        Ok(Self { info, shared, threads: Vec::new() })
    }

    fn start_threads(&mut self) -> io::Result<()> {
        while self.threads.len() < THREADS {
            let shared = self.shared.clone();
            let name = format!("disk-io{}", self.threads.len());
            match threads::spawn(Role::Disk(name), move || shared.serve()) {
                Ok(thread) => self.threads.push(thread),
                // One thread does the work too, only slower.
                Err(_) if !self.threads.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Disk for Raw {
    fn info(&self) -> Info {
        self.info
    }

    fn submit(&mut self, tag: u16, io: Io) {
        let started = if self.threads.is_empty() { self.start_threads() } else { Ok(()) };
        let mut work = self.shared.work();
        match started {
            Ok(()) => {
                work.queue.push_back((tag, io));
                self.shared.arrived.notify_one();
            }
            Err(error) => {
                work.done.push_back((tag, Err(error)));
                self.shared.ready.signal();
            }
        }
    }

    fn done(&mut self) -> Option<(u16, io::Result<u32>)> {
        let mut work = self.shared.work();
        let next = work.done.pop_front();
        if work.done.is_empty() {
            self.shared.ready.clear();
        }
        next
    }

    fn ready(&self) -> BorrowedFd<'_> {
        self.shared.ready.as_fd()
    }

    fn hold(&mut self) {
        self.shared.work().held = true;
    }

    fn is_at_rest(&self) -> bool {
        let work = self.shared.work();
        work.held && work.begun == 0 && work.done.is_empty()
    }

    fn go_on(&mut self) {
        self.shared.work().held = false;
        self.shared.arrived.notify_all();
    }

    fn forget(&mut self) {
        self.shared.work().queue.clear();
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let mut work = self.shared.work();
        work.closing = true;
        self.shared.arrived.notify_all();
        let end = Instant::now() + LAST_WAIT;
        // Who held it has waited already.
        while work.begun > 0 || (!work.held && !work.queue.is_empty()) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || (work.held && work.begun > 0) {
                // What they have keeps guest memory in place.
                log::warn!(
                    "a disk is closed with {} requests begun, {} waiting",
                    work.begun,
                    work.queue.len()
                );
                work.held = true;
                return;
            }
            work = self.shared.idle.wait_timeout(work, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(work);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An I/O thread: takes requests until the disk closes and none is left.
    fn serve(&self) {
        let mut work = self.work();
        loop {
            let next = if work.held { None } else { work.queue.pop_front() };
            if let Some((tag, io)) = next {
                work.begun += 1;
                self.image.begun.fetch_add(1, Ordering::SeqCst);
                drop(work);
                let result = self.image.perform(io, &|| self.work().held);
                self.image.begun.fetch_sub(1, Ordering::SeqCst);
                work = self.work();
                work.begun -= 1;
                match result {
                    Ok(Step::Done(moved)) => work.done.push_back((tag, Ok(moved))),
                    Ok(Step::Left(io)) => work.queue.push_front((tag, io)),
                    Err(error) => work.done.push_back((tag, Err(error))),
                }
                self.ready.signal();
                self.idle.notify_all();
            } else if work.closing {
                return;
            } else {
                work = self.arrived.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
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

/// The file itself: one request at a time on the calling thread. Knows no queue.
#[derive(Debug)]
struct Image {
    file: File,
    device: bool,
    info: Info,
    /// Requests under way, those of a disk that was dropped meanwhile among them.
    begun: AtomicUsize,
    /// fdatasync; a test counts its calls.
    sync: fn(&File) -> rustix::io::Result<()>,
}

/// How far a request has come.
enum Step {
    /// To its end, with so many bytes moved.
    Done(u32),
    /// This is left of it.
    Left(Io),
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
    fn open(config: &config::Disk) -> Result<Self, Error> {
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
    fn perform(&self, io: Io, stop: &dyn Fn() -> bool) -> io::Result<Step> {
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use std::thread;

    use super::*;

    static SYNCS: AtomicUsize = AtomicUsize::new(0);

    /// A disk whose flushes are counted, and take a moment.
    fn disk() -> (tempfile::TempDir, Raw) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let config = config::Disk { path, readonly: false, format: None, serial: None, block_size: None };
        let mut raw = Raw::open(&config).unwrap();
        let shared = Arc::get_mut(&mut raw.shared).unwrap();
        Arc::get_mut(&mut shared.image).unwrap().sync = |file| {
            thread::sleep(Duration::from_millis(50));
            rustix::fs::fdatasync(file)?;
            SYNCS.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        (dir, raw)
    }

    fn wait(disk: &mut Raw) -> (u16, io::Result<u32>) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(done) = disk.done() {
                return done;
            }
            assert!(Instant::now() < end, "no completion");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_image_with_a_request_from_before_a_reset_is_not_used_again_until_it_is_over() {
        static GATE: Mutex<()> = Mutex::new(());
        let (_keep, mut disk) = disk();
        let shared = Arc::get_mut(&mut disk.shared).unwrap();
        Arc::get_mut(&mut shared.image).unwrap().sync = |_| {
            drop(GATE.lock().unwrap());
            Ok(())
        };
        let image = disk.shared.image.clone();
        let mut images = Images(BTreeMap::from([(0, image.clone())]));
        let path = "not opened again".into();
        let config = config::Disk { path, readonly: false, format: None, serial: None, block_size: None };
        let closed = GATE.lock().unwrap();
        disk.submit(1, Io::Flush);
        let end = Instant::now() + Duration::from_secs(10);
        while image.begun.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < end, "it is not begun");
            thread::sleep(Duration::from_millis(1));
        }
        drop(disk);
        assert!(matches!(images.disk(0, &config), Err(Error::Busy { .. })));
        drop(closed);
        while image.begun.load(Ordering::SeqCst) > 0 {
            assert!(Instant::now() < end, "it is not over");
            thread::sleep(Duration::from_millis(1));
        }
        let mut again = images.disk(0, &config).unwrap();
        again.submit(1, Io::Flush);
        assert!(wait(&mut again).1.is_ok());
    }

    #[test]
    fn a_flush_is_an_fdatasync_that_is_over_when_it_completes() {
        let (_keep, mut disk) = disk();
        let before = SYNCS.load(Ordering::SeqCst);
        disk.submit(1, Io::WriteZeroes { offset: 0, len: 4096, unmap: false });
        assert_eq!(wait(&mut disk).0, 1);
        assert_eq!(SYNCS.load(Ordering::SeqCst), before, "a write alone is none");
        disk.submit(2, Io::Flush);
        assert!(disk.done().is_none(), "not before it is over");
        let (tag, result) = wait(&mut disk);
        assert_eq!((tag, result.unwrap(), SYNCS.load(Ordering::SeqCst)), (2, 0, before + 1));
        // Dropping waits for what is in flight.
        disk.submit(3, Io::Flush);
        drop(disk);
        assert_eq!(SYNCS.load(Ordering::SeqCst), before + 2);
    }

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
    fn a_held_disk_begins_nothing_and_keeps_what_it_has() {
        let (_keep, mut disk) = disk();
        disk.submit(0, Io::Flush);
        disk.submit(1, Io::Flush);
        disk.submit(2, Io::WriteZeroes { offset: 0, len: 4096, unmap: false });
        disk.hold();
        let end = Instant::now() + Duration::from_secs(10);
        let mut done = Vec::new();
        while !disk.is_at_rest() {
            assert!(Instant::now() < end, "it does not come to rest");
            done.extend(disk.done().map(|(tag, _)| tag));
        }
        disk.submit(3, Io::WriteZeroes { offset: 0, len: 4096, unmap: false });
        assert!(disk.done().is_none() && disk.is_at_rest(), "not while it is held");
        disk.go_on();
        while done.len() < 4 {
            done.push(wait(&mut disk).0);
        }
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2, 3], "each is done once");
        disk.hold();
        disk.submit(4, Io::Flush);
        disk.forget();
        disk.go_on();
        disk.submit(5, Io::WriteZeroes { offset: 0, len: 512, unmap: false });
        assert_eq!(wait(&mut disk).0, 5, "what was forgotten does not come");
    }

    #[test]
    fn a_disk_whose_storage_hangs_can_be_dropped() {
        static GO: AtomicUsize = AtomicUsize::new(0);
        let (_keep, mut disk) = disk();
        let shared = Arc::get_mut(&mut disk.shared).unwrap();
        Arc::get_mut(&mut shared.image).unwrap().sync = |_| {
            while GO.load(Ordering::SeqCst) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        for tag in 0..4 {
            disk.submit(tag, Io::Flush);
        }
        let shared = disk.shared.clone();
        drop(disk);
        GO.store(1, Ordering::SeqCst);
        // Its threads end by themselves, and begin nothing more.
        let end = Instant::now() + Duration::from_secs(10);
        while Arc::strong_count(&shared) > 1 {
            assert!(Instant::now() < end, "a thread goes on");
            thread::sleep(Duration::from_millis(1));
        }
        assert!(shared.work().done.len() <= THREADS);
    }

    #[test]
    fn zeroes_are_written_where_the_file_system_cannot_make_them() {
        let (keep, disk) = disk();
        let path = keep.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        disk.shared.image.write_zeroes_plainly(512, 100 << 10).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let end = 512 + (100 << 10);
        assert!(bytes[..512].iter().chain(&bytes[end..]).all(|b| *b == 7));
        assert!(bytes[512..end].iter().all(|b| *b == 0));
    }

    #[test]
    fn an_image_that_shrinks_under_the_guest_gives_errors() {
        let (keep, mut disk) = disk();
        File::options().write(true).open(keep.path().join("disk")).unwrap().set_len(4096).unwrap();
        let ram = crate::memory::GuestRam::from_ranges(&[(vm_memory::GuestAddress(0), 4096)]).unwrap();
        let mut to = Buffers::empty(Arc::new(ram));
        to.push(0, 4096).unwrap();
        disk.submit(0, Io::Read { offset: 4096, to: to.clone() });
        assert!(wait(&mut disk).1.is_err());
        disk.submit(0, Io::Read { offset: 0, to });
        assert_eq!(wait(&mut disk).1.unwrap(), 4096);
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
