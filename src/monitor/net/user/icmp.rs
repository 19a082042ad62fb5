//! ICMP: errors about the guest's packets, and ping, by the host's unprivileged ICMP sockets (ping_group_range in icmp(7)).

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr};

use super::table::Table;
use super::{Context, GATEWAY, Ready, Source, policy};
use crate::event_loop::Interest;

/// Flows at once.
const FLOWS: usize = 32;
const IDLE: Duration = Duration::from_secs(60);
const LONGEST: usize = 0xffff;
/// Replies taken at once.
const TURN: usize = 64;
/// Bytes of an echo message's header.
const HEADER: usize = 8;

/// What an error about `packet` quotes of it: its header, and eight bytes (RFC 792).
pub fn quote(packet: &[u8]) -> &[u8] {
    let header = usize::from(Ipv4Packet::new_unchecked(packet).header_len());
    &packet[..packet.len().min(header + 8)]
}

/// Tells the guest that its packet, of which `quote` has the beginning, does not arrive.
pub fn unreachable(context: &mut Context, quote: &[u8], reason: Icmpv4DstUnreachable) {
    let packet = Ipv4Packet::new_unchecked(quote);
    let payload = quote.get(usize::from(packet.header_len())..).unwrap_or_default();
    let header = Ipv4Repr {
        src_addr: packet.src_addr(),
        dst_addr: packet.dst_addr(),
        next_header: packet.next_header(),
        payload_len: usize::from(packet.total_len()).saturating_sub(usize::from(packet.header_len())),
        hop_limit: packet.hop_limit(),
    };
    let data = &payload[..payload.len().min(8)];
    put(context, GATEWAY, packet.src_addr(), &Icmpv4Repr::DstUnreachable { reason, header, data });
}

fn put(context: &mut Context, from: Ipv4Addr, to: Ipv4Addr, message: &Icmpv4Repr) {
    context.frames.ipv4((from, to), IpProtocol::Icmp, message.buffer_len(), |bytes| {
        message.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
    });
}

/// A series of echo requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Series {
    guest: Ipv4Addr,
    ident: u16,
    to: Ipv4Addr,
}

pub struct Ping {
    flows: Table<Series, OwnedFd>,
    buffer: Vec<u8>,
    is_refused: bool,
}

fn open(to: Ipv4Addr) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, Some(ipproto::ICMP))?;
    connect(&socket, &SocketAddrV4::new(to, 0))?;
    Ok(socket)
}

impl Ping {
    pub fn new() -> Self {
        Self { flows: Table::new(FLOWS), buffer: vec![0; LONGEST], is_refused: false }
    }

    /// The guest sends a message.
    pub fn input(&mut self, context: &mut Context, packet: &[u8]) {
        let ip = Ipv4Packet::new_unchecked(packet);
        let Ok(message) = Icmpv4Packet::new_checked(ip.payload()) else { return };
        // Whether it is intact was seen to by its own sum, which nothing on this wire can change.
        let mut sums = ChecksumCapabilities::ignored();
        sums.icmpv4 = smoltcp::phy::Checksum::None;
        let Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data }) = Icmpv4Repr::parse(&message, &sums) else {
            return;
        };
        let (guest, to) = (ip.src_addr(), ip.dst_addr());
        if policy::is_ours(to.into()) {
            return put(context, to, guest, &Icmpv4Repr::EchoReply { ident, seq_no, data });
        }
        let series = Series { guest, ident, to };
        if !self.flows.contains(&series) {
            if context.policy.target(SocketAddrV4::new(to, 0)).is_none() {
                return unreachable(context, packet, Icmpv4DstUnreachable::CommProhibited);
            }
            if let Some(oldest) = self.flows.surplus() {
                self.flows.remove(&oldest);
            }
            let id = self.flows.next_id();
            let opened = open(to).and_then(|socket| {
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
                    return unreachable(context, packet, Icmpv4DstUnreachable::HostUnreachable);
                }
            }
        }
        let request = Icmpv4Repr::EchoRequest { ident, seq_no, data };
        let mut bytes = vec![0; request.buffer_len()];
        request.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &ChecksumCapabilities::default());
        if let Some(socket) = self.flows.touch(&series, context.now) {
            // The host's number for the series is the socket's; a full socket loses the request.
            let send = |_| send(&*socket, &bytes, SendFlags::NOSIGNAL);
            let _ = send(()).or_else(|_| send(()));
        }
    }

    /// Replies have come.
    pub fn ready(&mut self, context: &mut Context, ready: Ready) {
        let Some(series) = self.flows.key(ready.id) else { return };
        let Some(socket) = self.flows.touch(&series, context.now) else { return };
        // A reply for which there is no room is lost.
        for _ in 0..TURN {
            match recv(&mut *socket, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((n, _)) => {
                    let Ok(message) = Icmpv4Packet::new_checked(&self.buffer[..n]) else { continue };
                    if n < HEADER || message.msg_type() != smoltcp::wire::Icmpv4Message::EchoReply {
                        continue;
                    }
                    let (ident, seq_no, data) = (series.ident, message.echo_seq_no(), message.data());
                    put(context, series.to, series.guest, &Icmpv4Repr::EchoReply { ident, seq_no, data });
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
