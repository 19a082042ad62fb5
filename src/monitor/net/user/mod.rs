//! A network for one guest that needs nothing of the host but sockets: the monitor is the gateway, the servers of DHCP and DNS and
//! the other end of every connection, and behind each is a socket of the host's.
//!
//! [`Stack`] takes the guest's frames and gives those for the guest. It never blocks: [`Stack::readable`] is so when there may be a
//! frame. It knows no virtio; `wire.rs` makes a network device's end of it. What it holds is bounded: flows, frames, bytes of each.

mod dhcp;
mod dns;
mod ethernet;
mod icmp;
mod policy;
mod publish;
mod route;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod wire;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use smoltcp::wire::{DHCP_SERVER_PORT, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, UdpPacket};

use crate::config::UserNet;
use crate::event_loop::{Event, Interest};
use crate::poller::{self, Poller};
use crate::timer::Timer;

use dns::Resolvers;
use ethernet::{Frame, Frames, OUR_MAC};
use icmp::Ping;
use policy::Policy;
use publish::Listeners;
use route::Routes;
use tcp::Tcp;
use udp::Udp;

pub use publish::Error;

/// The gateway, and the host as the guest calls it.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Who answers questions for names.
const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The guest.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Bits of the network's address.
const PREFIX: u8 = 24;
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
    guest: SocketAddrV4,
    remote: SocketAddrV4,
}

impl Key {
    /// None comes behind it.
    const LAST: Self = Self {
        guest: SocketAddrV4::new(Ipv4Addr::BROADCAST, u16::MAX),
        remote: SocketAddrV4::new(Ipv4Addr::BROADCAST, u16::MAX),
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
    fn free(&mut self, guest: SocketAddrV4, taken: impl Fn(&Key) -> bool) -> Key {
        loop {
            let key = Key { guest, remote: SocketAddrV4::new(GATEWAY, self.0) };
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
    clock: Clock,
    /// When this turn began.
    now: Instant,
}

/// The network.
pub struct Stack {
    context: Context,
    resolvers: Resolvers,
    tcp: Tcp,
    udp: Udp,
    ping: Ping,
    listeners: Listeners,
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
    /// [`Error`]: a port cannot be published, or the host is out of descriptors.
    pub fn new(config: &UserNet, guest: [u8; 6], mtu: u16) -> Result<Self, Error> {
        let (tcp, udp) = publish::open(&config.publish)?;
        let now = Instant::now();
        let context = Context {
            frames: Frames::new(guest, mtu.into()),
            poller: Poller::new()?,
            policy: Policy::new(config, Routes::new()?),
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
            timer,
            armed: None,
            swept: None,
            wake,
            is_awake: false,
            #[cfg(test)]
            ahead: Duration::ZERO,
        })
    }

    /// A descriptor that is readable when [`Stack::output`] may have a frame.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.context.poller.as_fd()
    }

    /// From now on the guest takes, or does not take, TCP whose checksum it has to compute.
    pub fn leave_checksums(&mut self, on: bool) {
        self.context.frames.checksums_left = on;
    }

    fn read_clock(&mut self) {
        self.context.now = Instant::now();
        #[cfg(test)]
        {
            self.context.now += self.ahead;
        }
    }

    /// The guest sends `frame`. What is not understood is dropped.
    pub fn input(&mut self, frame: &[u8]) {
        self.read_clock();
        self.dispatch(frame);
        self.rest();
    }

    fn dispatch(&mut self, frame: &[u8]) {
        let Ok(frame) = EthernetFrame::new_checked(frame) else { return };
        if frame.dst_addr() != OUR_MAC && !frame.dst_addr().is_broadcast() {
            return;
        }
        self.context.frames.is_from(frame.src_addr());
        match frame.ethertype() {
            EthernetProtocol::Arp => self.context.frames.answer_arp(frame.payload()),
            EthernetProtocol::Ipv4 => self.ipv4(frame.payload()),
            _ => {}
        }
    }

    fn ipv4(&mut self, packet: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
        // Behind the packet there may be Ethernet's padding.
        let packet = &packet[..usize::from(ip.total_len())];
        let is_part = ip.more_frags() || ip.frag_offset() > 0;
        if ip.version() != 4 || ip.header_len() < 20 || is_part {
            return;
        }
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let context = &mut self.context;
        if ip.next_header() == IpProtocol::Udp && (to == GATEWAY || to.is_broadcast()) {
            let Ok(udp) = UdpPacket::new_checked(ip.payload()) else { return };
            if udp.dst_port() == DHCP_SERVER_PORT {
                return dhcp::answer(context, udp.payload());
            }
        }
        let is_neighbor = from.to_bits() >> (32 - PREFIX) == GATEWAY.to_bits() >> (32 - PREFIX);
        if !is_neighbor || policy::is_ours(from.into()) || to.is_broadcast() || to.is_multicast() {
            return;
        }
        match ip.next_header() {
            IpProtocol::Tcp => self.tcp.input(context, &mut self.resolvers, packet),
            IpProtocol::Udp => self.udp.input(context, &mut self.resolvers, packet),
            IpProtocol::Icmp => self.ping.input(context, packet),
            _ => icmp::unreachable(context, packet, smoltcp::wire::Icmpv4DstUnreachable::ProtoUnreachable),
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
        let Some(deadline) = self.tcp.deadline().into_iter().chain(self.swept).min() else { return };
        if self.armed.is_none_or(|armed| deadline < armed) {
            self.timer.set(Some(deadline.saturating_duration_since(self.context.now)));
            self.armed = Some(deadline);
        }
    }
}
