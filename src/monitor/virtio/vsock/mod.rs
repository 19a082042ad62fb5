//! virtio-vsock: connections between ports of the guest and sockets of the host (virtio 1.3, 5.10).
//!
//! Data goes between the driver's buffers and a socket by one system call each; what the host's program does not take at once waits
//! here, within the room that the guest was told of. A connection that stands still holds up no other. What the guest is to be told
//! waits for its buffers as one bit for each thing, or as a reset, and a guest that lets resets pile up is not listened to.
//!
//! [`Served`] is the device where the host's kernel does all that.

mod connection;
mod credit;
mod header;
mod receive;
mod rooms;
mod served;
mod share;
mod table;
mod transmit;

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use zerocopy::{Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::device::{Traits, VirtioDevice};
use super::queue::{Chain, Virtqueue};
use crate::bus::Busy;
use crate::event_loop::Interest;
use crate::sandbox::Needs;
use crate::state::{StateError, Stateful};
use crate::vsock::{Event, Host, Sockets};
use connection::{Connection, Fate};
use receive::Message;
use rooms::Rooms;
pub use served::Served;
use table::Table;

// Feature bits (5.10.3).
const F_STREAM: u64 = 1 << 0;
const F_SEQPACKET: u64 = 1 << 1;
const F_NO_IMPLIED_STREAM: u64 = 1 << 2;
const FEATURES: u64 = F_STREAM | F_SEQPACKET | F_NO_IMPLIED_STREAM;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// The largest size of each queue.
const QUEUES: [u16; 3] = [256, 256, 16];

/// All connections are gone, and the guest's address may be another (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// `struct virtio_vsock_config` (5.10.4).
#[derive(Debug, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Config {
    guest_cid: le::U64,
}

/// A socket device.
pub struct Vsock {
    sockets: Sockets,
    config: Config,
    /// Those that the driver has accepted.
    features: u64,
    /// The driver is ready.
    running: bool,
    table: Table,
    rooms: Rooms,
    /// One that goes to the guest in pieces.
    message: Option<Message>,
    /// Packets of the guest's wait in their queue until it has taken some resets.
    held_back: bool,
    /// The guest is to be told that its connections are gone.
    reset_due: bool,
    /// The driver has been told; these are the buffers for events that it had offered by then, and another one shows that it has
    /// heard. Linux resets every connection that it has at that moment, so none is made before.
    unheard: Option<Vec<u16>>,
}

/// [`Vsock`]'s saved state. Connections are not: their other ends stay on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    features: u64,
    running: bool,
}

impl Vsock {
    /// A device of the guest at address `cid`, whose connections lead to and from `sockets`.
    pub fn new(sockets: Sockets, cid: u32) -> Self {
        Self {
            sockets,
            config: Config { guest_cid: u64::from(cid).into() },
            features: 0,
            running: false,
            table: Table::default(),
            rooms: Rooms::default(),
            message: None,
            held_back: false,
            reset_due: false,
            unheard: None,
        }
    }

    fn cid(&self) -> u64 {
        self.config.guest_cid.get()
    }

    /// A turn: takes up what has happened on the host, and what the driver has sent; then the driver gets what there is for it.
    fn serve(&mut self, queues: &mut [Virtqueue], has_events: bool, has_packets: bool) {
        let [receive, transmit, event, ..] = queues else { return };
        if !self.running {
            return;
        }
        let sockets = self.sockets.clone();
        let mut host = sockets.host();
        self.tell_reset(event);
        if has_events && self.unheard.is_none() {
            self.take_events(&mut host);
        }
        if has_packets {
            self.transmit(&mut host, transmit);
        }
        self.receive(&host, receive);
        while self.held_back && !self.table.is_full() {
            self.transmit(&mut host, transmit);
            self.receive(&host, receive);
        }
        host.wake_at(self.table.deadline());
    }

    /// Tells the driver of what was lost by a restore, and finds out whether it has heard.
    fn tell_reset(&mut self, queue: &mut Virtqueue) {
        if self.reset_due {
            // All of them before it can hear: what comes after that is its answer.
            let mut others = Vec::new();
            for chain in std::iter::from_fn(|| queue.pop()).collect::<Vec<_>>() {
                match self.reset_due {
                    true => self.reset_due = !told(queue, chain),
                    false => others.push(chain.head),
                }
            }
            self.unheard = (!self.reset_due).then_some(others);
        } else if self.unheard.is_some()
            && let Some(answer) = queue.pop()
        {
            queue.put_back(answer.head);
            self.forget_unheard(queue);
        }
    }

    fn forget_unheard(&mut self, queue: &mut Virtqueue) {
        self.unheard.take().into_iter().flatten().rev().for_each(|head| queue.put_back(head));
    }

    fn take_events(&mut self, host: &mut Host) {
        let cid = self.cid();
        for event in host.events() {
            match event {
                Event::Call(end, port) => {
                    let carries = self.carries(end.kind());
                    // Without a place for one more it is closed.
                    if let Some(share) = carries.then(|| self.table.admit(host.limit())).flatten() {
                        let key = self.table.free_key(port);
                        self.table.insert(Connection::calling(key, end, share));
                    }
                }
                Event::Ready { id, input, output, hung_up } => {
                    self.table.update(id, cid, host, |connection| {
                        match if output { connection.flush(hung_up) } else { Fate::Stays } {
                            Fate::Stays => connection.host_is_ready(input, hung_up),
                            fate => fate,
                        }
                    });
                }
            }
        }
        for id in self.table.expired() {
            self.table.update(id, cid, host, |_| Fate::Reset);
        }
    }
}

/// Tells the driver, if that is `due`, of what was lost by a restore.
fn tell_reset(due: &mut bool, queue: &mut Virtqueue) {
    while *due && let Some(chain) = queue.pop() {
        *due = !told(queue, chain);
    }
}

/// Whether `chain`, which is done with, has room for the event, and has it.
fn told(queue: &mut Virtqueue, mut chain: Chain) -> bool {
    let event = TRANSPORT_RESET.to_le_bytes();
    let fits = chain.writable.len() >= event.len();
    let written = if fits { chain.writable.write(&event).unwrap_or(0) } else { 0 };
    queue.complete(chain.head, written as u32);
    fits
}

impl VirtioDevice for Vsock {
    fn traits(&self) -> Traits {
        Traits { kind: VIRTIO_ID_VSOCK, features: FEATURES, queues: QUEUES.to_vec() }
    }

    fn needs(&self) -> Needs {
        Needs::UNIX
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn accept(&mut self, features: u64) {
        self.features = features & FEATURES;
    }

    fn start(&mut self) {
        self.running = true;
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        self.serve(queues, false, index == TRANSMIT);
    }

    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.sockets.as_fd()]
    }

    /// Until the driver is ready, the host's programs wait in their sockets' queues, and what an earlier driver sent waits for them.
    fn interest(&self, _source: usize) -> Interest {
        if self.running && self.unheard.is_none() { Interest::INPUT } else { Interest::default() }
    }

    fn on_event(&mut self, _source: usize, queues: &mut [Virtqueue]) {
        self.serve(queues, true, false);
    }

    fn finish(&mut self, queues: &mut [Virtqueue], deadline: Instant) -> Result<(), Busy> {
        let Some(queue) = queues.get_mut(TRANSMIT) else { return Ok(()) };
        let sockets = self.sockets.clone();
        let mut host = sockets.host();
        while {
            // Nobody is left to hear of resets, and they hold up no packet.
            self.table.forget_resets();
            self.transmit(&mut host, queue);
            self.held_back
        } {}
        loop {
            self.table.flush(self.cid(), &host);
            let stalled: Vec<_> =
                self.table.stalled().map(|(_, end)| PollFd::new(end, PollFlags::OUT)).collect();
            let left = deadline.saturating_duration_since(Instant::now());
            match stalled.len() {
                0 => return Ok(()),
                n if left.is_zero() => {
                    return Err(Busy(format!(
                        "{n} connections whose readers have yet to take what the guest sent"
                    )));
                }
                _ => {}
            }
            let mut stalled = stalled;
            let _ = poll(&mut stalled, Timespec::try_from(left).ok().as_ref());
        }
    }

    fn drain(&mut self, queues: &mut [Virtqueue], _deadline: Instant) -> Result<(), Busy> {
        if let Some(queue) = queues.get_mut(RECEIVE) {
            self.rooms.put_back(queue);
        }
        if let Some(queue) = queues.get_mut(EVENT) {
            self.forget_unheard(queue);
        }
        Ok(())
    }

    fn resume(&mut self, queues: &mut [Virtqueue]) {
        if let Some(queue) = queues.get_mut(EVENT) {
            self.tell_reset(queue);
        }
    }

    fn reset(&mut self) {
        self.features = 0;
        self.running = false;
        self.table.clear();
        self.message = None;
        (self.held_back, self.reset_due, self.unheard) = (false, false, None);
    }
}

impl Stateful for Vsock {
    type State = State;

    fn save(&self) -> State {
        State { features: self.features, running: self.running }
    }

    fn restore(&mut self, State { features, running }: State) -> Result<(), StateError> {
        if features & !FEATURES != 0 {
            return Err(StateError::Invalid(format!("socket: features {features:#x}")));
        }
        (self.features, self.running) = (features, running);
        self.table.clear();
        self.reset_due = running;
        Ok(())
    }
}
