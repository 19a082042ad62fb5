//! Raw disks: an image file or a block device, served by a few I/O threads with plain system calls.
//!
//! A front end submits through the [`Disk`] trait. The threads start with the first request, so that a disk that nobody
//! uses costs none. A faster engine can stand behind the same trait.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::files::Files;
use super::image::{Image, Step};
use super::{Disk, Error, Info, Io};
use crate::config;
use crate::event_loop::Event;
use crate::threads::{self, Role};

/// I/O threads of one disk: with two, a slow flush does not hold up a read.
const THREADS: usize = 2;
/// A disk that is dropped waits for its threads this long. One that hangs keeps its thread, and what that
/// has, to itself.
const LAST_WAIT: Duration = Duration::from_millis(500);
/// The same if what the guest wrote and did not flush would be lost.
const LAST_FLUSH: Duration = Duration::from_secs(10);
/// The tag of a flush that is the disk's own.
const NOBODY: u16 = u16::MAX;

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

    /// Has the `index`th image be in these `files`.
    ///
    /// # Errors
    /// As [`Raw::open`].
    pub fn put(&mut self, index: usize, config: &config::Disk, files: Files) -> Result<(), Error> {
        self.0.insert(index, Arc::new(Image::of(config, files)?));
        Ok(())
    }

    /// The `index`th image, if it is open: to be saved while its disk is at rest.
    pub fn get(&self, index: usize) -> Option<Arc<Image>> {
        self.0.get(&index).cloned()
    }

    /// Closes the `index`th image: its lock goes with the last request that is under way.
    pub fn close(&mut self, index: usize) {
        self.0.remove(&index);
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
        let mut wait = LAST_WAIT;
        // What was written since the last flush is for the next run, too, as it is where there is no overlay.
        if work.begun == 0 && !self.threads.is_empty() && self.shared.image.is_unsaved() {
            if work.held {
                work.queue.clear();
                work.held = false;
            }
            work.queue.push_back((NOBODY, Io::Flush));
            wait = LAST_FLUSH;
        }
        work.closing = true;
        self.shared.arrived.notify_all();
        let end = Instant::now() + wait;
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use super::*;
    use crate::memory::Buffers;

    static SYNCS: AtomicUsize = AtomicUsize::new(0);

    /// A disk whose flushes are counted, and take a moment.
    fn disk() -> (tempfile::TempDir, Raw) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let config = config::Disk::at(path);
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
        let config = config::Disk::at(path);
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
}
