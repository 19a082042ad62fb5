//! A network for one guest that needs nothing of the host but sockets: the monitor is the gateway, the servers of DHCP and DNS and
//! the other end of every connection, and behind each is a socket of the host's.
//!
//! [`Stack`] takes the guest's frames and gives those for the guest. It never blocks: [`Stack::readable`] is so when there may be a
//! frame. It knows no virtio; `wire.rs` makes a network device's end of it. What it holds is bounded: flows, frames, bytes of each.

mod addresses;
mod dhcp;
mod dhcpv6;
mod dns;
mod ethernet;
mod guest_end;
mod icmp;
mod ip;
mod ndp;
mod offload;
mod policy;
mod publish;
mod recovery;
mod room;
mod route;
mod search;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod wire;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol};

use crate::config::UserNet;
use crate::event_loop::{Event, Interest};
use crate::net::Offloads;
use crate::net::switch::Neighbours;
use crate::poller::{self, Poller};
use crate::timer::Timer;

use addresses::{GATEWAY, is_guests};
use dns::Resolvers;
use ethernet::{Frame, Frames, OUR_MAC};
use icmp::{Ping, Unreachable};
use ip::Packet;
use ndp::Router;
use policy::Policy;
use publish::Listeners;
use route::Routes;
use search::Search;
use tcp::Tcp;
use udp::Udp;

pub use publish::Error;

/// How often flows are looked at that may have been idle for too long.
const SWEEP: Duration = Duration::from_secs(5);
/// Rounds of events before whoever drives the stack has its turn.
const ROUNDS: usize = 16;

/// Whose descriptor can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Tcp,
    Udp,
    Ping,
    Listener,
    Timer,
    Wake,
}

impl poller::Source for Source {
    const ALL: &'static [Self] = &[Self::Tcp, Self::Udp, Self::Ping, Self::Listener, Self::Timer, Self::Wake];
}

/// What it can do.
type Ready = poller::Ready<Source>;

/// The two ends of a flow, as the guest names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    guest: SocketAddr,
    remote: SocketAddr,
}

impl Key {
    /// None comes behind it.
    const LAST: Self = {
        let last = SocketAddr::new(IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)), u16::MAX);
        Self { guest: last, remote: last }
    };
}

/// Ports of the gateway's for those who come to a published port.
#[derive(Debug)]
struct Ports(u16);

impl Default for Ports {
    fn default() -> Self {
        Self(Self::FIRST)
    }
}

impl Ports {
    /// The first of those that nobody is given (RFC 6335, 6).
    const FIRST: u16 = 49152;

    /// A key for a flow to `guest` that is not `taken`: flows are fewer than ports.
    fn free(&mut self, guest: SocketAddr, taken: impl Fn(&Key) -> bool) -> Key {
        loop {
            let key = Key { guest, remote: SocketAddr::new(GATEWAY.into(), self.0) };
            self.0 = self.0.checked_add(1).unwrap_or(Self::FIRST);
            if !taken(&key) {
                return key;
            }
        }
    }
}

/// The same moment for the host and for smoltcp.
#[derive(Debug)]
struct Clock {
    start: Instant,
}

impl Clock {
    fn smoltcp(&self, at: Instant) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros(at.saturating_duration_since(self.start).as_micros() as i64)
    }

    fn std(&self, at: smoltcp::time::Instant) -> Instant {
        self.start + Duration::from_micros(at.total_micros().max(0) as u64)
    }
}

/// What all protocols share.
struct Context {
    frames: Frames,
    poller: Poller<Source>,
    policy: Policy,
    /// Domains for the guest's resolver.
    search: Search,
    /// Machines that the guest finds by name.
    neighbours: Neighbours,
    /// The guest may have IPv6.
    ipv6: bool,
    clock: Clock,
    /// When this turn began.
    now: Instant,
}

impl Context {
    /// The domains for a guest that has names: see [`Search::list`].
    fn search(&mut self) -> Vec<u8> {
        if self.policy.has_names() { self.search.list(self.now).to_vec() } else { Vec::new() }
    }
}

/// The network.
pub struct Stack {
    context: Context,
    resolvers: Resolvers,
    tcp: Tcp,
    udp: Udp,
    ping: Ping,
    listeners: Listeners,
    router: Router,
    timer: Timer,
    /// When the timer will be readable.
    armed: Option<Instant>,
    swept: Option<Instant>,
    /// Readable while there are frames.
    wake: Event,
    is_awake: bool,
    /// Time that tests let pass.
    #[cfg(test)]
    ahead: Duration,
}

impl Stack {
    /// The network of a guest with the Ethernet address `guest`, whose packets have `mtu` bytes at most.
    ///
    /// # Errors
    /// [`Error`]: a port cannot be published, an `allow` opens nothing, or the host is out of descriptors.
    pub fn new(config: &UserNet, guest: [u8; 6], mtu: u16) -> Result<Self, Error> {
        policy::check(&config.allow)?;
        let (tcp, udp) = publish::open(&config.publish)?;
        let now = Instant::now();
        let context = Context {
            frames: Frames::new(guest, mtu.into()),
            poller: Poller::new()?,
            policy: Policy::new(config, Routes::new()?),
            // The host's domains are known to the host's resolvers.
            search: if config.dns.is_empty() { Search::of_host() } else { Search::default() },
            neighbours: Neighbours::default(),
            ipv6: config.ipv6 && mtu >= UserNet::MIN_MTU_IPV6,
            clock: Clock { start: now },
            now,
        };
        let resolvers = Resolvers::new(&config.dns.iter().map(|resolver| resolver.0).collect::<Vec<_>>());
        let timer = Timer::new()?;
        let wake = Event::new()?;
        context.poller.add(&timer, Source::Timer, 0, Interest::INPUT)?;
        context.poller.add_steady(&wake, Source::Wake, 0)?;
        Ok(Self {
            udp: Udp::new(&context, udp)?,
            listeners: Listeners::new(&context, tcp)?,
            context,
            resolvers,
            tcp: Tcp::new(),
            ping: Ping::new(),
            router: Router::default(),
            timer,
            armed: None,
            swept: None,
            wake,
            is_awake: false,
            #[cfg(test)]
            ahead: Duration::ZERO,
        })
    }

    /// The guest finds these by name, too.
    #[must_use]
    pub fn with_neighbours(mut self, neighbours: Neighbours) -> Self {
        self.context.neighbours = neighbours;
        self
    }

    /// A descriptor that is readable when [`Stack::output`] may have a frame.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.context.poller.as_fd()
    }

    /// From now on the guest does `offloads` to TCP's segments itself. Another guest may have begun.
    pub fn leave(&mut self, offloads: Offloads) {
        self.context.frames.left = offloads;
        self.router = Router::default();
    }

    fn read_clock(&mut self) {
        self.context.now = Instant::now();
        #[cfg(test)]
        {
            self.context.now += self.ahead;
        }
    }

    /// The guest sends `frame`, one of a batch perhaps. What is not understood is dropped.
    pub fn input(&mut self, frame: &[u8]) {
        self.read_clock();
        self.dispatch(frame);
        self.rest();
    }

    fn dispatch(&mut self, frame: &[u8]) {
        let Ok(frame) = EthernetFrame::new_checked(frame) else { return };
        if frame.dst_addr() != OUR_MAC && !frame.dst_addr().is_multicast() {
            return;
        }
        self.context.frames.is_from(frame.src_addr());
        match frame.ethertype() {
            EthernetProtocol::Arp => self.context.frames.answer_arp(frame.payload()),
            EthernetProtocol::Ipv4 | EthernetProtocol::Ipv6 => self.ip(frame.payload()),
            _ => {}
        }
    }

    fn ip(&mut self, bytes: &[u8]) {
        let Some(packet) = Packet::parse(bytes) else { return };
        let context = &mut self.context;
        let is_for_link = match packet.to {
            IpAddr::V4(to) => dhcp::input(context, &packet) || to.is_broadcast() || to.is_multicast(),
            IpAddr::V6(_) if !context.ipv6 => true,
            IpAddr::V6(to) => {
                self.router.hear(context);
                ndp::input(context, &packet) || dhcpv6::input(context, &packet) || to.is_multicast()
            }
        };
        if is_for_link || !is_guests(packet.from, packet.to) {
            return;
        }
        match packet.protocol {
            IpProtocol::Tcp => self.tcp.input(context, &mut self.resolvers, &packet),
            IpProtocol::Udp => self.udp.input(context, &mut self.resolvers, &packet),
            protocol if protocol == icmp::protocol(packet.to) => self.ping.input(context, &packet),
            _ => icmp::refuse(context, &packet, Unreachable::Protocol),
        }
    }

    /// The guest's batch is at its end: what it has sent goes on, and is acknowledged once.
    pub fn settle(&mut self) {
        if self.tcp.is_waiting() && self.context.frames.has_room() {
            self.tcp.resume(&mut self.context);
            self.rest();
        }
    }

    /// The next frame for the guest, if there is one.
    pub fn output(&mut self) -> Option<Frame> {
        let mut frame = self.context.frames.pop();
        if frame.is_none() {
            self.read_clock();
            for _ in 0..ROUNDS {
                let moved = self.turn();
                frame = self.context.frames.pop();
                if frame.is_some() || !moved {
                    break;
                }
            }
        }
        self.rest();
        frame
    }

    /// Takes up what has come to pass. False if nothing has.
    fn turn(&mut self) -> bool {
        let events = self.context.poller.ready();
        let context = &mut self.context;
        self.tcp.resume(context);
        self.udp.resume(context);
        self.listeners.resume(context, &mut self.tcp);
        for ready in &events {
            match ready.source {
                Source::Tcp => self.tcp.ready(context, *ready),
                Source::Udp => self.udp.ready(context, *ready),
                Source::Ping => self.ping.ready(context, *ready),
                Source::Listener => self.listeners.ready(context, &mut self.tcp, ready.id),
                Source::Timer => self.armed = None,
                Source::Wake => {}
            }
        }
        if self.tcp.deadline().is_some_and(|at| at <= context.now) {
            self.tcp.on_time(context);
        }
        self.router.on_time(context);
        if self.swept.is_some_and(|at| at <= context.now) {
            self.tcp.expire(context);
            self.udp.expire(context);
            self.ping.expire(context);
            self.listeners.retry(context, &mut self.tcp);
            self.swept = None;
        }
        events.iter().any(|ready| ready.source != Source::Wake)
    }

    /// Sees to it that the descriptor is readable when there is something to do.
    fn rest(&mut self) {
        let is_awake = !self.context.frames.is_empty()
            || self.tcp.is_waiting()
            || self.udp.is_waiting()
            || self.listeners.is_waiting();
        if is_awake != self.is_awake {
            self.is_awake = is_awake;
            if is_awake { self.wake.signal() } else { self.wake.clear() }
        }
        if self.swept.is_none()
            && (self.tcp.any() || self.udp.any() || self.ping.any() || self.listeners.any())
        {
            self.swept = Some(self.context.now + SWEEP);
        }
        let deadlines = [self.tcp.deadline(), self.router.deadline(), self.swept];
        let Some(deadline) = deadlines.into_iter().flatten().min() else { return };
        if self.armed.is_none_or(|armed| deadline < armed) {
            self.timer.set(Some(deadline.saturating_duration_since(self.context.now)));
            self.armed = Some(deadline);
        }
    }
}
