//! The console's queues, control messages and configuration (virtio 1.3, 5.3).

use super::{Fault, ordinary};
use crate::guest::{DATA, Guest, HIGH, HIGH_SIZE, NEEDS_RESET, STATUS};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
const BUFFER: u64 = DATA + 0x1000;
/// VIRTIO_CONSOLE_F_SIZE, F_MULTIPORT
const SIZE: u64 = 1;
const MULTIPORT: u64 = 2;

/// Waits for NEEDS_RESET after a kick of `queue`.
fn breaks(guest: &mut Guest, queue: usize) {
    guest.notify(queue);
    guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
}

/// The driver says `bytes` on the control queue.
fn say(guest: &mut Guest, bytes: &[u8]) {
    guest.store(BUFFER, bytes);
    let parts = [(BUFFER, bytes.len() as u32)];
    assert_eq!(guest.request(CONTROL_TRANSMIT, &parts, &[]), 0);
}

/// A control message's bytes: port, event, value.
fn message(port: u32, event: u16, value: u16) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&port.to_le_bytes());
    bytes[4..6].copy_from_slice(&event.to_le_bytes());
    bytes[6..].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// What the device says next.
fn hear(guest: &mut Guest) -> Vec<u8> {
    let used = guest.request(CONTROL_RECEIVE, &[], &[(BUFFER + 0x800, 64)]);
    guest.load(BUFFER + 0x800, used as usize)
}

/// What the device says to messages of no meaning: nothing. The next thing that it says answers DEVICE_READY.
fn says_nothing(guest: &mut Guest) {
    say(guest, &message(0, 0, 1));
    assert_eq!(hear(guest), message(0, 1, 0));
    assert_eq!(hear(guest), message(1, 1, 0));
}

pub const TABLE: &[Fault] = &[
    Fault("transmit of 0, 1 and 4096 bytes, and of many pieces", |guest, _| {
        guest.start(0);
        for len in [0, 1, 4096] {
            assert_eq!(guest.request(TRANSMIT, &[(BUFFER, len)], &[]), 0);
        }
        let pieces: Vec<_> = (0..14).map(|i| (BUFFER + 16 * i, 5)).collect();
        assert_eq!(guest.request(TRANSMIT, &pieces, &[]), 0);
    }),
    Fault("transmit of 64 KiB in one piece", |guest, _| {
        guest.start(0);
        assert_eq!(guest.request(TRANSMIT, &[(BUFFER, 0x1_0000)], &[]), 0);
    }),
    Fault("transmit of a writable buffer: nothing is written", |guest, _| {
        guest.start(0);
        guest.store(BUFFER, &[0x5a; 64]);
        assert_eq!(guest.request(TRANSMIT, &[], &[(BUFFER, 64)]), 0);
        assert_eq!(guest.load(BUFFER, 64), [0x5a; 64]);
    }),
    Fault("transmit past RAM: NEEDS_RESET", |guest, _| {
        guest.start(0);
        guest.rings[TRANSMIT].add(&[(HIGH + HIGH_SIZE - 8, 16)], &[]);
        breaks(guest, TRANSMIT);
    }),
    Fault("a full ring to transmit: each comes back once, in order", |guest, _| {
        guest.start(0);
        let count = guest.rings[TRANSMIT].free();
        let heads: Vec<_> = (0..count).map(|_| guest.rings[TRANSMIT].add(&[(BUFFER, 3)], &[])).collect();
        guest.notify(TRANSMIT);
        let used: Vec<_> = heads.iter().map(|_| guest.rings[TRANSMIT].wait_used(20)).collect();
        assert_eq!(used, heads.iter().map(|head| (*head, 0)).collect::<Vec<_>>());
    }),
    Fault("receive buffers that are readable, of 0 bytes, past RAM: transmit goes on", |guest, subject| {
        guest.start(0);
        guest.rings[RECEIVE].add(&[(BUFFER, 64)], &[]);
        guest.rings[RECEIVE].add(&[], &[(BUFFER, 0)]);
        guest.rings[RECEIVE].add(&[], &[(HIGH + HIGH_SIZE, 64)]);
        guest.notify(RECEIVE);
        ordinary(guest, subject);
    }),
    Fault(
        "emerg_wr of 1, 2 and 4 bytes, before and after DRIVER_OK, without the feature",
        |guest, subject| {
            for width in [1, 2, 4] {
                guest.write_bytes(0x108, &[b'e', 0, 0, 0][..width]);
            }
            // Past its end, and beside it.
            guest.write_bytes(0x10c, b"x");
            guest.write_bytes(0x104, b"xxxx");
            guest.start(4);
            guest.write_bytes(0x108, b"e\0\0\0");
            ordinary(guest, subject);
        },
    ),
    Fault("cols, rows and max_nr_ports written: ignored; without SIZE there are none", |guest, _| {
        guest.start(SIZE);
        let before: [u8; 8] = guest.config(0);
        for offset in 0..8 {
            guest.write_bytes(0x100 + offset, &[0x5a]);
        }
        assert_eq!(guest.config::<8>(0), before);
    }),
    Fault("control queues without MULTIPORT: nothing is taken", |guest, subject| {
        guest.start(MULTIPORT);
        if guest.rings.len() > 2 {
            guest.store(BUFFER, &message(0, 0, 1));
            guest.rings[CONTROL_TRANSMIT].add(&[(BUFFER, 8)], &[]);
            guest.rings[CONTROL_RECEIVE].add(&[], &[(BUFFER + 64, 64)]);
            guest.notify(CONTROL_TRANSMIT);
            guest.notify(CONTROL_RECEIVE);
        }
        ordinary(guest, subject);
        guest.settle();
        assert!(guest.rings.iter_mut().skip(2).all(|ring| ring.used().is_none()));
    }),
];

/// With named ports, so with MULTIPORT.
pub const WITH_PORTS: &[Fault] = &[
    Fault("control messages shorter than 8 bytes, in pieces, and longer", |guest, _| {
        guest.start(0);
        for len in [0, 1, 7] {
            say(guest, &message(0, 0, 1)[..len]);
        }
        guest.store(BUFFER, &message(0, 0, 1));
        let pieces = [(BUFFER, 3), (BUFFER + 0x100, 0), (BUFFER + 3, 5), (BUFFER + 0x200, 100)];
        assert_eq!(guest.request(CONTROL_TRANSMIT, &pieces, &[]), 0);
        assert_eq!(hear(guest), message(0, 1, 0));
        assert_eq!(hear(guest), message(1, 1, 0));
        says_nothing(guest);
    }),
    Fault("events that are unknown, or the device's own, and names from the driver: ignored", |guest, _| {
        guest.start(0);
        // DEVICE_ADD, DEVICE_REMOVE, CONSOLE_PORT, RESIZE, PORT_NAME, and none.
        for event in [1, 2, 4, 5, 7, 8, 0x7fff, u16::MAX] {
            say(guest, &message(0, event, 1));
            say(guest, &[&message(1, event, 1)[..], b"a name\0"].concat());
        }
        says_nothing(guest);
    }),
    Fault("ports out of range, at the maximum, never announced: ignored", |guest, _| {
        guest.start(0);
        for port in [2, 3, 31, 0xffff, 0x8000_0000, u32::MAX] {
            for event in [3, 6] {
                say(guest, &message(port, event, 1));
            }
        }
        says_nothing(guest);
    }),
    Fault("PORT_OPEN of 2, DEVICE_READY of 0: as not fine", |guest, subject| {
        guest.start(0);
        say(guest, &message(0, 0, 0));
        say(guest, &message(0, 0, 2));
        say(guest, &message(1, 6, 2));
        says_nothing(guest);
        ordinary(guest, subject);
    }),
    Fault("DEVICE_READY and PORT_READY twice: told twice", |guest, _| {
        guest.start(0);
        says_nothing(guest);
        says_nothing(guest);
        for _ in 0..2 {
            say(guest, &message(1, 3, 1));
            assert_eq!(hear(guest), b"\x01\0\0\0\x07\0\x01\0agent");
            assert_eq!(hear(guest), message(1, 6, 1));
        }
    }),
    Fault("a message on the receive side, and too short a buffer: not written past", |guest, _| {
        guest.start(0);
        say(guest, &message(0, 0, 1));
        guest.store(BUFFER + 0x800, &[0x5a; 16]);
        assert_eq!(guest.request(CONTROL_RECEIVE, &[(BUFFER, 8)], &[]), 0);
        assert_eq!(guest.request(CONTROL_RECEIVE, &[], &[(BUFFER + 0x800, 7)]), 0);
        assert_eq!(guest.load(BUFFER + 0x800, 16), [0x5a; 16]);
    }),
    Fault("ports opened and closed in a loop, without buffers for answers: bounded", |guest, subject| {
        guest.start(0);
        for round in 0..200 {
            say(guest, &message(0, 0, 1));
            say(guest, &message(1, 3, 1));
            say(guest, &message(1, 6, round & 1));
        }
        // What waits is what there is to say, not how often it was asked.
        let heard: Vec<_> = (0..4).map(|_| hear(guest)).collect();
        assert_eq!(heard[0], message(0, 1, 0));
        assert!(heard.contains(&message(1, 1, 0).to_vec()));
        ordinary(guest, subject);
    }),
    Fault("transmit on a port that is not ready: taken", |guest, _| {
        guest.start(0);
        guest.store(BUFFER, b"early");
        assert_eq!(guest.request(5, &[(BUFFER, 5)], &[]), 0);
    }),
];
