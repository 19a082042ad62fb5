//! Pairs of queues that the host's kernel serves (vhost-net), in the device's place.
//!
//! The device still has the control queue, the link's state and the features. What it does to frames that it sees, it does not do
//! here: no filters.

use std::io;
use std::os::fd::AsFd;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::{Net, features};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::net::{Ring, Vhost};
use crate::virtio::device::{Offload, OffloadedRing};
use crate::virtio::queue::{Position, Virtqueue};

/// Features of its rings that a driver always has, or may use without harm.
const RING: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What a device may offer whose queues `kernel` serves.
pub fn able(kernel: &Vhost) -> u64 {
    let merge = if kernel.features() & features::MRG_RXBUF != 0 { 0 } else { features::MRG_RXBUF };
    !(features::FILTERS | merge)
}

/// `kernel` has found one of the rings of `pair` broken, and says no more.
pub fn broken(kernel: &Vhost, pair: usize, queues: &mut [Virtqueue]) {
    kernel.broken().clear();
    guest_warn!("network: the host's kernel finds queue {} or {} broken", 2 * pair, 2 * pair + 1);
    queues.iter_mut().skip(2 * pair).take(2).for_each(Virtqueue::give_up);
}

impl Offload for Net {
    fn runs(&self, index: usize) -> bool {
        index < 2 * self.port.kernel.len()
    }

    fn hand_over(&mut self, ram: &GuestRam, rings: &[OffloadedRing<'_>]) -> io::Result<()> {
        let event_idx = rings.iter().any(|ring| ring.event_idx);
        let agreed = RING
            | self.features & features::MRG_RXBUF
            | if event_idx { 1 << VIRTIO_RING_F_EVENT_IDX } else { 0 };
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
        for (pair, (kernel, link)) in self.port.kernel.iter().zip(&self.port.links).enumerate() {
            let rings = [ring(2 * pair), ring(2 * pair + 1)];
            let started = kernel.start(ram, agreed, &rings, link.as_fd());
            if started.is_err() {
                self.take_back();
                return started;
            }
        }
        Ok(())
    }

    fn take_back(&mut self) -> Vec<(usize, Position)> {
        let mut positions = Vec::new();
        for (pair, kernel) in self.port.kernel.iter().enumerate() {
            match kernel.stop() {
                Ok(next) => {
                    // It works in order, and has finished what it has begun.
                    let position = |next| Position { next_available: next, next_used: next };
                    positions.extend([(2 * pair, position(next[0])), (2 * pair + 1, position(next[1]))]);
                }
                Err(error) => log::error!("vhost-net: take a pair of queues back: {error}"),
            }
        }
        positions
    }
}
