//! What a network device counts, and how much it lets pass.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use vmm_monitor::config::{Net as Config, NetLimits, NetTarget};
use vmm_monitor::net::traffic::{Counts, Dropped};
use vmm_monitor::net::user::Stack;
use vmm_monitor::net::{HEADER, Link, MAX_FRAME, Port};
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::net::Net;

use crate::guest::{DATA, Guest};
use crate::net::{RECEIVE, TO_HOST, TRANSMIT, command, counted, numbered, offer, send};
use crate::subjects::{MAC, NetSocket, Peer, frame, link};

/// A running device with these limits on `link`, and its port.
fn guest(link: &Link, limits: &str) -> (Guest, Port) {
    let port = Port::new(vec![link.clone()], MAC);
    let limits: NetLimits = format!("user{limits}").parse::<Config>().unwrap().limits;
    let device: Box<dyn VirtioDevice> = Box::new(Net::new(port.clone(), None).limited(&limits).unwrap());
    let mut guest = Guest::new(device);
    guest.start(0);
    (guest, port)
}

fn counts(frames: u64, bytes: u64, dropped: Dropped) -> Counts {
    Counts { frames, bytes, dropped }
}

#[test]
fn frames_are_counted_by_what_became_of_them() {
    let (link, mut peer) = link(NetSocket::Stream);
    let (mut guest, port) = guest(&link, "");
    let none = Dropped::default();
    for size in [60, 1514] {
        send(&mut guest, TRANSMIT, [0; HEADER], &numbered(1, size));
        guest.rings[TRANSMIT].wait_used(10);
    }
    assert_eq!(port.traffic.sent.counts(), counts(2, 1574, none));
    // Segments of no size; a frame without Ethernet's header; one that is longer than any.
    send(&mut guest, TRANSMIT, [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], &numbered(1, 60));
    guest.rings[TRANSMIT].wait_used(10);
    send(&mut guest, TRANSMIT, [0; HEADER], &[1; 13]);
    guest.rings[TRANSMIT].wait_used(10);
    send(&mut guest, TRANSMIT, [0; HEADER], &numbered(1, MAX_FRAME + 1));
    guest.rings[TRANSMIT].wait_used(10);
    let dropped = Dropped { malformed: 2, refused: 1, ..none };
    assert_eq!(port.traffic.sent.counts(), counts(2, 1574, dropped));

    // For the guest, for another guest, shorter than Ethernet's header, longer than all buffers.
    assert_eq!(command(&mut guest, &[0, 0, 0]), 0);
    offer(&mut guest, 4, 128);
    peer.send(&numbered(1, 60));
    peer.send(&frame(TO_HOST, &[0; 60]));
    peer.send(&[2; 13]);
    peer.send(&numbered(1, 600));
    peer.send(&numbered(1, 70));
    assert_eq!([0; 2].map(|_| guest.rings[RECEIVE].wait_used(10).1), [72, 82]);
    let dropped = Dropped { filtered: 1, malformed: 1, no_room: 1, ..none };
    assert_eq!(port.traffic.received.counts(), counts(2, 130, dropped));
    assert_eq!(dropped.total(), 3);

    assert!(port.traffic.is_up());
    drop(peer);
    guest.wait_for("the link is down", |_| !port.traffic.is_up());
    send(&mut guest, TRANSMIT, [0; HEADER], &numbered(1, 60));
    guest.rings[TRANSMIT].wait_used(10);
    assert_eq!(port.traffic.sent.counts().dropped.link_down, 1);
    // A reset of the device is none of its port's.
    guest.start(0);
    assert_eq!((port.traffic.sent.counts().frames, port.traffic.received.counts().frames), (2, 2));
}

#[test]
fn what_the_user_network_drops_itself_is_counted() {
    let own = UdpSocket::bind("127.0.0.1:0").unwrap();
    let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let net: Config = format!("user,publish={free}:9/udp").parse().unwrap();
    let NetTarget::User(config) = net.to else { unreachable!() };
    let link = Link::new(Stack::new(&config, MAC, 1500).unwrap()).unwrap();
    let (mut guest, port) = guest(&link, "");
    offer(&mut guest, 4, 2048);
    // With its headers it is longer than a packet may be.
    own.send_to(&[1; 1480], free).unwrap();
    own.send_to(&[2; 100], free).unwrap();
    let (ethernet, headers) = (14, 28);
    assert_eq!(guest.rings[RECEIVE].wait_used(10).1, HEADER as u32 + ethernet + headers + 100);
    let dropped = Dropped { no_room: 1, ..Dropped::default() };
    guest.wait_for("the count", |_| port.traffic.received.counts().dropped == dropped);
}

/// Bytes of a long frame.
const LONG: usize = 10_000;

/// Offers `count` long frames at once.
fn send_long(guest: &mut Guest, count: u64) {
    let old = guest.rings[TRANSMIT].available();
    for at in (0..count).map(|number| DATA + 0x1_0000 + number * 0x3000) {
        guest.store(at, &[&[0; HEADER][..], &frame(TO_HOST, &[7; LONG - 12])].concat());
        guest.rings[TRANSMIT].add(&[(at, (HEADER + LONG) as u32)], &[]);
    }
    guest.kick(TRANSMIT, old);
}

#[test]
fn a_limited_way_passes_its_burst_and_then_its_rate_and_stalls_the_other_way_not_at_all() {
    let (link, mut peer) = link(NetSocket::Stream);
    // 20 frames a second, and 5 at once: what comes after them has to wait.
    let (mut guest, port) = guest(&link, ",pps=20/5");
    offer(&mut guest, 4, 2048);
    guest.settle();
    let start = Instant::now();
    send_long(&mut guest, 20);
    // Meanwhile the other way has a burst of its own.
    let early = port.traffic.sent.counts().frames;
    peer.send(&numbered(1, 100));
    peer.send(&numbered(2, 100));
    assert_eq!([0; 2].map(|_| guest.rings[RECEIVE].wait_used(10).1), [112; 2]);
    let between = port.traffic.sent.counts().frames;
    assert!(early <= between && between < 20, "{between} had passed when the others had arrived");
    for _ in 0..20 {
        assert_eq!(peer.receive().len(), LONG);
    }
    // Fifteen of them at twenty a second; the last one may overdraw the bucket.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(700), "{took:?}");
    guest.wait_for("the guest has all buffers back", |_| port.traffic.sent.counts().frames == 20);
}

#[test]
fn bytes_are_limited_each_way_and_nothing_is_lost() {
    let (link, mut peer) = link(NetSocket::Stream);
    // A million bytes a second, and two frames at once.
    let (mut guest, port) = guest(&link, ",bw=1000000/20000");
    let start = Instant::now();
    send_long(&mut guest, 30);
    for _ in 0..30 {
        assert_eq!(peer.receive().len(), LONG);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(265), "300 KB less the burst and the last frame: {took:?}");

    offer(&mut guest, 30, 16384);
    let Peer::Stream(socket) = &peer else { unreachable!() };
    let mut writer = Peer::Stream(socket.try_clone().unwrap());
    let start = Instant::now();
    let sender = std::thread::spawn(move || (0..30).for_each(|number| writer.send(&numbered(number, LONG))));
    for number in 0..30u64 {
        assert_eq!(guest.rings[RECEIVE].wait_used(10).1 as usize, HEADER + LONG);
        let at = DATA + 0x1000 + 16384 * number + HEADER as u64;
        assert_eq!(guest.load(at, 60), numbered(number as usize, 60));
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(265), "{took:?}");
    sender.join().unwrap();
    let all = counts(30, 300_000, Dropped::default());
    assert_eq!((port.traffic.sent.counts(), port.traffic.received.counts()), (all, all));
}

#[test]
fn a_limited_guest_costs_no_more_turns_than_it_has_frames() {
    let (link, mut peer) = link(NetSocket::Stream);
    let (link, turns) = counted(link);
    let (mut guest, _) = guest(&link, ",pps=40/1");
    offer(&mut guest, 10, 2048);
    guest.settle();
    let before = turns.count();
    // Both ways at once: what has come stays in the link, which can be read all the time.
    (0..10).for_each(|number| peer.send(&numbered(number, 100)));
    send_long(&mut guest, 10);
    for _ in 0..10 {
        assert_eq!(peer.receive().len(), LONG);
        guest.rings[RECEIVE].wait_used(10);
    }
    let used = turns.count() - before;
    assert!(used < 200, "{used} turns for 20 frames within a quarter of a second");
}

#[test]
fn a_driver_that_resets_its_device_gets_no_other_burst() {
    let (link, _peer) = link(NetSocket::Stream);
    let (mut guest, port) = guest(&link, ",pps=1/5");
    let start = Instant::now();
    for _ in 0..20 {
        send_long(&mut guest, 5);
        guest.start(0);
    }
    let sent = port.traffic.sent.counts().frames;
    let most = 5 + start.elapsed().as_secs() + 1;
    assert!((5..=most).contains(&sent), "{sent} frames passed");
}

#[test]
fn a_pause_while_a_way_waits_loses_nothing() {
    let (link, mut peer) = link(NetSocket::Stream);
    let (mut guest, _) = guest(&link, ",pps=50/1");
    send_long(&mut guest, 8);
    for received in 0..8 {
        assert_eq!(peer.receive().len(), LONG);
        if received % 3 == 0 {
            guest.pause();
            guest.resume();
        }
    }
    for _ in 0..8 {
        guest.rings[TRANSMIT].wait_used(10);
    }
}
