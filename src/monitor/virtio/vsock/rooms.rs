//! [`Rooms`]: buffers that the driver has given for packets, taken out of the queue before there is a packet for them.
//!
//! How much is read from a socket shows when it is read. What is not used stays here for the next packet, or goes back into the queue
//! when the device comes to rest.

use std::collections::VecDeque;
use std::io::Write;

use zerocopy::IntoBytes;

use super::header::{HEADER, Header};
use crate::guest_warn;
use crate::memory::{Buffers, Slices};
use crate::virtio::queue::{Chain, Virtqueue};

/// A buffer for one packet.
#[derive(Debug)]
struct Room {
    head: u16,
    header: Buffers,
    payload: Buffers,
}

/// Buffers that wait for packets.
#[derive(Debug, Default)]
pub struct Rooms {
    held: VecDeque<Room>,
    /// Bytes of payload that fit into them.
    len: usize,
}

impl Rooms {
    /// Takes buffers until there is one, and `wanted` bytes of payload fit. Returns how many fit; `None` if there is no buffer.
    /// Having seen that there are no more, the queue asks for a kick when there are.
    pub fn gather(&mut self, queue: &mut Virtqueue, wanted: usize) -> Option<usize> {
        while self.held.is_empty() || self.len < wanted {
            let Some(Chain { head, writable: mut header, .. }) = queue.pop() else { break };
            let payload = header.split_off_back(header.len().saturating_sub(HEADER));
            if payload.is_empty() {
                guest_warn!("socket: a receive buffer of {} bytes", header.len());
                queue.complete(head, 0);
                continue;
            }
            self.len += payload.len();
            self.held.push_back(Room { head, header, payload });
        }
        (!self.held.is_empty()).then_some(self.len)
    }

    /// Bytes of payload that fit into the first one.
    pub fn first(&self) -> Option<usize> {
        self.held.front().map(|room| room.payload.len())
    }

    /// Where payload goes, in order.
    pub fn payload(&self) -> Slices<'_> {
        Slices::of(self.held.iter().map(|room| &room.payload), 0)
    }

    /// Gives the driver a packet: `header`, and `bytes` as far as they fit. Returns how many did.
    pub fn put(&mut self, queue: &mut Virtqueue, mut header: Header, bytes: &[u8]) -> usize {
        let Some(mut room) = self.held.pop_front() else { return 0 };
        self.len -= room.payload.len();
        // What is in RAM can be written to.
        let written = room.payload.write(bytes).unwrap_or(0);
        header.len = (written as u32).into();
        let _ = room.header.write(header.as_bytes());
        queue.complete(room.head, (HEADER + written) as u32);
        written
    }

    /// Gives the driver packets of `len` bytes in all, which are in their places already. `header` makes each one's, knowing its
    /// length and whether it is the last.
    pub fn put_filled(
        &mut self,
        queue: &mut Virtqueue,
        mut len: usize,
        mut header: impl FnMut(usize, bool) -> Header,
    ) {
        while len > 0 {
            let Some(mut room) = self.held.pop_front() else { return };
            let here = room.payload.len().min(len);
            self.len -= room.payload.len();
            len -= here;
            let header = Header { len: (here as u32).into(), ..header(here, len == 0) };
            let _ = room.header.write(header.as_bytes());
            queue.complete(room.head, (HEADER + here) as u32);
        }
    }

    /// Puts all buffers back.
    pub fn put_back(&mut self, queue: &mut Virtqueue) {
        while let Some(room) = self.held.pop_back() {
            queue.put_back(room.head);
        }
        self.len = 0;
    }
}
