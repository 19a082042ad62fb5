//! When a driver without F_MULTIPORT can take input: nothing in the protocol tells, so it is found out by waiting.
//!
//! Linux gives its receive buffers first and registers hvc0 after that; input that arrives between the two is thrown
//! away (`in_intr` in drivers/char/virtio_console.c, as long as the port is not `guest_connected`). Registering prints
//! the kernel's log so far in one go, so the first pause in the output comes when it is over. [`Console`](super::Console)
//! holds input back until then.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::timer::Timer;

/// A pause this long ends the wait.
pub const PAUSE: Duration = Duration::from_millis(50);
/// The wait ends after this long in any case: a guest may print without a pause.
const LIMIT: Duration = Duration::from_secs(1);

/// A timer that runs out when the driver has come to rest for the first time. Readable then.
#[derive(Debug)]
pub struct Settle {
    timer: Timer,
    deadline: Option<Instant>,
}

impl Settle {
    /// A timer that does not run.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: Timer::new()?, deadline: None })
    }

    /// The driver did something: the pause starts again.
    pub fn touch(&mut self) {
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + LIMIT);
        self.timer.set(Some(PAUSE.min(deadline.saturating_duration_since(now))));
    }

    /// Stops the timer, and takes down what it has signalled.
    pub fn stop(&mut self) {
        self.deadline = None;
        self.timer.set(None);
    }
}

impl AsFd for Settle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
