//! virtio-net: a network device on the links of a [`Port`] (virtio 1.3, 5.1). Knows no taps and no sockets.
//!
//! Frames go between the driver's buffers and a link by one system call each. Where the link takes no more, they stay in their
//! queue; where the driver gives no buffers, the link is not waited for. A rate limit (`limit`) is a third reason to wait.

mod bucket;
mod control;
mod features;
mod filter;
mod frames;
mod header;
mod limit;
mod receive;
mod served;
mod transmit;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};
use zerocopy::{Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::device::{Offload, Traits, VirtioDevice};
use super::queue::Virtqueue;
use crate::bus::Busy;
use crate::config::NetLimits;
use crate::event_loop::{Event, Interest};
use crate::net::traffic::{Drop, Way};
use crate::net::{HEADER, MAX_FRAME, Offloads, Port, START, Server};
use crate::recorder::{Event as Record, Recorder};
use crate::sandbox::Needs;
use crate::state::{StateError, Stateful};
use filter::Filter;
use frames::Frames;
use limit::{Gate, Limiter};
use receive::{Receiver, Terms};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// What Ethernet carries in one frame.
const ETHERNET_MTU: u16 = 1500;

/// `struct virtio_net_config` (5.1.4), up to what is offered.
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: le::U16,
    max_virtqueue_pairs: le::U16,
    mtu: le::U16,
}

/// What a frame passes on its way, either way: what may hold it up, and who hears of it.
struct Lane<'a> {
    gate: &'a mut Gate,
    counts: &'a Way,
    frames: &'a mut Frames,
}

/// A network device.
pub struct Net {
    port: Port,
    config: Config,
    offered: u64,
    /// Those that the driver has accepted and that mean something.
    features: u64,
    /// The driver is ready.
    running: bool,
    /// Pairs of queues that the driver uses.
    pairs: u16,
    /// Guest offloads that are on.
    offloads: u64,
    filter: Filter,
    /// The driver is asked to tell the network where it is.
    announce: bool,
    /// It is to be asked, because it is somewhere else than it was.
    moved: bool,
    receivers: Vec<Receiver>,
    /// What each link is waited for.
    interests: Vec<Interest>,
    limiter: Limiter,
    frames: Frames,
}

/// [`Net`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    features: u64,
    running: bool,
    mac: [u8; 6],
    pairs: u16,
    offloads: u64,
    announce: bool,
    filter: filter::State,
}

impl Net {
    /// A device on `port`, whose packets have `mtu` bytes at most.
    pub fn new(port: Port, mtu: Option<u16>) -> Self {
        let pairs = port.links.len();
        let able = port.links.iter().map(|link| link.wire().offloads());
        let able = able.reduce(Offloads::intersection).unwrap_or_default();
        let config = Config {
            max_virtqueue_pairs: (pairs as u16).into(),
            mtu: mtu.unwrap_or(ETHERNET_MTU).into(),
            ..Config::default()
        };
        let offered = features::offered(able, mtu.is_some(), pairs > 1);
        let offered = features::sound(offered & served::able(&port.server));
        let mut net = Self {
            port,
            config,
            offered,
            features: 0,
            running: false,
            pairs: 1,
            offloads: 0,
            filter: Filter::default(),
            announce: false,
            moved: false,
            receivers: (0..pairs).map(|_| Receiver::default()).collect(),
            interests: vec![Interest::default(); pairs],
            limiter: Limiter::default(),
            frames: Frames::default(),
        };
        // The links may have served another device before.
        net.reset();
        net
    }

    /// The same device with `limits`, for each way by itself and all pairs together.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn limited(self, limits: &NetLimits) -> io::Result<Self> {
        Ok(Self { limiter: Limiter::new(limits)?, ..self })
    }

    /// The same device, which tells `recorder` of each frame.
    pub fn recorded(self, recorder: Arc<Recorder>) -> Self {
        Self { frames: Frames::new(recorder), ..self }
    }

    fn most_pairs(&self) -> u16 {
        self.port.links.len() as u16
    }

    /// The control queue is behind as many pairs as the driver knows of (5.1.2).
    fn control_queue(&self) -> usize {
        if self.features & features::MQ != 0 { 2 * self.port.links.len() } else { 2 }
    }

    fn set_pairs(&mut self, pairs: u16) {
        self.pairs = pairs;
        for ((link, interest), pair) in self.port.links.iter().zip(&mut self.interests).zip(0..) {
            // One that takes no part is always ready, for nothing.
            if pair >= pairs {
                *interest = Interest::default();
            }
            link.wire().set_attached(pair < pairs);
        }
    }

    fn set_offloads(&mut self, offloads: u64) {
        self.offloads = offloads;
        if let Some(link) = self.port.links.first() {
            link.wire().accept(features::offloads(offloads));
        }
    }

    /// A turn for pair `pair`.
    fn serve(&mut self, pair: usize, queues: &mut [Virtqueue], receive: bool, transmit: bool) {
        let used = pair < usize::from(self.pairs) && self.port.server.pairs() == 0;
        let (Some(link), Some(receiver), Some(interest)) =
            (self.port.links.get(pair), self.receivers.get_mut(pair), self.interests.get_mut(pair))
        else {
            return;
        };
        if !self.running || !used {
            *interest = Interest::default();
            return;
        }
        let mut wire = link.wire();
        let traffic = &self.port.traffic;
        if transmit {
            let (gate, frames) = (&mut self.limiter.transmit, &mut self.frames);
            let mut lane = Lane { gate, frames, counts: &traffic.sent };
            let queue = &mut queues[2 * pair + 1];
            interest.output = transmit::serve(&mut **wire, queue, self.features, &mut lane);
        }
        if receive {
            let segments = self.offloads & features::SEGMENTS != 0;
            let frame = if segments { MAX_FRAME } else { usize::from(self.config.mtu.get()) + START };
            let terms = Terms {
                filter: &self.filter,
                mac: &self.config.mac,
                longest: HEADER + frame.min(MAX_FRAME),
                mergeable: self.features & features::MRG_RXBUF != 0,
                guest_csum: self.offloads & features::GUEST_CSUM != 0,
            };
            let (gate, frames) = (&mut self.limiter.receive, &mut self.frames);
            let mut lane = Lane { gate, frames, counts: &traffic.received };
            interest.input = receiver.serve(&mut **wire, &mut queues[2 * pair], &terms, &mut lane);
            traffic.received.dropped(Drop::NoRoom, wire.take_lost());
        }
        // One whose peer is gone would be ready for ever.
        if !wire.is_up() {
            *interest = Interest::default();
        }
        self.limiter.set_timer();
    }

    fn serve_all(&mut self, queues: &mut [Virtqueue]) {
        for pair in 0..self.port.links.len() {
            self.serve(pair, queues, true, true);
        }
    }

    /// Whether the driver is told that the link is up.
    fn is_up(&self) -> bool {
        u32::from(self.config.status.get()) & VIRTIO_NET_S_LINK_UP != 0
    }

    /// The configuration space's status, as it is now.
    fn look(&mut self) {
        let up = self.port.links.iter().all(|link| link.wire().is_up());
        self.port.traffic.set_up(up);
        let part = |on, bit: u32| if on { bit as u16 } else { 0 };
        self.config.status =
            (part(up, VIRTIO_NET_S_LINK_UP) | part(self.announce, VIRTIO_NET_S_ANNOUNCE)).into();
    }
}

impl VirtioDevice for Net {
    fn traits(&self) -> Traits {
        let mut queues = vec![QUEUE_SIZE; 2 * self.port.links.len()];
        queues.push(CONTROL_QUEUE_SIZE);
        Traits { kind: VIRTIO_ID_NET, features: self.offered, queues }
    }

    fn needs(&self) -> Needs {
        self.port.needs
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn accept(&mut self, features: u64) {
        self.features = features::sound(features & self.offered);
        if self.features & features::CTRL_VLAN != 0 {
            self.filter.by_vlan();
        }
        self.set_offloads(self.features & features::GUEST_OFFLOADS);
    }

    fn start(&mut self) {
        self.running = true;
        self.look();
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        if index == self.control_queue() {
            if self.features & features::CTRL_VQ != 0 {
                control::serve(self, &mut queues[index]);
                // There may be more pairs than before, and more that is wanted.
                self.serve_all(queues);
            }
        } else {
            self.serve(index / 2, queues, index & 1 == 0, index & 1 == 1);
        }
        self.look();
    }

    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        let broken = self.port.server.broken().into_iter().map(Event::as_fd);
        let links = self.port.links.iter().map(AsFd::as_fd);
        // The monitor does not wait for links that the kernel serves.
        let links = links.filter(|_| !matches!(self.port.server, Server::Kernel { .. }));
        let interfaces = self.port.server.interfaces().map(AsFd::as_fd);
        broken.chain(interfaces).chain(links).chain(self.limiter.timer()).collect()
    }

    fn interest(&self, source: usize) -> Interest {
        match (&self.port.server, self.interests.get(source)) {
            (Server::Monitor, Some(interest)) => *interest,
            // Behind what tells of broken rings: the end of who serves them, until it has been noticed.
            (Server::BackEnd(_), None) if !self.is_up() => Interest::default(),
            // What tells of broken rings, and behind the links the timer.
            _ => Interest::INPUT,
        }
    }

    fn on_event(&mut self, source: usize, queues: &mut [Virtqueue]) {
        if source < self.port.server.pairs() {
            served::broken(&self.port.server, source, queues);
        } else if let Server::BackEnd(back_end) = &self.port.server {
            back_end.look();
        } else if let Some(interfaces) = self.port.server.interfaces() {
            interfaces.take();
            self.port.links.iter().for_each(|link| link.wire().look());
        } else if source < self.port.links.len() {
            self.serve(source, queues, true, true);
        } else {
            self.limiter.take_alarm();
            self.serve_all(queues);
        }
        self.look();
    }

    fn take_records(&mut self) -> Vec<Record> {
        self.frames.take()
    }

    fn finish(&mut self, queues: &mut [Virtqueue], _deadline: Instant) -> Result<(), Busy> {
        // A link that takes no more is not waited for: as on any wire, frames may be lost.
        (0..self.port.links.len()).for_each(|pair| self.serve(pair, queues, false, true));
        Ok(())
    }

    fn drain(&mut self, queues: &mut [Virtqueue], _deadline: Instant) -> Result<(), Busy> {
        for (pair, receiver) in self.receivers.iter_mut().enumerate() {
            if let Some(queue) = queues.get_mut(2 * pair) {
                receiver.put_back(queue);
            }
        }
        Ok(())
    }

    fn resume(&mut self, _queues: &mut [Virtqueue]) {
        self.announce |= std::mem::take(&mut self.moved) && self.features & features::GUEST_ANNOUNCE != 0;
        self.look();
    }

    fn reset(&mut self) {
        self.running = false;
        self.features = 0;
        self.filter = Filter::default();
        (self.announce, self.moved) = (false, false);
        self.config.mac = self.port.mac;
        self.receivers.fill_with(Receiver::default);
        self.interests.fill(Interest::default());
        self.set_pairs(1);
        self.set_offloads(0);
        self.look();
    }

    fn offload(&mut self) -> Option<&mut dyn Offload> {
        if self.port.server.pairs() == 0 { None } else { Some(self) }
    }
}

impl Stateful for Net {
    type State = State;

    fn save(&self) -> State {
        let &Self { features, running, pairs, offloads, announce, .. } = self;
        State {
            features,
            running,
            mac: self.config.mac,
            pairs,
            offloads,
            announce,
            filter: self.filter.save(),
        }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let State { features, running, mac, pairs, offloads, announce, filter } = state;
        let invalid = |what: String| StateError::Invalid(format!("network: {what}"));
        if features::sound(features & self.offered) != features
            || offloads & !(features & features::GUEST_OFFLOADS) != 0
            || features::sound(offloads) != offloads
        {
            return Err(invalid(format!("features {features:#x}, offloads {offloads:#x}")));
        }
        if !(1..=self.most_pairs()).contains(&pairs) || mac[0] & 1 != 0 {
            return Err(invalid(format!("{pairs} pairs of queues, address {mac:x?}")));
        }
        self.filter = Filter::restored(filter).ok_or_else(|| invalid("impossible tables".to_owned()))?;
        (self.features, self.running, self.announce) = (features, running, announce);
        self.config.mac = mac;
        self.set_pairs(pairs);
        self.set_offloads(offloads);
        self.moved = running;
        self.look();
        Ok(())
    }
}
