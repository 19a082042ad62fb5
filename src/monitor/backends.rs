//! [`Backends`]: what a machine's devices have on the host, opened once and kept over the guest's resets.
//!
//! A session owns them; the assembly of each of its machines opens those that are not open yet. They know no virtio.

use crate::chardev::Ends;
use crate::disk::Images;
use crate::event_loop::EventLoop;
use crate::net::Ports;
use crate::vsock::Doors;

/// The host's side of a machine, by what it is.
#[derive(Debug)]
pub struct Backends {
    /// Of consoles, ports and the serial port.
    pub ends: Ends,
    /// Of disks.
    pub images: Images,
    /// Of network devices.
    pub ports: Ports,
    /// Of the socket device.
    pub doors: Doors,
}

impl Backends {
    /// None are open yet. `events` reads the terminal, and serves the devices that need no thread of their own.
    pub fn new(events: EventLoop) -> Self {
        Self {
            ends: Ends::new(events),
            images: Images::default(),
            ports: Ports::default(),
            doors: Doors::default(),
        }
    }
}
