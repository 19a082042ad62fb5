//! PCI: one segment with one bus, whose functions have a configuration space, memory wherever their BAR says, and message-signalled
//! interrupts.
//!
//! [`Segment`] finds the function that an access is for; its windows on the machine's buses ([`segment::Ecam`],
//! [`segment::Memory`], [`segment::ConfigPorts`]) stay where they are while BARs move behind them. A [`Function`] is a device
//! model's own (`virtio::pci`). Knows no device, and KVM only as [`vm`](crate::vm).
//!
//! Source: PCI Local Bus Specification 3.0, PCI Express Base Specification 5.0.

pub mod config_space;
pub mod host_bridge;
pub mod hot_plug;
pub mod intx;
pub mod msix;
pub mod segment;
#[cfg(test)]
mod tests;

use std::io;

use crate::bus::{Device, Effect};

pub use config_space::{ConfigSpace, Identity};
pub use host_bridge::HostBridge;
pub use hot_plug::HotPlug;
pub use intx::Line;
pub use msix::{Lines, Msix};
pub use segment::{ConfigPorts, Ecam, Memory, Segment};

/// A function on the bus. Its [`Device`] side is the memory behind its one BAR, with offsets from where that begins.
///
/// Caller: the segment, for a vCPU thread or while the machine is built, with the function's mutex held. The rules are those of
/// [`Device`].
pub trait Function: Device {
    /// The guest reads 1, 2 or 4 bytes at `register`, naturally aligned.
    fn read_config(&mut self, register: u8, data: &mut [u8]);
    /// The guest writes 1, 2 or 4 bytes at `register`, naturally aligned.
    fn write_config(&mut self, register: u8, data: &[u8]) -> Effect;
    /// Where its memory is to be decoded: first address and size. `None` while decoding is off.
    fn wants(&self) -> Option<(u64, u64)>;
    /// From now on its memory is decoded from `base` on, and its doorbells are there.
    ///
    /// # Errors
    /// They cannot be there. All is as it was.
    fn move_to(&mut self, base: u64) -> io::Result<()>;
    /// Another function's memory is to be where its own was when it was decoded last: nothing of it may be left there.
    fn leave(&mut self);
    /// It is off the bus, for good: it has no doorbells and interrupts nobody from now on, and whoever was on the way to it finds
    /// nothing there (PCI 3.0, 3.2.2.3.4: all ones).
    fn remove(&mut self);
}
