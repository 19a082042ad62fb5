//! Pairs of queues that others serve in the device's place: the host's kernel (vhost-net), or another process (vhost-user).
//!
//! The device still has the control queue, the link's state and the features. What it does to frames that it sees, it does not do
//! here: no filters.

use std::io;

use super::{Net, features};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::net::Server;
use crate::virtio::device::{Offload, OffloadedRing, agreed};
use crate::virtio::queue::{Position, Virtqueue};

/// What a device may offer whose queues `server` serves.
pub fn able(server: &Server) -> u64 {
    match server {
        Server::Monitor => !0,
        Server::Kernel { pairs, .. } => {
            let kernel = pairs.iter().fold(!0, |all, vhost| all & vhost.features());
            !(features::FILTERS | features::MRG_RXBUF & !kernel)
        }
        // It hears of the offloads once, before it starts.
        Server::BackEnd(back_end) => {
            let lacks = (features::OF_FRAMES | features::MQ) & !back_end.features();
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
        let of_frames = match &self.port.server {
            // The rest of it is the tap's.
            Server::Kernel { .. } => features::MRG_RXBUF,
            _ => features::OF_FRAMES | features::MQ,
        };
        let agreed = agreed(rings) | self.features & of_frames;
        let ring = |index| rings.iter().find(|ring| ring.queue == index).map(OffloadedRing::ring);
        let pairs = (0..self.port.server.pairs()).map(|pair| [ring(2 * pair), ring(2 * pair + 1)]);
        self.port.server.start(ram, agreed, pairs.collect(), &self.port.links)
    }

    fn take_back(&mut self) -> Vec<(usize, Position)> {
        // They work in order, and have finished what they have begun.
        let position = |(index, next)| (index, Position { next_available: next, next_used: next });
        self.port.server.stop().into_iter().map(position).collect()
    }
}
