//! [`Served`]: a socket device whose packets the host's kernel carries (vhost-vsock). The event queue is still the device's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use zerocopy::IntoBytes;

use super::{Config, EVENT, F_SEQPACKET, QUEUES, RECEIVE, State, TRANSMIT, tell_reset};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::sandbox::Needs;
use crate::state::{StateError, Stateful};
use crate::virtio::device::{Offload, OffloadedRing, Traits, VirtioDevice, agreed};
use crate::virtio::queue::{Position, Virtqueue};
use crate::vsock::Vhost;

/// A socket device.
pub struct Served {
    kernel: Arc<Vhost>,
    config: Config,
    /// Those that the driver has accepted.
    features: u64,
    /// The driver is ready.
    running: bool,
    /// The kernel has the rings.
    serves: bool,
    /// The guest is to be told that its connections are gone.
    reset_due: bool,
}

impl Served {
    /// A device of the guest at address `cid`, whose packets `kernel` carries.
    pub fn new(kernel: Arc<Vhost>, cid: u32) -> Self {
        let config = Config { guest_cid: u64::from(cid).into() };
        Self { kernel, config, features: 0, running: false, serves: false, reset_due: false }
    }

    /// Those that are offered. Streams are implied (5.10.3).
    fn able(&self) -> u64 {
        self.kernel.features() & F_SEQPACKET
    }
}

impl VirtioDevice for Served {
    fn traits(&self) -> Traits {
        Traits { kind: VIRTIO_ID_VSOCK, features: self.able(), queues: QUEUES.to_vec() }
    }

    fn needs(&self) -> Needs {
        Needs::VHOST
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn accept(&mut self, features: u64) {
        self.features = features & self.able();
    }

    fn start(&mut self) {
        self.running = true;
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        if let (EVENT, Some(queue)) = (index, queues.get_mut(EVENT)) {
            tell_reset(&mut self.reset_due, queue);
        }
    }

    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.kernel.broken().as_fd()]
    }

    /// The kernel has found a ring broken, and says no more.
    fn on_event(&mut self, _source: usize, queues: &mut [Virtqueue]) {
        self.kernel.broken().clear();
        guest_warn!("socket: the host's kernel finds a queue of packets broken");
        queues.iter_mut().take(EVENT).for_each(Virtqueue::give_up);
    }

    fn resume(&mut self, queues: &mut [Virtqueue]) {
        if let Some(queue) = queues.get_mut(EVENT) {
            tell_reset(&mut self.reset_due, queue);
        }
    }

    fn reset(&mut self) {
        if self.running
            && let Err(error) = self.kernel.renew()
        {
            log::error!("socket: {}", crate::error_chain(&error));
        }
        self.features = 0;
        (self.running, self.reset_due) = (false, false);
    }

    fn offload(&mut self) -> Option<&mut dyn Offload> {
        Some(self)
    }
}

impl Offload for Served {
    fn runs(&self, index: usize) -> bool {
        index < EVENT
    }

    fn ring_features(&self) -> u64 {
        self.kernel.features()
    }

    fn hand_over(&mut self, ram: &GuestRam, rings: &[OffloadedRing<'_>]) -> io::Result<()> {
        let ring = |index| rings.iter().find(|ring| ring.queue == index).map(OffloadedRing::ring);
        let pair = [ring(RECEIVE), ring(TRANSMIT)];
        // A driver that uses one alone has no connections.
        if pair.iter().all(Option::is_some) {
            self.kernel.start(ram, agreed(rings) | self.features, &pair)?;
            self.serves = true;
        }
        Ok(())
    }

    fn take_back(&mut self) -> Vec<(usize, Position)> {
        if !std::mem::take(&mut self.serves) {
            return Vec::new();
        }
        let next =
            self.kernel.stop().inspect_err(|error| log::error!("vhost-vsock: take the queues back: {error}"));
        // It works in order, and has finished what it has begun.
        let position = |(index, next)| (index, Position { next_available: next, next_used: next });
        (0..).zip(next.into_iter().flatten()).map(position).collect()
    }
}

impl Stateful for Served {
    type State = State;

    fn save(&self) -> State {
        State { features: self.features, running: self.running }
    }

    fn restore(&mut self, State { features, running }: State) -> Result<(), StateError> {
        if features & !self.able() != 0 {
            return Err(StateError::Invalid(format!("socket: features {features:#x}")));
        }
        (self.features, self.running, self.reset_due) = (features, running, running);
        Ok(())
    }
}
