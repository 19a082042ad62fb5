//! ICMP of both versions: errors about the guest's packets, and ping, by the host's unprivileged ICMP sockets (ping_group_range in
//! icmp(7)).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
};
use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, IpProtocol, IpRepr};

use super::addresses::{gateway, is_ours};
use super::ip::Packet;
use super::table::Table;
use super::{Context, Ready, Source};
use crate::event_loop::Interest;

/// Flows at once.
const FLOWS: usize = 32;
const IDLE: Duration = Duration::from_secs(60);
const LONGEST: usize = 0xffff;
/// Replies taken at once.
const TURN: usize = 64;
/// Bytes of a message's header: type, code, sum, and four more that its type gives a meaning.
const HEADER: usize = 8;

/// Why a packet does not arrive.
#[derive(Debug, Clone, Copy)]
pub enum Unreachable {
    Network,
    Host,
    Protocol,
    Port,
    Prohibited,
}

impl Unreachable {
    /// What an error to the guest at `guest` begins with (RFC 792 and RFC 1812, 5.2.7.1; RFC 4443, 3.1 and 3.4).
    fn header(self, guest: IpAddr) -> [u8; HEADER] {
        let (kind, code) = match (self, guest.is_ipv4()) {
            (Self::Network, true) => (3, 0),
            (Self::Host, true) => (3, 1),
            (Self::Protocol, true) => (3, 2),
            (Self::Port, true) => (3, 3),
            (Self::Prohibited, true) => (3, 13),
            (Self::Network, false) => (1, 0),
            (Self::Prohibited, false) => (1, 1),
            (Self::Host, false) => (1, 3),
            (Self::Port, false) => (1, 4),
            // The header's byte that names it is what is wrong.
            (Self::Protocol, false) => return [4, 1, 0, 0, 0, 0, 0, 6],
        };
        [kind, code, 0, 0, 0, 0, 0, 0]
    }
}

impl From<&io::Error> for Unreachable {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NetworkUnreachable => Self::Network,
            _ => Self::Host,
        }
    }
}

/// Tells the guest that `packet` does not arrive.
pub fn refuse(context: &mut Context, packet: &Packet<'_>, why: Unreachable) {
    unreachable(context, packet.from, packet.quote(), why);
}

/// Tells the guest at `guest` that its packet, of which `quote` has the beginning, does not arrive.
pub fn unreachable(context: &mut Context, guest: IpAddr, quote: &[u8], why: Unreachable) {
    put(context, (gateway(guest), guest), HEADER + quote.len(), |bytes| {
        let (header, rest) = bytes.split_at_mut(HEADER);
        header.copy_from_slice(&why.header(guest));
        rest.copy_from_slice(quote);
    });
}

/// A message of `len` bytes, which `fill` writes but for its sum.
pub fn put(context: &mut Context, (from, to): (IpAddr, IpAddr), len: usize, fill: impl FnOnce(&mut [u8])) {
    // What concerns the link is taken from nobody further off (RFC 4861, 3.1).
    let header = IpRepr::new(from.into(), to.into(), protocol(to), len, 255);
    context.frames.ip(&header, |bytes| {
        fill(bytes);
        match (from, to) {
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                Icmpv6Packet::new_unchecked(bytes).fill_checksum(&from, &to);
            }
            _ => Icmpv4Packet::new_unchecked(bytes).fill_checksum(),
        }
    });
}

/// The version of ICMP that goes with an address.
pub fn protocol(version: IpAddr) -> IpProtocol {
    if version.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 }
}

/// The types of echo requests and their replies (RFC 792; RFC 4443, 4).
fn echo_types(version: IpAddr) -> (u8, u8) {
    if version.is_ipv4() { (8, 0) } else { (128, 129) }
}

/// A series of echo requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Series {
    guest: IpAddr,
    ident: [u8; 2],
    to: IpAddr,
}

impl Series {
    /// Answers the guest: `rest` has number and data.
    fn reply(&self, context: &mut Context, rest: &[u8]) {
        let (_, kind) = echo_types(self.to);
        put(context, (self.to, self.guest), HEADER - 2 + rest.len(), |bytes| {
            bytes[..6].copy_from_slice(&[kind, 0, 0, 0, self.ident[0], self.ident[1]]);
            bytes[6..].copy_from_slice(rest);
        });
    }
}

pub struct Ping {
    flows: Table<Series, OwnedFd>,
    buffer: Vec<u8>,
    is_refused: bool,
}

fn open(to: IpAddr) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    connect(&socket, &SocketAddr::new(to, 0))?;
    Ok(socket)
}

impl Ping {
    pub fn new() -> Self {
        Self { flows: Table::new(FLOWS), buffer: vec![0; LONGEST], is_refused: false }
    }

    /// The guest sends a message. Whether it is intact was seen to by its own sum, which nothing on this wire can change.
    pub fn input(&mut self, context: &mut Context, packet: &Packet<'_>) {
        let (request, _) = echo_types(packet.to);
        let Some(([kind, code, _, _, id, ent], rest)) = packet.payload.split_first_chunk() else { return };
        if packet.payload.len() < HEADER || (*kind, *code) != (request, 0) {
            return;
        }
        let series = Series { guest: packet.from, ident: [*id, *ent], to: packet.to };
        if is_ours(packet.to) {
            return series.reply(context, rest);
        }
        if !self.flows.contains(&series) {
            if context.policy.target(SocketAddr::new(packet.to, 0)).is_none() {
                return refuse(context, packet, Unreachable::Prohibited);
            }
            if let Some(oldest) = self.flows.surplus() {
                self.flows.remove(&oldest);
            }
            let id = self.flows.next_id();
            let opened = open(packet.to).and_then(|socket| {
                context.poller.add(&socket, Source::Ping, id, Interest::BOTH)?;
                Ok(socket)
            });
            match opened {
                Ok(socket) => self.flows.insert(series, context.now, socket),
                Err(error) => {
                    let is_refused = error.kind() == io::ErrorKind::PermissionDenied;
                    if is_refused && !std::mem::replace(&mut self.is_refused, true) {
                        log::warn!(
                            "user network: the host does not let this user ping: \
                             sudo sysctl net.ipv4.ping_group_range='0 2147483647'"
                        );
                    }
                    return refuse(context, packet, (&error).into());
                }
            }
        }
        let mut bytes = packet.payload.to_vec();
        if packet.to.is_ipv4() {
            Icmpv4Packet::new_unchecked(&mut bytes).fill_checksum();
        }
        if let Some(socket) = self.flows.touch(&series, context.now) {
            // The host's number for the series is the socket's, and of IPv6 it makes the sum; a full socket loses the request.
            let send = |_| send(&*socket, &bytes, SendFlags::NOSIGNAL);
            let _ = send(()).or_else(|_| send(()));
        }
    }

    /// Replies have come.
    pub fn ready(&mut self, context: &mut Context, ready: Ready) {
        let Some(series) = self.flows.key(ready.id) else { return };
        let Some(socket) = self.flows.touch(&series, context.now) else { return };
        let (_, reply) = echo_types(series.to);
        // A reply for which there is no room is lost.
        for _ in 0..TURN {
            match recv(&mut *socket, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((n, _)) => {
                    if n >= HEADER && self.buffer[0] == reply {
                        series.reply(context, &self.buffer[6..n]);
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return,
                // What the network says of a request: it gets no reply.
                Err(_) => {}
            }
        }
    }

    /// Whether there are series.
    pub fn any(&self) -> bool {
        !self.flows.is_empty()
    }

    /// Ends series that have been idle for too long.
    pub fn expire(&mut self, context: &Context) {
        for series in self.flows.idle(context.now, |_| IDLE) {
            self.flows.remove(&series);
        }
    }
}
