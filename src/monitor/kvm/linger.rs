//! A child process that holds a VM's descriptor a moment longer than its owner, so that the owner need not wait for KVM.
//!
//! Closing a VM whose I/O bus was changed a moment ago (each in-kernel interrupt controller and each doorbell changes it) waits
//! for a grace period of SRCU: 13 to 23 ms on Linux 6.x, in which nothing is computed. A VM that is older closes at once.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use super::Vm;

/// For how long the child holds on: longer than the grace period.
const HOLD: Duration = Duration::from_millis(30);

impl Vm {
    /// Has a child of this process close the VM, some 30 ms from now. When this returns the child holds nothing else of this
    /// process (no lock, no terminal), so whoever waits for this process's end or output waits for no more than that. The
    /// child is not waited for: to be called when this process is about to end.
    ///
    /// # Errors
    /// There is no child: closing the VM will take its time.
    pub fn close_later(&self) -> io::Result<()> {
        let (mut done, held) = io::pipe()?;
        // SAFETY: the child only makes system calls, on numbers that are there already: it takes no lock and allocates nothing.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => hold(self.fd.as_raw_fd()),
            _ => {}
        }
        drop(held);
        // Its end of the pipe goes with everything else that it closes.
        done.read(&mut [0]).map(|_| ())
    }
}

/// The child: closes all descriptors but `vm`, waits, and ends.
fn hold(vm: RawFd) -> ! {
    let time = libc::timespec { tv_sec: 0, tv_nsec: HOLD.subsec_nanos().into() };
    // SAFETY: a copy of this process with one thread; every call is async-signal-safe and takes numbers or what lives here.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"vm-close".as_ptr());
        libc::close_range(vm as u32 + 1, u32::MAX, 0);
        if vm > 0 {
            libc::close_range(0, vm as u32 - 1, 0);
        }
        libc::nanosleep(&raw const time, std::ptr::null_mut());
        libc::_exit(0)
    }
}
