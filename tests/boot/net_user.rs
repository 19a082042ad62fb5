//! The user network under a real guest: its lease, names, what it reaches of the host, and how it is reached.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::guest::{Guest, Kernel, available, vmm};

/// Takes the lease, as busybox's client has it, and tells of it.
const LEASE: &str = "echo 'test $1 = bound || exit 0; echo lease $ip/$mask $router $dns $mtu; \
     ip addr add $ip/$mask dev eth0; ip route add default via $router; echo nameserver $dns >/etc/resolv.conf' >/u; \
     mkdir -p /etc; echo BEGIN; ip link set eth0 up; cat /sys/class/net/eth0/mtu; \
     printf '%s\\n' '#!/bin/sh' | cat - /u >/v; chmod +x /v; udhcpc -q -n -O mtu -i eth0 -s /v 2>/dev/null";

pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let output = Command::new("sha256sum").arg(file.path()).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

/// Takes everything, and tells its sum.
fn take(listener: TcpListener) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut all = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut all).unwrap();
        sha256(&all)
    })
}

/// Serves `body` over HTTP, once.
fn serve(listener: TcpListener, body: Vec<u8>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        reader.lines().map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
        write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(&body).unwrap();
    })
}

/// Answers every question for a name by `address`, and those for other types by nothing.
fn resolve(address: Ipv4Addr) -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((n, peer)) = socket.recv_from(&mut bytes) {
            let has_address = bytes[n - 3] == 1;
            let mut answer = bytes[..n].to_vec();
            (answer[2], answer[3], answer[7]) = (0x81, 0x80, u8::from(has_address));
            if has_address {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(address.octets());
            }
            socket.send_to(&answer, peer).unwrap();
        }
    });
    port
}

/// The guest takes its lease, asks for names, pings the gateway, and fetches 8 MiB from the one port of the host that is open to
/// it; another one is closed.
#[test]
fn a_guest_has_all_that_a_network_has() {
    if !available("user network") {
        return;
    }
    let body = noise(8 << 20);
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let [open, closed] = [0, 1].map(|n| listeners[n].local_addr().unwrap().port());
    let [listener, not_for_guests] = listeners;
    let server = serve(listener, body.clone());
    let dns = resolve(Ipv4Addr::new(192, 0, 2, 7));
    let script = format!(
        "{LEASE}; nslookup host.vmm.internal | grep -o 10.0.2.2$; nslookup a.example | grep -o 192.0.2.7; \
         ping -q -c 3 -W 20 10.0.2.2 | grep -o '3 packets received'; \
         wget -q -O - http://host.vmm.internal:{open}/ | sha256sum | cut -d ' ' -f 1; \
         nc -w 9 10.0.2.2 {closed} </dev/null 2>&1 || echo closed; echo END"
    );
    let mut command = vmm(Kernel::TunedPvh, &script);
    command.args(["--mem", "256M", "--net"]);
    command.arg(format!("user,allow=127.0.0.1:{open},dns=127.0.0.1:{dns}"));
    let ended = Guest::start(command).finish();
    let body: [&str; 8] = ended.body().try_into().unwrap_or_else(|_| panic!("{}", ended.text));
    server.join().unwrap();
    let sum = sha256(&noise(8 << 20));
    assert_eq!(body[..2], ["65520", "lease 10.0.2.15/24 10.0.2.2 10.0.2.3 65520"]);
    assert_eq!(body[2..6], ["10.0.2.2", "192.0.2.7", "3 packets received", &sum], "{}", ended.text);
    assert!(body[7] == "closed" && body[6].contains("No route to host"), "{}", ended.text);
    not_for_guests.set_nonblocking(true).unwrap();
    assert!(not_for_guests.accept().is_err(), "nobody has come");
}

/// Debian's kernel with its IPv6: it makes itself an address, finds the way and the resolver, pings, gets a
/// file of 100 MB by either version, and sends it back. What leads nowhere, or to the host, it hears of at once.
#[test]
fn a_stock_guest_has_ipv6_and_moves_100_mb_each_way() {
    if !available("user network, IPv6") {
        return;
    }
    const SIZE: usize = 100_000_000;
    const NOISE: usize = 1_000_000;
    const GATEWAY: &str = "fd76:6d6d:6e65:74::2";
    let block = noise(NOISE);
    let body =
        (0..SIZE / NOISE).flat_map(|n| [&n.to_le_bytes()[..], &block[8..]].concat()).collect::<Vec<_>>();
    let sum = sha256(&body);
    let listeners = ["127.0.0.1:0", "[::1]:0"].map(|at| [(); 2].map(|()| TcpListener::bind(at).unwrap()));
    let ports = listeners.each_ref().map(|two| two.each_ref().map(|one| one.local_addr().unwrap().port()));
    let closed = TcpListener::bind("[::]:0").unwrap();
    let [[four, back_four], [six, back_six]] = ports;
    let ends = listeners.map(|[from, to]| (serve(from, body.clone()), take(to)));
    let refused = |to: &str, port: u16| format!("nc -w 9 {to} {port} </dev/null 2>&1 | grep -o ': [A-Z].*'");
    let script = format!(
        "mkdir -p /d /etc; mount -t tmpfs none /d; ip link set lo up; ip link set eth0 up; \
         until ip -6 addr show dev eth0 scope global | grep -q inet6; do sleep 0.1; done; \
         while ip -6 addr show dev eth0 | grep -q tentative; do sleep 0.1; done; echo BEGIN; \
         ip -6 addr show dev eth0 scope global | grep -o 'fd76:6d6d:6e65:74:.*/64' | grep -o /64; \
         ip -6 route | grep -o 'default via fe80::2'; \
         echo nameserver fd76:6d6d:6e65:74::3 >/etc/resolv.conf; \
         ping -6 -q -c 3 -W 20 host.vmm.internal | grep -o -e '{GATEWAY}' -e '3 packets received'; \
         {}; {}; set -f; \
         ip addr add 10.0.2.15/24 dev eth0; \
         for at in '10.0.2.2 {four} {back_four} 10.0.2.2' '{GATEWAY} {six} {back_six} [{GATEWAY}]'; do \
         set -- $at; wget -q -O /d/f http://$4:$2/; sha256sum </d/f; nc $1 $3 </d/f; done; echo END",
        refused(GATEWAY, closed.local_addr().unwrap().port()),
        refused("2001:db8::1", 80),
    );
    let mut command = vmm(Kernel::Stock, &script);
    command.args(["--mem", "768M", "--net"]);
    let allow = [four, back_four].map(|port| format!(",allow=127.0.0.1:{port}"));
    let allow6 = [six, back_six].map(|port| format!(",allow=[::1]:{port}"));
    command.arg(format!("user{}{}", allow.concat(), allow6.concat()));
    let ended = Guest::start(command).finish();
    let body = ended.body();
    let ways = ["/64", "default via fe80::2", GATEWAY, "3 packets received"];
    assert_eq!(body[..4], ways, "{}", ended.text);
    assert!(body[4].contains("denied") && body[5].contains("unreachable"), "{}", ended.text);
    assert_eq!(body[6..], [format!("{sum}  -"), format!("{sum}  -")], "{}", ended.text);
    for (server, taker) in ends {
        server.join().unwrap();
        assert_eq!(taker.join().unwrap(), sum, "what came back is what was sent");
    }
}

/// A guest that reaches nothing serves on a published port: 4 MiB go in, and come back.
#[test]
fn a_published_port_leads_into_a_guest_that_reaches_nothing() {
    if !available("published ports") {
        return;
    }
    let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = ports.map(|listener| listener.local_addr().unwrap().port());
    let script = "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2; echo BEGIN; \
                  nc -w 9 10.0.2.2 22 </dev/null 2>&1; nc -l -p 80 -e /bin/cat; nc -l -p 81; echo END";
    let mut command = vmm(Kernel::TunedPvh, script);
    command.args(["--mem", "256M", "--net", "user,restrict=on"]).args(["-p", &format!("{}:80", ports[0])]);
    command.args(["-p", &format!("{}:81", ports[1])]);
    let guest = Guest::start(command);
    guest.wait_for("No route to host", 1);
    let data = noise(4 << 20);
    assert!(exchange(ports[0], &data) == data, "what came back is what was sent");
    // It has served, and may go.
    exchange(ports[1], b"x");
    assert_eq!(guest.finish().code, Some(0));
}

/// Sends `data` to `port` and ends; returns what comes back. Until the guest listens, it resets.
fn exchange(port: u16, data: &[u8]) -> Vec<u8> {
    loop {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut writer, data) = (stream.try_clone().unwrap(), data.to_vec());
        let writer =
            thread::spawn(move || writer.write_all(&data).and_then(|()| writer.shutdown(Shutdown::Write)));
        let mut back = Vec::new();
        let read = stream.read_to_end(&mut back);
        if writer.join().unwrap().is_ok() && read.is_ok() {
            return back;
        }
        thread::sleep(Duration::from_millis(100));
    }
}
