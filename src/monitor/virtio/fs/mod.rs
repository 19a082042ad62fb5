//! virtio-fs: FUSE requests to the server of a shared folder (virtio 1.3, 5.11). Knows neither files nor what requests say.
//!
//! [`Served`] has another process serve it.
//!
//! The worker takes one request at a time, and has the server do it without the device's lock: the host may let it wait. A request for a lock
//! that somebody else has is laid aside, and tried again when the guest has asked for something else, or some time has passed.

mod served;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use zerocopy::{Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::device::{Blocking, Traits, VirtioDevice};
use super::queue::{Chain, Virtqueue};
use crate::bus::{Busy, lock};
use crate::config::Share;
use crate::sandbox::Needs;
use crate::share::{self, Outcome, SavedLocks, Server, Waiting};
use crate::state::{StateError, Stateful};
use crate::timer::Timer;

pub use served::Served;

/// That of requests that overtake others (FORGET), and that of all others (5.11.2). Linux takes as many pages for one request as the
/// second has descriptors, but for four.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// The most requests that are laid aside: half of a queue, so that others go on.
const WAITING_MOST: usize = 256;
/// How soon one is tried again if nothing happens here that may have freed the lock.
const TRIED_AGAIN: Duration = Duration::from_millis(20);

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

/// Requests that are laid aside.
#[derive(Debug, Default)]
struct Aside {
    /// Queue and head of each.
    waiting: Vec<(usize, u16, Waiting)>,
    /// Of these queues and heads; so many bytes are the replies.
    done: Vec<(usize, u16, u32)>,
    /// They are to be tried again.
    is_due: bool,
    /// The worker is at that, and has them.
    is_tried: bool,
}

/// What the worker has without the device's lock.
#[derive(Debug)]
struct Shared {
    server: Mutex<Server>,
    request: Mutex<Request>,
    aside: Mutex<Aside>,
}

/// A file system device.
#[derive(Debug)]
pub struct Fs {
    config: Config,
    shared: Arc<Shared>,
    /// If requests may be laid aside: runs while some are.
    timer: Option<Timer>,
    /// Queue and head of requests that a saved device had taken and not begun, or laid aside.
    restored: VecDeque<(usize, u16)>,
}

impl Blocking for Shared {
    fn work(&self) -> bool {
        let request = {
            let mut request = lock(&self.request);
            match std::mem::take(&mut *request) {
                Request::Taken(queue, chain) => {
                    *request = Request::Begun;
                    Some((queue, chain))
                }
                other => {
                    *request = other;
                    None
                }
            }
        };
        let has_begun = request.is_some();
        if let Some((queue, Chain { head, mut readable, mut writable })) = request {
            let outcome = lock(&self.server).serve(&mut readable, &mut writable);
            let len = match outcome {
                Outcome::Replied(len) => Some(len),
                Outcome::Waits(waiting) if lock(&self.aside).waiting.len() >= WAITING_MOST => {
                    Some(lock(&self.server).refuse(waiting))
                }
                Outcome::Waits(waiting) => {
                    lock(&self.aside).waiting.push((queue, head, waiting));
                    None
                }
            };
            *lock(&self.request) = len.map_or(Request::None, |len| Request::Done(queue, head, len as u32));
        }
        // It may have freed what others wait for.
        self.try_again(has_begun) || has_begun
    }
}

impl Shared {
    /// Tries again what is laid aside, if it is due, or something has happened.
    fn try_again(&self, has_happened: bool) -> bool {
        let mut waiting = {
            let mut aside = lock(&self.aside);
            let is_due = std::mem::take(&mut aside.is_due);
            if aside.waiting.is_empty() || !(is_due || has_happened) {
                return false;
            }
            aside.is_tried = true;
            std::mem::take(&mut aside.waiting)
        };
        let mut done = Vec::new();
        let mut server = lock(&self.server);
        waiting.retain_mut(|(queue, head, waiting)| match server.again(waiting) {
            Some(len) => {
                done.push((*queue, *head, len as u32));
                false
            }
            None => true,
        });
        drop(server);
        let mut aside = lock(&self.aside);
        (aside.waiting, aside.is_tried) = (waiting, false);
        aside.done.extend(done);
        true
    }
}

impl Fs {
    /// A device that the guest mounts by `tag`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(server: Server, tag: &str) -> io::Result<Self> {
        let timer = server.shares_locks().then(Timer::new).transpose()?;
        let shared =
            Shared { server: Mutex::new(server), request: Mutex::default(), aside: Mutex::default() };
        Ok(Self { config: Config::new(tag), shared: Arc::new(shared), timer, restored: VecDeque::new() })
    }

    /// Answers what is done, and takes the next request if none is at hand.
    fn go_on(&mut self, queues: &mut [Virtqueue], takes: bool) {
        let mut request = lock(&self.shared.request);
        if let Request::Done(queue, head, len) = *request {
            *request = Request::None;
            complete(queues, queue, head, len);
        }
        if self.timer.is_some() {
            let mut aside = lock(&self.shared.aside);
            for (queue, head, len) in aside.done.drain(..) {
                complete(queues, queue, head, len);
            }
            let again = (takes && !aside.waiting.is_empty()).then_some(TRIED_AGAIN);
            self.timer.iter().for_each(|timer| timer.set(again));
        }
        if let (true, Request::None) = (takes, &*request) {
            let restored = |(index, head): (usize, u16)| Some((index, queues.get_mut(index)?.retake(head)?));
            let next = self.restored.pop_front().and_then(restored);
            let pop = || queues.iter_mut().enumerate().find_map(|(index, queue)| Some((index, queue.pop()?)));
            let next = next.or_else(pop);
            *request = next.map_or(Request::None, |(index, chain)| Request::Taken(index, chain));
        }
    }
}

fn complete(queues: &mut [Virtqueue], queue: usize, head: u16, len: u32) {
    if let Some(queue) = queues.get_mut(queue) {
        queue.complete(head, len);
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

    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        self.timer.iter().map(AsFd::as_fd).collect()
    }

    fn on_event(&mut self, _: usize, _: &mut [Virtqueue]) {
        self.timer.iter().for_each(|timer| timer.set(None));
        lock(&self.shared.aside).is_due = true;
    }

    fn blocking(&self) -> Option<Arc<dyn Blocking>> {
        Some(self.shared.clone())
    }

    fn on_done(&mut self, queues: &mut [Virtqueue]) {
        self.go_on(queues, true);
    }

    fn drain(&mut self, queues: &mut [Virtqueue], _: Instant) -> Result<(), Busy> {
        self.go_on(queues, false);
        // The worker, if there is one, comes again when it is over; a pause has waited for the worker.
        let is_begun = matches!(*lock(&self.shared.request), Request::Begun);
        if is_begun || lock(&self.shared.aside).is_tried {
            return Err(Busy("the host is still at one of its requests".to_owned()));
        }
        Ok(())
    }

    fn resume(&mut self, queues: &mut [Virtqueue]) {
        self.go_on(queues, true);
    }

    fn forget(&mut self, index: usize) {
        let mut request = lock(&self.shared.request);
        if matches!(*request, Request::Taken(queue, _) if queue == index) {
            *request = Request::None;
        }
        self.restored.retain(|(queue, _)| *queue != index);
        lock(&self.shared.aside).waiting.retain(|(queue, ..)| *queue != index);
    }

    fn reset(&mut self) {
        *lock(&self.shared.request) = Request::None;
        *lock(&self.shared.aside) = Aside::default();
        self.restored.clear();
        lock(&self.shared.server).reset();
    }
}

/// [`Fs`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Queue and head of requests that are taken and not begun, or laid aside.
    taken: Vec<(u8, u16)>,
    /// What the guest knows of the folder.
    server: share::State,
    /// What it has locked there.
    locks: SavedLocks,
}

/// What it was at first.
#[derive(Deserialize)]
struct First {
    taken: Option<(u8, u16)>,
    server: share::State,
}

impl Stateful for Fs {
    type State = State;
    const VERSION: u8 = 2;
    const OLDEST: u8 = 1;

    fn older(_: u8, bytes: &[u8]) -> Result<State, StateError> {
        let First { taken, server } = postcard::from_bytes(bytes).map_err(StateError::Decode)?;
        Ok(State { taken: taken.into_iter().collect(), server, locks: SavedLocks::default() })
    }

    fn save(&self) -> State {
        let at_hand = match &*lock(&self.shared.request) {
            Request::Taken(queue, chain) => Some((*queue, chain.head)),
            _ => None,
        };
        let aside = lock(&self.shared.aside);
        let waiting = aside.waiting.iter().map(|(queue, head, _)| (*queue, *head));
        let taken = at_hand.into_iter().chain(self.restored.iter().copied()).chain(waiting);
        let taken = taken.map(|(queue, head)| (queue as u8, head)).collect();
        let server = lock(&self.shared.server);
        State { taken, server: server.save(), locks: server.save_locks() }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let State { taken, server, locks } = state;
        let is_one =
            |(queue, head): (u8, u16)| QUEUE_SIZES.get(usize::from(queue)).is_some_and(|size| head < *size);
        let known: BTreeSet<_> = taken.iter().collect();
        if known.len() < taken.len() || !taken.iter().copied().all(is_one) {
            return Err(StateError::Invalid(format!("requests {taken:?}")));
        }
        self.restored = taken.into_iter().map(|(queue, head)| (queue.into(), head)).collect();
        let mut shared = lock(&self.shared.server);
        shared.restore(server).map_err(StateError::Invalid)?;
        shared.restore_locks(locks);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::Folders;

    #[test]
    fn a_state_of_the_first_version_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let share = format!("{}", folder.path().display()).parse().unwrap();
        let now = Fs::new(Folders::default().server(0, 1, &share).unwrap(), "tag").unwrap().save();
        for (taken, heads) in [(None, vec![]), (Some((1_u8, 300_u16)), vec![(1, 300)])] {
            let first = postcard::to_stdvec(&(taken, &now.server)).unwrap();
            assert_eq!(Fs::older(1, &first).unwrap(), State { taken: heads, ..now.clone() });
        }
    }
}
