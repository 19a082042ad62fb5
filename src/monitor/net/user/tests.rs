//! The network with a guest of smoltcp's on one side and sockets of this host's on the other.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{AnySocket, dhcpv4, icmp, tcp, udp};
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, IpEndpoint,
};

use super::Stack;
use super::addresses::{DNS, DNS6, GATEWAY, GATEWAY6, GUEST, GUEST6, PREFIX6};
use super::search::Search;
use crate::config::{Net, NetTarget, UserNet};

mod closed;
mod ipv6;
mod segments;

const MTU: u16 = UserNet::MTU;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PATIENCE: Duration = Duration::from_secs(20);

/// What smoltcp takes for the guest's network device.
#[derive(Default)]
struct Card {
    received: VecDeque<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        Some((Received(self.received.pop_front()?), Sent(&mut self.sent)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sent<'_>> {
        Some(Sent(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(MTU) + 14;
        capabilities
    }
}

struct Guest {
    stack: Stack,
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    next_port: u16,
}

impl Guest {
    /// A guest with an address, on the network that `allow` and others say.
    fn new(config: UserNet) -> Self {
        let stack = Stack::new(&config, MAC, MTU).unwrap();
        let mut card = Card::default();
        let hardware = HardwareAddress::Ethernet(EthernetAddress(MAC));
        let mut interface = Interface::new(Config::new(hardware), &mut card, smoltcp::time::Instant::now());
        interface.update_ip_addrs(|own| {
            own.push(IpCidr::new(IpAddress::Ipv4(GUEST), 24)).unwrap();
            own.push(IpCidr::new(IpAddress::Ipv6(GUEST6), PREFIX6)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        interface.routes_mut().add_default_ipv6_route(GATEWAY6).unwrap();
        Self { stack, card, interface, sockets: SocketSet::new(Vec::new()), next_port: 40000 }
    }

    fn allowed(allow: &str) -> Self {
        Self::new(UserNet { allow: vec![allow.parse().unwrap()], ..UserNet::default() })
    }

    /// One round on both sides. True if frames went either way.
    fn step(&mut self) -> bool {
        self.interface.poll(smoltcp::time::Instant::now(), &mut self.card, &mut self.sockets);
        let mut moved = false;
        while let Some(frame) = self.card.sent.pop_front() {
            self.stack.input(&frame);
            moved = true;
        }
        while let Some(frame) = self.stack.output() {
            self.card.received.push_back(frame.bytes);
            moved = true;
        }
        moved
    }

    /// Goes on until `done`.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "waited for {what}");
            if !self.step() {
                let fd = self.stack.readable();
                let brief = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&brief));
            }
        }
    }

    /// Time passes for the network.
    fn wait(&mut self, time: Duration) {
        self.stack.ahead += time;
        self.stack.read_clock();
        self.stack.turn();
        self.stack.rest();
    }

    fn tcp(&mut self, buffer: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; buffer]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn connect_with(&mut self, to: (impl Into<IpAddress>, u16), buffer: usize) -> SocketHandle {
        let handle = self.tcp(buffer);
        self.next_port += 1;
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        let to = IpEndpoint::new(to.0.into(), to.1);
        socket.connect(self.interface.context(), to, self.next_port).unwrap();
        handle
    }

    fn connect(&mut self, to: (impl Into<IpAddress>, u16)) -> SocketHandle {
        self.connect_with(to, 128 << 10)
    }

    fn socket<T: AnySocket<'static>>(&mut self, handle: SocketHandle) -> &mut T {
        self.sockets.get_mut(handle)
    }

    fn state(&mut self, handle: SocketHandle) -> tcp::State {
        self.socket::<tcp::Socket<'_>>(handle).state()
    }

    fn until_state(&mut self, handle: SocketHandle, state: tcp::State) {
        self.until(&state.to_string(), |guest| guest.state(handle) == state);
    }

    /// Reads until the other side ends.
    fn read_all(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut all = Vec::new();
        self.until("a connection", |guest| {
            !matches!(guest.state(handle), tcp::State::SynSent | tcp::State::SynReceived)
        });
        self.until("the end of a stream", |guest| {
            let socket = guest.socket::<tcp::Socket<'_>>(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), all.extend_from_slice(bytes))).unwrap();
            }
            !socket.may_recv()
        });
        all
    }

    fn write_all(&mut self, handle: SocketHandle, mut bytes: &[u8]) {
        self.until("room to write", |guest| {
            bytes = &bytes[guest.socket::<tcp::Socket<'_>>(handle).send_slice(bytes).unwrap_or(0)..];
            bytes.is_empty()
        });
    }

    fn udp(&mut self) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 256 << 10]);
        self.next_port += 1;
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(self.next_port).unwrap();
        self.sockets.add(socket)
    }

    fn send_to(&mut self, handle: SocketHandle, to: (impl Into<IpAddress>, u16), bytes: &[u8]) {
        let to = IpEndpoint::new(to.0.into(), to.1);
        self.socket::<udp::Socket<'_>>(handle).send_slice(bytes, to).unwrap();
    }

    fn receive(&mut self, handle: SocketHandle) -> (Vec<u8>, IpEndpoint) {
        let mut got = None;
        self.until("a datagram", |guest| {
            let received = guest.socket::<udp::Socket<'_>>(handle).recv();
            got = received.ok().map(|(bytes, about)| (bytes.to_vec(), about.endpoint));
            got.is_some()
        });
        got.unwrap()
    }

    /// What ICMP says of packets: type and code of the next error.
    fn icmp_error(&mut self) -> (u8, u8) {
        let mut got = None;
        self.until("an error of ICMP", |guest| {
            for frame in &guest.card.received {
                if frame.len() > 36 && frame[12..14] == [8, 0] && frame[23] == 1 && frame[34] == 3 {
                    got = Some((frame[34], frame[35]));
                }
            }
            got.is_some() || {
                // The frames are looked at before smoltcp takes them.
                guest.card.received.clear();
                false
            }
        });
        got.unwrap()
    }
}

/// A listener of this host's loopback, and its port.
fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A port that nobody has, for as long as nobody takes it.
fn free_port() -> u16 {
    listener().1
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let (listener, port) = listener();
    // The host's side reads to the end before it says a word: the guest's end has come through, and leaves the other way open.
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY, port));
    let data = noise(3 << 20);
    guest.write_all(socket, &data);
    guest.socket::<tcp::Socket<'_>>(socket).close();
    assert!(guest.read_all(socket) == data, "what came back is what was sent");
    server.join().unwrap();
    guest.until("the flow's end", |guest| guest.stack.tcp.flows() == 0);
}

#[test]
fn the_host_may_end_first_and_read_on() {
    let (listener, port) = listener();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY, port));
    assert_eq!(guest.read_all(socket), b"hello");
    guest.write_all(socket, &noise(1 << 20));
    guest.socket::<tcp::Socket<'_>>(socket).close();
    guest.until("the flow's end", |guest| guest.stack.tcp.flows() == 0);
    assert!(server.join().unwrap() == noise(1 << 20));
}

#[test]
fn a_connection_that_the_host_refuses_is_refused() {
    let port = free_port();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY, port));
    guest.until_state(socket, tcp::State::Closed);
    assert_eq!(guest.stack.tcp.flows(), 0);
}

/// A frame of the guest's that opens a connection.
fn syn(to: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut segment = vec![0x9c, 0x40];
    segment.extend(port.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    packet(to, 6, &segment)
}

fn datagram(to: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut datagram = vec![0x9c, 0x40];
    datagram.extend(port.to_be_bytes());
    datagram.extend([0, 12, 0, 0, 1, 2, 3, 4]);
    packet(to, 17, &datagram)
}

fn packet(to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = super::OUR_MAC.0.to_vec();
    frame.extend(MAC);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((20 + payload.len() as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend(GUEST.octets());
    frame.extend(to.octets());
    frame.extend(payload);
    frame
}

#[test]
fn a_reset_goes_through_either_way() {
    let (listener, port) = listener();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY, port));
    guest.until_state(socket, tcp::State::Established);
    let (mut server, _) = listener.accept().unwrap();
    guest.socket::<tcp::Socket<'_>>(socket).abort();
    guest.until("the flow's end", |guest| guest.stack.tcp.flows() == 0);
    let error = server.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let socket = guest.connect((GATEWAY, port));
    guest.until_state(socket, tcp::State::Established);
    let (server, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&server, Some(Duration::ZERO)).unwrap();
    drop(server);
    guest.until_state(socket, tcp::State::Closed);
    assert_eq!(guest.stack.tcp.flows(), 0);
}

#[test]
fn peers_of_a_guest_that_is_gone_are_reset() {
    let (listener, port) = listener();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY, port));
    guest.until_state(socket, tcp::State::Established);
    let (mut server, _) = listener.accept().unwrap();
    guest.write_all(socket, b"half a word");
    drop(guest);
    let error = server.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_host_that_does_not_read_stops_the_guest() {
    let (listener, port) = listener();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY, port));
    guest.until_state(socket, tcp::State::Established);
    let (mut server, _) = listener.accept().unwrap();
    let data = noise(32 << 20);
    let mut sent = 0;
    let mut last = (0, Instant::now());
    guest.until("the guest to stop", |guest| {
        sent += guest.socket::<tcp::Socket<'_>>(socket).send_slice(&data[sent..]).unwrap();
        if sent > last.0 {
            last = (sent, Instant::now());
        }
        last.1.elapsed() > Duration::from_millis(300)
    });
    // The kernel's buffers, ours, and the guest's.
    assert!(sent < data.len(), "all of it went somewhere");
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        all
    });
    guest.write_all(socket, &data[sent..]);
    guest.socket::<tcp::Socket<'_>>(socket).close();
    guest.until("the flow's end", |guest| guest.stack.tcp.flows() == 0);
    assert!(reader.join().unwrap() == data);
}

#[test]
fn a_guest_that_does_not_read_stops_the_host() {
    let (listener, port) = listener();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect_with((GATEWAY, port), 64 << 10);
    guest.until_state(socket, tcp::State::Established);
    let (server, _) = listener.accept().unwrap();
    server.set_nonblocking(true).unwrap();
    let data = noise(32 << 20);
    let (mut sent, mut last) = (0, Instant::now());
    guest.until("the host to stop", |_| {
        if let Ok(n) = (&server).write(&data[sent..]) {
            (sent, last) = (sent + n, Instant::now());
        }
        last.elapsed() > Duration::from_millis(300)
    });
    assert!(sent < data.len(), "all of it went somewhere");
    assert!(guest.card.received.len() < 8, "no frames pile up");
    server.set_nonblocking(false).unwrap();
    let rest = data[sent..].to_vec();
    let mut writer = server.try_clone().unwrap();
    thread::spawn(move || {
        writer.write_all(&rest).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    assert!(guest.read_all(socket) == data, "nothing is lost");
}

#[test]
fn frames_that_nobody_takes_do_not_pile_up() {
    let (_listener, port) = listener();
    let mut guest = Guest::allowed("127.0.0.1");
    let large = {
        let mut echo = vec![8, 0, 0, 0, 0, 1, 0, 1];
        echo.resize(60000, 0);
        packet(GATEWAY, 1, &echo)
    };
    for n in 0..5000u16 {
        guest.stack.input(&large);
        guest.stack.input(&packet(
            GATEWAY,
            6,
            &[0, n as u8, (n >> 8) as u8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0],
        ));
        guest.stack.input(&syn(GATEWAY, port));
    }
    let frames: Vec<_> = std::iter::from_fn(|| guest.stack.output()).collect();
    let bytes: usize = frames.iter().map(|frame| frame.bytes.len()).sum();
    assert!(frames.len() < 1200 && bytes < 9 << 20, "{} frames of {bytes} bytes", frames.len());
}

#[test]
fn the_oldest_idle_connection_makes_room() {
    let (listener, port) = listener();
    let mut guest = Guest::allowed("127.0.0.1");
    let first = guest.connect_with((GATEWAY, port), 4096);
    guest.until_state(first, tcp::State::Established);
    let mut kept = vec![listener.accept().unwrap()];
    for n in 0..520u16 {
        let mut frame = syn(GATEWAY, port);
        frame[34..36].copy_from_slice(&(1000 + n).to_be_bytes());
        guest.stack.input(&frame);
        guest.until("the connection", |_| {
            listener.set_nonblocking(true).unwrap();
            listener.accept().is_ok_and(|stream| {
                kept.push(stream);
                true
            })
        });
    }
    assert_eq!(guest.stack.tcp.flows(), 512);
    guest.until_state(first, tcp::State::Closed);
}

#[test]
fn idle_flows_end() {
    let (listener, port) = listener();
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY, port));
    guest.until_state(socket, tcp::State::Established);
    let _server = listener.accept().unwrap();
    let datagrams = guest.udp();
    guest.send_to(datagrams, (GATEWAY, echo.local_addr().unwrap().port()), b"x");
    guest.until("a flow", |guest| guest.stack.udp.flows() == 1);
    guest.wait(Duration::from_secs(10 * 60));
    assert_eq!((guest.stack.udp.flows(), guest.stack.tcp.flows()), (0, 1));
    guest.wait(Duration::from_secs(3 * 60 * 60));
    assert_eq!(guest.stack.tcp.flows(), 0);
    guest.until_state(socket, tcp::State::Closed);
}

#[test]
fn datagrams_go_both_ways_and_only_between_the_two_ends() {
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = echo.local_addr().unwrap().port();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.udp();
    for len in [0, 1, 1400, 60000] {
        guest.send_to(socket, (GATEWAY, port), &noise(len));
        guest.until("a flow", |guest| guest.stack.udp.flows() == 1 && !guest.step());
        let mut bytes = vec![0; 0xffff];
        let (n, peer) = echo.recv_from(&mut bytes).unwrap();
        assert!(bytes[..n] == noise(len));
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"not asked", peer).unwrap();
        echo.send_to(&bytes[..n], peer).unwrap();
        let (back, from) = guest.receive(socket);
        assert!(back == noise(len) && from == (IpAddress::Ipv4(GATEWAY), port).into());
    }
}

#[test]
fn a_port_of_udp_that_nobody_has_is_told_to_be_unreachable() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::allowed("127.0.0.1");
    guest.stack.input(&datagram(GATEWAY, port));
    assert_eq!(guest.icmp_error(), (3, 3));
}

#[test]
fn names_are_asked_of_one_resolver_after_the_other() {
    let resolvers = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
    let dns = resolvers.iter().map(|resolver| resolver.local_addr().unwrap().to_string().parse().unwrap());
    let mut guest = Guest::new(UserNet { dns: dns.collect(), ..UserNet::default() });
    let socket = guest.udp();
    let query = |n: u8| [&[n, n, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], b"\x01a\x00\x00\x01\x00\x01"].concat();
    let mut bytes = [0; 512];
    let mut asked = |guest: &mut Guest, number: usize, n| {
        guest.send_to(socket, (DNS, 53), &query(n));
        resolvers[number].set_read_timeout(Some(PATIENCE)).unwrap();
        while guest.step() {}
        let (len, peer) = resolvers[number].recv_from(&mut bytes).unwrap();
        assert_eq!(bytes[..len], query(n));
        peer
    };
    let peer = asked(&mut guest, 0, 1);
    resolvers[0].send_to(b"answer", peer).unwrap();
    assert_eq!(guest.receive(socket), (b"answer".to_vec(), (IpAddress::Ipv4(DNS), 53).into()));
    asked(&mut guest, 0, 2);
    // No answer: the same question goes to the next one.
    let peer = asked(&mut guest, 1, 2);
    resolvers[1].send_to(b"late", peer).unwrap();
    assert_eq!(guest.receive(socket).0, b"late");
    // The host's own name needs none.
    let mut own = query(3);
    own.splice(12..15, *b"\x04host\x03vmm\x08internal\x00");
    guest.send_to(socket, (DNS, 53), &own);
    assert!(guest.receive(socket).0.ends_with(&GATEWAY.octets()));
}

#[test]
fn the_lease_has_address_router_resolver_domains_and_mtu() {
    let (router, dns) = (Some(GATEWAY), vec![DNS]);
    for (text, router, dns) in [
        ("user", router, dns.clone()),
        ("user,restrict=on", None, Vec::new()),
        ("user,restrict=on,allow=192.0.2.1", router, Vec::new()),
        ("user,restrict=on,dns=192.0.2.1", None, dns),
    ] {
        let NetTarget::User(config) = text.parse::<Net>().unwrap().to else { panic!("{text}") };
        let mut guest = Guest::new(config);
        guest.stack.context.search = Search::of("search lab a.example");
        let domains = [&[119, 16][..], b"\x03lab\x00\x01a\x07example\x00"].concat();
        let mut has_domains = false;
        guest.interface.update_ip_addrs(|own| own.clear());
        let client = dhcpv4::Socket::new();
        let handle = guest.sockets.add(client);
        let mut lease = None;
        guest.until("a lease", |guest| {
            let mut mtu = None;
            for frame in &guest.card.received {
                has_domains |= frame.windows(domains.len()).any(|option| option == domains);
                mtu = frame
                    .windows(4)
                    .find(|option| option[..2] == [26, 2])
                    .map(|option| [option[2], option[3]]);
            }
            let socket = guest.socket::<dhcpv4::Socket<'_>>(handle);
            if let Some(dhcpv4::Event::Configured(config)) = socket.poll() {
                lease = Some((config.address.to_string(), config.router, config.dns_servers.to_vec()));
            }
            mtu.iter().for_each(|mtu| assert_eq!(u16::from_be_bytes(*mtu), MTU));
            lease.is_some()
        });
        assert_eq!(has_domains, !dns.is_empty(), "{text}");
        assert_eq!(lease.unwrap(), ("10.0.2.15/24".to_owned(), router, dns));
    }
}

#[test]
fn the_hosts_domains_go_with_the_hosts_resolvers() {
    for (text, is_hosts) in [("user", true), ("user,dns=192.0.2.1", false)] {
        let NetTarget::User(config) = text.parse::<Net>().unwrap().to else { panic!("{text}") };
        assert_eq!(Guest::new(config).stack.context.search.is_hosts, is_hosts, "{text}");
    }
}

#[test]
fn the_gateway_answers_ping() {
    let mut guest = Guest::new(UserNet::default());
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(7)).unwrap();
    let handle = guest.sockets.add(socket);
    ping(&mut guest, handle, GATEWAY);
    ping(&mut guest, handle, DNS);
    // By a socket of the host's, where it lets us have one.
    let ours = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        Some(rustix::net::ipproto::ICMP),
    );
    if ours.is_ok() {
        let mut guest = Guest::allowed("127.0.0.1");
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(7)).unwrap();
        let handle = guest.sockets.add(socket);
        ping(&mut guest, handle, Ipv4Addr::LOCALHOST);
    } else {
        eprintln!(
            "SKIP: the_gateway_answers_ping: beyond it, for net.ipv4.ping_group_range has not this group"
        );
    }
}

fn ping(guest: &mut Guest, handle: SocketHandle, to: Ipv4Addr) {
    let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 3, data: b"payload" };
    let socket = guest.socket::<icmp::Socket<'_>>(handle);
    let bytes = socket.send(request.buffer_len(), IpAddress::Ipv4(to)).unwrap();
    request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
    guest.until("a reply", |guest| {
        let Ok((bytes, from)) = guest.socket::<icmp::Socket<'_>>(handle).recv() else { return false };
        let reply =
            Icmpv4Repr::parse(&Icmpv4Packet::new_checked(bytes).unwrap(), &ChecksumCapabilities::default());
        assert_eq!(reply, Ok(Icmpv4Repr::EchoReply { ident: 7, seq_no: 3, data: b"payload" }));
        assert_eq!(from, IpAddress::Ipv4(to));
        true
    });
}

#[test]
fn published_ports_lead_to_the_guest() {
    let port = free_port();
    let publish = [format!("{port}:80"), format!("{port}:53/udp")].map(|text| text.parse().unwrap()).to_vec();
    // Also into a guest that reaches nothing itself.
    let mut guest = Guest::new(UserNet { publish, restrict: true, ..UserNet::default() });
    let server = guest.tcp(128 << 10);
    guest.socket::<tcp::Socket<'_>>(server).listen(80).unwrap();
    let data = noise(1 << 20);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(&noise(1 << 20)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    guest.until_state(server, tcp::State::Established);
    let peer = guest.socket::<tcp::Socket<'_>>(server).remote_endpoint().unwrap();
    assert_eq!(peer.addr, IpAddress::Ipv4(GATEWAY));
    assert!(guest.read_all(server) == data);
    guest.write_all(server, b"done");
    guest.socket::<tcp::Socket<'_>>(server).close();
    guest.until("the flow's end", |guest| guest.stack.tcp.flows() == 0);
    assert_eq!(client.join().unwrap(), b"done");

    let socket = guest.udp();
    guest.socket::<udp::Socket<'_>>(socket).close();
    guest.socket::<udp::Socket<'_>>(socket).bind(53).unwrap();
    let clients = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
    for (number, client) in (b'0'..).zip(&clients) {
        client.connect(("127.0.0.1", port)).unwrap();
        client.send(&[number]).unwrap();
        let (bytes, from) = guest.receive(socket);
        assert_eq!(bytes, [number]);
        guest.socket::<udp::Socket<'_>>(socket).send_slice(b"reply", from).unwrap();
        while guest.step() {}
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reply = [0; 16];
        assert_eq!(client.recv(&mut reply).unwrap(), 5);
    }
}

#[test]
fn a_published_port_that_the_guest_does_not_have_is_reset() {
    let port = free_port();
    let mut guest =
        Guest::new(UserNet { publish: vec![format!("{port}:81").parse().unwrap()], ..UserNet::default() });
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let closed = thread::spawn(move || client.read(&mut [0]).unwrap_err().kind());
    guest.until("the reset", |_| closed.is_finished());
    assert_eq!(closed.join().unwrap(), std::io::ErrorKind::ConnectionReset);
}

/// Whoever connects faster than the guest answers does not keep the network from its other work.
#[test]
fn a_flood_of_connections_is_taken_in_turns() {
    let port = free_port();
    let publish = vec![format!("{port}:80").parse().unwrap()];
    let mut stack = Stack::new(&UserNet { publish, ..UserNet::default() }, MAC, MTU).unwrap();
    let _clients: Vec<_> = (0..100).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    stack.turn();
    assert_eq!(stack.tcp.flows(), 64);
    stack.rest();
    assert!(stack.is_awake, "the others are not forgotten");
    stack.turn();
    assert_eq!(stack.tcp.flows(), 100);
}

proptest! {
    #[test]
    fn no_frame_breaks_the_network(frames in proptest::collection::vec(garbage(), 1..40)) {
        let config = UserNet { allow: vec!["127.0.0.1:1".parse().unwrap()], restrict: true, ..UserNet::default() };
        let mut stack = Stack::new(&config, MAC, MTU).unwrap();
        for frame in frames {
            stack.input(&frame);
            while stack.output().is_some() {}
        }
        prop_assert!(stack.tcp.flows() <= 512);
    }
}

/// Noise, and frames that are right up to a point.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let noise = || proptest::collection::vec(any::<u8>(), 0..200);
    let to = prop_oneof![Just(GATEWAY), Just(DNS), Just(Ipv4Addr::BROADCAST), Just(Ipv4Addr::LOCALHOST)];
    let port = prop_oneof![Just(53u16), Just(67), Just(1), any::<u16>()];
    let framed = (to, any::<u8>(), port, noise(), 0usize..400, any::<bool>(), any::<u8>()).prop_map(
        |(to, kind, port, noise, cut, flip, at)| {
            let mut payload = vec![0x9c, 0x40];
            payload.extend(port.to_be_bytes());
            match kind % 4 {
                0 => {
                    payload.extend(((8 + noise.len()) as u16).to_be_bytes());
                    payload.extend([0, 0]);
                }
                // A segment with a SYN and some options.
                1 => payload.extend([
                    0,
                    0,
                    0,
                    1,
                    0,
                    0,
                    0,
                    0,
                    0x50 | kind & 0xf0,
                    2 | kind & 0x3f,
                    0xff,
                    0xff,
                    0,
                    0,
                    0,
                    0,
                ]),
                2 => payload = vec![8, 0, 0, 0],
                _ => {}
            }
            if port == 67 {
                // A message of DHCP begins.
                let mut message = vec![1, 1, 6, 0];
                message.resize(236, 0);
                message.extend([99, 130, 83, 99, 53, 1, kind % 9]);
                payload.extend(message);
            }
            payload.extend(noise);
            let protocol = [17, 6, 1, kind][usize::from(kind % 4)];
            let mut frame = packet(to, protocol, &payload);
            if kind & 0x80 != 0 && to == GATEWAY {
                frame[12..14].copy_from_slice(&[8, 6]);
            }
            frame.truncate(frame.len().saturating_sub(cut % 64));
            let len = frame.len();
            if flip && len > 14 {
                frame[14 + usize::from(at) % (len - 14)] ^= at | 1;
            }
            frame
        },
    );
    prop_oneof![1 => noise(), 4 => framed]
}
