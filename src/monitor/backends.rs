//! [`Backends`]: what a machine's devices have on the host, opened once and kept over the guest's resets.
//!
//! A session owns them; the assembly of each of its machines opens those that are not open yet. They know no virtio.

use std::sync::{Arc, Mutex};

use crate::chardev::Ends;
use crate::config::Plug;
use crate::disk::Images;
use crate::event_loop::EventLoop;
use crate::net::Ports;
use crate::share::Folders;
use crate::vsock::Doors;

/// The host's side of a machine, by what it is.
#[derive(Debug)]
pub struct Backends {
    /// Of consoles, ports and the serial port.
    pub ends: Ends,
    /// Of what may come and go while a machine runs.
    pub pluggable: SharedPluggable,
    /// Of the socket device.
    pub doors: Doors,
    /// Of file system devices.
    pub folders: Folders,
}

/// [`Pluggable`] as the assembly and whoever adds and removes devices share it.
pub type SharedPluggable = Arc<Mutex<Pluggable>>;

/// The host's side of the devices that may come and go while a machine runs, and which of them have.
#[derive(Debug, Default)]
pub struct Pluggable {
    /// Of disks.
    pub images: Images,
    /// Of network devices.
    pub ports: Ports,
    /// What the machine has beside its configuration, and what it no longer has.
    pub changes: Changes,
    /// How many machines were built: those before the last can be given nothing any more.
    pub machines: u64,
}

/// What has changed since the configuration was read. A machine that is built later has it, too.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Devices that were added.
    pub added: Vec<Added>,
    /// Places in the configuration's list of devices whose device was removed.
    pub removed: Vec<usize>,
    /// Numbers of the devices that the guest was asked for, and has not let go.
    pub asked: Vec<u64>,
    /// How many devices were ever added.
    pub count: u64,
}

/// A device that was added.
#[derive(Debug, Clone)]
pub struct Added {
    /// A number that no other device of the session ever has.
    pub id: u64,
    /// The lowest among the devices of its kind, by which it is named.
    pub index: usize,
    /// Its device number on the bus.
    pub number: u8,
    /// What it is.
    pub plug: Plug,
}

impl Backends {
    /// None are open yet. `events` reads the terminal, and serves the devices that need no thread of their own.
    pub fn new(events: EventLoop) -> Self {
        Self {
            ends: Ends::new(events),
            pluggable: Arc::default(),
            doors: Doors::default(),
            folders: Folders::default(),
        }
    }
}
