//! What a process has from whoever started it, beyond what it was told to use: descriptors and the environment. Both may be secrets of
//! that one's, and none of the guest's business.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, RawDir, fstat, open};
use rustix::io::{FdFlags, fcntl_getfd};

/// The descriptors that this process was started with, and what each is of.
static GIVEN: OnceLock<Vec<(RawFd, Identity)>> = OnceLock::new();

/// Device and inode.
type Identity = (u64, u64);

/// The first that is not standard input, output or error.
const FIRST: RawFd = 3;

/// What is read of the environment while the guest runs, or tells nothing that a guest could use: where this user's files are, and how to
/// speak.
const KEPT: [&[u8]; 12] = [
    b"HOME=",
    b"XDG_",
    b"TMPDIR=",
    b"PATH=",
    b"TERM=",
    b"TZ=",
    b"LANG=",
    b"LC_",
    b"RUST_",
    b"NO_COLOR=",
    b"COLUMNS=",
    b"VMM_",
];

/// Takes note of the descriptors that are open and were not opened by this process: all of those close at exec.
///
/// # Errors
/// There is no /proc.
pub(super) fn note() -> io::Result<()> {
    let folder = open("/proc/self/fd", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Every start does this: the standard library would take more memory for it than all that it is about.
    let mut room = [MaybeUninit::uninit(); 1024];
    let mut entries = RawDir::new(folder, &mut room);
    let mut given = Vec::new();
    while let Some(entry) = entries.next() {
        let number = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok());
        given.extend(number.and_then(|number| Some((number, of(number)?))));
    }
    // Once for a process.
    let _ = GIVEN.set(given);
    Ok(())
}

/// What `number` is of, if it was not opened by this process.
fn of(number: RawFd) -> Option<Identity> {
    if number < FIRST {
        return None;
    }
    // SAFETY: only asked what it is; a number that is no descriptor is an error of that.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(descriptor).ok()?;
    let stat = fstat(descriptor).ok()?;
    (!flags.contains(FdFlags::CLOEXEC)).then_some((stat.st_dev, stat.st_ino))
}

/// Closes those of them that are still there. What the machine was to have of them it has descriptors of its own of by now.
pub(super) fn close() {
    for (number, identity) in GIVEN.get().map_or(&[][..], Vec::as_slice) {
        if of(*number) == Some(*identity) {
            // SAFETY: it is open, and is not what this process has opened, whose descriptors close at exec.
            drop(unsafe { OwnedFd::from_raw_fd(*number) });
        }
    }
}

/// Overwrites what is in the environment beyond [`KEPT`], where the kernel has put it. Call it while the process has one thread.
pub(super) fn forget_environment() {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: nobody else reads or changes the environment meanwhile. Its strings lie on the stack that the process was started with, which
    // may be written to, or were allocated by the C library.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let text = CStr::from_ptr(*entry).to_bytes();
            if !KEPT.iter().any(|kept| text.starts_with(kept)) {
                // An empty entry is none.
                std::ptr::write_bytes(*entry, 0, text.len());
            }
            entry = entry.add(1);
        }
    }
}
