//! TCP: each connection is two, the guest's with a socket of smoltcp's and the host's with one of the kernel's, and a buffer each
//! way. A buffer that is full closes the window of the side that fills it.
//!
//! The guest's SYN is answered when the host's connection is there, and refused when that is.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
use smoltcp::socket::tcp;
use smoltcp::wire::{IpProtocol, IpRepr, TcpControl, TcpPacket, TcpRepr};

use super::addresses::{GUEST, is_dns};
use super::dns::Resolvers;
use super::guest_end::{BUFFER, BUFFER_OF_MANY, GuestEnd, unchecked};
use super::icmp::Unreachable;
use super::ip::Packet;
use super::table::Table;
use super::{Context, Key, Ports, Ready, Source, icmp};
use crate::event_loop::Interest;

/// Flows at once.
const FLOWS: usize = 512;
/// Beyond these, a flow is one of many.
const FEW: usize = 64;
/// How long an open connection may be idle (RFC 5382, 5).
const IDLE: Duration = Duration::from_secs(2 * 60 * 60 + 4 * 60);
/// The same for one that is only half open.
const IDLE_HALF: Duration = Duration::from_secs(4 * 60);
/// How long a guest may take to answer a connection to a published port.
const ANSWER: Duration = Duration::from_secs(10);

/// When to look again at what cannot go on for no reason that is known.
const SOON: Duration = Duration::from_millis(1);

enum State {
    /// The host connects; the guest's SYN waits.
    Connecting(Vec<u8>),
    Open(Box<GuestEnd>),
    /// The guest's end is closed in order, and these bytes are still to go to the host.
    Closing(Vec<u8>),
}

struct Flow {
    state: State,
    host: TcpStream,
    /// The host may have something to read, or room for something to write.
    readable: bool,
    writable: bool,
    /// The host's side has said all.
    host_ended: bool,
    /// The guest has said all, and the host knows.
    guest_ended: bool,
    told_host: bool,
    deadline: Option<Instant>,
}

#[derive(PartialEq, Eq)]
enum Fate {
    Lives,
    Ends,
    /// The host's peer gets a reset.
    Breaks,
}

impl Flow {
    fn new(state: State, host: TcpStream) -> Self {
        let (readable, writable, host_ended, guest_ended, told_host) = Default::default();
        Self { state, host, readable, writable, host_ended, guest_ended, told_host, deadline: None }
    }

    /// Moves what can be moved, both ways, after packets of the guest's or a change on the host's side.
    fn turn(&mut self, context: &mut Context) -> Fate {
        let guest = match &mut self.state {
            State::Connecting(_) => return Fate::Lives,
            State::Closing(rest) => return drain(&mut self.host, rest),
            State::Open(guest) => guest,
        };
        loop {
            let moved = to_host(&mut self.host, &mut self.writable, guest.socket()).and_then(|out| {
                let into = to_guest(&mut self.host, &mut self.readable, &mut self.host_ended, guest.socket());
                into.map(|into| out || into)
            });
            // The host's peer has reset the connection; the guest's goes the same way.
            let Ok(moved) = moved else {
                guest.socket().abort();
                guest.poll(context);
                return Fate::Breaks;
            };
            // With the last bytes, if they are still to go.
            if self.host_ended
                && matches!(guest.socket().state(), tcp::State::Established | tcp::State::CloseWait)
            {
                guest.socket().close();
            }
            // What is acknowledged now has made room for as much.
            guest.poll(context);
            let socket = guest.socket();
            let state = socket.state();
            self.guest_ended |= matches!(
                state,
                tcp::State::CloseWait | tcp::State::LastAck | tcp::State::Closing | tcp::State::TimeWait
            );
            if state == tcp::State::Established {
                socket.set_timeout(None);
            }
            if moved {
                continue;
            }
            if self.guest_ended && !self.told_host && socket.recv_queue() == 0 {
                self.told_host = true;
                let _ = self.host.shutdown(Shutdown::Write);
            }
            break;
        }
        let is_in_order = self.guest_ended && self.host_ended;
        let over = match guest.socket().state() {
            tcp::State::Closed | tcp::State::Listen if !is_in_order => return Fate::Breaks,
            tcp::State::Closed | tcp::State::TimeWait => true,
            _ => false,
        };
        if !over {
            return Fate::Lives;
        }
        let mut rest = vec![0; guest.socket().recv_queue()];
        let n = guest.socket().recv_slice(&mut rest).unwrap_or_default();
        rest.truncate(n);
        let fate = drain(&mut self.host, &mut rest);
        self.state = State::Closing(rest);
        fate
    }
}

/// What the guest has sent, as far as the host takes it. True if there was something.
fn to_host(host: &mut TcpStream, writable: &mut bool, guest: &mut tcp::Socket<'_>) -> io::Result<bool> {
    let mut moved = false;
    while *writable && guest.can_recv() {
        let written = guest.recv(|bytes| match host.write(bytes) {
            Ok(n) => (n, Ok(n)),
            Err(error) => (0, Err(error)),
        });
        match written {
            Ok(Ok(n)) => moved |= n > 0,
            Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => *writable = false,
            Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => break,
        }
    }
    Ok(moved)
}

/// What the host has, as far as the guest's buffer takes it. True if there was something. A buffer that is full is read into
/// again when a half of it is free: with less, pieces get ever smaller.
fn to_guest(
    host: &mut TcpStream,
    readable: &mut bool,
    ended: &mut bool,
    guest: &mut tcp::Socket<'_>,
) -> io::Result<bool> {
    let mut moved = false;
    if guest.send_queue() > guest.send_capacity() / 2 {
        return Ok(false);
    }
    while *readable && !*ended && guest.can_send() {
        let read = guest.send(|room| match host.read(room) {
            Ok(n) => (n, Ok(n)),
            Err(error) => (0, Err(error)),
        });
        match read {
            Ok(Ok(0)) => *ended = true,
            Ok(Ok(_)) => moved = true,
            Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => *readable = false,
            Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => break,
        }
    }
    Ok(moved)
}

/// Writes the last bytes of a guest whose end is closed.
fn drain(host: &mut TcpStream, rest: &mut Vec<u8>) -> Fate {
    while !rest.is_empty() {
        match host.write(rest) {
            Ok(n) => drop(rest.drain(..n)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Fate::Lives,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Fate::Breaks,
        }
    }
    Fate::Ends
}

pub struct Tcp {
    flows: Table<Key, Flow>,
    /// When flows have something to do by themselves.
    deadlines: BTreeSet<(Instant, Key)>,
    ports: Ports,
}

/// Begins to connect to `to`.
fn begin(to: SocketAddr) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    match connect(&socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

impl Tcp {
    pub fn new() -> Self {
        Self { flows: Table::new(FLOWS), deadlines: BTreeSet::new(), ports: Ports::default() }
    }

    /// Bytes for each way of a flow that begins now.
    fn buffer(&self) -> usize {
        if self.flows.len() <= FEW { BUFFER } else { BUFFER_OF_MANY }
    }

    #[cfg(test)]
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// When a flow next has something to do by itself.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// The guest sends a segment.
    pub fn input(&mut self, context: &mut Context, resolvers: &mut Resolvers, packet: &Packet<'_>) {
        let Some(segment) = parse(packet) else { return };
        let guest = SocketAddr::new(packet.from, segment.src_port);
        let key = Key { guest, remote: SocketAddr::new(packet.to, segment.dst_port) };
        if let Some(flow) = self.flows.touch(&key, context.now) {
            match &mut flow.state {
                // The same SYN again, or the guest has thought better of it.
                State::Connecting(_) if segment.control == TcpControl::Rst => self.remove(&key, Fate::Breaks),
                State::Connecting(_) => {}
                State::Open(guest) => {
                    guest.take(context, packet.bytes);
                    // Others of the same batch come first.
                    self.flows.wait(key);
                }
                State::Closing(_) => {}
            }
            return;
        }
        match segment.control {
            TcpControl::Syn if segment.ack_number.is_none() => {
                self.open(context, resolvers, key, packet, &segment)
            }
            TcpControl::Rst => {}
            _ => refuse(context, key, &segment),
        }
    }

    /// The guest opens a connection.
    fn open(
        &mut self,
        context: &mut Context,
        resolvers: &mut Resolvers,
        key: Key,
        packet: &Packet<'_>,
        segment: &TcpRepr<'_>,
    ) {
        let target = match is_dns(key.remote) && context.policy.has_names() {
            true => resolvers.pick(0, context.now),
            false => context.policy.target(key.remote),
        };
        let Some(target) = target else {
            return icmp::refuse(context, packet, Unreachable::Prohibited);
        };
        let begun = begin(target)
            .and_then(|host| self.insert(context, key, State::Connecting(packet.bytes.to_vec()), host));
        if let Err(error) = begun {
            fail(context, key, packet, segment, &error);
        }
    }

    /// Somebody has connected to a published port, behind which is the guest's `port`.
    pub fn accept(&mut self, context: &mut Context, host: TcpStream, port: u16) {
        let guest = SocketAddr::new(GUEST.into(), port);
        let key = self.ports.free(guest, |key| self.flows.contains(key));
        let Ok(mut end) = GuestEnd::new(context, &key, self.buffer()) else { return };
        if !end.connect(&key, ANSWER) || host.set_nonblocking(true).is_err() {
            return;
        }
        if self.insert(context, key, State::Open(Box::new(end)), host).is_ok() {
            self.turn(context, key);
        }
    }

    fn insert(&mut self, context: &mut Context, key: Key, state: State, host: TcpStream) -> io::Result<()> {
        if let Some(oldest) = self.flows.surplus() {
            self.abort(context, oldest);
        }
        // What goes over this socket was put together by somebody else already.
        let _ = host.set_nodelay(true);
        context.poller.add(&host, Source::Tcp, self.flows.next_id(), Interest::BOTH)?;
        self.flows.insert(key, context.now, Flow::new(state, host));
        Ok(())
    }

    /// A flow's socket can go on.
    pub fn ready(&mut self, context: &mut Context, ready: Ready) {
        let Some(key) = self.flows.key(ready.id) else { return };
        let buffer = self.buffer();
        let Some(flow) = self.flows.touch(&key, context.now) else { return };
        flow.readable |= ready.input;
        flow.writable |= ready.output;
        let State::Connecting(syn) = &mut flow.state else {
            return self.turn(context, key);
        };
        if !ready.output {
            return;
        }
        let syn = std::mem::take(syn);
        let connected = sockopt::socket_error(&flow.host).unwrap_or_else(Err);
        if let Err(error) = connected {
            self.remove(&key, Fate::Ends);
            // They were read before.
            let Some(packet) = Packet::parse(&syn) else { return };
            let Some(segment) = parse(&packet) else { return };
            return fail(context, key, &packet, &segment, &error.into());
        }
        let mut guest = GuestEnd::new(context, &key, buffer).ok();
        let Some(mut guest) = guest.take_if(|guest| guest.listen(&key)) else {
            return self.remove(&key, Fate::Breaks);
        };
        guest.take(context, &syn);
        flow.state = State::Open(Box::new(guest));
        self.turn(context, key);
    }

    /// Lets a flow do what it can, and sees to what follows from that.
    fn turn(&mut self, context: &mut Context, key: Key) {
        let Some(flow) = self.flows.get_mut(&key) else { return };
        let fate = flow.turn(context);
        if fate != Fate::Lives {
            return self.remove(&key, fate);
        }
        let next = match &mut flow.state {
            State::Open(guest) => guest.deadline(context),
            _ => None,
        };
        let is_due = next.is_some_and(|at| at <= context.now);
        let waits = is_due && !context.frames.has_room();
        // What is due although all has been sent that could be is looked at again soon, and not at once.
        let deadline = match next {
            _ if waits => None,
            Some(_) if is_due => Some(context.now + SOON),
            next => next,
        };
        let before = std::mem::replace(&mut flow.deadline, deadline);
        if before != deadline {
            before.map(|at| self.deadlines.remove(&(at, key)));
            deadline.map(|at| self.deadlines.insert((at, key)));
        }
        if waits {
            self.flows.wait(key);
        }
    }

    /// There is room for frames again, or what the guest has sent is all there.
    pub fn resume(&mut self, context: &mut Context) {
        for key in self.flows.take_waiting() {
            self.turn(context, key);
        }
    }

    /// Whether there is more than there was room for.
    pub fn is_waiting(&self) -> bool {
        self.flows.is_waiting()
    }

    /// Does what is due by now.
    pub fn on_time(&mut self, context: &mut Context) {
        let later = self.deadlines.split_off(&(context.now, Key::LAST));
        for (_, key) in std::mem::replace(&mut self.deadlines, later) {
            if let Some(flow) = self.flows.get_mut(&key) {
                flow.deadline = None;
                self.turn(context, key);
            }
        }
    }

    /// Whether there are flows.
    pub fn any(&self) -> bool {
        !self.flows.is_empty()
    }

    /// Ends flows that have been idle for too long.
    pub fn expire(&mut self, context: &mut Context) {
        let limit = |flow: &Flow| match flow.state {
            State::Open(_) if !flow.host_ended && !flow.guest_ended => IDLE,
            _ => IDLE_HALF,
        };
        for key in self.flows.idle(context.now, limit) {
            self.abort(context, key);
        }
    }

    /// Ends a flow, and tells both sides by a reset.
    fn abort(&mut self, context: &mut Context, key: Key) {
        if let Some(Flow { state: State::Open(guest), .. }) = self.flows.get_mut(&key) {
            guest.socket().abort();
            guest.poll(context);
        }
        self.remove(&key, Fate::Breaks);
    }

    fn remove(&mut self, key: &Key, fate: Fate) {
        let Some(flow) = self.flows.remove(key) else { return };
        flow.deadline.map(|at| self.deadlines.remove(&(at, *key)));
        if fate == Fate::Breaks {
            let _ = sockopt::set_socket_linger(&flow.host, Some(Duration::ZERO));
        }
    }
}

/// The network goes, and with it what the guest has not sent yet: peers must not take that for the end.
impl Drop for Tcp {
    fn drop(&mut self) {
        for flow in self.flows.all().filter(|flow| !flow.told_host) {
            let _ = sockopt::set_socket_linger(&flow.host, Some(Duration::ZERO));
        }
    }
}

fn parse<'a>(packet: &Packet<'a>) -> Option<TcpRepr<'a>> {
    let segment = TcpPacket::new_checked(packet.payload).ok()?;
    TcpRepr::parse(&segment, &packet.from.into(), &packet.to.into(), &unchecked()).ok()
}

/// The host could not connect: the guest's kernel hears it as it would of its own network.
fn fail(context: &mut Context, key: Key, packet: &Packet<'_>, segment: &TcpRepr<'_>, error: &io::Error) {
    log::debug!("user network: TCP to {}: {error}", key.remote);
    match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => refuse(context, key, segment),
        _ => icmp::refuse(context, packet, error.into()),
    }
}

/// Answers a segment that belongs to no connection by a reset (RFC 9293, 3.10.7.1).
fn refuse(context: &mut Context, key: Key, segment: &TcpRepr<'_>) {
    let seq_number = segment.ack_number.unwrap_or_default();
    let ack_number = match segment.ack_number {
        Some(_) => None,
        None => Some(segment.seq_number + segment.segment_len()),
    };
    let reset = TcpRepr {
        src_port: key.remote.port(),
        dst_port: key.guest.port(),
        control: TcpControl::Rst,
        seq_number,
        ack_number,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let (from, to) = (key.remote.ip().into(), key.guest.ip().into());
    let ip = IpRepr::new(from, to, IpProtocol::Tcp, reset.buffer_len(), 64);
    context.frames.tcp(key.guest.ip(), None, ip.buffer_len(), |bytes| {
        ip.emit(&mut bytes[..], &unchecked());
        let mut segment = TcpPacket::new_unchecked(&mut bytes[ip.header_len()..]);
        reset.emit(&mut segment, &from, &to, &unchecked());
    });
}
