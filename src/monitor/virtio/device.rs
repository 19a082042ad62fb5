//! What a virtio device is: requests in, completions out. It sees no rings, transports, threads or KVM.
//!
//! [`core`](super::core) drives it, the same way for every device and transport.

use std::os::fd::BorrowedFd;

use super::queue::Virtqueue;
use crate::state::Saved;

/// What a device is, as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traits {
    /// Device type (virtio 1.3, section 5).
    pub kind: Kind,
    /// Device-specific feature bits that are offered. The core adds the ring's and VIRTIO_F_VERSION_1.
    pub features: u64,
    /// The largest size of each queue, a power of two.
    pub queues: &'static [u16],
}

/// Device types (virtio 1.3, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// 5.2
    Block = 2,
    /// 5.3
    Console = 3,
    /// 5.4
    Entropy = 4,
}

/// A device behind virtqueues.
///
/// Life: built, `start` at DRIVER_OK, then any number of `on_queue` and `on_event`, then `drain` (pause, reset or
/// save), then `on_queue` again (resume) or `reset` (back to as built). `restore_bytes` comes in place of `start`:
/// state must therefore hold the negotiated features that the device cares for.
///
/// Every call is made with the device's one mutex held, by its worker thread or, for configuration space and queues that
/// are [`served_by_vcpu`](VirtioDevice::served_by_vcpu), a vCPU. None may block for long, panic, or grow without bound,
/// whatever the rings hold. After `drain` returns no work is in flight: no thread and no kernel request touches guest memory
/// on the device's behalf.
pub trait VirtioDevice: Saved + Send {
    /// What the device is. Constant for its life.
    fn traits(&self) -> Traits;
    /// The configuration space's bytes. The core compares them around each call and tells the driver of a change.
    fn config(&self) -> &[u8] {
        &[]
    }
    /// The driver writes to configuration space. In range of [`VirtioDevice::config`].
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// The driver is ready, having accepted `features`.
    fn start(&mut self, _features: u64) {}
    /// The driver kicked queue `index`, or work may be waiting there. Pops until the queue is empty or the device can
    /// take no more (it must then look again by itself, from `on_event`).
    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]);
    /// Whether the vCPU that kicks queue `index` serves it itself, without waking the worker. For what a driver spins on until
    /// it is done, if a turn is short: a wake-up costs more than an exit, and the vCPU would only wait for it.
    fn served_by_vcpu(&self, _index: usize) -> bool {
        false
    }
    /// Descriptors that the device waits on, for reading, level-triggered. Asked at each start of the worker; the set
    /// is constant while it runs (one whose interest changes can be an epoll descriptor).
    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// Source `source` of [`VirtioDevice::event_sources`] is ready.
    fn on_event(&mut self, _source: usize, _queues: &mut [Virtqueue]) {}
    /// Finishes what is in flight, completing it to the queues.
    fn drain(&mut self, _queues: &mut [Virtqueue]) {}
    /// Forgets the driver: back to the state in which it was built. Called after `drain`.
    fn reset(&mut self) {}
}
