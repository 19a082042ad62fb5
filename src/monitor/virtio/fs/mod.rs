//! virtio-fs: FUSE requests to the server of a shared folder (virtio 1.3, 5.11). Knows neither files nor what requests say.
//!
//! [`Served`] has another process serve it.
//!
//! The worker takes one request at a time, and has the server do it without the device's lock: the host may let it wait.

mod served;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use zerocopy::{Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::device::{Blocking, Traits, VirtioDevice};
use super::queue::{Chain, Virtqueue};
use crate::bus::{Busy, lock};
use crate::config::Share;
use crate::sandbox::Needs;
use crate::share::{self, Server};
use crate::state::{StateError, Stateful};

pub use served::Served;

/// That of requests that overtake others (FORGET), and that of all others (5.11.2). Linux takes as many pages for one request as the
/// second has descriptors, but for four.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// `struct virtio_fs_config` (5.11.4), up to what is offered.
#[derive(Debug, Clone, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Config {
    tag: [u8; Share::TAG_MOST],
    num_request_queues: le::U32,
}

impl Config {
    /// Of a device that is mounted by `tag`, of which the first 36 bytes count.
    fn new(tag: &str) -> Self {
        let mut config = Self { tag: [0; Share::TAG_MOST], num_request_queues: 1.into() };
        config.tag.iter_mut().zip(tag.bytes()).for_each(|(to, byte)| *to = byte);
        config
    }
}

/// The request that is at hand.
#[derive(Debug, Default)]
enum Request {
    #[default]
    None,
    /// Taken from this queue, and not begun.
    Taken(usize, Chain),
    /// The worker is at it.
    Begun,
    /// Of this queue and head; so many bytes are the reply.
    Done(usize, u16, u32),
}

/// What the worker has without the device's lock.
#[derive(Debug)]
struct Shared {
    server: Mutex<Server>,
    request: Mutex<Request>,
}

/// A file system device.
#[derive(Debug)]
pub struct Fs {
    config: Config,
    shared: Arc<Shared>,
    /// Queue and head of a request that a saved device had taken and not begun.
    restored: Option<(usize, u16)>,
}

impl Blocking for Shared {
    fn work(&self) -> bool {
        let taken = {
            let mut request = lock(&self.request);
            match std::mem::take(&mut *request) {
                Request::Taken(queue, chain) => {
                    *request = Request::Begun;
                    (queue, chain)
                }
                other => {
                    *request = other;
                    return false;
                }
            }
        };
        let (queue, Chain { head, mut readable, mut writable }) = taken;
        let len = lock(&self.server).serve(&mut readable, &mut writable);
        *lock(&self.request) = Request::Done(queue, head, len as u32);
        true
    }
}

impl Fs {
    /// A device that the guest mounts by `tag`.
    pub fn new(server: Server, tag: &str) -> Self {
        let shared = Shared { server: Mutex::new(server), request: Mutex::default() };
        Self { config: Config::new(tag), shared: Arc::new(shared), restored: None }
    }

    /// Answers the request at hand if it is done, and takes the next if none is.
    fn go_on(&self, queues: &mut [Virtqueue], takes: bool) {
        let mut request = lock(&self.shared.request);
        if let Request::Done(queue, head, len) = *request {
            *request = Request::None;
            if let Some(queue) = queues.get_mut(queue) {
                queue.complete(head, len);
            }
        }
        if let (true, Request::None) = (takes, &*request) {
            let next = queues.iter_mut().enumerate().find_map(|(index, queue)| Some((index, queue.pop()?)));
            *request = next.map_or(Request::None, |(index, chain)| Request::Taken(index, chain));
        }
    }
}

impl VirtioDevice for Fs {
    fn traits(&self) -> Traits {
        Traits { kind: VIRTIO_ID_FS, features: 0, queues: QUEUE_SIZES.to_vec() }
    }

    fn needs(&self) -> Needs {
        Needs::SHARE
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn on_queue(&mut self, _: usize, queues: &mut [Virtqueue]) {
        self.go_on(queues, true);
    }

    fn blocking(&self) -> Option<Arc<dyn Blocking>> {
        Some(self.shared.clone())
    }

    fn on_done(&mut self, queues: &mut [Virtqueue]) {
        self.go_on(queues, true);
    }

    fn drain(&mut self, queues: &mut [Virtqueue], _: Instant) -> Result<(), Busy> {
        self.go_on(queues, false);
        match *lock(&self.shared.request) {
            // The worker, if there is one, comes again when it is over; a pause has waited for the worker.
            Request::Begun => Err(Busy("the host is still at one of its requests".to_owned())),
            _ => Ok(()),
        }
    }

    fn resume(&mut self, queues: &mut [Virtqueue]) {
        let Some((index, head)) = self.restored.take() else { return };
        if let Some(chain) = queues.get_mut(index).and_then(|queue| queue.retake(head)) {
            *lock(&self.shared.request) = Request::Taken(index, chain);
        }
    }

    fn forget(&mut self, index: usize) {
        let mut request = lock(&self.shared.request);
        if matches!(*request, Request::Taken(queue, _) if queue == index) {
            *request = Request::None;
        }
        self.restored = self.restored.filter(|(queue, _)| *queue != index);
    }

    fn reset(&mut self) {
        *lock(&self.shared.request) = Request::None;
        self.restored = None;
        lock(&self.shared.server).reset();
    }
}

/// [`Fs`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Queue and head of a request that is taken and not begun.
    taken: Option<(u8, u16)>,
    /// What the guest knows of the folder.
    server: share::State,
}

impl Stateful for Fs {
    type State = State;

    fn save(&self) -> State {
        let taken = match &*lock(&self.shared.request) {
            Request::Taken(queue, chain) => Some((*queue, chain.head)),
            _ => self.restored,
        };
        let taken = taken.map(|(queue, head)| (queue as u8, head));
        State { taken, server: lock(&self.shared.server).save() }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let State { taken, server } = state;
        let is_one =
            |(queue, head): (u8, u16)| QUEUE_SIZES.get(usize::from(queue)).is_some_and(|size| head < *size);
        if let Some((queue, head)) = taken.filter(|taken| !is_one(*taken)) {
            return Err(StateError::Invalid(format!("request {head} of queue {queue}")));
        }
        self.restored = taken.map(|(queue, head)| (queue.into(), head));
        lock(&self.shared.server).restore(server).map_err(StateError::Invalid)
    }
}
