//! vhost-vsock: the host's kernel itself carries connections between a guest's rings and programs of the host that use AF_VSOCK.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::Error;
use crate::config::Vsock;
use crate::event_loop::Event;
use crate::memory::GuestRam;
use crate::vhost::{Kernel, Ring};

/// The kernel's end of a socket device's two queues of packets. It uses guest memory from [`Vhost::start`] until [`Vhost::stop`]:
/// whoever starts it keeps the memory mapped until then.
#[derive(Debug)]
pub struct Vhost {
    cid: u32,
    features: u64,
    /// None if it could not be had a second time.
    kernel: Mutex<Option<Kernel>>,
    /// Set when the kernel finds a ring that breaks the rules.
    broken: Event,
}

fn open(cid: u32) -> Result<Kernel, Error> {
    let kernel = Kernel::open(Vsock::HOST_DEVICE).map_err(|(what, source)| Error::Vhost { what, source })?;
    kernel.set_guest_cid(cid).map_err(|source| match Errno::from_io_error(&source) {
        Some(Errno::ADDRINUSE) => Error::CidTaken(cid),
        _ => Error::Vhost { what: "give the guest its address by", source },
    })?;
    Ok(kernel)
}

impl Vhost {
    /// That of the guest at address `cid`.
    ///
    /// # Errors
    /// The host has no vhost-vsock, or not for this user, or another guest of this host has the address.
    pub fn open(cid: u32) -> Result<Self, Error> {
        let kernel = open(cid)?;
        Ok(Self { cid, features: kernel.features(), kernel: Mutex::new(Some(kernel)), broken: Event::new()? })
    }

    fn kernel(&self) -> MutexGuard<'_, Option<Kernel>> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The feature bits of virtio and of its rings that the kernel knows here.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Readable when a ring has been found broken.
    pub fn broken(&self) -> &Event {
        &self.broken
    }

    /// Ends all connections: the guest that had them is gone. (The kernel does so for nothing but the end of its own end.)
    ///
    /// # Errors
    /// The kernel has no other end for us. Nothing can be served until this succeeds.
    pub fn renew(&self) -> Result<(), Error> {
        let mut kernel = self.kernel();
        // The address is free again only then.
        drop(kernel.take());
        *kernel = Some(open(self.cid)?);
        Ok(())
    }

    /// Has the kernel serve `rings`, the receiving one first, as agreed by `features`, in `ram`.
    ///
    /// # Errors
    /// The kernel refuses: a ring outside of guest memory, say. Nothing is served then.
    pub fn start(&self, ram: &GuestRam, features: u64, rings: &[Option<Ring<'_>>; 2]) -> io::Result<()> {
        let kernel = self.kernel();
        let kernel = kernel.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        kernel.tell(ram, features, rings, &self.broken)?;
        // It takes none if it does not take both.
        kernel.set_running(true)
    }

    /// Takes the rings back, when the kernel has let go of them: nothing is in flight then. Where it has come to in each: the index
    /// of the next available entry, which all before have been used. Connections stay.
    ///
    /// # Errors
    /// The kernel refuses: never seen.
    pub fn stop(&self) -> io::Result<[u16; 2]> {
        let kernel = self.kernel();
        let kernel = kernel.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        kernel.set_running(false)?;
        kernel.next()
    }
}
