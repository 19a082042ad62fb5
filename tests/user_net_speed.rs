//! How fast the user network is by itself: `cargo bench --package vmm-monitor --bench user_net [SECONDS]`.
//!
//! The guest is a few lines of TCP in this thread, which cost next to nothing: whole segments of 64 KiB from it, as its kernel
//! leaves them to the device, and an acknowledgement for each that comes. The host's end is another thread on the loopback. So
//! the time of this thread is what the monitor's thread would spend: for the guest's frames, and for the host's socket.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{ClockId, clock_gettime};
use vmm_monitor::config::{Net, NetTarget};
use vmm_monitor::net::Offloads;
use vmm_monitor::net::user::Stack;

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];
const ETHERNET: usize = 14;
const TCP: usize = 20;
const PORT: u16 = 10000;
/// What a guest's kernel sends and takes in one piece.
const PIECE: usize = 64 << 10;
/// Bits by which windows are shifted.
const SHIFT: u8 = 7;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 0x10;

/// A connection of the guest's.
struct Peer {
    stack: Stack,
    ends: (IpAddr, IpAddr),
    port: u16,
    own_port: u16,
    mtu: usize,
    /// Of what it sends: the next byte, the first that is not acknowledged, and the first beyond the window.
    next: u32,
    acknowledged: u32,
    limit: u32,
    shift: u8,
    /// The next byte that it expects.
    expected: u32,
    frame: Vec<u8>,
    received: u64,
    frames: u64,
    /// Of those, the ones that had come before.
    again: u64,
    /// The other side has said all.
    ended: bool,
}

impl Peer {
    fn connect(to: SocketAddr, mtu: u16) -> Self {
        let net: Net = format!("user,mtu={mtu},allow=127.0.0.1,allow=::1").parse().unwrap();
        let NetTarget::User(config) = net.to else { unreachable!() };
        let mut stack = Stack::new(&config, GUEST_MAC, mtu).unwrap();
        stack.leave(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6);
        let ends: [&str; 2] = match to {
            SocketAddr::V4(_) => ["10.0.2.15", "10.0.2.2"],
            SocketAddr::V6(_) => ["fd76:6d6d:6e65:74::15", "fd76:6d6d:6e65:74::2"],
        };
        let [guest, gateway] = ends.map(|end| end.parse().unwrap());
        let mut peer = Self {
            stack,
            ends: (guest, gateway),
            port: to.port(),
            own_port: PORT,
            mtu: mtu.into(),
            next: 1,
            acknowledged: 1,
            limit: 1,
            shift: 0,
            expected: 0,
            frame: Vec::new(),
            received: 0,
            frames: 0,
            again: 0,
            ended: false,
        };
        peer.open();
        peer
    }

    fn open(&mut self) {
        (self.next, self.acknowledged, self.limit, self.ended) = (1, 1, 1, false);
        self.send(SYN, &[]);
        while self.limit == 1 {
            self.take(true);
        }
    }

    fn ip_header(&self) -> usize {
        if self.ends.0.is_ipv4() { 20 } else { 40 }
    }

    fn send(&mut self, flags: u8, data: &[u8]) {
        let options: &[u8] = match flags & SYN {
            0 => &[],
            _ => {
                let mss = (self.mtu - self.ip_header() - TCP) as u16;
                &[[2, 4, (mss >> 8) as u8, mss as u8], [1, 3, 3, SHIFT]].concat()
            }
        };
        let len = (TCP + options.len() + data.len()) as u16;
        self.frame.clear();
        self.frame.extend(GATEWAY_MAC);
        self.frame.extend(GUEST_MAC);
        match self.ends {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                self.frame.extend([8, 0, 0x45, 0]);
                self.frame.extend((20 + len).to_be_bytes());
                self.frame.extend([0, 0, 0, 0, 64, 6, 0, 0]);
                self.frame.extend(from.octets());
                self.frame.extend(to.octets());
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                self.frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                self.frame.extend(len.to_be_bytes());
                self.frame.extend([6, 64]);
                self.frame.extend(from.octets());
                self.frame.extend(to.octets());
            }
            _ => unreachable!(),
        }
        let window = if flags & SYN != 0 { u16::MAX } else { ((4 << 20) >> SHIFT) as u16 };
        self.frame.extend(self.own_port.to_be_bytes());
        self.frame.extend(self.port.to_be_bytes());
        self.frame.extend(self.next.wrapping_sub(u32::from(flags & SYN != 0)).to_be_bytes());
        self.frame.extend(self.expected.to_be_bytes());
        self.frame.extend([((TCP + options.len()) as u8 / 4) << 4, flags]);
        self.frame.extend(window.to_be_bytes());
        self.frame.extend([0; 4]);
        self.frame.extend(options);
        self.frame.extend(data);
        self.next = self.next.wrapping_add(data.len() as u32 + u32::from(flags & FIN));
        self.stack.input(&self.frame);
    }

    /// Takes what has come, and acknowledges it; waits for it if that is asked for and there is nothing.
    fn take(&mut self, wait: bool) {
        let mut came = false;
        while let Some(frame) = self.stack.output() {
            came = true;
            let at = ETHERNET + self.ip_header();
            let is_tcp = frame.bytes[if at == 34 { 23 } else { 20 }] == 6;
            if !is_tcp {
                continue;
            }
            self.frames += 1;
            let segment = &frame.bytes[at..];
            if segment[2..4] != self.own_port.to_be_bytes() {
                continue;
            }
            let word = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
            let (flags, data) = (segment[13], segment.len() - usize::from(segment[12] >> 4) * 4);
            assert!(flags & 4 == 0, "a reset");
            if flags & SYN != 0 {
                self.expected = word(4).wrapping_add(1);
                self.shift = shift(&segment[TCP..segment.len() - data]);
            }
            let window = u32::from(u16::from_be_bytes([segment[14], segment[15]]));
            let shift = if flags & SYN == 0 { self.shift } else { 0 };
            self.acknowledged = word(8);
            self.limit = self.acknowledged.wrapping_add(window << shift);
            let behind = self.expected.wrapping_sub(word(4)).cast_signed();
            assert!(data == 0 || behind >= 0, "a gap");
            if data > 0 && behind == 0 {
                self.expected = self.expected.wrapping_add(data as u32);
                self.received += data as u64;
            } else if data > 0 {
                self.again += 1;
            }
            if flags & FIN != 0 && !self.ended {
                self.ended = true;
                self.expected = self.expected.wrapping_add(1);
            }
            if data > 0 || flags & (SYN | FIN) != 0 {
                self.send(ACK, &[]);
            }
        }
        if !came && wait {
            let fd = self.stack.readable();
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
        }
    }

    fn room(&self) -> usize {
        self.limit.wrapping_sub(self.next).cast_signed().max(0) as usize
    }
}

/// What a SYN says that later windows are shifted by.
fn shift(mut options: &[u8]) -> u8 {
    while let [kind, len, more @ ..] = options {
        match (*kind, more) {
            (3, [shift, ..]) => return *shift,
            (0, _) => break,
            (1, _) => options = &options[1..],
            _ => options = &options[usize::from(*len)..],
        }
    }
    0
}

fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn report(what: &str, mtu: u16, bytes: u64, peer: &Peer, start: (Instant, Duration)) {
    let (wall, cpu) = (start.0.elapsed(), cpu() - start.1);
    println!(
        "{what:<22} mtu {mtu:<5}  {:>6.2} Gbit/s  {:>5.0} ns of CPU per KiB  {} frames, {} twice",
        bytes as f64 * 8.0 / wall.as_secs_f64() / 1e9,
        cpu.as_nanos() as f64 / (bytes as f64 / 1024.0),
        peer.frames,
        peer.again
    );
}

fn listener(version: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(version).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn from_guest(version: &str, mtu: u16, time: Duration) {
    let (listener, address) = listener(version);
    let reader = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let (mut buffer, mut all) = (vec![0; 1 << 20], 0u64);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return all,
                n => all += n as u64,
            }
        }
    });
    let mut peer = Peer::connect(address, mtu);
    let header = peer.ip_header() + TCP;
    let (data, start) = (vec![0x5a; PIECE], (Instant::now(), cpu()));
    let mut sent = 0;
    while start.0.elapsed() < time {
        let piece = (u16::MAX as usize - header).min(peer.room());
        if piece < 4096 {
            peer.take(true);
            continue;
        }
        peer.send(ACK, &data[..piece]);
        sent += piece as u64;
        peer.take(false);
    }
    report(
        &format!("from the guest, {}", if header == 40 { "IPv4" } else { "IPv6" }),
        mtu,
        sent,
        &peer,
        start,
    );
    peer.send(FIN | ACK, &[]);
    while !reader.is_finished() {
        peer.take(false);
    }
    assert_eq!(reader.join().unwrap(), sent);
}

fn to_guest(version: &str, mtu: u16, time: Duration) {
    let (listener, address) = listener(version);
    thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let data = vec![0x5a; 1 << 20];
        // Until the other end is gone.
        while stream.write_all(&data).is_ok() {}
    });
    let mut peer = Peer::connect(address, mtu);
    let start = (Instant::now(), cpu());
    while start.0.elapsed() < time {
        peer.take(true);
    }
    let what = format!("to the guest, {}", if address.is_ipv4() { "IPv4" } else { "IPv6" });
    report(&what, mtu, peer.received, &peer, start);
}

/// A byte there and back.
fn round_trip(version: &str, mtu: u16, time: Duration) {
    let (listener, address) = listener(version);
    thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.set_nodelay(true).unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
    });
    let mut peer = Peer::connect(address, mtu);
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < time {
        let (began, had) = (Instant::now(), peer.received);
        peer.send(ACK, &[1]);
        while peer.received == had {
            peer.take(true);
        }
        times.push(began.elapsed());
    }
    times.sort();
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_nanos() as f64 / 1000.0;
    println!("round trip             mtu {mtu:<5}  {:>6.1} us, 99 of 100 below {:.1} us", at(50), at(99));
}

/// A connection for each request.
fn requests(mtu: u16, time: Duration) {
    let (listener, address) = listener("127.0.0.1:0");
    let answer = |mut stream: TcpStream| -> io::Result<()> {
        stream.read_exact(&mut [0; 64])?;
        stream.write_all(&[0; 1024])?;
        stream.shutdown(Shutdown::Write)?;
        // The guest's end comes; nothing else may.
        assert_eq!(stream.read(&mut [0])?, 0);
        Ok(())
    };
    // Until one connection is cut off: the last.
    thread::spawn(move || while listener.accept().and_then(|(stream, _)| answer(stream)).is_ok() {});
    let mut peer = Peer::connect(address, mtu);
    let (start, mut count) = ((Instant::now(), cpu()), 0u32);
    while start.0.elapsed() < time || count == 0 {
        peer.send(ACK, &[0; 64]);
        while !peer.ended {
            peer.take(true);
        }
        peer.send(FIN | ACK, &[]);
        peer.take(false);
        count += 1;
        peer.own_port = PORT + (count % 20000) as u16;
        peer.open();
    }
    let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(count);
    println!(
        "a request              mtu {mtu:<5}  {:>6.1} us, {:.1} us of CPU",
        each(start.0.elapsed()),
        each(cpu() - start.1)
    );
}

/// Bytes of memory that this process has.
fn memory() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    resident * 4096
}

/// Opens as many connections as there may be, which say nothing, and again, when those before have gone.
fn idle() {
    const CONNECTIONS: u16 = 500;
    let (listener, address) = listener("127.0.0.1:0");
    let mut peer = Peer::connect(address, 65520);
    let mut accepted = vec![listener.accept().unwrap()];
    let before = memory();
    for round in 1..=3u16 {
        for number in 0..CONNECTIONS {
            peer.own_port = PORT + round * CONNECTIONS + number;
            peer.open();
            accepted.push(listener.accept().unwrap());
        }
        let each = memory().saturating_sub(before) / u64::from(CONNECTIONS) / 1024;
        println!("{CONNECTIONS} idle connections: {each} KiB each, round {round}");
        for number in 0..CONNECTIONS {
            peer.own_port = PORT + round * CONNECTIONS + number;
            peer.send(RST, &[]);
        }
        accepted.clear();
    }
}

fn main() {
    let seconds = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(2);
    let time = Duration::from_secs(seconds);
    idle();
    if seconds == 0 {
        return;
    }
    for mtu in [65520, 1500] {
        for version in ["127.0.0.1:0", "[::1]:0"] {
            from_guest(version, mtu, time);
            to_guest(version, mtu, time);
        }
        round_trip("127.0.0.1:0", mtu, time);
        requests(mtu, time);
    }
}
