//! Rings that others serve: another process ([`FrontEnd`], vhost-user), or the host's kernel ([`Kernel`], vhost); and what a ring
//! is to whoever takes it over.
//!
//! Knows no kind of device: network devices ([`net`](crate::net)) and socket devices ([`vsock`](crate::vsock)) use it.

mod error;
mod front_end;
mod kernel;
mod message;

use std::os::fd::BorrowedFd;

pub use error::Error;
pub use front_end::FrontEnd;
pub use kernel::Kernel;

/// A ring as it is handed over.
#[derive(Debug)]
pub struct Ring<'a> {
    /// Number of descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Index of the next available entry to take.
    pub next: u16,
    /// Signalled when there is something in it.
    pub kick: BorrowedFd<'a>,
    /// To be signalled when something of it is used.
    pub call: BorrowedFd<'a>,
}

impl Ring<'_> {
    /// Guest addresses and lengths in bytes of the descriptor table, the used and the available ring (virtio 1.3, 2.7), event
    /// indices included.
    pub fn parts(&self) -> [(u64, u64); 3] {
        let entries = u64::from(self.size);
        [(self.descriptors, 16 * entries), (self.used, 6 + 8 * entries), (self.available, 6 + 2 * entries)]
    }
}
