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
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::device::{Offload, OffloadedRing, Traits, VirtioDevice};
use super::queue::{Notifier, Position, Setup, Virtqueue};
use crate::bus::{Busy, lock};
use crate::event_loop::{Event, Handler, Interest, Sources, Worker};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::recorder::{Event as Record, Kind, Recorder, Track, clock};
use crate::state::{StateError, Stateful};
use crate::threads::Role;

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

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Offered for every device, beside the device's own bits.
const RING_FEATURES: u64 = EVENT_IDX | VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Chains that one callback may take from one queue before the worker looks whether it should stop.
const CHAINS_PER_CALL: usize = 256;

/// What the worker tells the registers, without a lock.
#[derive(Debug, Default)]
struct Signals {
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    /// Something is in [`Parts::posted`].
    posted: AtomicBool,
}

/// What the driver asked for that needs the device at rest.
#[derive(Debug, Default)]
struct Posted {
    reset: bool,
    /// Queues to be disabled.
    stop: Vec<usize>,
}

/// The data path: what the worker holds while it serves the device.
struct Parts {
    device: Box<dyn VirtioDevice>,
    queues: Vec<Virtqueue>,
    doorbells: Vec<Event>,
    notifier: Arc<dyn Notifier>,
    ram: Arc<GuestRam>,
    signals: Arc<Signals>,
    posted: Posted,
    /// From DRIVER_OK to a reset.
    started: bool,
    /// Others run their queues now.
    handed_over: bool,
    /// The configuration space as it was after the last callback.
    config: Vec<u8>,
    recorder: Arc<Recorder>,
    /// Made when something is recorded first.
    track: Option<Track>,
    /// The device's name, and its track's.
    name: String,
}

/// What a callback is made for.
#[derive(Clone, Copy)]
enum Cause {
    Queue(usize),
    Source(usize),
}

impl Parts {
    /// One callback, with all that belongs around it.
    fn call(&mut self, cause: Cause) {
        if self.signals.posted.load(Ordering::SeqCst) {
            if self.come_to_rest(Instant::now()).is_ok() {
                self.go_on();
            }
            return;
        }
        // Nothing is taken before DRIVER_OK (3.1.1). A source is heard all the same: else it would stay
        // ready.
        if !self.started && matches!(cause, Cause::Queue(_)) {
            return;
        }
        let start = self.recorder.is_on().then(|| (clock::ticks(), self.completions()));
        self.allow();
        match cause {
            Cause::Queue(index) => self.device.on_queue(index, &mut self.queues),
            Cause::Source(index) => self.device.on_event(index, &mut self.queues),
        }
        let interrupted = self.tell_driver();
        if let Some((time, completions)) = start {
            self.record(cause, time, completions, interrupted);
        }
    }

    /// Has others begin with the queues that are theirs.
    fn hand_over(&mut self) {
        if !self.started || self.handed_over {
            return;
        }
        let Some(offload) = self.device.offload() else { return };
        let mut rings = Vec::new();
        for (queue, (ring, doorbell)) in self.queues.iter().zip(&self.doorbells).enumerate() {
            if let (true, Some(setup)) = (offload.runs(queue), ring.setup()) {
                let Some(call) = self.notifier.direct(queue) else {
                    log::error!("{}: its interrupts cannot be raised by others", self.name);
                    return self.fail();
                };
                let (position, event_idx, kick) = (ring.position(), ring.event_idx(), doorbell.as_fd());
                rings.push(OffloadedRing { queue, setup, position, event_idx, kick, call });
            }
        }
        let handed_over = offload.hand_over(&self.ram, &rings);
        drop(rings);
        match handed_over {
            Ok(()) => self.handed_over = true,
            Err(error) => {
                log::error!("{}: hand its queues over: {error}", self.name);
                self.fail();
            }
        }
    }

    /// The device cannot go on until the driver resets it.
    fn fail(&self) {
        if !self.signals.needs_reset.swap(true, Ordering::SeqCst) {
            self.notifier.config_changed();
        }
    }

    /// Undoes [`Parts::hand_over`].
    fn take_back(&mut self) {
        if !std::mem::take(&mut self.handed_over) {
            return;
        }
        for (index, position) in self.device.offload().map(Offload::take_back).unwrap_or_default() {
            if let Some(queue) = self.queues.get_mut(index) {
                queue.go_on_at(position);
            }
        }
    }

    /// What the driver has asked for is done once the device is at rest.
    fn come_to_rest(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.take_back();
        self.allow();
        // The driver may have kicked a moment ago, before it had enough: nobody else looks at its rings again.
        if self.posted.reset {
            let _ = self.device.finish(&mut self.queues, Instant::now());
        }
        let result = self.device.drain(&mut self.queues, deadline);
        self.tell_driver();
        result?;
        let Posted { reset, stop } = std::mem::take(&mut self.posted);
        for index in stop {
            self.device.forget(index);
            self.queues[index].disable();
        }
        if reset {
            self.device.reset();
            self.queues.iter_mut().for_each(Virtqueue::disable);
            self.started = false;
            self.config_moved();
            self.signals.needs_reset.store(false, Ordering::SeqCst);
        }
        // Last: the driver may go on as soon as it reads this.
        self.signals.posted.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Undoes [`Parts::come_to_rest`], or has the worker try again.
    fn go_on(&mut self) {
        if self.signals.posted.load(Ordering::SeqCst) {
            let ours = self.offloaded().iter().position(|offloaded| !offloaded);
            ours.and_then(|index| self.doorbells.get(index)).iter().for_each(|doorbell| doorbell.signal());
        } else {
            self.allow();
            self.device.resume(&mut self.queues);
            self.tell_driver();
            self.hand_over();
            self.ring();
        }
    }

    /// Of each queue, whether others run it.
    fn offloaded(&mut self) -> Vec<bool> {
        let offload = self.device.offload();
        (0..self.queues.len())
            .map(|index| offload.as_ref().is_some_and(|offload| offload.runs(index)))
            .collect()
    }

    /// Has the worker look at every queue: for what came while nobody looked.
    fn ring(&self) {
        let queues = self.queues.iter().zip(&self.doorbells);
        queues.filter(|(queue, _)| queue.is_usable()).for_each(|(_, doorbell)| doorbell.signal());
    }

    fn allow(&mut self) {
        for queue in &mut self.queues {
            queue.allow(CHAINS_PER_CALL);
        }
    }

    /// Interrupts the driver for what a callback did: the queue (all ones: the configuration) that it was
    /// last interrupted for.
    fn tell_driver(&mut self) -> Option<u64> {
        let mut changed = self.config_moved();
        let mut interrupted = None;
        for (index, (queue, doorbell)) in self.queues.iter_mut().zip(&self.doorbells).enumerate() {
            if queue.notify() {
                interrupted = Some(index as u64);
            }
            if queue.is_broken() && !self.signals.needs_reset.swap(true, Ordering::SeqCst) {
                // 2.1.2: with DRIVER_OK set, the driver hears of it by a configuration interrupt.
                changed = true;
            }
            if queue.wants_more() {
                doorbell.signal();
            }
        }
        if changed && self.started {
            self.notifier.config_changed();
            interrupted = Some(u64::MAX);
        }
        interrupted
    }

    /// Requests completed so far, in all queues; it wraps.
    fn completions(&self) -> u16 {
        self.queues.iter().fold(0, |sum, queue| sum.wrapping_add(queue.position().next_used))
    }

    #[cold]
    fn record(&mut self, cause: Cause, time: u64, completions: u16, interrupted: Option<u64>) {
        let (kind, address) = match cause {
            Cause::Queue(index) => (Kind::Queue, index as u64),
            Cause::Source(index) => (Kind::Source, index as u64),
        };
        let completed = self.completions().wrapping_sub(completions);
        let track = self.track.get_or_insert_with(|| self.recorder.track(&self.name));
        let now = clock::ticks();
        let handled = u32::try_from(now.wrapping_sub(time)).unwrap_or(u32::MAX);
        let (kind, value) = (kind as u8, completed.into());
        track.write(Record { time, address, value, handled, kind, ..Record::default() });
        self.device.take_records().into_iter().for_each(|record| track.write(record));
        if let Some(address) = interrupted {
            track.write(Record { time: now, address, kind: Kind::Interrupt as u8, ..Record::default() });
        }
    }

    /// Counts a change of the configuration space; true if there was one.
    fn config_moved(&mut self) -> bool {
        let config = self.device.config();
        if config == self.config {
            return false;
        }
        self.config = config.to_vec();
        self.signals.config_generation.fetch_add(1, Ordering::SeqCst);
        true
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // Guest memory goes next.
        self.take_back();
    }
}

/// What the worker thread runs.
struct Service {
    parts: Arc<Mutex<Parts>>,
    doorbells: Vec<Event>,
    /// Of each queue, whether others wait for its doorbell.
    offloaded: Vec<bool>,
    /// The device's own sources, and what is waited for on each.
    sources: Vec<(OwnedFd, Interest)>,
}

impl Service {
    /// Waits for what the device wants now.
    fn adapt(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        let parts = lock(&self.parts);
        let tokens = self.doorbells.len() as u32..;
        for (index, ((source, waited), token)) in self.sources.iter_mut().zip(tokens).enumerate() {
            let wanted = parts.device.interest(index);
            match (*waited == Interest::default(), wanted == Interest::default()) {
                _ if *waited == wanted => {}
                (true, _) => sources.add(source, token, wanted)?,
                (_, true) => sources.remove(source)?,
                _ => sources.change(source, token, wanted)?,
            }
            *waited = wanted;
        }
        Ok(())
    }
}

impl Handler for Service {
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        let doorbells = self.doorbells.iter().zip(0..).zip(&self.offloaded);
        for ((doorbell, token), _) in doorbells.filter(|(_, offloaded)| !**offloaded) {
            sources.add(doorbell, token, Interest::INPUT)?;
        }
        self.adapt(sources)
    }

    fn ready(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
        let index = token as usize;
        match self.doorbells.get(index) {
            Some(doorbell) => {
                // Before the look at the queue: a kick that comes after the look is then still there.
                doorbell.clear();
                lock(&self.parts).call(Cause::Queue(index));
            }
            None => {
                let source = index - self.doorbells.len();
                lock(&self.parts).call(Cause::Source(source));
            }
        }
        if let Err(error) = self.adapt(sources) {
            log::error!("{}: wait for the host: {error}", lock(&self.parts).name);
        }
    }
}

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
}

/// [`Core`]'s saved state, the device's included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    features: u128,
    status: u8,
    needs_reset: bool,
    config_generation: u32,
    queues: Vec<(Setup, Position)>,
    device: Vec<u8>,
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
        self.worker = None;
        let parts = &mut *lock(&self.parts);
        parts.allow();
        parts.device.finish(&mut parts.queues, deadline)
    }

    /// Comes to rest: the worker is gone, nothing is in flight, and what the driver had asked for is done.
    /// Idempotent.
    ///
    /// # Errors
    /// [`Busy`] at `deadline`; the worker is gone all the same.
    pub fn pause(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.worker = None;
        self.running = false;
        lock(&self.parts).come_to_rest(deadline)
    }

    /// Gives the device its worker, if the driver had started it. Undoes [`Core::pause`]. Not for vCPUs.
    /// Idempotent.
    pub fn resume(&mut self) {
        self.asked = false;
        let started = self.status.contains(Status::DRIVER_OK) && !self.failed();
        if self.worker.is_some() {
            return;
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
        drop(parts);
        Worker::spawn(
            Role::Device(self.name.clone()),
            Service { parts: self.parts.clone(), doorbells, offloaded, sources },
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

/// Only between [`Core::pause`] and [`Core::resume`]. `restore` leaves the device at rest, too.
impl Stateful for Core {
    type State = State;

    fn save(&self) -> State {
        let parts = lock(&self.parts);
        let needs_reset = self.failed();
        // A broken device stands still until its reset, so nobody can tell where in the rings it was.
        let position = |queue: &Virtqueue| if needs_reset { Position::default() } else { queue.position() };
        State {
            features: self.features,
            status: self.status.bits(),
            needs_reset,
            config_generation: self.config_generation(),
            queues: self.queues.iter().zip(&parts.queues).map(|(s, q)| (*s, position(q))).collect(),
            device: parts.device.save_bytes(),
        }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let invalid = |what: String| Err(StateError::Invalid(format!("{}: {what}", self.name)));
        let status = Status::from_bits_truncate(state.status);
        if status.bits() != state.status || status.contains(Status::NEEDS_RESET) {
            return invalid(format!("status {:#x}", state.status));
        }
        let chain = [Status::ACKNOWLEDGE, Status::DRIVER, Status::FEATURES_OK, Status::DRIVER_OK];
        if chain.windows(2).any(|step| status.contains(step[1]) && !status.contains(step[0])) {
            return invalid(format!("status {status:?}"));
        }
        let agreed = status.contains(Status::FEATURES_OK);
        let features = state.features as u64;
        let fit = state.features & !u128::from(self.offered()) == 0 && features & VERSION_1 != 0;
        if agreed && !fit {
            return invalid(format!("features {:#x}, but {:#x} are offered", state.features, self.offered()));
        }
        let fits =
            |(setup, max): (&Setup, u16)| !setup.ready || (setup.size.is_power_of_two() && setup.size <= max);
        let setups = state.queues.iter().map(|(setup, _)| setup).zip(self.traits.queues.iter().copied());
        if state.queues.len() != self.queues.len() || !setups.into_iter().all(fits) {
            return invalid(format!("queues {:x?}", state.queues));
        }

        let running = status.contains(Status::DRIVER_OK) && !state.needs_reset;
        let mut parts = lock(&self.parts);
        parts.device.restore_bytes(&state.device)?;
        for (queue, (setup, position)) in parts.queues.iter_mut().zip(&state.queues) {
            queue.disable();
            let event_idx = features & EVENT_IDX != 0;
            if running && setup.ready && !queue.enable(setup, *position, event_idx) {
                return invalid(format!("queue {setup:x?}"));
            }
        }
        parts.config = parts.device.config().to_vec();
        parts.started = running;
        drop(parts);
        self.signals.needs_reset.store(state.needs_reset, Ordering::SeqCst);
        self.signals.config_generation.store(state.config_generation, Ordering::SeqCst);
        self.features = state.features;
        self.status = status;
        self.queues = state.queues.into_iter().map(|(setup, _)| setup).collect();
        Ok(())
    }
}
