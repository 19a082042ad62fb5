//! Pairs of queues that others serve in the device's place: the host's kernel (vhost-net), or another process (vhost-user).
//!
//! The device still has the control queue, the link's state and the features. What it does to frames that it sees, it does not do
//! here: no filters.

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{Net, features};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::net::Server;
use crate::vhost::Ring;
use crate::virtio::device::{Offload, OffloadedRing};
use crate::virtio::queue::{Position, Virtqueue};

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What a device may offer whose queues `server` serves.
pub fn able(server: &Server) -> u64 {
    match server {
        Server::Monitor => !0,
        Server::Kernel(pairs) => {
            let kernel = pairs.iter().fold(!0, |all, vhost| all & vhost.features());
            !(features::FILTERS | features::MRG_RXBUF & !kernel)
        }
        // It hears of the offloads once, before it starts.
        Server::BackEnd(back_end) => {
            let lacks = features::OF_FRAMES & !back_end.features();
            !(features::FILTERS | features::CTRL_GUEST_OFFLOADS | lacks)
        }
    }
}

/// A ring of `pair` has been found broken by who serves it, who says no more.
pub fn broken(server: &Server, pair: usize, queues: &mut [Virtqueue]) {
    server.broken().get(pair).iter().for_each(|event| event.clear());
    guest_warn!("network: who serves queues {} and {} finds one of them broken", 2 * pair, 2 * pair + 1);
    queues.iter_mut().skip(2 * pair).take(2).for_each(Virtqueue::give_up);
}

impl Offload for Net {
    fn runs(&self, index: usize) -> bool {
        index < 2 * self.port.server.pairs()
    }

    fn ring_features(&self) -> u64 {
        match &self.port.server {
            Server::BackEnd(back_end) => back_end.features(),
            _ => !0,
        }
    }

    fn hand_over(&mut self, ram: &GuestRam, rings: &[OffloadedRing<'_>]) -> io::Result<()> {
        // Rings are the same with or without indirect descriptors, for who knows them.
        let event_idx = if rings.iter().any(|ring| ring.event_idx) { EVENT_IDX } else { 0 };
        let of_frames = match &self.port.server {
            // The rest of it is the tap's.
            Server::Kernel(_) => features::MRG_RXBUF,
            _ => features::OF_FRAMES,
        };
        let agreed = 1 << VIRTIO_F_VERSION_1 | INDIRECT | event_idx | self.features & of_frames;
        let ring = |index| {
            let OffloadedRing { setup, position, kick, call, .. } =
                rings.iter().find(|ring| ring.queue == index)?;
            Some(Ring {
                size: setup.size,
                descriptors: setup.descriptors,
                available: setup.available,
                used: setup.used,
                next: position.next_available,
                kick: *kick,
                call: *call,
            })
        };
        let pairs = (0..self.port.server.pairs()).map(|pair| [ring(2 * pair), ring(2 * pair + 1)]);
        self.port.server.start(ram, agreed, pairs.collect(), &self.port.links)
    }

    fn take_back(&mut self) -> Vec<(usize, Position)> {
        // They work in order, and have finished what they have begun.
        let position = |(index, next)| (index, Position { next_available: next, next_used: next });
        self.port.server.stop().into_iter().map(position).collect()
    }
}
