//! [`Timer`]: a moment as a descriptor to wait on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

/// Runs out once each time that it is set. Readable from then until it is set anew.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// One that does not run.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Has it run out `after` so much time, or not at all. What it was set to before no longer holds.
    pub fn set(&self, after: Option<Duration>) {
        // Zero would stop it.
        let after = after.map(|after| after.max(Duration::from_nanos(1)));
        let value = after.and_then(|after| Timespec::try_from(after).ok()).unwrap_or_default();
        let once = Itimerspec { it_interval: Timespec::default(), it_value: value };
        // Fails only for times that are none.
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once) {
            log::error!("set a timer: {error}");
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
