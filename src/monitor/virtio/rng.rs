//! virtio-rng: the host's random bytes for the guest (virtio 1.3, 5.4).

use std::io::Write;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{Traits, VirtioDevice};
use super::queue::{Chain, Virtqueue};
use crate::state::Stateless;

/// Bytes that one request gets at most: a driver asks again, and Linux asks for 64 at a time.
const MAX_BYTES: usize = 4096;

/// An entropy device. It has no state: the driver's requests are all there is.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    fn serve(chain: &mut Chain) -> u32 {
        let mut bytes = [0; MAX_BYTES];
        let wanted = chain.writable.len().min(MAX_BYTES);
        let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
        chain.writable.write(&bytes[..got]).unwrap_or(0) as u32
    }
}

impl VirtioDevice for Rng {
    fn traits(&self) -> Traits {
        Traits { kind: VIRTIO_ID_RNG, features: 0, queues: vec![64] }
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        while let Some(mut chain) = queues[index].pop() {
            let written = Self::serve(&mut chain);
            queues[index].complete(chain.head, written);
        }
    }
}

impl Stateless for Rng {}
