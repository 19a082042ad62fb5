//! UDP: a socket of the host's for each pair of ends, connected, so that only that end's answers come back. Questions for names go
//! to a resolver instead, and what comes to a published port gets a port of the gateway's to be answered at.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpProtocol, IpRepr, UdpPacket, UdpRepr};

use super::addresses::{GUEST, is_dns};
use super::dns::{self, Resolvers};
use super::ethernet::Frames;
use super::icmp::Unreachable;
use super::ip::Packet;
use super::table::Table;
use super::{Context, Key, Ports, Ready, Source, icmp};
use crate::event_loop::Interest;

/// Flows at once.
const FLOWS: usize = 256;
/// How long a flow lives without a datagram (RFC 4787, 4.3).
const IDLE: Duration = Duration::from_secs(2 * 60);
/// The same for a question for a name.
const IDLE_NAMES: Duration = Duration::from_secs(15);
/// No datagram is longer.
const LONGEST: usize = 0xffff;
/// Datagrams taken from one socket before the others have their turn.
const TURN: usize = 64;
/// A port of the host's that leads to the guest has a number above those of flows.
const PUBLISHED: u64 = 1 << 48;

/// What is behind a flow.
enum Behind {
    Socket(UdpSocket),
    /// A resolver; a question that comes again before its answer goes to the next one.
    Names {
        socket: UdpSocket,
        attempt: usize,
        answered: bool,
    },
    /// Who came to a published port, by its number.
    Peer(usize, SocketAddr),
}

struct Flow {
    behind: Behind,
    /// The packet that began it, as far as an error about it quotes it.
    quote: Vec<u8>,
}

/// A port of the host's that leads to the guest.
struct Published {
    socket: UdpSocket,
    port: u16,
    peers: HashMap<SocketAddr, Key>,
}

pub struct Udp {
    flows: Table<Key, Flow>,
    published: Vec<Published>,
    /// Published ports that have more than there was room for.
    waiting: bool,
    ports: Ports,
    buffer: Vec<u8>,
}

/// A datagram to the guest, between addresses of the same version.
pub fn put(frames: &mut Frames, from: SocketAddr, to: SocketAddr, payload: &[u8]) {
    let repr = UdpRepr { src_port: from.port(), dst_port: to.port() };
    let len = repr.header_len() + payload.len();
    if len > LONGEST {
        return;
    }
    let (src, dst) = (from.ip().into(), to.ip().into());
    frames.ip(&IpRepr::new(src, dst, IpProtocol::Udp, len, 64), |bytes| {
        let fill = |bytes: &mut [u8]| bytes.copy_from_slice(payload);
        let mut packet = UdpPacket::new_unchecked(bytes);
        repr.emit(&mut packet, &src, &dst, payload.len(), fill, &ChecksumCapabilities::default());
    });
}

fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

impl Udp {
    /// With `published` sockets, each with the guest's port that it leads to.
    pub fn new(context: &Context, published: Vec<(UdpSocket, u16)>) -> io::Result<Self> {
        let own = |(socket, port)| Published { socket, port, peers: HashMap::new() };
        let published: Vec<_> = published.into_iter().map(own).collect();
        for (number, published) in (0..).zip(&published) {
            context.poller.add(&published.socket, Source::Udp, PUBLISHED + number, Interest::BOTH)?;
        }
        let (flows, buffer) = (Table::new(FLOWS), vec![0; LONGEST]);
        Ok(Self { flows, published, waiting: false, ports: Ports::default(), buffer })
    }

    #[cfg(test)]
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// The guest sends a datagram.
    pub fn input(&mut self, context: &mut Context, resolvers: &mut Resolvers, packet: &Packet<'_>) {
        let Ok(udp) = UdpPacket::new_checked(packet.payload) else { return };
        if udp.src_port() == 0 || udp.dst_port() == 0 {
            return;
        }
        let guest = SocketAddr::new(packet.from, udp.src_port());
        let remote = SocketAddr::new(packet.to, udp.dst_port());
        let (key, payload) = (Key { guest, remote }, udp.payload());
        let is_dns = is_dns(remote) && context.policy.has_names();
        if let Some(answer) =
            is_dns.then(|| dns::own_answer(payload, context.ipv6, &context.neighbours)).flatten()
        {
            return put(&mut context.frames, remote, guest, &answer);
        }
        let attempt = match self.flows.get_mut(&key) {
            None => Some(0),
            Some(Flow { behind: Behind::Names { attempt, answered: false, .. }, .. }) => Some(*attempt + 1),
            Some(_) => None,
        };
        if let Some(attempt) = attempt {
            let target = match is_dns {
                true => resolvers.pick(attempt, context.now),
                false => context.policy.target(remote),
            };
            let Some(target) = target else {
                return icmp::refuse(context, packet, Unreachable::Prohibited);
            };
            self.remove(&key);
            self.make_room();
            let id = self.flows.next_id();
            let opened = connected(target).and_then(|socket| {
                context.poller.add(&socket, Source::Udp, id, Interest::BOTH)?;
                Ok(socket)
            });
            let behind = match opened {
                Ok(socket) if is_dns => Behind::Names { socket, attempt, answered: true },
                Ok(socket) => Behind::Socket(socket),
                Err(error) => {
                    log::debug!("user network: UDP to {target}: {error}");
                    return icmp::refuse(context, packet, (&error).into());
                }
            };
            self.flows.insert(key, context.now, Flow { behind, quote: packet.quote().to_vec() });
        }
        let Some(flow) = self.flows.touch(&key, context.now) else { return };
        if let Behind::Names { answered, .. } = &mut flow.behind {
            *answered = false;
        }
        // An error that is waiting is reported in place of sending; the second attempt sends. What is full, loses.
        let _ = match &flow.behind {
            Behind::Socket(socket) | Behind::Names { socket, .. } => {
                socket.send(payload).or_else(|_| socket.send(payload))
            }
            Behind::Peer(number, peer) => self.published[*number].socket.send_to(payload, *peer),
        };
    }

    /// A socket has something to read.
    pub fn ready(&mut self, context: &mut Context, ready: Ready) {
        if !ready.input {
            return;
        }
        if let Some(number) = ready.id.checked_sub(PUBLISHED) {
            self.take_published(context, number as usize);
        } else if let Some(key) = self.flows.key(ready.id) {
            self.take(context, key);
        }
    }

    /// There is room for frames again.
    pub fn resume(&mut self, context: &mut Context) {
        for key in self.flows.take_waiting() {
            self.take(context, key);
        }
        if std::mem::take(&mut self.waiting) {
            (0..self.published.len()).for_each(|number| self.take_published(context, number));
        }
    }

    /// Whether there is more than there was room for.
    pub fn is_waiting(&self) -> bool {
        self.waiting || self.flows.is_waiting()
    }

    /// Brings a flow's datagrams to the guest.
    fn take(&mut self, context: &mut Context, key: Key) {
        let Some(flow) = self.flows.touch(&key, context.now) else { return };
        for _ in 0..TURN {
            if !context.frames.has_room() {
                break;
            }
            let (Behind::Socket(socket) | Behind::Names { socket, .. }) = &flow.behind else { return };
            match socket.recv(&mut self.buffer) {
                Ok(n) => {
                    if let Behind::Names { answered, .. } = &mut flow.behind {
                        *answered = true;
                    }
                    put(&mut context.frames, key.remote, key.guest, &self.buffer[..n]);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    icmp::unreachable(context, key.guest.ip(), &flow.quote, Unreachable::Port);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {}
            }
        }
        self.flows.wait(key);
    }

    /// Brings datagrams that came to a published port to the guest.
    fn take_published(&mut self, context: &mut Context, number: usize) {
        for _ in 0..TURN {
            if !context.frames.has_room() {
                break;
            }
            let Some(published) = self.published.get(number) else { return };
            let (n, peer) = match published.socket.recv_from(&mut self.buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => continue,
            };
            let guest = SocketAddr::new(GUEST.into(), published.port);
            let key = match published.peers.get(&peer).copied() {
                Some(key) => key,
                None => {
                    self.make_room();
                    let key = self.ports.free(guest, |key| self.flows.contains(key));
                    let flow = Flow { behind: Behind::Peer(number, peer), quote: Vec::new() };
                    self.flows.insert(key, context.now, flow);
                    self.published[number].peers.insert(peer, key);
                    key
                }
            };
            self.flows.touch(&key, context.now);
            put(&mut context.frames, key.remote, key.guest, &self.buffer[..n]);
        }
        self.waiting = true;
    }

    fn make_room(&mut self) {
        if let Some(key) = self.flows.surplus() {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(Flow { behind: Behind::Peer(number, peer), .. }) = self.flows.remove(key) {
            self.published[number].peers.remove(&peer);
        }
    }

    /// Whether there are flows.
    pub fn any(&self) -> bool {
        !self.flows.is_empty()
    }

    /// Ends flows that have been idle for too long.
    pub fn expire(&mut self, context: &Context) {
        let limit = |flow: &Flow| match flow.behind {
            Behind::Names { .. } => IDLE_NAMES,
            _ => IDLE,
        };
        self.flows.idle(context.now, limit).iter().for_each(|key| self.remove(key));
    }
}
