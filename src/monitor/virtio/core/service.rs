//! What a device's worker thread does: it waits for kicks and for the device's own sources, and calls the device.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::data_path::{Cause, Parts, Signals};
use crate::bus::lock;
use crate::event_loop::{Event, Handler, Interest, Sources};
use crate::virtio::device::Blocking;

/// The handler.
pub(super) struct Service {
    pub(super) parts: Arc<Mutex<Parts>>,
    pub(super) doorbells: Vec<Event>,
    /// Of each queue, whether others wait for its doorbell.
    pub(super) offloaded: Vec<bool>,
    /// The device's own sources, and what is waited for on each.
    pub(super) sources: Vec<(OwnedFd, Interest)>,
    /// What the device leaves to be done without its lock.
    pub(super) blocking: Option<Arc<dyn Blocking>>,
    pub(super) signals: Arc<Signals>,
}

impl Service {
    /// Does what the last callback has left, and what that leads to.
    fn work(&self) {
        let Some(blocking) = &self.blocking else { return };
        while !self.signals.pausing.load(Ordering::SeqCst) && blocking.work() {
            lock(&self.parts).call(Cause::Done);
        }
    }

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
        self.work();
        if let Err(error) = self.adapt(sources) {
            log::error!("{}: wait for the host: {error}", lock(&self.parts).name);
        }
    }
}
