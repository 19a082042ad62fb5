//! What IPv6 adds: how a guest finds its way, and that nothing is open which was closed.

use std::net::{Ipv6Addr, SocketAddr};

use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr};

use super::super::addresses::ROUTER;
use super::super::icmp::Unreachable;
use super::*;
use crate::net::Offloads;

/// Ethernet's header and IP's.
const HEADERS: usize = 14 + 40;
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77);

fn packet(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = super::super::OUR_MAC.0.to_vec();
    frame.extend(MAC);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((payload.len() as u16).to_be_bytes());
    frame.extend([protocol, 255]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(payload);
    frame
}

fn syn(to: Ipv6Addr, port: u16) -> Vec<u8> {
    packet(GUEST6, to, 6, &super::syn(GATEWAY, port)[34..])
}

fn datagram(to: Ipv6Addr, port: u16) -> Vec<u8> {
    packet(GUEST6, to, 17, &super::datagram(GATEWAY, port)[34..])
}

fn solicitation() -> Vec<u8> {
    packet(LOCAL, ALL_ROUTERS, 58, &[133, 0, 0, 0, 0, 0, 0, 0])
}

fn network(text: &str) -> Guest {
    let NetTarget::User(config) = text.parse::<Net>().unwrap().to else { panic!("{text}") };
    Guest::new(config)
}

/// The messages of ICMPv6 for the guest: who sends them to whom, and what they say, with a sum that is right.
fn messages(guest: &mut Guest) -> Vec<(Ipv6Addr, Ipv6Addr, Vec<u8>)> {
    let frames = std::iter::from_fn(|| guest.stack.output());
    let messages = frames.filter(|frame| frame.bytes[12..14] == [0x86, 0xdd] && frame.bytes[20] == 58);
    let read = messages.map(|frame| {
        let [from, to] = [22, 38].map(|at| Ipv6Addr::from(*frame.bytes[at..].first_chunk::<16>().unwrap()));
        let message = frame.bytes[HEADERS..].to_vec();
        assert!(Icmpv6Packet::new_checked(&message[..]).unwrap().verify_checksum(&from, &to));
        assert_eq!(frame.bytes[21], 255, "hops");
        (from, to, message)
    });
    read.collect()
}

/// Type and code of the one error that the guest gets.
fn error_of(guest: &mut Guest) -> (u8, u8) {
    let errors: Vec<_> = messages(guest).into_iter().filter(|(_, _, message)| message[0] < 128).collect();
    assert_eq!(errors.len(), 1, "{errors:x?}");
    assert_eq!((errors[0].0, errors[0].1), (GATEWAY6, GUEST6));
    (errors[0].2[0], errors[0].2[1])
}

/// An option of a message's, by its type.
fn option(message: &[u8], start: usize, kind: u8) -> Option<Vec<u8>> {
    let mut rest = &message[start..];
    while let [found, len, ..] = rest {
        let (this, behind) = rest.split_at(usize::from(*len) * 8);
        if *found == kind {
            return Some(this.to_vec());
        }
        rest = behind;
    }
    None
}

#[test]
fn the_router_tells_what_a_guest_needs() {
    for (text, leads_out, names) in [
        ("user", true, true),
        ("user,restrict=on", false, false),
        ("user,restrict=on,allow=2001:db8::/32", true, false),
        ("user,restrict=on,dns=192.0.2.1", false, true),
    ] {
        let mut guest = network(text);
        guest.stack.context.search = Search::of("search lab ab.example");
        guest.stack.input(&solicitation());
        let (from, to, message) = messages(&mut guest).pop().unwrap();
        assert_eq!((from, to, message[0]), (ROUTER, "ff02::1".parse().unwrap(), 134));
        assert_eq!(
            message[5], 0x40,
            "there is more to know by DHCPv6, and no address that has to be asked for"
        );
        assert_eq!(message[6..8] != [0, 0], leads_out, "{text}: the lifetime of the way out");
        let prefix = option(&message, 16, 3).unwrap();
        assert_eq!((prefix[2], prefix[3], &prefix[16..30]), (64, 0xc0, &GUEST6.octets()[..14]));
        assert_eq!(option(&message, 16, 5).unwrap()[4..], u32::from(MTU).to_be_bytes());
        assert_eq!(option(&message, 16, 1).unwrap()[2..], super::super::OUR_MAC.0);
        let resolver = option(&message, 16, 25).map(|option| option[8..].to_vec());
        assert_eq!(resolver, names.then(|| DNS6.octets().to_vec()), "{text}");
        let domains = option(&message, 16, 31).map(|option| option[8..].to_vec());
        let padded = b"\x03lab\x00\x02ab\x07example\x00\x00\x00\x00\x00\x00\x00\x00".to_vec();
        assert_eq!(domains, names.then_some(padded), "{text}");
    }
}

#[test]
fn the_router_speaks_up_by_itself() {
    let mut guest = network("user");
    assert_eq!(messages(&mut guest).len(), 0);
    // The first thing that a guest's kernel says: whether anybody has the address that it is about to take.
    let own = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &LOCAL.octets()].concat();
    let own = packet(Ipv6Addr::UNSPECIFIED, "ff02::1:ff00:77".parse().unwrap(), 58, &own);
    guest.stack.input(&own);
    let told = |guest: &mut Guest| messages(guest).iter().filter(|(.., message)| message[0] == 134).count();
    assert_eq!(told(&mut guest), 1);
    guest.stack.input(&own);
    assert_eq!(told(&mut guest), 0);
    guest.wait(Duration::from_secs(601));
    assert_eq!(told(&mut guest), 1, "long before it is taken to be gone");
    // Another guest, or the same one again.
    guest.stack.leave(Offloads::empty());
    guest.stack.input(&own);
    assert_eq!(told(&mut guest), 1);
}

#[test]
fn neighbours_are_the_monitors_addresses_and_no_others() {
    let mut guest = network("user");
    guest.stack.input(&solicitation());
    messages(&mut guest);
    for (target, is_there) in
        [(GATEWAY6, true), (DNS6, true), (ROUTER, true), (GUEST6, false), (LOCAL, false)]
    {
        let message = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &target.octets()].concat();
        for (from, to, solicited) in
            [(LOCAL, LOCAL, 0x40), (Ipv6Addr::UNSPECIFIED, "ff02::1".parse().unwrap(), 0)]
        {
            guest.stack.input(&packet(from, "ff02::1:ff00:2".parse().unwrap(), 58, &message));
            let answers = messages(&mut guest);
            assert_eq!(answers.len(), usize::from(is_there), "{target} for {from}");
            for (who, whom, answer) in answers {
                assert_eq!((who, whom, answer[0], answer[4]), (target, to, 136, 0xa0 | solicited));
                assert_eq!(answer[8..24], target.octets());
                assert_eq!(option(&answer, 24, 2).unwrap()[2..], super::super::OUR_MAC.0);
            }
        }
    }
}

#[test]
fn bytes_and_datagrams_go_both_ways_by_ipv6() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let echo = UdpSocket::bind("[::1]:0").unwrap();
    let (port, udp_port) = (listener.local_addr().unwrap().port(), echo.local_addr().unwrap().port());
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let mut guest = Guest::allowed("::1");
    let socket = guest.connect((GATEWAY6, port));
    let data = noise(3 << 20);
    guest.write_all(socket, &data);
    guest.socket::<tcp::Socket<'_>>(socket).close();
    assert!(guest.read_all(socket) == data, "what came back is what was sent");
    server.join().unwrap();

    let socket = guest.udp();
    for len in [0, 1, 1400, 60000] {
        guest.send_to(socket, (GATEWAY6, udp_port), &noise(len));
        guest.until("a flow", |guest| guest.stack.udp.flows() == 1 && !guest.step());
        let mut bytes = vec![0; 0xffff];
        let (n, peer) = echo.recv_from(&mut bytes).unwrap();
        assert!(bytes[..n] == noise(len));
        echo.send_to(&bytes[..n], peer).unwrap();
        let (back, from) = guest.receive(socket);
        assert!(back == noise(len) && from == (IpAddress::Ipv6(GATEWAY6), udp_port).into());
    }
}

#[test]
fn the_gateway_leads_to_what_is_open_of_either_loopback() {
    let (listener, port) = listener();
    let mut guest = Guest::allowed("127.0.0.1");
    let socket = guest.connect((GATEWAY6, port));
    guest.until_state(socket, tcp::State::Established);
    listener.accept().unwrap();
    let six = TcpListener::bind("[::1]:0").unwrap();
    let mut guest = Guest::allowed("::1");
    let socket = guest.connect((GATEWAY, six.local_addr().unwrap().port()));
    guest.until_state(socket, tcp::State::Established);
    six.accept().unwrap();
}

#[test]
fn the_hosts_addresses_are_closed_by_ipv6_too() {
    // Of both versions: one socket has all that lead to it.
    let listener = TcpListener::bind("[::]:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let probe = UdpSocket::bind("[::]:0").unwrap();
    let own = probe.connect("[2001:db8::1]:9").and_then(|()| probe.local_addr()).map(|own| own.ip());
    let closed =
        ["::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "fe80::1"];
    let mut closed: Vec<Ipv6Addr> = closed.iter().map(|text| text.parse().unwrap()).collect();
    closed.extend([GATEWAY6, DNS6, ROUTER, GUEST6]);
    match own {
        Ok(std::net::IpAddr::V6(own)) => closed.push(own),
        _ => eprintln!(
            "SKIP: the_hosts_addresses_are_closed_by_ipv6_too: an address of the host's own, for it has none"
        ),
    }
    for address in closed {
        for restrict in [false, true] {
            let mut guest = Guest::new(UserNet { restrict, ..UserNet::default() });
            for frame in [syn(address, port), datagram(address, port)] {
                guest.stack.input(&frame);
                assert_eq!(error_of(&mut guest), (1, 1), "{address}: administratively prohibited");
            }
            assert_eq!((guest.stack.tcp.flows(), guest.stack.udp.flows()), (0, 0), "{address}");
        }
    }
    assert!(listener.accept().is_err(), "nobody has come");
}

#[test]
fn what_does_not_arrive_is_told_in_icmpv6() {
    let port = UdpSocket::bind("[::1]:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::allowed("::1");
    guest.stack.input(&datagram(GATEWAY6, port));
    let mut told = Vec::new();
    guest.until("an error", |guest| {
        told.extend(messages(guest).into_iter().filter(|(.., message)| message[0] == 1));
        !told.is_empty()
    });
    let (from, to, message) = &told[0];
    assert_eq!((*from, *to, message[1]), (GATEWAY6, GUEST6, 4), "no such port");
    assert_eq!(message[8..], datagram(GATEWAY6, port)[14..], "with the packet that it is about");
    // Extension headers, a fragment among them, and protocols that nobody knows.
    for protocol in [0, 43, 44, 60, 132] {
        guest.stack.input(&packet(GUEST6, GATEWAY6, protocol, &[6, 0, 1, 4, 0, 0, 0, 0]));
        assert_eq!(error_of(&mut guest), (4, 1), "header {protocol}");
    }
    // From an address that is no guest's, nothing is answered.
    for from in [GATEWAY6, "2001:db8::1".parse().unwrap(), Ipv6Addr::UNSPECIFIED] {
        guest.stack.input(&packet(from, GATEWAY6, 132, &[0; 8]));
        assert_eq!(messages(&mut guest), [], "{from}");
    }
    let network = std::io::Error::from(std::io::ErrorKind::NetworkUnreachable);
    assert!(matches!(Unreachable::from(&network), Unreachable::Network));
}

#[test]
fn names_are_asked_by_ipv6() {
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    resolver.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut guest = network(&format!("user,dns={}", resolver.local_addr().unwrap()));
    let socket = guest.udp();
    guest.send_to(socket, (DNS6, 53), b"a question that is long enough");
    guest.until("a flow", |guest| guest.stack.udp.flows() == 1 && !guest.step());
    let mut bytes = [0; 512];
    let (n, peer) = resolver.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..n], b"a question that is long enough");
    resolver.send_to(b"answer", peer).unwrap();
    assert_eq!(guest.receive(socket), (b"answer".to_vec(), (IpAddress::Ipv6(DNS6), 53).into()));
    let query =
        [&[0, 3, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], b"\x04host\x03vmm\x08internal\x00\x00\x1c\x00\x01"];
    guest.send_to(socket, (DNS6, 53), &query.concat());
    assert!(guest.receive(socket).0.ends_with(&GATEWAY6.octets()));
}

#[test]
fn the_gateway_answers_ping_by_ipv6() {
    let mut guest = network("user");
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
    let socket = |guest: &mut Guest| {
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(7)).unwrap();
        guest.sockets.add(socket)
    };
    let handle = socket(&mut guest);
    ping(&mut guest, handle, GATEWAY6);
    ping(&mut guest, handle, DNS6);
    let (inet6, icmpv6) = (rustix::net::AddressFamily::INET6, rustix::net::ipproto::ICMPV6);
    if rustix::net::socket(inet6, rustix::net::SocketType::DGRAM, Some(icmpv6)).is_ok() {
        let mut guest = Guest::allowed("::1");
        let handle = socket(&mut guest);
        ping(&mut guest, handle, Ipv6Addr::LOCALHOST);
    } else {
        eprintln!(
            "SKIP: the_gateway_answers_ping_by_ipv6: beyond it, for net.ipv4.ping_group_range has not this group"
        );
    }
}

fn ping(guest: &mut Guest, handle: SocketHandle, to: Ipv6Addr) {
    let request = Icmpv6Repr::EchoRequest { ident: 7, seq_no: 3, data: b"payload" };
    let socket = guest.socket::<icmp::Socket<'_>>(handle);
    let bytes = socket.send(request.buffer_len(), to.into()).unwrap();
    let sums = ChecksumCapabilities::default();
    request.emit(&GUEST6, &to, &mut Icmpv6Packet::new_unchecked(bytes), &sums);
    guest.until("a reply", |guest| {
        let Ok((bytes, from)) = guest.socket::<icmp::Socket<'_>>(handle).recv() else { return false };
        let packet = Icmpv6Packet::new_checked(bytes).unwrap();
        let reply = Icmpv6Repr::parse(&to, &GUEST6, &packet, &ChecksumCapabilities::default());
        assert_eq!(reply, Ok(Icmpv6Repr::EchoReply { ident: 7, seq_no: 3, data: b"payload" }));
        assert_eq!(from, IpAddress::Ipv6(to));
        true
    });
}

#[test]
fn a_port_of_an_ipv6_address_leads_to_a_guest_without() {
    let port = TcpListener::bind("[::1]:0").unwrap().local_addr().unwrap().port();
    let mut guest = network(&format!("user,ipv6=off,publish=[::1]:{port}:80,publish=[::1]:{port}:53/udp"));
    let server = guest.tcp(4096);
    guest.socket::<tcp::Socket<'_>>(server).listen(80).unwrap();
    let to: SocketAddr = (Ipv6Addr::LOCALHOST, port).into();
    let mut client = TcpStream::connect(to).unwrap();
    guest.until_state(server, tcp::State::Established);
    client.write_all(b"hello").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read_all(server), b"hello");
    let socket = guest.udp();
    guest.socket::<udp::Socket<'_>>(socket).close();
    guest.socket::<udp::Socket<'_>>(socket).bind(53).unwrap();
    let client = UdpSocket::bind("[::1]:0").unwrap();
    client.send_to(b"question", to).unwrap();
    let (bytes, from) = guest.receive(socket);
    assert_eq!((&bytes[..], from.addr), (&b"question"[..], IpAddress::Ipv4(GATEWAY)));
}

#[test]
fn a_network_without_ipv6_says_nothing_of_it() {
    for text in ["user,ipv6=off", "user,mtu=1279"] {
        let net: Net = text.parse().unwrap();
        let NetTarget::User(config) = &net.to else { panic!("{text}") };
        let mut stack = Stack::new(config, MAC, net.mtu().unwrap()).unwrap();
        for frame in [solicitation(), syn(GATEWAY6, 80), datagram(DNS6, 53)] {
            stack.input(&frame);
            assert!(stack.output().is_none(), "{text}");
        }
    }
}

/// A checksum that is left to the guest is the sum over the pseudo-header, and the guest's part makes it right.
#[test]
fn what_is_left_of_a_checksum_is_right_for_both_versions() {
    let port = free_port();
    for frame in [super::syn(GATEWAY, port), syn(GATEWAY6, port)] {
        let whole = |left| {
            let mut guest = network("user,allow=127.0.0.1,allow=::1");
            guest.stack.leave(if left { Offloads::CSUM } else { Offloads::empty() });
            guest.stack.input(&frame);
            let mut reset = None;
            guest.until("a reset", |guest| {
                let frames = std::iter::from_fn(|| guest.stack.output());
                reset = frames.into_iter().find(|frame| [frame.bytes[20], frame.bytes[23]].contains(&6));
                reset.is_some()
            });
            reset.unwrap()
        };
        let (done, mut left) = (whole(false), whole(true));
        assert_eq!(left.header[0], 1, "it needs a checksum");
        let word = |at: usize| usize::from(u16::from_le_bytes([left.header[at], left.header[at + 1]]));
        let (start, at) = (word(6), word(6) + word(8));
        let sum = left.bytes[start..].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        let sum = sum.sum::<u32>();
        let sum = (sum & 0xffff) + (sum >> 16);
        left.bytes[at..at + 2].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
        assert_eq!(left.bytes, done.bytes);
    }
}

proptest! {
    #[test]
    fn no_frame_of_ipv6_breaks_the_network(frames in proptest::collection::vec(garbage(), 1..40)) {
        let allow = vec!["[::1]:1".parse().unwrap()];
        let mut stack = Stack::new(&UserNet { allow, restrict: true, ..UserNet::default() }, MAC, MTU).unwrap();
        for frame in frames {
            stack.input(&frame);
            while stack.output().is_some() {}
        }
        prop_assert!(stack.tcp.flows() <= 512);
    }
}

/// Messages that are right up to a point.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let groups =
        ["ff02::1", "ff02::1:2", "ff02::16", "fd76:6d6d:6e65:74::ffff"].map(|text| text.parse().unwrap());
    let [all, servers, reports, nobody] = groups;
    let to = prop_oneof![
        Just(GATEWAY6),
        Just(DNS6),
        Just(ROUTER),
        Just(all),
        Just(servers),
        Just(reports),
        Just(nobody)
    ];
    let from = prop_oneof![Just(GUEST6), Just(LOCAL), Just(Ipv6Addr::UNSPECIFIED)];
    let protocol = prop_oneof![Just(58u8), Just(17), Just(6), Just(0), Just(44), any::<u8>()];
    let start = prop_oneof![
        any::<u8>().prop_map(|kind| vec![128 | (kind % 20), 0, 0, 0]),
        // Messages of DHCPv6, with a client's name.
        (any::<u8>(), any::<u8>()).prop_map(|(kind, len)| {
            vec![2, 34, 2, 35, 0, len, 0, 0, kind % 14, 1, 2, 3, 0, 1, 0, 2, 5, 5, 0, 3, 0, len % 40]
        }),
        // A segment with a SYN, and some options.
        any::<u8>().prop_map(|kind| {
            vec![
                1,
                2,
                0,
                1,
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
                255,
                255,
                0,
                0,
                0,
                0,
            ]
        }),
        Just(Vec::new()),
    ];
    let rest = proptest::collection::vec(any::<u8>(), 0..200);
    (from, to, protocol, start, rest, 0usize..100, any::<u8>()).prop_map(
        |(from, to, protocol, start, rest, cut, at)| {
            let mut frame = packet(from, to, protocol, &[start, rest].concat());
            frame.truncate(frame.len().saturating_sub(cut % 64));
            if cut > 90 {
                let len = frame.len();
                frame[usize::from(at) % len] ^= at | 1;
            }
            frame
        },
    )
}
