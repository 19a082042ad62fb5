//! Headers of a driver that has agreed on every offload: those that cannot be reach no host, whatever was agreed on.

use std::sync::Arc;

use vmm_monitor::event_loop::Event;
use vmm_monitor::net::traffic::Traffic;
use vmm_monitor::net::{HEADER, Link, Port};
use vmm_monitor::virtio::net::Net;

use crate::guest::{Guest, NEEDS_RESET, STATUS};
use crate::net::{Able, TRANSMIT, send};
use crate::subjects::MAC;

const CSUM: u64 = 1;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const HOST_USO: u64 = 1 << 56;
/// Kinds of segments: TCP over IPv4, UDP's fragments, TCP over IPv6, UDP; and congestion marks beside TCP's.
const TCP4: u8 = 1;
const UFO: u8 = 3;
const TCP6: u8 = 4;
const UDP: u8 = 5;
const ECN: u8 = 0x80;
/// Bytes of each frame.
const LEN: usize = 1514;

/// Flags, kind, length of the headers, size of a segment, where the checksum's part begins, and where it goes from there.
fn header(flags: u8, kind: u8, words: [u16; 4]) -> [u8; HEADER] {
    let words = words.map(u16::to_le_bytes).concat();
    [&[flags, kind][..], &words, &[0xee; 2]].concat().try_into().unwrap()
}

struct Driver {
    guest: Guest,
    link: Able,
    traffic: Arc<Traffic>,
}

impl Driver {
    fn new() -> Self {
        let link = Able(Arc::default(), Arc::new(Event::new().unwrap()));
        let port = Port::new(vec![Link::new(link.clone()).unwrap()], MAC);
        let traffic = port.traffic.clone();
        Self { guest: Guest::new(Box::new(Net::new(port, None))), link, traffic }
    }

    /// What reaches the host of a frame with this header. What does not is counted, and the device goes on.
    fn reaches(&mut self, header: [u8; HEADER]) -> Option<[u8; HEADER]> {
        let malformed = || self.traffic.sent.counts().dropped.malformed;
        let before = malformed();
        send(&mut self.guest, TRANSMIT, header, &[0; LEN]);
        self.guest.rings[TRANSMIT].wait_used(10);
        let sent = self.link.0.lock().unwrap().sent.pop();
        assert_eq!(malformed() - before, u64::from(sent.is_none()), "{header:?}");
        assert_eq!(self.guest.read(STATUS) & NEEDS_RESET, 0);
        sent.map(|(header, _)| header)
    }
}

#[test]
fn a_header_that_cannot_be_reaches_no_host_where_every_offload_is_agreed_on() {
    let mut driver = Driver::new();
    driver.guest.start(0);
    assert_eq!(driver.guest.features & HOST_USO, HOST_USO);
    for (what, header) in [
        ("segments without a checksum", header(0, TCP4, [54, 1448, 34, 16])),
        ("segments of no size", header(1, TCP4, [54, 0, 34, 16])),
        ("segments of UDP of no size", header(1, UDP, [42, 0, 34, 6])),
        ("a checksum that begins behind the frame", header(1, 0, [0, 0, LEN as u16, 0])),
        ("one that goes behind the frame", header(1, 0, [0, 0, 34, LEN as u16 - 35])),
        ("one whose sum wraps", header(1, 0, [0, 0, u16::MAX, u16::MAX])),
        ("one within Ethernet's header", header(1, 0, [0, 0, 13, 6])),
        ("TCP's header behind the frame", header(1, TCP4, [54, 1448, LEN as u16 - 19, 16])),
        ("TCP with UDP's checksum", header(1, TCP6, [54, 1448, 54, 6])),
        ("UDP with TCP's checksum", header(1, UDP, [54, 1448, 34, 16])),
        ("fragments of UDP, which nobody offers", header(1, UFO, [54, 1448, 34, 6])),
        ("congestion marks of UDP", header(1, UDP | ECN, [54, 1448, 34, 6])),
        ("congestion marks without segments", header(0, ECN, [0; 4])),
    ] {
        assert_eq!(driver.reaches(header), None, "{what}");
    }
    // Undefined kinds, tunnels' bits among them.
    let known = [0, TCP4, TCP6, UDP, TCP4 | ECN, TCP6 | ECN];
    for kind in (0..=u8::MAX).filter(|kind| !known.contains(kind)) {
        assert_eq!(driver.reaches(header(1, kind, [54, 1448, 34, 16])), None, "{kind:#x}");
        assert_eq!(driver.reaches(header(1, kind, [42, 1448, 34, 6])), None, "{kind:#x}");
    }
}

#[test]
fn what_means_nothing_in_a_header_does_not_reach_the_host() {
    let mut driver = Driver::new();
    driver.guest.start(0);
    let clean = |flags, kind, words: [u16; 4]| {
        let mut clean = header(flags, kind, words);
        clean[10..].fill(0);
        Some(clean)
    };
    // Reserved flags; fields without the flag or the kind that gives them a meaning.
    assert_eq!(driver.reaches(header(0xfe, 0, [9; 4])), Some([0; HEADER]));
    assert_eq!(driver.reaches(header(0xff, 0, [9, 9, 34, 16])), clean(1, 0, [0, 0, 34, 16]));
    // The length of the headers is a hint: one that is too short or behind the frame is mended.
    for (told, mended) in [(0, 54), (54, 54), (66, 66), (u16::MAX, LEN as u16)] {
        assert_eq!(
            driver.reaches(header(1, TCP4, [told, 1448, 34, 16])),
            clean(1, TCP4, [mended, 1448, 34, 16])
        );
    }
    assert_eq!(driver.reaches(header(1, TCP6 | ECN, [74, 1, 54, 16])), clean(1, TCP6 | ECN, [74, 1, 54, 16]));
    assert_eq!(driver.reaches(header(1, UDP, [42, 500, 34, 6])), clean(1, UDP, [42, 500, 34, 6]));
}

#[test]
fn each_offload_needs_its_feature_and_those_that_it_hangs_on() {
    let mut driver = Driver::new();
    let kinds = [
        (header(1, 0, [0, 0, 34, 16]), CSUM),
        (header(1, TCP4, [54, 1448, 34, 16]), CSUM | HOST_TSO4),
        (header(1, TCP6, [74, 1448, 54, 16]), CSUM | HOST_TSO6),
        (header(1, TCP4 | ECN, [54, 1448, 34, 16]), CSUM | HOST_TSO4 | HOST_ECN),
        (header(1, UDP, [42, 500, 34, 6]), CSUM | HOST_USO),
    ];
    // A driver may not accept segments without checksums (5.1.3.1): if it does, it has not got them.
    for without in [0, CSUM, HOST_TSO4, HOST_TSO6, HOST_TSO4 | HOST_TSO6, HOST_ECN, HOST_USO] {
        driver.guest.start(without);
        for (header, needed) in kinds {
            let reaches = driver.reaches(header).is_some();
            assert_eq!(reaches, needed & without == 0, "{header:?} without {without:#x}");
        }
    }
}
