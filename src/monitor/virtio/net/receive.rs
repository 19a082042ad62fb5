//! The way in, for one pair of queues: frames from a link straight into the driver's buffers.
//!
//! A frame's length shows when it is read, so buffers for the longest one are taken out of the queue before. They stay here until
//! a frame fills them, or go back into the queue when the device comes to rest.

use std::collections::VecDeque;
use std::io::Write;

use super::Lane;
use super::filter::Filter;
use super::header::{ETHERNET, received};
use crate::guest_warn;
use crate::memory::Slices;
use crate::net::traffic::Drop;
use crate::net::{HEADER, Head, START, Wire};
use crate::virtio::queue::{Chain, Virtqueue};

/// Frames that one turn reads at most: the worker has other queues, and may have to stop.
const TURN: usize = 256;

/// What the driver has agreed on, and wants.
pub struct Terms<'a> {
    pub filter: &'a Filter,
    pub mac: &'a [u8; 6],
    /// Bytes of the longest frame, header and all.
    pub longest: usize,
    /// A frame may lie in several buffers.
    pub mergeable: bool,
    pub guest_csum: bool,
}

/// Buffers that wait for frames.
#[derive(Debug, Default)]
pub struct Receiver {
    held: VecDeque<Chain>,
    /// Bytes of theirs.
    room: usize,
    /// The driver has offered room for the longest frame before: it will again, and the next frame can wait for that. From one that
    /// never does, frames that do not fit are kept by dropping them.
    ample: bool,
}

impl Receiver {
    /// Moves what has come, as far as there are buffers and the gate of `lane` allows it. True if more frames can be used: the link is to be
    /// waited for.
    pub(super) fn serve(
        &mut self,
        wire: &mut dyn Wire,
        queue: &mut Virtqueue,
        terms: &Terms,
        lane: &mut Lane<'_>,
    ) -> bool {
        for _ in 0..TURN {
            // Having seen that there is none, the queue asks for a kick when there is one.
            if !self.gather(queue, terms) || !lane.gate.admits() {
                return false;
            }
            let mut head = Head::default();
            let slices = Slices::of(self.held.iter().map(|chain| &chain.writable), HEADER + START);
            let Some(len) = wire.receive(&mut head, &slices) else { return true };
            if len < ETHERNET {
                lane.counts.dropped(Drop::Malformed, 1);
            } else if HEADER + len > self.room {
                lane.counts.dropped(Drop::NoRoom, 1);
            } else if !terms.filter.passes(&head.start, terms.mac) {
                lane.counts.dropped(Drop::Filtered, 1);
            } else {
                lane.gate.take(len);
                lane.counts.carried(len);
                lane.frames.note(false, len, |first| {
                    first[..START].copy_from_slice(&head.start);
                    (START + slices.copy_to(0, &mut first[START..])).min(len)
                });
                self.deliver(&head, len, queue, terms.guest_csum);
            }
        }
        true
    }

    /// Takes buffers for the next frame. False if it has to wait for more.
    fn gather(&mut self, queue: &mut Virtqueue, terms: &Terms) -> bool {
        while self.room < terms.longest && (terms.mergeable || self.held.is_empty()) {
            let Some(chain) = queue.pop() else { break };
            let len = chain.writable.len();
            if len < HEADER {
                guest_warn!("network: a receive buffer of {len} bytes");
                queue.complete(chain.head, 0);
                continue;
            }
            self.room += len;
            self.held.push_back(chain);
        }
        let enough = self.room >= terms.longest;
        self.ample |= enough;
        !self.held.is_empty() && (enough || !terms.mergeable || !self.ample)
    }

    /// Gives the driver the frame of `len` bytes, whose first ones are in `head` and the others in the buffers.
    fn deliver(&mut self, head: &Head, len: usize, queue: &mut Virtqueue, guest_csum: bool) {
        let mut left = HEADER + len;
        let mut used = Vec::new();
        let sizes = self.held.iter().map(|chain| (chain.head, chain.writable.len()));
        for (id, size) in sizes {
            used.push((id, size.min(left) as u32));
            left = left.saturating_sub(size);
            if left == 0 {
                break;
            }
        }
        let mut own = [0; HEADER + START];
        own[..HEADER].copy_from_slice(&received(head.header, guest_csum, used.len() as u16));
        own[HEADER..].copy_from_slice(&head.start);
        let mut own = &own[..HEADER + len.min(START)];
        for mut chain in self.held.drain(..used.len()) {
            self.room -= chain.writable.len();
            let written = chain.writable.write(own).unwrap_or(0);
            own = &own[written..];
        }
        queue.complete_together(&used);
    }

    /// Puts the buffers back.
    pub fn put_back(&mut self, queue: &mut Virtqueue) {
        while let Some(chain) = self.held.pop_back() {
            queue.put_back(chain.head);
        }
        self.room = 0;
    }
}
