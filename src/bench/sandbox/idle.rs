//! The class of threads that run only when nobody else wants to.

use std::io;

/// Puts this thread into it (sched(7), SCHED_IDLE). While such a thread runs, KVM does not poll for a halted guest.
///
/// # Errors
/// The kernel refused.
pub fn idle_class() -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads one structure, which lives for the call, and changes nothing but this thread's class.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const none) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
