//! [`Core`]: what is the same for every virtio device behind every transport.
//!
//! Feature negotiation, the device status machine, queue setup, configuration space, the worker thread, reset, save
//! and restore (virtio 1.3, 2.1 to 2.5 and 3.1). Transports decode registers into calls on it; devices never see it.
//!
//! Two locks: the transport's mutex covers the registers here, and device and queues behind one of their own are
//! what the worker needs, so that a vCPU at a register and the worker at a queue meet only where they must.
//!
//! No vCPU waits for I/O, nor makes a thread: a reset, or the end of a queue, that comes with work in flight
//! is posted, and done by the worker, or a pause, when the device is at rest. Until then the driver reads
//! that it is not over.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bitflags::bitflags;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::data_path::{Cause, Parts, Posted, Signals};
pub use self::saved::State;
use self::service::Service;
use super::device::{Traits, VirtioDevice};
use super::queue::{Notifier, Position, Setup, Virtqueue};
use crate::bus::{Busy, lock};
use crate::event_loop::{Event, Interest, Worker};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::recorder::Recorder;
use crate::threads::Role;

mod data_path;
mod saved;
mod service;

bitflags! {
    /// The device status field (virtio 1.3, 2.1).
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The guest has noticed the device.
        const ACKNOWLEDGE = 1;
        /// It knows how to drive it.
        const DRIVER = 2;
        /// The driver is set up.
        const DRIVER_OK = 4;
        /// Features are agreed on.
        const FEATURES_OK = 8;
        /// The device cannot go on without a reset.
        const NEEDS_RESET = 64;
        /// The guest has given up on the device.
        const FAILED = 128;
    }
}

/// A device that goes waits so long for a worker whose work may block.
const LAST_WAIT: Duration = Duration::from_millis(500);

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Offered for every device, beside the device's own bits.
const RING_FEATURES: u64 = EVENT_IDX | VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A virtio device with everything but its transport. Called by the transport, under the transport's mutex.
pub struct Core {
    /// The worker thread's name, and the device's in messages.
    name: String,
    traits: Traits,
    /// Accepted by the driver so far; four pages, of which devices know two.
    features: u128,
    /// As written by the driver.
    status: Status,
    queues: Vec<Setup>,
    doorbells: Vec<Event>,
    /// Of each queue, whether the vCPU that kicks it serves it.
    by_vcpu: Vec<bool>,
    signals: Arc<Signals>,
    parts: Arc<Mutex<Parts>>,
    /// The status that the driver reads while its reset is posted.
    leaving: Option<Status>,
    /// Queues whose end is posted: they read as ready until then.
    stopping: Vec<usize>,
    /// The driver is ready, and the machine not paused.
    running: bool,
    /// Made by [`Core::resume`]. It stays over resets.
    worker: Option<Worker>,
    /// The machine was asked for a worker, and has not looked yet.
    asked: bool,
    /// The worker does work that may block.
    blocks: bool,
}

impl Core {
    /// `device` at rest, called `name` (`virtio-blk0`), whose driver hears of things by `notifier`, and `recorder` of what it
    /// does.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(
        name: &str,
        ram: &Arc<GuestRam>,
        mut device: Box<dyn VirtioDevice>,
        notifier: Arc<dyn Notifier>,
        recorder: &Arc<Recorder>,
    ) -> io::Result<Self> {
        let mut traits = device.traits();
        traits.features |= RING_FEATURES & device.offload().map_or(!0, |offload| offload.ring_features());
        let doorbell = |_: &u16| Event::new();
        let doorbells = traits.queues.iter().map(doorbell).collect::<io::Result<Vec<_>>>()?;
        let queue = |(i, size): (usize, &u16)| Virtqueue::new(ram.clone(), notifier.clone(), i, *size);
        let by_vcpu = (0..doorbells.len()).map(|queue| device.served_by_vcpu(queue)).collect();
        let signals = Arc::<Signals>::default();
        let blocks = device.blocking().is_some();
        let parts = Parts {
            queues: traits.queues.iter().enumerate().map(queue).collect(),
            doorbells: clones(&doorbells)?,
            signals: signals.clone(),
            posted: Posted::default(),
            started: false,
            handed_over: false,
            ram: ram.clone(),
            config: device.config().to_vec(),
            device,
            notifier,
            recorder: recorder.clone(),
            track: None,
            name: name.to_owned(),
        };
        Ok(Self {
            name: name.to_owned(),
            features: 0,
            status: Status::empty(),
            queues: initial_queues(&traits),
            traits,
            doorbells,
            by_vcpu,
            signals,
            parts: Arc::new(Mutex::new(parts)),
            leaving: None,
            stopping: Vec::new(),
            running: false,
            worker: None,
            asked: false,
            blocks,
        })
    }

    /// What the device is.
    pub fn traits(&self) -> &Traits {
        &self.traits
    }

    /// The event that a kick of each queue signals. Ringing one early or in vain is harmless.
    pub fn doorbells(&self) -> &[Event] {
        &self.doorbells
    }

    /// Whether a kick of `queue` should come as a register write, and not to its doorbell.
    pub fn served_by_vcpu(&self, queue: usize) -> bool {
        self.by_vcpu.get(queue).is_some_and(|by_vcpu| *by_vcpu)
    }

    /// A kick that came as a register write.
    pub fn kick(&self, queue: usize) {
        if self.served_by_vcpu(queue) && self.running && self.queue_ready(queue) {
            return lock(&self.parts).call(Cause::Queue(queue));
        }
        if let Some(doorbell) = self.doorbells.get(queue) {
            doorbell.signal();
        }
    }

    fn offered(&self) -> u64 {
        self.traits.features
    }

    /// Offered features: 32 of them, from bit 32 * `page`.
    pub fn offered_features(&self, page: u32) -> u32 {
        self.offered().checked_shr(page.saturating_mul(32)).unwrap_or(0) as u32
    }

    /// The driver accepts features: 32 of them, from bit 32 * `page`. Ignored once they are agreed on.
    pub fn accept_features(&mut self, page: u32, value: u32) {
        if !self.status.contains(Status::DRIVER) || self.status.contains(Status::FEATURES_OK) {
            guest_warn!("{}: features accepted at the wrong time", self.name);
            return;
        }
        if page < 4 {
            let shift = page * 32;
            self.features = self.features & !(u128::from(u32::MAX) << shift) | u128::from(value) << shift;
        } else if value != 0 {
            // Nothing is offered further up: the last bit stands for all of them.
            self.features |= 1 << 127;
        }
    }

    /// Accepted features, likewise.
    pub fn accepted_features(&self, page: u32) -> u32 {
        self.features.checked_shr(page.saturating_mul(32)).unwrap_or(0) as u32
    }

    /// The device status as the driver reads it.
    pub fn status(&self) -> u8 {
        let status = self.leaving.filter(|_| self.is_posted()).unwrap_or(self.status);
        (status | if self.failed() { Status::NEEDS_RESET } else { Status::empty() }).bits()
    }

    fn is_posted(&self) -> bool {
        self.signals.posted.load(Ordering::SeqCst)
    }

    /// A reset was asked for, and is not over: the status reads as before it, and the driver has to wait for
    /// 0 (2.4.2). What it writes meanwhile is to be ignored.
    pub fn is_resetting(&self) -> bool {
        self.leaving.is_some() && self.is_posted()
    }

    /// The driver writes the device status; bits that mean nothing are ignored. True if that was a reset, and
    /// the transport's registers have to follow.
    pub fn write_status(&mut self, value: u32) -> bool {
        let new = Status::from_bits_truncate(value as u8) - Status::NEEDS_RESET;
        if value == 0 {
            self.reset();
            return true;
        }
        if !new.contains(self.status) {
            guest_warn!("{}: status {:?} to {new:?}: bits only go by a reset", self.name, self.status);
            return false;
        }
        // One bit after the other, in the order of 3.1.1, each only if those before it hold.
        for (bit, needs) in [
            (Status::ACKNOWLEDGE, Status::empty()),
            (Status::DRIVER, Status::ACKNOWLEDGE),
            (Status::FEATURES_OK, Status::DRIVER),
            (Status::DRIVER_OK, Status::FEATURES_OK),
            (Status::FAILED, Status::empty()),
        ] {
            if !new.contains(bit) || self.status.contains(bit) {
                continue;
            }
            if !self.status.contains(needs) || (bit == Status::FEATURES_OK && !self.features_fit()) {
                guest_warn!(
                    "{}: {bit:?} refused in {:?}, features {:#x}",
                    self.name,
                    self.status,
                    self.features
                );
                continue;
            }
            self.status |= bit;
            match bit {
                Status::FEATURES_OK => self.agree(),
                Status::DRIVER_OK => self.start(),
                _ => {}
            }
        }
        false
    }

    fn features_fit(&self) -> bool {
        self.features & !u128::from(self.offered()) == 0 && self.accepted() & VERSION_1 != 0
    }

    /// The accepted features that a device or a ring can know.
    fn accepted(&self) -> u64 {
        self.features as u64
    }

    /// The largest size of queue `index`; `None` if there is no such queue.
    pub fn queue_max(&self, index: usize) -> Option<u16> {
        self.traits.queues.get(index).copied()
    }

    /// What the driver has set up of queue `index`.
    pub fn queue_setup(&self, index: usize) -> Option<&Setup> {
        self.queues.get(index)
    }

    /// Queues that others run are to interrupt the driver in another way from now on.
    pub fn interrupts_moved(&self) {
        let mut parts = lock(&self.parts);
        if parts.handed_over {
            parts.take_back();
            parts.hand_over();
        }
    }

    /// Whether queue `index` is enabled: it is until the device has let go of it (4.2.2.2).
    pub fn queue_ready(&self, index: usize) -> bool {
        let stopping = self.is_posted() && self.stopping.contains(&index);
        stopping || self.queues.get(index).is_some_and(|queue| queue.ready)
    }

    /// Sets up queue `index`. Ignored while it is enabled and after DRIVER_OK (4.2.2.2).
    pub fn set_up_queue(&mut self, index: usize, change: impl FnOnce(&mut Setup)) {
        let late = self.status.contains(Status::DRIVER_OK);
        match self.queues.get_mut(index) {
            Some(queue) if !queue.ready && !late => change(queue),
            Some(_) => guest_warn!("{}: queue {index} set up while in use", self.name),
            None => guest_warn!("{}: there is no queue {index}", self.name),
        }
    }

    /// Enables or disables queue `index`. A queue can be disabled at any time, and enabled before DRIVER_OK.
    pub fn set_queue_ready(&mut self, index: usize, ready: bool) {
        if self.queue_ready(index) == ready {
            return;
        }
        let late = self.status.contains(Status::DRIVER_OK);
        let (Some(max), Some(queue)) = (self.queue_max(index), self.queues.get_mut(index)) else { return };
        if ready && (late || !queue.size.is_power_of_two() || queue.size > max) {
            guest_warn!("{}: queue {index} cannot be enabled: {queue:x?}", self.name);
            return;
        }
        queue.ready = ready;
        if late {
            self.post(|posted| posted.stop.push(index));
            self.stopping.push(index);
        }
    }

    /// Has the device do what needs it at rest: at once, if it is, or else by the worker. True if at once.
    fn post(&mut self, what: impl FnOnce(&mut Posted)) -> bool {
        if !self.is_posted() {
            // What was posted before is done.
            self.stopping.clear();
            self.leaving = None;
        }
        let mut parts = lock(&self.parts);
        what(&mut parts.posted);
        self.signals.posted.store(true, Ordering::SeqCst);
        let result = parts.come_to_rest(Instant::now());
        if let Err(busy) = &result {
            log::debug!("{}: reset or disabled with work in flight: {busy}", self.name);
        } else if self.running {
            parts.go_on();
        }
        result.is_ok()
    }

    /// Counts changes of the configuration space.
    pub fn config_generation(&self) -> u32 {
        self.signals.config_generation.load(Ordering::SeqCst)
    }

    /// Reads configuration space; what lies outside it leaves `data` as it is.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let parts = lock(&self.parts);
        if let Some(bytes) = part(parts.device.config(), offset, data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    /// Writes configuration space; ignored outside it.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut parts = lock(&self.parts);
        if part(parts.device.config(), offset, data.len()).is_some() {
            parts.device.write_config(offset as usize, data);
            // The driver knows what it wrote: a new generation, but no interrupt.
            parts.config_moved();
        }
    }

    /// FEATURES_OK: the features stand.
    fn agree(&mut self) {
        let mut parts = lock(&self.parts);
        parts.device.accept(self.accepted());
        parts.config_moved();
    }

    /// DRIVER_OK: from here on the device may touch the queues.
    fn start(&mut self) {
        let event_idx = self.accepted() & EVENT_IDX != 0;
        let mut parts = lock(&self.parts);
        let mut fine = true;
        for (queue, setup) in parts.queues.iter_mut().zip(&self.queues) {
            fine &= !setup.ready || queue.enable(setup, Position::default(), event_idx);
        }
        if !fine {
            parts.queues.iter_mut().for_each(Virtqueue::disable);
            drop(parts);
            self.give_up();
            return;
        }
        parts.device.start();
        parts.config_moved();
        parts.started = true;
        parts.hand_over();
        parts.ring();
        drop(parts);
        self.running = true;
    }

    /// Whether the device waits for the machine to call [`Core::resume`], because it has no worker. Says so
    /// once.
    pub fn wants_worker(&mut self) -> bool {
        let wanted = self.running && self.worker.is_none() && !self.failed();
        wanted && !std::mem::replace(&mut self.asked, true)
    }

    /// The device cannot go on until the driver resets it.
    fn give_up(&self) {
        lock(&self.parts).fail();
    }

    /// The guest is gone: see [`Device::finish`](crate::bus::Device::finish). The worker goes, too.
    ///
    /// # Errors
    /// [`Busy`] at `deadline`.
    pub fn finish(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.dismiss(deadline)?;
        let parts = &mut *lock(&self.parts);
        parts.allow();
        parts.device.finish(&mut parts.queues, deadline)
    }

    /// Comes to rest: the worker is gone, nothing is in flight, and what the driver had asked for is done.
    /// Idempotent.
    ///
    /// # Errors
    /// [`Busy`] at `deadline`. The worker is gone all the same, unless it is what still works.
    pub fn pause(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.running = false;
        self.dismiss(deadline)?;
        lock(&self.parts).come_to_rest(deadline)
    }

    /// Has no worker any more.
    ///
    /// # Errors
    /// [`Busy`] at `deadline`: the host has yet to do what the worker waits for.
    fn dismiss(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.signals.pausing.store(true, Ordering::SeqCst);
        match &self.worker {
            Some(worker) if self.blocks && !worker.stop_by(deadline) => {
                Err(Busy("the host is still at one of its requests".to_owned()))
            }
            _ => {
                self.worker = None;
                Ok(())
            }
        }
    }

    /// Gives the device its worker, if the driver had started it. Undoes [`Core::pause`]. Not for vCPUs.
    /// Idempotent.
    pub fn resume(&mut self) {
        self.asked = false;
        let started = self.status.contains(Status::DRIVER_OK) && !self.failed();
        self.signals.pausing.store(false, Ordering::SeqCst);
        match &self.worker {
            Some(worker) if self.blocks && !self.running => {
                if worker.go_on() {
                    self.running = started;
                    return lock(&self.parts).go_on();
                }
                self.worker = None;
            }
            Some(_) => return,
            None => {}
        }
        self.running = started;
        lock(&self.parts).go_on();
        if !started && !self.is_posted() {
            return;
        }
        match self.spawn() {
            Ok(worker) => self.worker = Some(worker),
            Err(error) => {
                log::error!("{}: start the worker thread: {error}", self.name);
                self.give_up();
            }
        }
    }

    fn failed(&self) -> bool {
        self.signals.needs_reset.load(Ordering::SeqCst)
    }

    fn spawn(&self) -> io::Result<Worker> {
        let doorbells = clones(&self.doorbells)?;
        let mut parts = lock(&self.parts);
        let offloaded = parts.offloaded();
        // Own descriptors, because the device's can be borrowed only under the lock. epoll takes both for the same.
        let own = parts.device.event_sources().into_iter();
        let own = own.map(|fd| Ok((fd.try_clone_to_owned()?, Interest::default())));
        let sources = own.collect::<io::Result<Vec<_>>>()?;
        let (needs, blocking) = (parts.device.needs(), parts.device.blocking());
        drop(parts);
        let (parts, signals) = (self.parts.clone(), self.signals.clone());
        Worker::spawn(
            Role::Device(self.name.clone(), needs),
            Service { parts, doorbells, offloaded, sources, blocking, signals },
        )
    }

    /// Back to as built (2.4): at once, or [posted](Core::is_resetting) while work is in flight.
    fn reset(&mut self) {
        self.running = false;
        if !self.post(|posted| posted.reset = true) {
            self.leaving = Some(self.status);
            let mut parts = lock(&self.parts);
            // From here on its rings are the driver's, and it hears of nothing.
            parts.queues.iter_mut().for_each(Virtqueue::disable);
            parts.started = false;
        }
        self.features = 0;
        self.status = Status::empty();
        self.queues = initial_queues(&self.traits);
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if let (true, Some(worker)) = (self.blocks, self.worker.take())
            && !worker.stop_by(Instant::now() + LAST_WAIT)
        {
            log::warn!("{}: the host is still at one of its requests", self.name);
            // Its thread keeps what it has, guest memory above all, until then.
            std::mem::forget(worker);
        }
    }
}

/// `data.len()` bytes of `config` from `offset`, if they are all there.
fn part(config: &[u8], offset: u64, len: usize) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    config.get(start..start.checked_add(len)?)
}

fn initial_queues(traits: &Traits) -> Vec<Setup> {
    traits.queues.iter().map(|size| Setup { size: *size, ..Setup::default() }).collect()
}

fn clones(events: &[Event]) -> io::Result<Vec<Event>> {
    events.iter().map(Event::try_clone).collect()
}
