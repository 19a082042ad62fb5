//! Memory whose file is no longer what it was: it was cut short, or the host cannot read it. The guest cannot go on, and nobody gets
//! zeroes in place of it.
//!
//! A processor of the guest finds out inside KVM_RUN, which fails (EFAULT), and its machine asks [`Memory::lost`] why. A thread of ours
//! gets a signal (SIGBUS) at its own access, in the middle of whatever it does: it tells the one that [`end_with`] names, and that ends
//! the process.

use std::io;
use std::mem;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, Memory, RamFile, SavedRam};

/// Bytes that are read at a time to find what cannot be read.
const BATCH: usize = 1 << 20;

/// Told of the loss. It ends the process.
type End = Box<dyn Fn(Error) + Send + Sync>;

static END: OnceLock<End> = OnceLock::new();
/// Held by nobody who touches guest memory.
static MAPPED: Mutex<Vec<Arc<Mapped>>> = Mutex::new(Vec::new());
/// One thread is about to end the process.
static ENDING: AtomicBool = AtomicBool::new(false);

fn mapped() -> MutexGuard<'static, Vec<Arc<Mapped>>> {
    MAPPED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first time it is called, has `end` called when a thread of this process meets memory of [`Memory::private_copy`] that is lost:
/// once, on that thread. It is to end the process.
pub fn end_with(end: impl Fn(Error) + Send + Sync + 'static) {
    if END.set(Box::new(end)).is_err() {
        return;
    }
    // SAFETY: zeroes are no flags, an empty mask and the default action.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_bus_error as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `on_bus_error` is a handler as SA_SIGINFO wants it.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes what SA_SIGINFO promises; si_addr is set for SIGBUS, and only read where the kernel sent it for an access
    // (a code above 0).
    let (address, is_access) = unsafe { ((*info).si_addr().addr(), (*info).si_code > 0) };
    // The instruction that is interrupted is an access to guest memory, by its address: not one of the allocator's, of a lock's or of
    // standard error's, so all of them are as usable here as in that thread itself.
    let ram = is_access.then(|| mapped().iter().find(|ram| ram.has(address)).cloned()).flatten();
    match ram {
        Some(ram) => ram.end(),
        // Not ours: it happens again when this returns, and ends the process as it always did.
        // SAFETY: the default action is one.
        None => _ = unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) },
    }
}

/// RAM that is mapped from files.
#[derive(Debug)]
pub(super) struct Mapped {
    /// Addresses in this process.
    places: Vec<Range<usize>>,
    saved: SavedRam,
    size: u64,
}

impl Mapped {
    fn has(&self, address: usize) -> bool {
        self.places.iter().any(|place| place.contains(&address))
    }

    /// What is wrong with its files. None if all of them can be read.
    fn lost(&self) -> Option<Error> {
        self.first(check)
    }

    /// What `check` finds in the first of its files that it finds something in.
    fn first(&self, check: fn(&RamFile, u64) -> io::Result<()>) -> Option<Error> {
        self.saved.files().find_map(|file| {
            let source = check(file, self.size).err()?;
            Some(Error::Lost { path: file.path().to_owned(), source })
        })
    }

    /// Has the process end because of it.
    fn end(&self) {
        end(self.lost().unwrap_or_else(|| Error::Lost {
            path: self.saved.bottom.path().to_owned(),
            source: io::Error::other("a page of it was gone, and is there again"),
        }));
    }
}

/// Has the process end because of `error`.
pub(super) fn end(error: Error) {
    if !ENDING.swap(true, Ordering::SeqCst)
        && let Some(end) = END.get()
    {
        end(error);
    }
    // Until the process has ended.
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

impl Error {
    /// RAM of `size` bytes could not be read from `saved`: `error`.
    pub(super) fn lost(saved: &SavedRam, size: u64, error: io::Error) -> Self {
        // Which of several it was.
        let found = saved.files().find_map(|file| Some((file, check(file, size).err()?)));
        let (file, source) = found.unwrap_or((&saved.bottom, error));
        Self::Lost { path: file.path().to_owned(), source }
    }
}

/// Whether `file` is as long as it was, of `size` bytes of RAM.
fn is_whole(file: &RamFile, size: u64) -> io::Result<()> {
    match file.file().metadata()?.len() {
        len if file.as_plain().is_some() && len < size => {
            Err(io::Error::other(format!("it was cut short: {len} bytes are left of {size}")))
        }
        _ => Ok(()),
    }
}

/// Whether `file` has `size` bytes that can be read.
fn check(file: &RamFile, size: u64) -> io::Result<()> {
    is_whole(file, size)?;
    let mut buffer = vec![0; BATCH];
    for at in (0..size).step_by(BATCH) {
        let len = BATCH.min((size - at) as usize);
        file.read(at, &mut buffer[..len])?;
    }
    Ok(())
}

/// Guards the place of RAM in the list of those that are mapped.
#[derive(Debug)]
pub(super) struct Watch(Arc<Mapped>);

impl Watch {
    /// Of `memory`, which is as in `saved`.
    pub fn begin(memory: &Memory, saved: &SavedRam) -> Arc<Self> {
        let place = |start: usize, len: u64| start..start + len as usize;
        let places = memory.ram.iter().map(|region| place(region.as_ptr().addr(), region.len())).collect();
        let ram = Arc::new(Mapped { places, saved: saved.clone(), size: memory.size });
        mapped().push(ram.clone());
        Arc::new(Self(ram))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        mapped().retain(|ram| !Arc::ptr_eq(ram, &self.0));
    }
}

impl Memory {
    /// Why the guest cannot have all of its memory, if that is so. Reads it all: for who has found that something is missing.
    pub fn lost(&self) -> Option<Error> {
        self.watch.as_ref()?.0.lost()
    }

    /// Ends the process if a file was cut short: for who asks the files what they have, to which the rest would be a hole.
    pub fn must_be_whole(&self) {
        if let Some(error) = self.watch.as_ref().and_then(|watch| watch.0.first(is_whole)) {
            end(error);
        }
    }
}
