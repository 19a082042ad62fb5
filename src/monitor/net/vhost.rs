//! vhost-net: the host's kernel itself moves frames between a guest's rings and a tap.
//!
//! One [`Vhost`] for each pair of queues. It uses guest memory from [`Vhost::start`] until [`Vhost::stop`]: whoever starts it keeps
//! the memory mapped until then.

use std::io;
use std::os::fd::BorrowedFd;

use super::Error;
use crate::event_loop::Event;
use crate::memory::GuestRam;
use crate::vhost::{Kernel, Ring};

/// Where the driver is.
const DEVICE: &str = "/dev/vhost-net";

/// The kernel's end of one pair of queues.
#[derive(Debug)]
pub struct Vhost {
    kernel: Kernel,
    /// Set when the kernel finds a ring that breaks the rules.
    broken: Event,
}

impl Vhost {
    /// One for the memory of this process.
    ///
    /// # Errors
    /// The host has no vhost-net, or not for this user.
    pub fn open() -> Result<Self, Error> {
        let kernel = Kernel::open(DEVICE).map_err(|(what, source)| Error::Vhost { what, source })?;
        Ok(Self { kernel, broken: Event::new().map_err(Error::Host)? })
    }

    /// The feature bits of virtio and of its rings that the kernel knows here.
    pub fn features(&self) -> u64 {
        self.kernel.features()
    }

    /// Readable when a ring has been found broken.
    pub fn broken(&self) -> &Event {
        &self.broken
    }

    /// Has the kernel serve `rings`, the pair's receiving one first, as agreed by `features`, between `ram` and `tap`. Of a pair that
    /// the driver does not use, none is served.
    ///
    /// # Errors
    /// The kernel refuses: a ring outside of guest memory, say. Nothing is served then.
    pub fn start(
        &self,
        ram: &GuestRam,
        features: u64,
        rings: &[Option<Ring<'_>>; 2],
        tap: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let mut used = (0..).zip(rings).filter(|(_, ring)| ring.is_some());
        let started = self
            .kernel
            .tell(ram, features, rings, &self.broken)
            .and_then(|()| used.try_for_each(|(index, _)| self.kernel.set_tap(index, Some(tap))));
        if started.is_err() {
            let _ = [0, 1].map(|index| self.kernel.set_tap(index, None));
        }
        started
    }

    /// Takes the rings back, when the kernel has let go of them: nothing is in flight then. Where it has come to in each: the index
    /// of the next available entry, which all before have been used.
    ///
    /// # Errors
    /// The kernel refuses: never seen.
    pub fn stop(&self) -> io::Result<[u16; 2]> {
        // Both, whatever the kernel says of the first: what is still served still touches memory.
        let [first, second] = [0, 1].map(|index| self.kernel.set_tap(index, None));
        first.and(second)?;
        self.kernel.next()
    }
}
