//! Frames and commands of a network device (virtio 1.3, 5.1.6). What a driver may not send never reaches the peer: a good frame that
//! is sent afterwards is the next one that comes out (that is the table's traffic).

use super::Fault;
use crate::guest::{DATA, Guest, NEEDS_RESET, STATUS};
use crate::subjects::MAC;

const ANSWER: u64 = DATA + 0xf00;
const FRAME: u64 = DATA + 0x2000;

/// A command's answer.
fn command(guest: &mut Guest, bytes: &[u8]) -> u8 {
    guest.store(DATA, bytes);
    guest.store(ANSWER, &[0xee]);
    assert_eq!(guest.request(2, &[(DATA, bytes.len() as u32)], &[(ANSWER, 1)]), 1);
    guest.load(ANSWER, 1)[0]
}

/// Sends `header`, and `len` bytes as the frame.
fn transmit(guest: &mut Guest, header: &[u8], len: u32) {
    guest.store(DATA, header);
    guest.store(FRAME, &[0x77; 64]);
    assert_eq!(guest.request(1, &[(DATA, header.len() as u32), (FRAME, len)], &[]), 0);
}

/// A header: flags, kind of segments, its length, their size, where the checksum is.
fn header(flags: u8, kind: u8, hdr_len: u16, size: u16, start: u16, offset: u16) -> Vec<u8> {
    let words = [hdr_len, size, start, offset, 0].map(u16::to_le_bytes).concat();
    [&[flags, kind][..], &words].concat()
}

pub const TABLE: &[Fault] = &[
    Fault(
        "transmit: nothing, less than a header, a header alone, a frame of 1 and of 13 bytes",
        |guest, _| {
            guest.start(0);
            assert_eq!(guest.request(1, &[(DATA, 0)], &[]), 0);
            for (header, frame) in [(0, 0), (1, 0), (11, 0), (12, 0), (12, 1), (12, 13)] {
                transmit(guest, &vec![0; header], frame);
            }
        },
    ),
    Fault("transmit: more than any frame has", |guest, _| {
        guest.start(0);
        guest.store(DATA, &[0; 12]);
        assert_eq!(guest.request(1, &[(DATA, 12), (FRAME, 0x1_0013)], &[]), 0);
    }),
    Fault("transmit: writable parts alone", |guest, _| {
        guest.start(0);
        guest.store(FRAME, &[0x5a; 64]);
        assert_eq!(guest.request(1, &[], &[(FRAME, 64)]), 0);
        assert_eq!(guest.load(FRAME, 64), [0x5a; 64]);
    }),
    Fault("transmit: every kind of segments, and checksums, without their features", |guest, _| {
        guest.start(0);
        for kind in 1..=255 {
            transmit(guest, &header(1, kind, 54, 1000, 34, 16), 2000);
            transmit(guest, &header(0, kind, 54, 1000, 34, 16), 2000);
        }
        for (start, offset) in [(14, 6), (34, 16), (0, 0), (u16::MAX, u16::MAX)] {
            transmit(guest, &header(1, 0, 0, 0, start, offset), 60);
        }
    }),
    Fault("transmit: a header in pieces, in another queue's ring, in registers", |guest, _| {
        guest.start(0);
        let pieces: Vec<_> = (0..12).map(|i| (DATA + 16 * i, 1)).collect();
        assert_eq!(guest.request(1, &pieces, &[]), 0);
        let ring = guest.rings[0].setup().descriptors;
        assert_eq!(guest.request(1, &[(ring, 13)], &[]), 0);
        guest.rings[1].add(&[(crate::guest::BASE, 64)], &[]);
        guest.notify(1);
        guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
    }),
    Fault("receive: buffers of 0, 1 and 11 bytes, and readable ones, come back empty", |guest, _| {
        for without in [0, 1 << 15] {
            guest.start(without);
            for len in [0, 1, 11] {
                assert_eq!(guest.request(0, &[], &[(FRAME, len)]), 0);
            }
            assert_eq!(guest.request(0, &[(FRAME, 2000)], &[]), 0);
            assert_eq!(guest.request(0, &[(FRAME, 2000)], &[(FRAME, 11)]), 0);
        }
    }),
    Fault("receive: a buffer past RAM", |guest, _| {
        guest.start(0);
        guest.rings[0].add(&[], &[(crate::guest::LOW - 100, 2000)]);
        guest.notify(0);
        guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
    }),
    Fault("receive: a ring full of buffers, taken away by a reset", |guest, _| {
        guest.start(0);
        while guest.rings[0].free() > 0 {
            guest.rings[0].add(&[], &[(FRAME, 64)]);
        }
        guest.notify(0);
    }),
    Fault("commands: no data, unknown classes and codes", |guest, _| {
        guest.start(0);
        for class in 0..=9u8 {
            assert_eq!(command(guest, &[class]), 1);
            for code in 0..=9u8 {
                assert_eq!(
                    command(guest, &[class, code]),
                    u8::from((class, code) != (3, 0)),
                    "{class}.{code}"
                );
                assert_eq!(command(guest, &[class, code, 9, 9, 9]), 1, "{class}.{code}");
            }
        }
        assert_eq!(guest.request(2, &[], &[(ANSWER, 1)]), 1);
        assert_eq!(guest.load(ANSWER, 1), [1]);
    }),
    Fault("commands: no room for an answer, too much room, far too much data", |guest, _| {
        guest.start(0);
        guest.store(DATA, &[0, 0, 0]);
        assert_eq!(guest.request(2, &[(DATA, 3)], &[]), 0);
        guest.store(ANSWER, &[0xee; 8]);
        assert_eq!(guest.request(2, &[(DATA, 2), (DATA + 2, 1)], &[(ANSWER, 8)]), 1);
        assert_eq!(guest.load(ANSWER, 8), [0, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee]);
        guest.store(DATA, &[1, 0]);
        assert_eq!(guest.request(2, &[(DATA, 2), (FRAME, 0x2_0000)], &[(ANSWER, 1)]), 1);
        assert_eq!(guest.load(ANSWER, 1), [1]);
    }),
    Fault("commands: an answer that cannot be written", |guest, _| {
        guest.start(0);
        guest.rings[2].add(&[(DATA, 3)], &[(crate::guest::BASE, 1)]);
        guest.notify(2);
        guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
    }),
    Fault("commands: each without its feature", |guest, _| {
        // All of CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, GUEST_ANNOUNCE and CTRL_MAC_ADDR.
        guest.start(1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23);
        let table = [&[1, 0][..], &[0; 8]].concat();
        for bytes in [
            &[0, 0, 0][..],
            &[0, 1, 0],
            &[0, 2, 0],
            &[2, 0, 1, 0],
            &[3, 0],
            &[1, 1, 2, 0, 0, 0, 0, 7],
            &table,
        ] {
            assert_eq!(command(guest, bytes), 1, "{bytes:?}");
        }
        assert_eq!(command(guest, &[4, 0, 1, 0]), 1, "no MQ is offered");
        assert_eq!(command(guest, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 1, "nor offloads");
        // Without CTRL_VQ nobody looks at the queue.
        guest.start(1 << 17);
        guest.rings[2].add(&[(DATA, 2)], &[(ANSWER, 1)]);
        guest.notify(2);
        guest.settle();
        assert_eq!(guest.rings[2].used(), None);
    }),
    Fault(
        "commands: receive modes other than on and off, VLAN 4096, addresses that no device has",
        |guest, _| {
            guest.start(0);
            for code in 0..6 {
                assert_eq!([0, 1, 2, 255].map(|on| command(guest, &[0, code, on])), [0, 0, 1, 1]);
                assert_eq!(command(guest, &[0, code, 0]), 0);
            }
            for (id, expect) in [(0u16, 0), (4095, 0), (4096, 1), (u16::MAX, 1)] {
                for code in 0..2 {
                    assert_eq!(command(guest, &[&[2, code][..], &id.to_le_bytes()].concat()), expect);
                }
            }
            for mac in [[0; 6], [1, 0, 0, 0, 0, 1], [0xff; 6]] {
                assert_eq!(command(guest, &[&[1, 1][..], &mac].concat()), 1);
            }
            assert_eq!(guest.config::<6>(0), MAC);
            assert_eq!(command(guest, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
            assert_eq!(guest.config::<6>(0), [2, 0, 0, 0, 0, 9], "the new address can be read");
        },
    ),
    Fault("commands: a MAC table with a count beyond its data", |guest, _| {
        guest.start(0);
        for count in [1, 2, 0x2aaa_aaab, u32::MAX] {
            assert_eq!(command(guest, &[&[1, 0][..], &count.to_le_bytes(), &[0; 8]].concat()), 1);
        }
        let full = [&[1, 0][..], &1000u32.to_le_bytes(), &[2; 6000], &[0; 4]].concat();
        assert_eq!(command(guest, &full), 0, "more than are kept");
    }),
    Fault("commands: hashes, RSS, coalescing and counters, of which none is offered", |guest, _| {
        guest.start(0);
        // RSS_CONFIG and HASH_CONFIG: their fields, a table of queues and a key, each as it should be and as it cannot be.
        for (mask, pairs, key) in [(0, 1, 40), (1, 1, 40), (2, 0, 0), (127, 0xffff, 255)] {
            for code in [1, 2] {
                let table = vec![7; 2 * (mask + 1)];
                let head = [&[4, code, 0xff, 0, 0, 0][..], &(mask as u16).to_le_bytes(), &[0, 0]].concat();
                let tail = [&[pairs as u8, (pairs >> 8) as u8, key][..], &vec![0; usize::from(key)]].concat();
                assert_eq!(command(guest, &[head, table, tail].concat()), 1, "{mask} {pairs} {key}");
            }
        }
        for (class, codes, len) in [(6, 0..4, 8), (6, 0..4, 16), (7, 0..2, 8), (8, 0..2, 24)] {
            for code in codes {
                assert_eq!(command(guest, &[&[class, code][..], &vec![0xff; len]].concat()), 1);
            }
        }
    }),
    Fault("commands: several in flight", |guest, _| {
        guest.start(0);
        guest.store(DATA, &[0, 0, 0]);
        for i in 0..16 {
            guest.rings[2].add(&[(DATA, 3)], &[(ANSWER + i, 1)]);
        }
        guest.notify(2);
        (0..16).for_each(|_| assert_eq!(guest.rings[2].wait_used(20).1, 1));
        assert_eq!(guest.load(ANSWER, 16), [0; 16]);
    }),
    Fault("configuration: written all over, nothing changes", |guest, _| {
        guest.start(0);
        let before = guest.config::<12>(0);
        for offset in 0..16 {
            guest.write_bytes(0x100 + offset, &[0xff]);
        }
        assert_eq!(guest.config::<12>(0), before);
        assert_eq!((&before[..6], &before[6..8]), (&MAC[..], &[1, 0][..]), "the link is up");
    }),
];
