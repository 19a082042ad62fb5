//! [`Frozen`]: memory as it was at one moment, in a child process that works on it while this one runs on.
//!
//! fork(2) copies page tables and no page: what either writes to afterwards is copied then, a page at a time. The child is this
//! process's in nothing else: it gives up every descriptor that it does not need, takes no signal, and ends with the thread that made it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, set_parent_process_death_signal, waitpid,
};

use crate::sandbox::close_all_but;

/// A child at work. Dropping it ends it.
#[derive(Debug)]
pub struct Frozen {
    child: Pid,
    result: File,
}

impl Frozen {
    /// Has a child do `work`, to which private memory stays as it is now; shared mappings do not. Of this process's descriptors it
    /// has those in `keep` alone.
    ///
    /// Threads that are not in the child may hold locks: `work` takes none, so it does not log. It may allocate: the C library's
    /// fork sees to its own locks.
    ///
    /// # Errors
    /// The host is out of processes, memory or descriptors.
    pub fn begin(keep: &[BorrowedFd<'_>], work: impl FnOnce() -> io::Result<u32>) -> io::Result<Self> {
        let (result, told) = pipe_with(PipeFlags::CLOEXEC)?;
        let (parent, mut told) = (getpid(), File::from(told));
        let unmask = Masked::all();
        // SAFETY: the child runs `work`, which by its contract needs nothing of other threads, and never returns from here.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let _ = set_parent_process_death_signal(Some(Signal::KILL));
            let mut keep: Vec<_> = keep.iter().map(AsRawFd::as_raw_fd).chain([told.as_raw_fd()]).collect();
            close_all_but(&mut keep);
            // The one whose end it would be told of may have been gone by then.
            let done = if getppid() == Some(parent) { work() } else { Err(io::ErrorKind::Other.into()) };
            let done = match done {
                Ok(value) => u64::from(value),
                Err(error) => u64::from(error.raw_os_error().unwrap_or(libc::EIO).unsigned_abs()) << 32,
            };
            let _ = told.write_all(&done.to_le_bytes());
            // SAFETY: ends the process; what it shares with its parent sees no destructor.
            unsafe { libc::_exit(0) }
        }
        let child = Pid::from_raw(child.max(0)).ok_or_else(io::Error::last_os_error);
        drop(unmask);
        Ok(Self { child: child?, result: result.into() })
    }

    /// Waits for the end of the work, and gives what it gave.
    ///
    /// # Errors
    /// The work's, or the child was killed.
    pub fn finish(mut self) -> io::Result<u32> {
        let mut done = [0; 8];
        self.result.read_exact(&mut done).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("the process that was to do it was killed"),
            _ => error,
        })?;
        let done = u64::from_le_bytes(done);
        match (done >> 32) as i32 {
            0 => Ok(done as u32),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = kill_process(self.child, Signal::KILL);
        while matches!(waitpid(Some(self.child), WaitOptions::empty()), Err(Errno::INTR)) {}
    }
}

/// Takes no signal on this thread while it lives: a child has the handlers of its parent, and what they write to. But for the one by
/// which the kernel tells of a refused system call, which would end it without a word.
struct Masked(libc::sigset_t);

impl Masked {
    fn all() -> Self {
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: both are sets that the calls write to; zeroes are the empty set.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::sigdelset(all.as_mut_ptr(), libc::SIGSYS);
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        // SAFETY: the set is what the kernel gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::Memory;

    #[test]
    fn a_child_sees_memory_as_it_was_and_keeps_nothing_else_open() {
        let memory = Memory::new(&"16M".parse().unwrap()).unwrap();
        memory.ram().write_obj(1u8, GuestAddress(0x5000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let (go, gone) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let work = || {
            // Until the parent has written: closing was the first thing here, so the file is the only way to hear of it.
            while file.metadata()?.len() == 0 {}
            let byte: u8 = memory.ram().read_obj(GuestAddress(0x5000)).map_err(|_| io::ErrorKind::Other)?;
            Ok(u32::from(byte) + 41)
        };
        let frozen = Frozen::begin(&[file.as_fd()], work).unwrap();
        drop((ours, go, gone));
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the child does not hold it");
        memory.ram().write_obj(2u8, GuestAddress(0x5000)).unwrap();
        file.write_all_at(&[1], 0).unwrap();
        assert_eq!(frozen.finish().unwrap(), 42);
    }

    #[test]
    fn what_fails_in_the_child_is_told_and_one_that_is_dropped_ends() {
        let file = tempfile::tempfile().unwrap();
        let failing = || Err(io::Error::from_raw_os_error(libc::ENOSPC));
        let error = Frozen::begin(&[file.as_fd()], failing).unwrap().finish().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let endless = || loop {
            std::hint::spin_loop();
        };
        let frozen = Frozen::begin(&[file.as_fd()], endless).unwrap();
        let child = frozen.child;
        drop(frozen);
        assert_eq!(kill_process(child, Signal::KILL), Err(Errno::SRCH));
        let killed = Frozen::begin(&[file.as_fd()], endless).unwrap();
        kill_process(killed.child, Signal::KILL).unwrap();
        assert!(killed.finish().unwrap_err().to_string().contains("was killed"));
    }
}
