//! [`Parts`]: device and queues behind one lock, and what belongs around each callback.
//!
//! Held by the worker while it serves, by a vCPU at a register that needs the device, and by a pause.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use crate::bus::Busy;
use crate::event_loop::Event;
use crate::memory::GuestRam;
use crate::recorder::{Event as Record, Kind, Recorder, Track, clock};
use crate::virtio::device::{Offload, OffloadedRing, VirtioDevice};
use crate::virtio::queue::{Notifier, Virtqueue};

/// Chains that one callback may take from one queue before the worker looks whether it should stop.
const CHAINS_PER_CALL: usize = 256;

/// What the worker and the registers tell each other, without a lock.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pub(super) needs_reset: AtomicBool,
    pub(super) config_generation: AtomicU32,
    /// Something is in [`Parts::posted`].
    pub(super) posted: AtomicBool,
    /// The worker is to stop.
    pub(super) pausing: AtomicBool,
}

/// What the driver asked for that needs the device at rest.
#[derive(Debug, Default)]
pub(super) struct Posted {
    pub(super) reset: bool,
    /// Queues to be disabled.
    pub(super) stop: Vec<usize>,
}

/// The data path: what the worker holds while it serves the device.
pub(super) struct Parts {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) queues: Vec<Virtqueue>,
    pub(super) doorbells: Vec<Event>,
    pub(super) notifier: Arc<dyn Notifier>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) signals: Arc<Signals>,
    pub(super) posted: Posted,
    /// From DRIVER_OK to a reset.
    pub(super) started: bool,
    /// Others run their queues now.
    pub(super) handed_over: bool,
    /// The configuration space as it was after the last callback.
    pub(super) config: Vec<u8>,
    pub(super) recorder: Arc<Recorder>,
    /// Made when something is recorded first.
    pub(super) track: Option<Track>,
    /// The device's name, and its track's.
    pub(super) name: String,
}

/// What a callback is made for.
#[derive(Clone, Copy)]
pub(super) enum Cause {
    Queue(usize),
    Source(usize),
    /// What the device had left to be done.
    Done,
}

impl Parts {
    /// One callback, with all that belongs around it.
    pub(super) fn call(&mut self, cause: Cause) {
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
            Cause::Done => self.device.on_done(&mut self.queues),
        }
        let interrupted = self.tell_driver();
        if let Some((time, completions)) = start {
            self.record(cause, time, completions, interrupted);
        }
    }

    /// Has others begin with the queues that are theirs.
    pub(super) fn hand_over(&mut self) {
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
    pub(super) fn fail(&self) {
        if !self.signals.needs_reset.swap(true, Ordering::SeqCst) {
            self.notifier.config_changed();
        }
    }

    /// Undoes [`Parts::hand_over`].
    pub(super) fn take_back(&mut self) {
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
    pub(super) fn come_to_rest(&mut self, deadline: Instant) -> Result<(), Busy> {
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
    pub(super) fn go_on(&mut self) {
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
    pub(super) fn offloaded(&mut self) -> Vec<bool> {
        let offload = self.device.offload();
        (0..self.queues.len())
            .map(|index| offload.as_ref().is_some_and(|offload| offload.runs(index)))
            .collect()
    }

    /// Has the worker look at every queue: for what came while nobody looked.
    pub(super) fn ring(&self) {
        let queues = self.queues.iter().zip(&self.doorbells);
        queues.filter(|(queue, _)| queue.is_usable()).for_each(|(_, doorbell)| doorbell.signal());
    }

    pub(super) fn allow(&mut self) {
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
            Cause::Done => (Kind::Source, 0),
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
    pub(super) fn config_moved(&mut self) -> bool {
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
