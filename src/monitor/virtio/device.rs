//! What a virtio device is: requests in, completions out. It sees no rings, transports, threads or KVM.
//!
//! [`core`](super::core) drives it, the same way for every device and transport.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::queue::{Position, Setup, Virtqueue};
use crate::bus::Busy;
use crate::event_loop::Interest;
use crate::memory::GuestRam;
use crate::recorder::Event as Record;
use crate::sandbox::Needs;
use crate::state::Saved;
use crate::vhost::Ring;

/// What a device is, as data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traits {
    /// Device type: a `VIRTIO_ID_*` (virtio 1.3, section 5).
    pub kind: u32,
    /// Device-specific feature bits that are offered. The core adds the ring's and VIRTIO_F_VERSION_1.
    pub features: u64,
    /// The largest size of each queue, a power of two.
    pub queues: Vec<u16>,
}

/// A device behind virtqueues.
///
/// Life: built, `accept` at FEATURES_OK, `start` at DRIVER_OK, then any number of `on_queue` and `on_event`,
/// then `drain` (until it says that the device is at rest), then `resume`, or `reset` (back to as built).
/// `restore_bytes` comes in place of `accept` and `start`, and `resume` after it: state must therefore hold
/// the accepted features that the device cares for.
///
/// Every call is made with the device's one mutex held, by its worker thread, by a vCPU (registers,
/// configuration space, queues that are [`served_by_vcpu`](VirtioDevice::served_by_vcpu)) or by who pauses
/// the machine. None may block for long, panic, or grow without bound, whatever the rings hold; `drain` may
/// until its deadline, which is over already when a vCPU or the worker asks.
pub trait VirtioDevice: Saved + Send {
    /// What the device is. Constant for its life.
    fn traits(&self) -> Traits;
    /// What its worker needs of the host, beyond what is open.
    fn needs(&self) -> Needs {
        Needs::empty()
    }
    /// The configuration space's bytes. The core compares them around each call and tells the driver of a change.
    fn config(&self) -> &[u8] {
        &[]
    }
    /// The driver writes to configuration space. In range of [`VirtioDevice::config`].
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// The driver has accepted `features`: they stand until the next reset.
    fn accept(&mut self, _features: u64) {}
    /// The driver is ready.
    fn start(&mut self) {}
    /// The driver kicked queue `index`, or work may be waiting there. Pops until the queue is empty or the device can
    /// take no more (it must then look again by itself, from `on_event`).
    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]);
    /// Whether the vCPU that kicks queue `index` serves it itself, without waking the worker. For what a driver spins on until
    /// it is done, if a turn is short: a wake-up costs more than an exit, and the vCPU would only wait for it.
    fn served_by_vcpu(&self, _index: usize) -> bool {
        false
    }
    /// Descriptors that the device may wait on, level-triggered. Asked at each start of the worker; the set is constant while it
    /// runs.
    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// What is waited for on source `source` at present; with no interest at all a hang-up is not heard either. The worker asks when
    /// it starts and after each of its callbacks.
    fn interest(&self, _source: usize) -> Interest {
        Interest::INPUT
    }
    /// Source `source` of [`VirtioDevice::event_sources`] is ready. It may be so before `start` and after
    /// `reset`, too.
    fn on_event(&mut self, _source: usize, _queues: &mut [Virtqueue]) {}
    /// The device's work that may block. Asked at each start of the worker.
    fn blocking(&self) -> Option<Arc<dyn Blocking>> {
        None
    }
    /// [`Blocking::work`] has done something.
    fn on_done(&mut self, _queues: &mut [Virtqueue]) {}
    /// What the last callbacks did, for the recorder, in order of time: only if it was on.
    fn take_records(&mut self) -> Vec<Record> {
        Vec::new()
    }
    /// The guest is gone, or its driver wants a reset: takes what was handed over before, kicked or not, and passes it on to those on
    /// the host who take it by `deadline`. For devices whose drivers do not wait until what they sent has arrived. Before `drain`, at
    /// any time.
    ///
    /// # Errors
    /// [`Busy`] at `deadline`: somebody has yet to take some of it. It may be called again.
    fn finish(&mut self, _queues: &mut [Virtqueue], _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }
    /// Comes to rest: begins nothing more, and waits until `deadline` at most for what is begun. After `Ok`
    /// no thread and no kernel request touches guest memory or the host on the device's behalf; what it has
    /// popped is completed, put back, or kept in its state to go on after `resume`.
    ///
    /// # Errors
    /// [`Busy`]: not yet. The device has a source that becomes ready when it is worth asking again.
    fn drain(&mut self, _queues: &mut [Virtqueue], _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }
    /// Undoes `drain`, also one that is not over, and takes up what restored state holds. The queues are
    /// looked at anyway.
    fn resume(&mut self, _queues: &mut [Virtqueue]) {}
    /// Forgets what it has popped from queue `index`, which is about to be disabled. At rest.
    fn forget(&mut self, _index: usize) {}
    /// Forgets the driver: back to the state in which it was built. At rest.
    fn reset(&mut self) {}
    /// For a device with queues that others run.
    fn offload(&mut self) -> Option<&mut dyn Offload> {
        None
    }
}

/// Work of a device that may block: its worker does it without the device's lock, so that registers, pauses and resets do not wait for it.
pub trait Blocking: Send + Sync {
    /// Does what a callback of the device's has left to do, and returns whether there was anything. The worker asks after each callback
    /// until there is nothing, or until it should stop: what is left then is asked for when it is there again.
    fn work(&self) -> bool;
}

/// Queues of a device that others run than the monitor: the host's kernel, or another process.
///
/// They get the rings themselves, with the eventfds of the driver's kicks and of its interrupts, and the device sees no requests of
/// these queues. `hand_over` follows `start` and `resume`; `take_back` comes before `drain`, before any of these queues is disabled,
/// and at the latest before guest memory goes.
pub trait Offload {
    /// Whether others run queue `index`. Constant for the device's life.
    fn runs(&self, index: usize) -> bool;
    /// The features of rings that they know. Constant for the device's life, and offered for all of its queues.
    fn ring_features(&self) -> u64;
    /// Has them begin with `rings`, those of their queues that the driver has enabled.
    ///
    /// # Errors
    /// They do not take them. Nothing is handed over then, and the device cannot go on.
    fn hand_over(&mut self, ram: &GuestRam, rings: &[OffloadedRing<'_>]) -> io::Result<()>;
    /// Has them stop, and waits until they touch guest memory no more. How far they have come in each queue, by its index.
    fn take_back(&mut self) -> Vec<(usize, Position)>;
}

/// A ring that is handed over.
#[derive(Debug)]
pub struct OffloadedRing<'a> {
    /// The queue's index.
    pub queue: usize,
    /// The ring.
    pub setup: Setup,
    /// Where to go on in it.
    pub position: Position,
    /// VIRTIO_F_EVENT_IDX is agreed on.
    pub event_idx: bool,
    /// What the driver's kicks signal.
    pub kick: BorrowedFd<'a>,
    /// What interrupts the driver.
    pub call: BorrowedFd<'a>,
}

impl OffloadedRing<'_> {
    /// The ring, for who takes it over.
    pub fn ring(&self) -> Ring<'_> {
        let Self { setup, position, kick, call, .. } = self;
        Ring {
            size: setup.size,
            descriptors: setup.descriptors,
            available: setup.available,
            used: setup.used,
            next: position.next_available,
            kick: *kick,
            call: *call,
        }
    }
}

/// The features of rings, of whatever device, by which who takes over `rings` serves them.
pub fn agreed(rings: &[OffloadedRing<'_>]) -> u64 {
    let event_idx = u64::from(rings.iter().any(|ring| ring.event_idx));
    // Rings are the same with or without indirect descriptors, for who knows them.
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | event_idx << VIRTIO_RING_F_EVENT_IDX
}
