//! [`Served`]: a file system device whose queues another process serves (vhost-user): virtiofsd, for instance. What the guest has open is known
//! there alone, so that such a machine is not saved.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use zerocopy::IntoBytes;

use super::{Config, QUEUE_SIZES};
use crate::event_loop::Interest;
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::sandbox::Needs;
use crate::state::{StateError, Stateful};
use crate::vhost::FrontEnd;
use crate::virtio::device::{Offload, OffloadedRing, Traits, VirtioDevice, agreed};
use crate::virtio::queue::{Position, Virtqueue};

/// A file system device.
#[derive(Debug)]
pub struct Served {
    config: Config,
    back_end: Arc<FrontEnd>,
}

impl Served {
    /// A device that the guest mounts by `tag`, and `back_end` serves.
    pub fn new(back_end: Arc<FrontEnd>, tag: &str) -> Self {
        Self { config: Config::new(tag), back_end }
    }
}

impl VirtioDevice for Served {
    fn traits(&self) -> Traits {
        Traits { kind: VIRTIO_ID_FS, features: 0, queues: QUEUE_SIZES.to_vec() }
    }

    fn needs(&self) -> Needs {
        Needs::UNIX
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn on_queue(&mut self, _: usize, _: &mut [Virtqueue]) {}

    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        self.back_end.broken().iter().map(AsFd::as_fd).chain([self.back_end.fd()]).collect()
    }

    fn interest(&self, source: usize) -> Interest {
        match self.back_end.broken().get(source) {
            // Its end, until it has been noticed.
            None if !self.back_end.is_up() => Interest::default(),
            _ => Interest::INPUT,
        }
    }

    fn on_event(&mut self, source: usize, queues: &mut [Virtqueue]) {
        match self.back_end.broken().get(source) {
            Some(broken) => {
                broken.clear();
                guest_warn!("shared folder: who serves it finds a queue broken");
            }
            None => {
                self.back_end.look();
                if self.back_end.is_up() {
                    return;
                }
            }
        }
        // Nobody answers what is in them: the driver is told that the device needs a reset.
        queues.iter_mut().for_each(Virtqueue::give_up);
    }

    fn offload(&mut self) -> Option<&mut dyn Offload> {
        Some(self)
    }
}

impl Offload for Served {
    fn runs(&self, _: usize) -> bool {
        true
    }

    fn ring_features(&self) -> u64 {
        self.back_end.features()
    }

    fn hand_over(&mut self, ram: &GuestRam, rings: &[OffloadedRing<'_>]) -> io::Result<()> {
        let all: Vec<_> = rings.iter().map(|ring| (ring.queue as u32, ring.ring())).collect();
        self.back_end.start(ram, agreed(rings), &all)
    }

    fn take_back(&mut self) -> Vec<(usize, Position)> {
        // It has finished what it has begun.
        let position = |next| Position { next_available: next, next_used: next };
        self.back_end.stop().into_iter().map(|(index, next)| (index as usize, position(next))).collect()
    }
}

/// [`Served`]'s saved state, which is not to be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

impl Stateful for Served {
    type State = Nothing;

    fn save(&self) -> Nothing {
        Nothing {}
    }

    fn restore(&mut self, Nothing {}: Nothing) -> Result<(), StateError> {
        Err(StateError::Invalid("a shared folder that another process served".to_owned()))
    }
}
