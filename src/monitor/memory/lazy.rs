//! [`Lazy`]: RAM whose pages come from a file when somebody first touches them, by userfaultfd: whoever that is, a processor of the
//! guest inside KVM or a thread of ours, waits until a thread of the monitor has put them there.

use std::fs::File;
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, GuestRam, SavedRam, lost};
use crate::threads::{Role, spawn};

/// Bytes that are put in place at once: those around the one that was touched, and of a compressed file what is expanded at once.
const AROUND: u64 = super::packed::PIECE;
const PAGE: u64 = 4096;
/// How often the thread looks whether the last user of memory is gone, when the machine is.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// Guards the thread, which ends some time after this does.
#[derive(Debug)]
pub(super) struct Lazy {
    pages: Arc<Pages>,
    /// All of it is there, and the thread has nothing to do.
    is_complete: AtomicBool,
}

#[derive(Debug)]
struct Pages {
    faults: File,
    /// Readable when the machine is gone, or all pages are there.
    over: OwnedFd,
    saved: SavedRam,
    /// Address in this process, place in the file, and length of each region.
    places: Vec<(u64, u64, u64)>,
}

impl Lazy {
    /// Has the pages of `ram`, of which none has been touched, come from `saved`.
    ///
    /// # Errors
    /// The kernel refuses it to this process.
    pub fn begin(ram: &Arc<GuestRam>, saved: &SavedRam) -> io::Result<Self> {
        let faults = userfaultfd()?;
        let mut end = 0;
        let places = ram.iter().map(|region| {
            let at = end;
            end += region.len();
            (region.as_ptr().addr() as u64, at, region.len())
        });
        let places: Vec<_> = places.collect();
        for (start, _, len) in &places {
            let mut range = Register { start: *start, len: *len, mode: MISSING, ioctls: 0 };
            call(&faults, UFFDIO_REGISTER, &mut range)?;
        }
        let over = eventfd(0, EventfdFlags::CLOEXEC)?;
        let pages = Arc::new(Pages { faults, over, saved: saved.clone(), places });
        let (serving, users) = (pages.clone(), Arc::downgrade(ram));
        spawn(Role::Fetch, move || serving.serve(&users))?;
        Ok(Self { pages, is_complete: AtomicBool::new(false) })
    }

    /// Puts all pages in place that are not there yet: from then on RAM is like any other, and can be forked.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn complete(&self) -> io::Result<()> {
        if self.is_complete.load(Ordering::Acquire) {
            return Ok(());
        }
        let data = self.pages.saved.data()?;
        for (start, at, len) in &self.pages.places {
            let place = *at..at + len;
            for part in data.iter().filter_map(|range| super::within(range, &place)) {
                let first = (at + part.start) / AROUND * AROUND;
                for here in (first..at + part.end).step_by(AROUND as usize) {
                    self.pages.put_around(here.max(*at))?;
                }
            }
            // What is left are zeroes, which it gives to those who wait for them, too.
            let mut range = UnRegister { start: *start, len: *len };
            call(&self.pages.faults, UFFDIO_UNREGISTER, &mut range)?;
        }
        self.is_complete.store(true, Ordering::Release);
        Ok(())
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.pages.over, &1u64.to_ne_bytes());
    }
}

impl Pages {
    /// Until `users` are gone: whoever touches what nobody would put in place waits for ever, or finds zeroes.
    fn serve(&self, users: &Weak<GuestRam>) {
        let mut is_over = false;
        while !is_over || users.strong_count() > 0 {
            let mut waited =
                [PollFd::new(&self.faults, PollFlags::IN), PollFd::new(&self.over, PollFlags::IN)];
            let waited = if is_over { &mut waited[..1] } else { &mut waited[..] };
            // An interruption, if any, is none of ours.
            let _ = poll(waited, is_over.then_some(&LOOK));
            is_over |= waited.get(1).is_some_and(|over| !over.revents().is_empty());
            if let Err(error) = self.answer() {
                let size = self.places.iter().map(|(_, _, len)| len).sum();
                lost::end(Error::lost(&self.saved, size, error));
            }
        }
    }

    /// Puts in place what somebody waits for.
    fn answer(&self) -> io::Result<()> {
        let mut message = [0; 32];
        loop {
            match (&self.faults).read(&mut message) {
                Ok(32) if message[0] == PAGE_FAULT => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let address = message[16..24].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
            let place = self.places.iter().find(|(start, _, len)| (*start..start + len).contains(&address));
            if let Some((start, at, _)) = place {
                self.put_around(at + (address - start))?;
            }
        }
    }

    /// Puts in place what the file has around `at`, as far as it is in the same region and not there yet.
    fn put_around(&self, at: u64) -> io::Result<()> {
        let Some((start, base, len)) =
            self.places.iter().find(|(_, base, len)| (*base..base + len).contains(&at))
        else {
            return Ok(());
        };
        let first = (at / AROUND * AROUND).max(*base);
        let end = (at / AROUND * AROUND + AROUND).min(base + len);
        let mut bytes = Aligned([0; AROUND as usize]);
        let bytes = &mut bytes.0[..(end - first) as usize];
        self.saved.read(first, bytes)?;
        let mut done = 0;
        while done < bytes.len() as u64 {
            let here = &bytes[done as usize..];
            let (to, from) = (start + (first - base) + done, here.as_ptr().addr() as u64);
            let mut copy = Copy { to, from, len: here.len() as u64, mode: 0, copied: 0 };
            match call(&self.faults, UFFDIO_COPY, &mut copy) {
                Ok(()) => return Ok(()),
                // Some are there, and so on behind them.
                Err(_) if copy.copied > 0 => done += copy.copied as u64,
                Err(error) => match error.raw_os_error() {
                    // It is there; or all of them, and nobody is in want of any. Whoever waits is woken by who put it there.
                    Some(libc::EEXIST) => done += PAGE,
                    Some(libc::EAGAIN | libc::EINTR) => {}
                    Some(libc::ENOENT) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
        // A thread that found the page missing just before somebody else put it there.
        let mut wake = UnRegister { start: start + (first - base), len: bytes.len() as u64 };
        call(&self.faults, UFFDIO_WAKE, &mut wake)
    }
}

#[repr(align(4096))]
struct Aligned([u8; AROUND as usize]);

// linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01_u32 as libc::Ioctl;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
/// Of /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const MISSING: u64 = 1;
const PAGE_FAULT: u8 = 0x12;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UnRegister {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// Issues `request`, whose argument `argument` is.
fn call<T>(faults: &File, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    debug_assert_eq!((request as u32 >> 16 & 0x3fff) as usize, mem::size_of::<T>());
    // SAFETY: the request is one of userfaultfd's, and its argument as long as it says. UFFDIO_COPY reads bytes that the caller has, and
    // writes to pages of guest memory alone, which nobody has seen.
    match unsafe { libc::ioctl(faults.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One that hears of the kernel's own faults, KVM's above all: a right, which not every process has.
fn userfaultfd() -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: it takes flags alone.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let made = match i32::try_from(made) {
        Ok(made @ 0..) => made,
        _ => {
            let refused = io::Error::last_os_error();
            let Ok(device) = File::open("/dev/userfaultfd") else { return Err(refused) };
            // SAFETY: as above.
            match unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) } {
                made @ 0.. => made,
                _ => return Err(refused),
            }
        }
    };
    // SAFETY: a descriptor that was made just now, and is nobody else's.
    let faults = File::from(unsafe { OwnedFd::from_raw_fd(made) });
    call(&faults, UFFDIO_API, &mut Api { api: UFFD_API, features: 0, ioctls: 0 })?;
    Ok(faults)
}
