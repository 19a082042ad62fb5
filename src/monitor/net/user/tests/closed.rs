//! What a guest cannot reach, by any protocol and under any configuration that does not name it. Of IPv6 `ipv6` tells.

use std::net::IpAddr;

use super::*;

/// Addresses of the host's and of its links, and names of them.
const CLOSED: [[u8; 4]; 16] = [
    [10, 0, 2, 2],
    [10, 0, 2, 3],
    [10, 0, 2, 0],
    [10, 0, 2, 15],
    [10, 0, 2, 77],
    [10, 0, 2, 255],
    [127, 0, 0, 1],
    [127, 0, 0, 53],
    [127, 255, 255, 255],
    [0, 0, 0, 0],
    [0, 0, 0, 1],
    [0, 127, 0, 1],
    // Link-local, with the metadata of clouds.
    [169, 254, 169, 254],
    [169, 254, 0, 1],
    // Reserved.
    [240, 0, 0, 1],
    [255, 255, 255, 254],
];
/// To many at once: a guest's own affair on its link, which nobody else is on.
const GROUPS: [[u8; 4]; 4] = [[255, 255, 255, 255], [224, 0, 0, 1], [224, 0, 0, 251], [239, 255, 255, 250]];

/// None of them names an address of the host's.
fn configurations() -> Vec<UserNet> {
    let text = [
        "user",
        "user,restrict=on",
        "user,allow=0.0.0.0/0,allow=::/0",
        "user,restrict=on,allow=0.0.0.0/0",
        "user,restrict=on,allow=192.0.2.1,allow=126.0.0.0/7",
    ];
    let config = |text: &str| match text.parse::<Net>().unwrap().to {
        NetTarget::User(config) => config,
        _ => unreachable!(),
    };
    text.into_iter().map(config).collect()
}

fn echo(to: Ipv4Addr) -> Vec<u8> {
    let mut bytes = [8, 0, 0, 0, 0, 7, 0, 1];
    Icmpv4Packet::new_unchecked(&mut bytes[..]).fill_checksum();
    packet(to, 1, &bytes)
}

fn has_flows(guest: &Guest) -> bool {
    guest.stack.tcp.flows() + guest.stack.udp.flows() > 0 || guest.stack.ping.any()
}

#[test]
fn the_host_its_loopback_and_its_links_are_closed() {
    let (listener, port) = listener();
    listener.set_nonblocking(true).unwrap();
    let every = TcpListener::bind(("0.0.0.0", 0)).unwrap();
    every.set_nonblocking(true).unwrap();
    let datagrams = UdpSocket::bind(("127.0.0.1", port)).unwrap();
    datagrams.set_nonblocking(true).unwrap();
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr()).map(|own| own.ip());
    let mut closed = CLOSED.map(Ipv4Addr::from).to_vec();
    match own {
        Ok(IpAddr::V4(own)) => closed.push(own),
        _ => eprintln!(
            "SKIP: the_host_its_loopback_and_its_links_are_closed: an address of the host's own: it has none"
        ),
    }
    for config in configurations() {
        for address in &closed {
            let mut guest = Guest::new(config.clone());
            for port in [port, every.local_addr().unwrap().port()] {
                for frame in [syn(*address, port), datagram(*address, port)] {
                    guest.stack.input(&frame);
                    assert_eq!(
                        guest.icmp_error(),
                        (3, 13),
                        "{address}: administratively prohibited, {config:?}"
                    );
                    guest.card.received.clear();
                }
            }
            // Those of the monitor's answer themselves.
            if ![GATEWAY, DNS].contains(address) {
                guest.stack.input(&echo(*address));
                assert_eq!(guest.icmp_error(), (3, 13), "{address}");
            }
            assert!(!has_flows(&guest), "{address}, {config:?}");
        }
        let mut guest = Guest::new(config);
        for address in GROUPS.map(Ipv4Addr::from) {
            for frame in [syn(address, port), datagram(address, port), echo(address)] {
                guest.stack.input(&frame);
                assert!(guest.stack.output().is_none() && !has_flows(&guest), "{address}");
            }
        }
    }
    assert!(listener.accept().is_err() && every.accept().is_err(), "nobody has come");
    assert!(datagrams.recv(&mut [0; 8]).is_err(), "nothing has come");
}

#[test]
fn a_name_that_stands_for_the_host_opens_nothing() {
    let (listener, port) = listener();
    listener.set_nonblocking(true).unwrap();
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    resolver.set_read_timeout(Some(PATIENCE)).unwrap();
    let dns = vec![resolver.local_addr().unwrap().to_string().parse().unwrap()];
    let mut guest = Guest::new(UserNet { dns, ..UserNet::default() });
    let socket = guest.udp();
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x04evil\x07example\0\0\x01\0\x01";
    guest.send_to(socket, (DNS, 53), query);
    while guest.step() {}
    let (_, peer) = resolver.recv_from(&mut [0; 512]).unwrap();
    for address in [[127, 0, 0, 1], [0, 0, 0, 0], [10, 0, 2, 2]] {
        let record = [&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4][..], &address].concat();
        let mut answer = [&query[..], &record].concat();
        [answer[2], answer[3], answer[7]] = [0x81, 0x80, 1];
        resolver.send_to(&answer, peer).unwrap();
        assert!(guest.receive(socket).0.ends_with(&address), "the answer is the resolver's own");
        guest.card.received.clear();
        guest.stack.input(&syn(address.into(), port));
        assert_eq!(guest.icmp_error(), (3, 13), "{address:?}");
        guest.card.received.clear();
    }
    assert!(listener.accept().is_err() && guest.stack.tcp.flows() == 0);
}

#[test]
fn what_is_allowed_by_name_is_open_and_its_neighbours_are_not() {
    let ((open, port), (closed, other)) = (listener(), listener());
    closed.set_nonblocking(true).unwrap();
    let mut guest = Guest::allowed(&format!("127.0.0.1:{port}"));
    for (address, port) in
        [(GATEWAY, other), (Ipv4Addr::LOCALHOST, other), (Ipv4Addr::new(127, 0, 0, 2), port)]
    {
        guest.stack.input(&syn(address, port));
        assert_eq!(guest.icmp_error(), (3, 13), "{address}:{port}");
        guest.card.received.clear();
    }
    guest.stack.input(&echo(Ipv4Addr::LOCALHOST));
    assert_eq!(guest.icmp_error(), (3, 13), "a port is no ping");
    guest.card.received.clear();
    let socket = guest.connect((GATEWAY, port));
    guest.until_state(socket, tcp::State::Established);
    open.accept().unwrap();
    assert!(closed.accept().is_err(), "nobody has come");
}
