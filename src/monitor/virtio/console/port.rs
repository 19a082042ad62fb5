//! One port of the console: bytes between a pair of queues and a host end, bounded both ways.
//!
//! Output is never copied further than one piece of the request at hand: while the host end is stalled the request stays
//! with the device, and so the guest waits. Input is read only as far as one piece ahead of the guest's buffers.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::control::Pending;
use crate::chardev::{Endpoint, Interest};
use crate::guest_warn;
use crate::state::StateError;
use crate::virtio::queue::{Chain, Virtqueue};

/// Bytes that are held at most, each way, between the host end and the guest's buffers.
pub const PIECE: usize = 16 << 10;
/// Bytes that one turn moves at most, each way: the worker has other ports, and may have to stop.
const TURN: usize = 256 << 10;
/// The same for the last turn before the device rests.
const LAST_TURN: usize = 16 << 20;

/// A port and its host end.
pub struct Port {
    pub endpoint: Endpoint,
    pub name: String,
    /// Read from the host, not yet in a buffer of the guest's. At most [`PIECE`].
    input: Vec<u8>,
    output: Option<Output>,
    /// Bytes at the start of the next request that the host has already: it was put back half done.
    sent: u64,
    wants: Interest,
    /// The driver has opened it. Before that input would be thrown away.
    pub guest_open: bool,
    /// The driver knows of it.
    pub ready: bool,
    /// Whether the driver was told that somebody is at the host's end.
    pub told_open: bool,
    /// Messages to the driver that wait for a buffer.
    pub pending: Pending,
}

/// A request whose bytes are on their way out.
struct Output {
    chain: Chain,
    /// What was read of it last, and how much of that the host has taken.
    piece: Vec<u8>,
    taken: usize,
    /// Bytes that the host has taken in all.
    sent: u64,
}

/// A [`Port`]'s saved state, at rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    input: Vec<u8>,
    sent: u64,
    guest_open: bool,
    ready: bool,
    told_open: bool,
    pending: u8,
}

impl Output {
    /// Starts on a request of which the host has `sent` bytes already.
    fn new(mut chain: Chain, sent: u64) -> Self {
        // Guest RAM can be read as it was when the chain was popped, or the queue has forgotten it anyway.
        let _ = io::copy(&mut (&mut chain.readable).take(sent), &mut io::sink());
        Self { chain, piece: Vec::new(), taken: 0, sent }
    }

    /// What to write next: empty at the end of the request.
    fn rest(&mut self) -> &[u8] {
        if self.taken == self.piece.len() {
            self.taken = 0;
            self.piece.resize(self.chain.readable.len().min(PIECE), 0);
            let len = self.chain.readable.read(&mut self.piece).unwrap_or(0);
            self.piece.truncate(len);
        }
        &self.piece[self.taken..]
    }
}

impl Port {
    pub fn new(name: &str, endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            name: name.to_owned(),
            input: Vec::new(),
            output: None,
            sent: 0,
            wants: Interest::default(),
            guest_open: false,
            ready: false,
            told_open: false,
            pending: Pending::empty(),
        }
    }

    /// Forgets the driver.
    pub fn reset(&mut self) {
        *self = Self::new(&self.name, self.endpoint.clone());
        self.endpoint.want(self.wants);
    }

    /// Sends what the guest gives, as far as the host takes it.
    pub fn send(&mut self, queue: &mut Virtqueue) {
        self.wants.output = self.send_some(queue, TURN);
    }

    /// True if there is more to send.
    fn send_some(&mut self, queue: &mut Virtqueue, mut budget: usize) -> bool {
        loop {
            let mut output = match self.output.take() {
                Some(output) => output,
                None => match queue.pop() {
                    Some(chain) => Output::new(chain, std::mem::take(&mut self.sent)),
                    None => return false,
                },
            };
            loop {
                let rest = output.rest();
                if rest.is_empty() {
                    queue.complete(output.chain.head, 0);
                    break;
                }
                let taken = if budget == 0 { 0 } else { self.endpoint.write(rest) };
                if taken == 0 {
                    self.output = Some(output);
                    return true;
                }
                output.taken += taken;
                output.sent += taken as u64;
                budget = budget.saturating_sub(taken);
            }
        }
    }

    /// Gives the guest what the host sends, as far as there are buffers for it.
    pub fn receive(&mut self, queue: &mut Virtqueue) {
        self.wants.input = self.guest_open && self.receive_some(queue);
    }

    /// True if more input can be used.
    fn receive_some(&mut self, queue: &mut Virtqueue) -> bool {
        let mut budget = TURN;
        loop {
            if self.input.is_empty() {
                if budget == 0 {
                    return true;
                }
                self.input.resize(PIECE, 0);
                let len = self.endpoint.read(&mut self.input);
                self.input.truncate(len);
                budget = budget.saturating_sub(len);
                if len == 0 {
                    self.input = Vec::new();
                    return true;
                }
            }
            // Having seen that there is none, the queue asks for a kick when there is one.
            let Some(mut chain) = queue.pop() else { return false };
            let len = chain.writable.write(&self.input).unwrap_or(0);
            if len == 0 {
                guest_warn!("console port {}: a receive buffer that can hold nothing", self.name);
            }
            self.input.drain(..len);
            queue.complete(chain.head, len as u32);
        }
    }

    /// Waits for what the last turns left to do, and for `more` output that is not the queue's.
    pub fn wait(&self, more: bool) {
        self.endpoint.want(Interest { output: self.wants.output || more, ..self.wants });
    }

    /// Sends what can be sent at once, and puts a request that is half done back into its queue.
    pub fn drain(&mut self, transmit: &mut Virtqueue) {
        self.wants.output = self.send_some(transmit, LAST_TURN);
        if let Some(output) = self.output.take() {
            self.sent = output.sent;
            transmit.put_back(output.chain.head);
        }
    }

    /// Bytes held for either side.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.input.capacity() + self.output.as_ref().map_or(0, |output| output.piece.capacity())
    }

    pub fn save(&self) -> PortState {
        let (input, sent, pending) = (self.input.clone(), self.sent, self.pending.bits());
        let Self { guest_open, ready, told_open, .. } = *self;
        PortState { input, sent, guest_open, ready, told_open, pending }
    }

    pub fn restore(&mut self, state: PortState) -> Result<(), StateError> {
        let pending = Pending::from_bits(state.pending);
        let (Some(pending), true) = (pending, state.input.len() <= PIECE) else {
            return Err(StateError::Invalid(format!(
                "console port {}: {} bytes",
                self.name,
                state.input.len()
            )));
        };
        let PortState { input, sent, guest_open, ready, told_open, .. } = state;
        let fresh = Self::new(&self.name, self.endpoint.clone());
        *self = Self { input, sent, guest_open, ready, told_open, pending, ..fresh };
        Ok(())
    }
}
