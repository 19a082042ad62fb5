//! The network device and its links beyond single requests: who waits for whom, and what is lost when.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_monitor::event_loop::Event;
use vmm_monitor::memory::{Buffers, Slices};
use vmm_monitor::net::{HEADER, Head, Link, MAX_FRAME, Offloads, Port, START, Wire, from_descriptor};
use vmm_monitor::virtio::net::Net;
use zerocopy::IntoBytes;

use crate::guest::{DATA, Guest};
use crate::subjects::{MAC, NetSocket, Peer, frame, link, net_on};

pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const MRG_RXBUF: u64 = 1 << 15;
const MQ: u64 = 1 << 22;
pub const TO_HOST: [u8; 6] = [2; 6];

/// A running device on a link of `socket`, whose turns are counted.
pub fn guest(socket: NetSocket) -> (Guest, Link, Peer, Turns) {
    let (link, peer) = link(socket);
    let (link, turns) = counted(link);
    let mut guest = Guest::new(net_on(std::slice::from_ref(&link)));
    guest.start(0);
    (guest, link, peer, turns)
}

/// The same link, on which the turns of its device are counted.
pub fn counted(link: Link) -> (Link, Turns) {
    let turns = Turns::default();
    (Link::new(Counted(link, turns.clone())).unwrap(), turns)
}

/// Turns that a device has had.
#[derive(Clone, Default)]
pub struct Turns(Arc<AtomicUsize>);

impl Turns {
    /// How many looks at the link those were: two or three for each.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// Whether the worker comes to sleep.
    pub fn are_over(&self) -> bool {
        (0..200).any(|_| {
            let before = self.0.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            self.0.load(Ordering::SeqCst) == before
        })
    }
}

/// A link that counts its device's turns: each asks at its end whether it is up.
struct Counted(Link, Turns);

impl Wire for Counted {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn is_up(&self) -> bool {
        self.1.0.fetch_add(1, Ordering::SeqCst);
        self.0.wire().is_up()
    }
    fn offloads(&self) -> Offloads {
        self.0.wire().offloads()
    }
    fn accept(&mut self, offloads: Offloads) {
        self.0.wire().accept(offloads);
    }
    fn set_attached(&mut self, on: bool) {
        self.0.wire().set_attached(on);
    }
    fn send(&mut self, header: &[u8; HEADER], frame: &Buffers) -> bool {
        self.0.wire().send(header, frame)
    }
    fn flush(&mut self) -> bool {
        self.0.wire().flush()
    }
    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        self.0.wire().receive(head, rest)
    }
}

/// A frame of `len` bytes to the guest.
pub fn numbered(number: usize, len: usize) -> Vec<u8> {
    let mut all = frame(MAC, &number.to_be_bytes());
    all.resize(len, number as u8);
    all
}

pub fn command(guest: &mut Guest, bytes: &[u8]) -> u8 {
    guest.store(DATA, bytes);
    assert_eq!(guest.request(CONTROL, &[(DATA, bytes.len() as u32)], &[(DATA + 0xf00, 1)]), 1);
    guest.load(DATA + 0xf00, 1)[0]
}

/// Offers `count` receive buffers of `len` bytes, from `DATA + 0x1000` on.
pub fn offer(guest: &mut Guest, count: u64, len: u32) {
    let old = guest.rings[RECEIVE].available();
    for i in 0..count {
        guest.rings[RECEIVE].add(&[], &[(DATA + 0x1000 + i * u64::from(len), len)]);
    }
    guest.kick(RECEIVE, old);
}

/// Offers `frame` to queue `queue`, at `DATA + 0x1000`; its chain.
pub fn send(guest: &mut Guest, queue: usize, header: [u8; HEADER], frame: &[u8]) -> u16 {
    guest.store(DATA + 0x1000, &[&header[..], frame].concat());
    let old = guest.rings[queue].available();
    let head = guest.rings[queue].add(&[(DATA + 0x1000, (HEADER + frame.len()) as u32)], &[]);
    guest.kick(queue, old);
    head
}

#[test]
fn a_guest_without_receive_buffers_costs_nothing_and_loses_nothing_that_the_socket_holds() {
    let (mut guest, _, mut peer, turns) = guest(NetSocket::Stream);
    guest.settle();
    (0..5).for_each(|number| peer.send(&numbered(number, 100)));
    assert!(turns.are_over(), "nobody is woken");
    offer(&mut guest, 5, 2048);
    for number in 0..5 {
        let (_, len) = guest.rings[RECEIVE].wait_used(10);
        let at = DATA + 0x1000 + 2048 * number as u64;
        assert_eq!(guest.load(at + 12, len as usize - 12), numbered(number, 100));
    }
    guest.settle();
    peer.send(&numbered(9, 100));
    assert!(turns.are_over(), "all buffers are used again");
}

#[test]
fn a_peer_that_does_not_read_stalls_the_guest_and_nobody_spins() {
    let (mut guest, link, mut peer, turns) = guest(NetSocket::Stream);
    let all: Vec<_> = (0..60).map(|number| frame(TO_HOST, &[number; 9000])).collect();
    for (frame, at) in all.iter().zip((DATA..).step_by(0x2400)) {
        guest.store(at, &[&[0; HEADER][..], frame].concat());
        guest.rings[TRANSMIT].add(&[(at, (HEADER + frame.len()) as u32)], &[]);
        if at == DATA + 30 * 0x2400 {
            // The rest comes while the device is stalled.
            guest.notify(TRANSMIT);
            guest.settle();
        }
    }
    let offered = guest.rings[TRANSMIT].available();
    guest.notify(TRANSMIT);
    assert!(turns.are_over(), "nothing to do until the peer reads");
    let sent = std::iter::from_fn(|| guest.rings[TRANSMIT].used()).count();
    assert!(sent > 0 && sent < usize::from(offered), "{sent} of {offered} sent to nobody");
    // A pause, and another device in its place, lose nothing and send nothing twice.
    guest.pause();
    let saved = guest.device.save_bytes();
    let mut guest = Guest::on(guest.unplug(), net_on(std::slice::from_ref(&link)));
    guest.device.restore_bytes(&saved).unwrap();
    guest.resume();
    for expect in &all[..usize::from(offered)] {
        assert!(peer.receive() == *expect, "in order, and whole");
    }
    for _ in sent..usize::from(offered) {
        guest.rings[TRANSMIT].wait_used(10);
    }
    assert_eq!(guest.rings[TRANSMIT].used(), None);
}

/// A link that notes how many bytes its peer has to read before and after each end of a batch.
struct Batched {
    link: Link,
    peer: UnixStream,
    noted: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Wire for Batched {
    fn fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
    fn is_up(&self) -> bool {
        self.link.wire().is_up()
    }
    fn send(&mut self, header: &[u8; HEADER], frame: &Buffers) -> bool {
        self.link.wire().send(header, frame)
    }
    fn flush(&mut self) -> bool {
        let waits = || rustix::io::ioctl_fionread(&self.peer).unwrap();
        let before = waits();
        let done = self.link.wire().flush();
        self.noted.lock().unwrap().push((before, waits()));
        done
    }
    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        self.link.wire().receive(head, rest)
    }
}

#[test]
fn short_frames_of_one_batch_go_to_a_stream_at_its_end() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let link = from_descriptor(ours.into(), 3).unwrap();
    let noted = Arc::default();
    let link =
        Link::new(Batched { link, peer: peer.try_clone().unwrap(), noted: Arc::clone(&noted) }).unwrap();
    let mut guest = Guest::new(net_on(&[link]));
    guest.start(0);
    // Offered while nobody looks, so that they are one batch.
    guest.pause();
    noted.lock().unwrap().clear();
    let all: Vec<_> = (0..10).map(|number| frame(TO_HOST, &[number; 1000])).collect();
    for (frame, at) in all.iter().zip((DATA..).step_by(0x800)) {
        guest.store(at, &[&[0; HEADER][..], frame].concat());
        guest.rings[TRANSMIT].add(&[(at, (HEADER + frame.len()) as u32)], &[]);
    }
    guest.resume();
    // What waits for the peer is noted before the peer takes it.
    let sent = || noted.lock().unwrap().iter().copied().find(|note| *note != (0, 0));
    guest.wait_for("the batch is sent", |_| sent().is_some());
    assert_eq!(sent(), Some((0, 10 * (4 + all[0].len() as u64))), "none before, all after");
    for expect in &all {
        let mut bytes = vec![0; 4 + expect.len()];
        peer.read_exact(&mut bytes).unwrap();
        assert!(bytes[..4] == (expect.len() as u32).to_be_bytes() && bytes[4..] == **expect);
    }
}

#[test]
fn a_frame_may_lie_in_several_buffers_if_that_was_agreed_on() {
    for socket in [NetSocket::Stream, NetSocket::Datagram] {
        let (mut guest, _, mut peer, _) = guest(socket);
        offer(&mut guest, 8, 128);
        peer.send(&numbered(7, 1000));
        let used: Vec<_> = (0..8).map(|_| guest.rings[RECEIVE].wait_used(10).1 as usize).collect();
        assert_eq!(used, [128, 128, 128, 128, 128, 128, 128, 1012 - 7 * 128]);
        let got = guest.load(DATA + 0x1000, 1012);
        assert_eq!((&got[10..12], &got[12..]), (&[8, 0][..], &numbered(7, 1000)[..]), "num_buffers first");
        // Too long for what there is, which the next one gets.
        offer(&mut guest, 8, 128);
        peer.send(&numbered(8, 1100));
        peer.send(&numbered(9, 60));
        assert_eq!(guest.rings[RECEIVE].wait_used(10).1, 72);
        assert_eq!(guest.load(DATA + 0x1000 + 12, 60), numbered(9, 60));

        guest.start(MRG_RXBUF);
        offer(&mut guest, 4, 128);
        peer.send(&numbered(1, 117));
        peer.send(&numbered(2, 116));
        assert_eq!(guest.rings[RECEIVE].wait_used(10).1, 128);
        assert_eq!(guest.load(DATA + 0x1000 + 12, 116), numbered(2, 116), "the first one did not fit");
        assert_eq!(guest.load(DATA + 0x1000, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
}

#[test]
fn frames_come_in_whatever_pieces_the_peer_writes_them() {
    let (mut guest, _, peer, _) = guest(NetSocket::Stream);
    let Peer::Stream(mut peer) = peer else { unreachable!() };
    offer(&mut guest, 32, 2048);
    let frames: Vec<_> = (0..12).map(|number| numbered(number, 14 + 97 * number)).collect();
    let bytes: Vec<u8> =
        frames.iter().flat_map(|f| [&(f.len() as u32).to_be_bytes()[..], f].concat()).collect();
    let mut rest = &bytes[..];
    for size in [1, 3, 5, 7, 20, 200, 600, 1500].into_iter().cycle() {
        let (piece, more) = rest.split_at(size.min(rest.len()));
        peer.write_all(piece).unwrap();
        rest = more;
        // So that the device reads just that; a pause in the middle of a frame does not harm either.
        guest.settle();
        if rest.is_empty() {
            break;
        }
    }
    for (expect, at) in frames.iter().zip(0u64..) {
        let (_, len) = guest.rings[RECEIVE].wait_used(10);
        assert_eq!(&guest.load(DATA + 0x1000 + 2048 * at + 12, len as usize - 12), expect);
    }
}

#[test]
fn the_driver_hears_that_the_peer_is_gone_and_what_it_sends_is_dropped() {
    // What no frame has in front ends a stream as well.
    for nonsense in [false, true] {
        let (mut guest, _, peer, turns) = guest(NetSocket::Stream);
        let Peer::Stream(mut peer) = peer else { unreachable!() };
        offer(&mut guest, 4, 2048);
        assert_eq!(guest.config::<2>(6), [1, 0]);
        if nonsense {
            peer.write_all(&u32::MAX.to_be_bytes()).unwrap();
        } else {
            peer.write_all(&[0, 0, 0, 60, 1, 2, 3]).unwrap();
            drop(peer);
        }
        guest.wait_for("the link is down", |guest| guest.config::<2>(6) == [0, 0]);
        assert_ne!(guest.read(0x60) & 2, 0, "an interrupt tells of it");
        assert!(turns.are_over(), "nobody is woken for it again");
        for _ in 0..3 {
            let head = send(&mut guest, TRANSMIT, [0; HEADER], &frame(TO_HOST, &[0; 50]));
            assert_eq!(guest.rings[TRANSMIT].wait_used(10), (head, 0));
        }
        guest.start(0);
        assert_eq!(guest.config::<2>(6), [0, 0], "it stays down");
    }
}

#[test]
fn queues_beyond_those_that_the_driver_asked_for_are_silent() {
    let pairs = [link(NetSocket::Stream), link(NetSocket::Stream)];
    let (links, mut peers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let mut guest = Guest::new(net_on(&links));
    // Without MQ the control queue is the third, with it the fifth.
    guest.start(MQ);
    assert_eq!((guest.rings.len(), guest.config::<2>(8)), (5, [2, 0]));
    assert_eq!(command(&mut guest, &[0, 0, 1]), 0);
    assert_eq!(command(&mut guest, &[4, 0, 2, 0]), 1);

    guest.start(0);
    let set = |guest: &mut Guest, pairs: u16| {
        guest.store(DATA, &[&[4, 0][..], &pairs.to_le_bytes()].concat());
        assert_eq!(guest.request(4, &[(DATA, 4)], &[(DATA + 0xf00, 1)]), 1);
        guest.load(DATA + 0xf00, 1)[0]
    };
    let head = send(&mut guest, 3, [0; HEADER], &frame(TO_HOST, &[1; 50]));
    guest.rings[2].add(&[], &[(DATA + 0x3000, 2048)]);
    guest.notify(2);
    peers[1].send(&numbered(1, 60));
    guest.settle();
    assert_eq!((guest.rings[3].used(), guest.rings[2].used()), (None, None));
    assert_eq!([0, 3, u16::MAX].map(|pairs| set(&mut guest, pairs)), [1; 3]);
    assert_eq!(set(&mut guest, 2), 0);
    assert_eq!((guest.rings[3].wait_used(10), guest.rings[2].wait_used(10).1), ((head, 0), 72));
    assert_eq!(peers[1].receive(), frame(TO_HOST, &[1; 50]));
    assert_eq!(set(&mut guest, 1), 0);
    send(&mut guest, 3, [0; HEADER], &frame(TO_HOST, &[2; 50]));
    guest.settle();
    assert_eq!(guest.rings[3].used(), None);
}

#[test]
fn the_mtu_is_told_where_there_is_one_and_longer_frames_are_the_drivers_own_affair() {
    const MTU: u64 = 1 << 3;
    let (link, mut peer) = link(NetSocket::Stream);
    for mtu in [None, Some(1280), Some(u16::MAX)] {
        let port = Port::new(vec![link.clone()], MAC);
        let mut guest = Guest::new(Box::new(Net::new(port, mtu)));
        guest.start(0);
        assert_eq!(guest.features & MTU != 0, mtu.is_some());
        assert_eq!(guest.config::<2>(10), mtu.unwrap_or(1500).to_le_bytes());
        for len in [14, 1280 + 14, 1280 + 15, 1280 + 18, 9000] {
            send(&mut guest, TRANSMIT, [0; HEADER], &numbered(len, len));
            assert_eq!(peer.receive(), numbered(len, len));
            guest.rings[TRANSMIT].wait_used(10);
        }
    }
}

#[test]
fn a_device_that_was_moved_asks_the_driver_to_announce_itself() {
    let (mut guest, link, _peer, _) = guest(NetSocket::Stream);
    guest.pause();
    guest.resume();
    assert_eq!(guest.config::<2>(6), [1, 0], "a pause moves nothing");
    assert_eq!(command(&mut guest, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    guest.pause();
    let saved = guest.device.save_bytes();
    let mut guest = Guest::on(guest.unplug(), net_on(std::slice::from_ref(&link)));
    guest.device.restore_bytes(&saved).unwrap();
    guest.resume();
    assert_eq!((guest.config::<6>(0), guest.config::<2>(6)), ([2, 0, 0, 0, 0, 9], [3, 0]));
    assert_ne!(guest.read(0x60) & 2, 0, "an interrupt tells of it");
    assert_eq!(command(&mut guest, &[3, 0]), 0);
    assert_eq!(guest.config::<2>(6), [1, 0]);
    guest.start(0);
    assert_eq!(guest.config::<6>(0), MAC, "a reset brings its own address back");
}

/// A link that can do everything, and writes down what it is asked for.
#[derive(Clone)]
pub struct Able(pub Arc<Mutex<Log>>, pub Arc<Event>);

#[derive(Default)]
pub struct Log {
    accepted: Vec<Offloads>,
    pub sent: Vec<([u8; HEADER], usize)>,
    coming: VecDeque<([u8; HEADER], Vec<u8>)>,
}

impl Wire for Able {
    fn fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
    fn is_up(&self) -> bool {
        true
    }
    fn offloads(&self) -> Offloads {
        Offloads::all()
    }
    fn accept(&mut self, offloads: Offloads) {
        self.0.lock().unwrap().accepted.push(offloads);
    }
    fn send(&mut self, header: &[u8; HEADER], frame: &Buffers) -> bool {
        self.0.lock().unwrap().sent.push((*header, frame.len()));
        true
    }
    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        self.1.clear();
        let (header, frame) = self.0.lock().unwrap().coming.pop_front()?;
        let start = frame.len().min(START);
        head.header = header;
        head.start[..start].copy_from_slice(&frame[..start]);
        rest.copy_from(&frame[start..]);
        Some(frame.len())
    }
}

#[test]
fn offloads_go_both_ways_as_far_as_they_are_agreed_on() {
    let able = Able(Arc::default(), Arc::new(Event::new().unwrap()));
    let log = || able.0.lock().unwrap();
    let mut guest = Guest::new(net_on(&[Link::new(able.clone()).unwrap()]));
    guest.start(0);
    assert_eq!(log().accepted, [Offloads::empty(), Offloads::empty(), Offloads::all()]);

    // TCP over IPv4 in segments of 1448 bytes; then the same with a size of 0, which is dropped.
    let mut header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 7, 7];
    send(&mut guest, TRANSMIT, header, &[0; 60000]);
    guest.rings[TRANSMIT].wait_used(10);
    [header[4], header[5]] = [0, 0];
    send(&mut guest, TRANSMIT, header, &[0; 60000]);
    guest.rings[TRANSMIT].wait_used(10);
    assert_eq!(log().sent, [([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], 60000)]);

    // The longest frame there is, in mergeable buffers of a page. The driver must offer enough first.
    let come = |frame: Vec<u8>| {
        log().coming.push_back(([3, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], frame));
        able.1.signal();
    };
    offer(&mut guest, 17, 4096);
    let long = numbered(3, MAX_FRAME);
    come(long.clone());
    let used: u32 = (0..17).map(|_| guest.rings[RECEIVE].wait_used(10).1).sum();
    assert_eq!(used as usize, HEADER + MAX_FRAME);
    assert_eq!(guest.load(DATA + 0x1000, HEADER), [3, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 17, 0]);
    assert!(guest.load(DATA + 0x1000 + HEADER as u64, MAX_FRAME) == long);
    offer(&mut guest, 16, 4096);
    come(numbered(4, 60));
    guest.settle();
    assert_eq!(guest.rings[RECEIVE].used(), None, "the next one may be as long, so it waits for room");
    offer(&mut guest, 1, 4096);
    assert_eq!(guest.rings[RECEIVE].wait_used(10).1, 72);

    // Turned off and on by command: only what was agreed on, and only what is sound.
    let set = |guest: &mut Guest, bits: u64| command(guest, &[&[5, 0][..], &bits.to_le_bytes()].concat());
    assert_eq!([1 << 1 | 1 << 7, 0].map(|bits| set(&mut guest, bits)), [0, 0]);
    assert_eq!(log().accepted[3..], [Offloads::CSUM | Offloads::TSO4, Offloads::empty()]);
    for wrong in [1 << 7, 1 << 1 | 1 << 9, 1 << 11, 1 << 63] {
        assert_eq!(set(&mut guest, wrong), 1, "{wrong:#x}");
    }
    assert_eq!(log().accepted.len(), 5);
    // Without GUEST_CSUM a driver hears nothing of checksums.
    guest.start(1 << 1);
    assert_eq!(log().accepted.last(), Some(&Offloads::empty()));
    offer(&mut guest, 1, 4096);
    come(numbered(5, 60));
    guest.rings[RECEIVE].wait_used(10);
    assert_eq!(guest.load(DATA + 0x1000, 1), [0]);
}

#[test]
fn descriptors_are_told_apart_and_those_that_carry_no_frames_refused() {
    let (one, _other) = UnixStream::pair().unwrap();
    assert!(from_descriptor(one.into(), 7).is_ok());
    let (pipe, _) = std::io::pipe().unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("l")).unwrap();
    for fd in [pipe.into(), file.into(), tcp.into(), listener.into()] {
        let error = from_descriptor(fd, 7).unwrap_err().to_string();
        assert!(error.contains("descriptor 7"), "{error}");
    }
}

/// On hosts where this user may make one.
#[test]
fn a_tap_that_was_made_carries_frames_and_goes_with_its_last_queue() {
    use vmm_monitor::config::Net;
    use vmm_monitor::net::Ports;
    let name = format!("vmmt{}", std::process::id());
    let folder = std::path::PathBuf::from(format!("/sys/class/net/{name}"));
    let mut ports = Ports::default();
    let config: Net = format!("tap={name},queues=2,mtu=1400,mac=02:00:00:00:00:21").parse().unwrap();
    let port = match ports.get(0, &config, None) {
        Ok(port) => port,
        Err(error) => {
            assert!(!rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists());
            let refused = "SKIP: a tap that was made: this machine lacks the right to make one";
            return eprintln!("{refused}: {error}");
        }
    };
    assert_eq!(std::fs::read_to_string(folder.join("mtu")).unwrap(), "1400\n");
    let mut other = Ports::default();
    assert!(other.get(0, &format!("tap={name}").parse().unwrap(), None).is_ok(), "a queue more");
    drop(other);
    let turns = Turns::default();
    let links: Vec<_> =
        port.links.iter().map(|link| Link::new(Counted(link.clone(), turns.clone())).unwrap()).collect();
    let mut guest = Guest::new(net_on(&links));
    guest.start(0);
    offer(&mut guest, 32, 4096);
    // The host greets a new interface by itself (IPv6), or answers a question about itself not at all; what the guest sends is
    // counted either way.
    let count = || {
        std::fs::read_to_string(folder.join("statistics/rx_packets")).unwrap().trim().parse::<u64>().unwrap()
    };
    let before = count();
    for _ in 0..3 {
        send(&mut guest, TRANSMIT, [0; HEADER], &frame([0xff; 6], &[0x88, 0xb5, 1, 2, 3]));
        guest.rings[TRANSMIT].wait_used(10);
    }
    guest.wait_for("the frames are on the tap", |_| count() >= before + 3);
    // Taken away behind our back: the link is down, and nobody spins.
    if std::process::Command::new("ip")
        .args(["link", "delete", &name])
        .status()
        .is_ok_and(|status| status.success())
    {
        guest.wait_for("the link is down", |guest| guest.config::<2>(6) == [0, 0]);
        assert!(turns.are_over(), "nobody spins");
        send(&mut guest, TRANSMIT, [0; HEADER], &frame([0xff; 6], &[0x88, 0xb5, 1, 2, 3]));
        guest.rings[TRANSMIT].wait_used(10);
    }
    drop((guest, links, port));
    drop(ports);
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while folder.exists() {
        assert!(std::time::Instant::now() < end, "the tap outlives its queues");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A tap as another program makes one, with `flags` beside IFF_TAP. `None` where this user may not.
fn foreign_tap(name: &str, flags: i32) -> Option<OwnedFd> {
    let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun").ok()?;
    let mut request = [0u64; 5];
    let bytes = request.as_mut_bytes();
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes[16..18].copy_from_slice(&((libc::IFF_TAP | flags) as u16).to_ne_bytes());
    // SAFETY: the request takes a struct ifreq, which has 40 bytes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    (result == 0).then(|| file.into())
}

#[test]
fn a_tap_that_was_passed_is_used_as_it_was_made() {
    let name = |suffix: &str| format!("vmmp{}{suffix}", std::process::id());
    let Some(plain) = foreign_tap(&name("p"), libc::IFF_NO_PI) else {
        return eprintln!("SKIP: a tap that was passed: this machine lacks the right to make one");
    };
    let link = from_descriptor(plain, 9).unwrap();
    assert_eq!(
        link.wire().offloads(),
        Offloads::empty(),
        "its frames have no header that could ask for them"
    );
    let mut guest = Guest::new(net_on(std::slice::from_ref(&link)));
    guest.start(0);
    let head = send(&mut guest, TRANSMIT, [0; HEADER], &frame([0xff; 6], &[0x88, 0xb5, 1, 2, 3]));
    assert_eq!(guest.rings[TRANSMIT].wait_used(10), (head, 0));

    let able = foreign_tap(&name("v"), libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
    let offloads = from_descriptor(able, 9).unwrap().wire().offloads();
    assert!(
        offloads.contains(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN),
        "{offloads:?}"
    );
    let error = from_descriptor(foreign_tap(&name("i"), 0).unwrap(), 9).unwrap_err();
    assert!(error.to_string().contains("IFF_NO_PI"), "{error}");
}
