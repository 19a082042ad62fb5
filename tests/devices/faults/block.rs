//! Block requests (virtio 1.3, 5.2.6), in the layouts that 2.7.4.3 allows: any.

use super::Fault;
use crate::guest::{DATA, Guest, NEEDS_RESET, STATUS};
use crate::subjects::header;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SECURE_ERASE: u32 = 14;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const SECTORS: u64 = 2048;

const BUFFER: u64 = DATA + 0x1000;
const STATUS_BYTE: (u64, u32) = (DATA + 0x100, 1);

/// A request of these parts, whose header is in place: the status byte behind them, and the bytes used.
fn send(guest: &mut Guest, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> (u8, u32) {
    guest.store(STATUS_BYTE.0, &[0xee]);
    let used = guest.request(0, readable, &[writable, &[STATUS_BYTE]].concat());
    (guest.load(STATUS_BYTE.0, 1)[0], used)
}

/// A request with its header in one part.
fn ask(guest: &mut Guest, kind: u32, sector: u64, out: &[(u64, u32)], back: &[(u64, u32)]) -> (u8, u32) {
    header(guest, DATA, kind, sector);
    send(guest, &[&[(DATA, 16)], out].concat(), back)
}

/// A discard or write-zeroes of these segments: sector, sectors, flags.
fn ranges(guest: &mut Guest, kind: u32, segments: &[(u64, u32, u32)]) -> (u8, u32) {
    let bytes = segments.iter().flat_map(|(sector, sectors, flags)| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    });
    let bytes: Vec<_> = bytes.collect();
    guest.store(BUFFER, &bytes);
    ask(guest, kind, 0, &[(BUFFER, bytes.len() as u32)], &[])
}

/// Sectors of the disk as they are, without the driver's buffers.
fn sectors(guest: &mut Guest, sector: u64, count: u32) -> Vec<u8> {
    let at = BUFFER + 0x2_0000;
    assert_eq!(ask(guest, IN, sector, &[], &[(at, 512 * count)]), (OK, 512 * count + 1));
    guest.load(at, 512 * count as usize)
}

/// A request that breaks the queue, because it has no place for an answer.
fn breaks(guest: &mut Guest, readable: &[(u64, u32)], writable: &[(u64, u32)]) {
    guest.start(0);
    guest.rings[0].add(readable, writable);
    guest.notify(0);
    guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
}

pub const TABLE: &[Fault] = &[
    // Range.
    Fault(
        "the last sector works; past the end, straddling it, wrapping: IOERR, and nothing is written",
        |guest, _| {
            guest.start(0);
            let last = sectors(guest, SECTORS - 2, 2);
            let bad = [SECTORS, SECTORS + 1, 1 << 54, 1 << 55, (1 << 55) + 1, u64::MAX / 512, u64::MAX];
            guest.store(BUFFER, &[0x99; 2048]);
            for sector in bad {
                assert_eq!(ask(guest, IN, sector, &[], &[(BUFFER, 512)]), (IOERR, 0), "{sector:#x}");
                assert_eq!(ask(guest, OUT, sector, &[(BUFFER, 512)], &[]), (IOERR, 1), "{sector:#x}");
            }
            assert_eq!(ask(guest, OUT, SECTORS - 1, &[(BUFFER, 1024)], &[]), (IOERR, 1));
            assert_eq!(ask(guest, OUT, u64::MAX, &[(BUFFER, 1024)], &[]), (IOERR, 1));
            assert_eq!(sectors(guest, SECTORS - 2, 2), last);
        },
    ),
    Fault("lengths that are no whole sectors: IOERR; none at all is fine", |guest, _| {
        guest.start(0);
        for len in [1, 511, 513, 1023] {
            assert_eq!(ask(guest, IN, 0, &[], &[(BUFFER, len)]).0, IOERR, "{len}");
            assert_eq!(ask(guest, OUT, 0, &[(BUFFER, len)], &[]).0, IOERR, "{len}");
        }
        assert_eq!(ask(guest, IN, 0, &[], &[]), (OK, 1));
        assert_eq!(ask(guest, OUT, 0, &[], &[]), (OK, 1));
    }),
    Fault("sectors are the unit whatever the block size (5.2.4)", |guest, _| {
        guest.start(0);
        let around = sectors(guest, 8, 8);
        for sector in [9, 11, 15] {
            guest.store(BUFFER, &[0xa5; 512]);
            assert_eq!(ask(guest, OUT, sector, &[(BUFFER, 512)], &[]), (OK, 1), "{sector}");
            assert_eq!(sectors(guest, sector, 1), [0xa5; 512]);
        }
        assert_eq!(ranges(guest, WRITE_ZEROES, &[(11, 3, 0)]), (OK, 1));
        assert_eq!(ranges(guest, DISCARD, &[(13, 1, 0)]).0, OK);
        let now = sectors(guest, 8, 8);
        let expected = [(0, 0xff), (1, 0xa5), (2, 0xff), (3, 0), (4, 0), (6, 0xff), (7, 0xa5)];
        for (index, byte) in expected {
            let range = index * 512..(index + 1) * 512;
            let old = &around[range.clone()];
            assert!(
                now[range].iter().zip(old).all(|(new, old)| *new == if byte == 0xff { *old } else { byte })
            );
        }
    }),
    // Type.
    Fault("types that nobody knows, SCSI's, barriers, of features that are not there: UNSUPP", |guest, _| {
        guest.start(0);
        let old = sectors(guest, 0, 1);
        for kind in [
            2,
            3,
            5,
            6,
            7,
            9,
            10,
            12,
            SECURE_ERASE,
            15,
            16,
            18,
            20,
            22,
            24,
            26,
            0x8000_0000,
            0x8000_0001,
            u32::MAX,
        ] {
            assert_eq!(ask(guest, kind, 0, &[(BUFFER, 512)], &[]), (UNSUPP, 1), "{kind:#x}");
            assert_eq!(ask(guest, kind, 0, &[], &[(BUFFER, 512)]), (UNSUPP, 0), "{kind:#x}");
        }
        assert_eq!(sectors(guest, 0, 1), old);
    }),
    Fault("discard and write-zeroes that the driver has not accepted: UNSUPP", |guest, _| {
        for (kind, feature) in [(DISCARD, 1 << 13), (WRITE_ZEROES, 1 << 14)] {
            guest.start(feature);
            assert_eq!(ranges(guest, kind, &[(8, 8, 0)]), (UNSUPP, 1));
            guest.start(0);
            assert_eq!(ranges(guest, kind, &[(8, 8, 0)]), (OK, 1));
        }
    }),
    Fault("ioprio of any value: ignored", |guest, _| {
        guest.start(0);
        for priority in [1u32, 0x8000, u32::MAX] {
            header(guest, DATA, IN, 2);
            guest.store(DATA + 4, &priority.to_le_bytes());
            assert_eq!(send(guest, &[(DATA, 16)], &[(BUFFER, 512)]), (OK, 513));
        }
    }),
    Fault("flush with a sector, with data either way, twice, many in flight", |guest, _| {
        guest.start(0);
        assert_eq!(ask(guest, FLUSH, u64::MAX, &[], &[]), (OK, 1));
        assert_eq!(ask(guest, FLUSH, 0, &[(BUFFER, 700)], &[]), (OK, 1));
        assert_eq!(ask(guest, FLUSH, 0, &[], &[(BUFFER, 700)]), (OK, 0));
        header(guest, DATA, FLUSH, 0);
        for _ in 0..16 {
            guest.rings[0].add(&[(DATA, 16)], &[STATUS_BYTE]);
        }
        guest.notify(0);
        (0..16).for_each(|_| assert_eq!(guest.rings[0].wait_used(20).1, 1));
    }),
    // What is used (2.7.8.2).
    Fault("the used length counts what was written, from the front on", |guest, _| {
        guest.start(0);
        let spare = (BUFFER + 0x800, 64);
        guest.store(BUFFER, &[0x11; 512]);
        assert_eq!(ask(guest, OUT, 20, &[(BUFFER, 512)], &[spare]), (OK, 0));
        assert_eq!(ask(guest, FLUSH, 0, &[], &[spare]), (OK, 0));
        guest.store(BUFFER, &[&20u64.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat());
        assert_eq!(ask(guest, WRITE_ZEROES, 0, &[(BUFFER, 16)], &[spare]), (OK, 0));
        assert_eq!(ask(guest, DISCARD, 0, &[(BUFFER, 16)], &[spare]), (OK, 0));
        assert_eq!(ask(guest, OUT, SECTORS, &[(BUFFER, 512)], &[spare]), (IOERR, 0));
        assert_eq!(ask(guest, IN, 20, &[], &[(BUFFER, 512)]), (OK, 513));
        assert_eq!(ask(guest, IN, SECTORS, &[], &[(BUFFER, 512)]), (IOERR, 0));
    }),
    Fault("GET_ID into 1, 19, 20 and 512 bytes, in pieces, and into none", |guest, _| {
        guest.start(0);
        let id = b"conformance\0\0\0\0\0\0\0\0\0";
        for len in [1usize, 19, 20] {
            guest.store(BUFFER, &[0xee; 600]);
            assert_eq!(ask(guest, GET_ID, 0, &[], &[(BUFFER, len as u32)]), (OK, len as u32 + 1));
            assert_eq!(guest.load(BUFFER, 21), [&id[..len], &[0xee; 21][len..]].concat());
        }
        guest.store(BUFFER, &[0xee; 600]);
        assert_eq!(ask(guest, GET_ID, 0, &[], &[(BUFFER, 512)]), (OK, 20));
        assert_eq!(guest.load(BUFFER, 21), [&id[..], &[0xee]].concat());
        assert_eq!(ask(guest, GET_ID, 7, &[], &[(BUFFER, 3), (BUFFER + 64, 17)]), (OK, 21));
        assert_eq!(
            (guest.load(BUFFER, 3), guest.load(BUFFER + 64, 17)),
            (id[..3].to_vec(), id[3..].to_vec())
        );
        assert_eq!(ask(guest, GET_ID, 0, &[], &[]), (OK, 1));
        // A buffer that cannot be written is none.
        guest.store(BUFFER, &[0xee; 20]);
        assert_eq!(ask(guest, GET_ID, 0, &[(BUFFER, 20)], &[]), (OK, 1));
        assert_eq!(guest.load(BUFFER, 20), [0xee; 20]);
    }),
    // Layout.
    Fault(
        "header in pieces, with data, data with the status, empty parts between: all the same",
        |guest, _| {
            guest.start(0);
            let expected = sectors(guest, 39, 1);
            header(guest, DATA, IN, 39);
            for cut in [1, 4, 8, 15] {
                let readable = [(DATA, cut), (DATA + 0x800, 0), (DATA + u64::from(cut), 16 - cut)];
                assert_eq!(send(guest, &readable, &[(BUFFER, 512)]), (OK, 513));
                assert_eq!(guest.load(BUFFER, 512), expected);
            }
            // Data and status in one part.
            guest.store(BUFFER, &[0xee; 513]);
            assert_eq!(guest.request(0, &[(DATA, 16)], &[(BUFFER, 513)]), 513);
            assert_eq!((guest.load(BUFFER, 512), guest.load(BUFFER + 512, 1)), (expected.clone(), vec![OK]));
            // In 3 and in 16 pieces.
            for pieces in [3u64, 16] {
                let piece =
                    |i| (BUFFER + 0x100 * i, if i + 1 < pieces { 7 } else { 512 - 7 * (pieces as u32 - 1) });
                let parts: Vec<_> = (0..pieces).map(piece).collect();
                assert_eq!(send(guest, &[(DATA, 16)], &parts), (OK, 513));
            }
            // Header and data in one part, and the data's first byte with the header.
            header(guest, DATA, OUT, 40);
            guest.store(DATA + 16, &[0x3c; 240]);
            guest.store(BUFFER, &[0x3c; 512]);
            assert_eq!(send(guest, &[(DATA, 256), (BUFFER, 272)], &[]), (OK, 1));
            assert_eq!(send(guest, &[(DATA, 17), (BUFFER, 511)], &[]), (OK, 1));
            assert_eq!(sectors(guest, 40, 1), [0x3c; 512]);
        },
    ),
    Fault("a header that is short, long or writable", |guest, _| {
        guest.start(0);
        header(guest, DATA, IN, 0);
        assert_eq!(send(guest, &[(DATA, 15)], &[]), (IOERR, 1));
        assert_eq!(send(guest, &[], &[(BUFFER, 512)]), (IOERR, 0));
        assert_eq!(send(guest, &[], &[]), (IOERR, 1));
        // What is behind a read's header is nobody's.
        assert_eq!(send(guest, &[(DATA, 64)], &[(BUFFER, 512)]), (OK, 513));
    }),
    Fault("a status of 512 bytes, and two: the last byte is it", |guest, _| {
        guest.start(0);
        header(guest, DATA, FLUSH, 0);
        guest.store(BUFFER, &[0xee; 512]);
        assert_eq!(guest.request(0, &[(DATA, 16)], &[(BUFFER, 512)]), 0);
        assert_eq!(guest.load(BUFFER, 512), [&[0xee; 511][..], &[OK]].concat());
        assert_eq!(guest.request(0, &[(DATA, 16)], &[(BUFFER, 1), (BUFFER + 1, 1)]), 0);
        assert_eq!(guest.load(BUFFER, 2), [0xee, OK]);
    }),
    Fault("a status of no bytes, readable, or missing: NEEDS_RESET", |guest, _| {
        header(guest, DATA, IN, 0);
        breaks(guest, &[(DATA, 16)], &[(STATUS_BYTE.0, 0)]);
        breaks(guest, &[(DATA, 16), STATUS_BYTE], &[]);
        breaks(guest, &[(DATA, 16)], &[]);
    }),
    Fault("data of the wrong direction: as if it were not there", |guest, _| {
        guest.start(0);
        let old = sectors(guest, 3, 1);
        guest.store(BUFFER, &[0x44; 512]);
        assert_eq!(ask(guest, OUT, 3, &[], &[(BUFFER, 512)]), (OK, 0));
        assert_eq!(ask(guest, IN, 3, &[(BUFFER, 512)], &[]), (OK, 1));
        assert_eq!((guest.load(BUFFER, 512), sectors(guest, 3, 1)), (vec![0x44; 512], old));
    }),
    // Discard, write-zeroes.
    Fault("segments: none, half, too many, past the end, wrapping, reserved flags", |guest, _| {
        guest.start(0);
        guest.store(BUFFER, &[0; 64]);
        let old = sectors(guest, 0, 16);
        for kind in [DISCARD, WRITE_ZEROES] {
            for len in [0, 1, 8, 15, 17, 31] {
                let parts = if len == 0 { vec![] } else { vec![(BUFFER, len)] };
                assert_eq!(ask(guest, kind, 0, &parts, &[]), (IOERR, 1), "{len} bytes");
            }
            for (segments, status) in [
                (&[(0, 8, 0), (8, 8, 0)][..], IOERR),
                (&[(0, 8, 0), (4, 8, 0)], IOERR),
                (&[(SECTORS, 1, 0)], IOERR),
                (&[(SECTORS - 1, 2, 0)], IOERR),
                (&[(0, u32::MAX, 0)], IOERR),
                (&[(u64::MAX, 1, 0)], IOERR),
                (&[(u64::MAX - 7, 8, 0)], IOERR),
                (&[(1 << 55, 1, 0)], IOERR),
                (&[(0, 8, 2)], UNSUPP),
                (&[(0, 8, u32::MAX)], UNSUPP),
                (&[(0, 0, 0)], OK),
            ] {
                assert_eq!(ranges(guest, kind, segments), (status, 1), "{kind}: {segments:x?}");
            }
        }
        assert_eq!(ranges(guest, DISCARD, &[(0, 8, 1)]), (UNSUPP, 1), "unmap is no flag of discard");
        assert_eq!(sectors(guest, 0, 16), old);
        assert_eq!(ranges(guest, WRITE_ZEROES, &[(SECTORS - 1, 1, 1)]), (OK, 1), "the last sector");
        assert_eq!(sectors(guest, SECTORS - 1, 1), [0; 512]);
    }),
    // Configuration.
    Fault("configuration: no field but writeback can be written", |guest, _| {
        guest.start(0);
        let before: [u8; 8] = guest.config(0);
        let all: Vec<_> = (0..15).map(|i| guest.config::<4>(4 * i)).collect();
        for offset in (0..60).filter(|offset| *offset != 32) {
            guest.write_bytes(0x100 + offset, &[0x5a]);
        }
        for offset in [0, 8, 24, 32, 40] {
            guest.write_bytes(0x100 + offset, &[0x5a; 8]);
            guest.write_bytes(0x100 + offset, &[0x5a; 4]);
        }
        assert_eq!(guest.config::<8>(0), before);
        assert_eq!((0..15).map(|i| guest.config::<4>(4 * i)).collect::<Vec<_>>(), all);
    }),
    Fault("configuration: writeback toggled moves the generation, and no interrupt comes", |guest, _| {
        guest.start(0);
        for on in [0, 1, 0, 1] {
            let generation = guest.read(0xfc);
            guest.write_bytes(0x120, &[on]);
            assert_eq!((guest.config::<1>(32), guest.read(0xfc)), ([on], generation.wrapping_add(1)));
            assert_eq!(guest.read(0x60) & 2, 0);
        }
    }),
    // Many.
    Fault("many in one kick, the same sector twice in a batch: neighbours stay", |guest, _| {
        guest.start(0);
        let (before, behind) = (sectors(guest, 99, 1), sectors(guest, 101, 1));
        for (i, byte) in [0x51, 0x52].into_iter().enumerate() {
            let at = DATA + 0x400 * i as u64;
            header(guest, at, OUT, 100);
            guest.store(at + 16, &[byte; 512]);
            guest.rings[0].add(&[(at, 528)], &[(at + 0x300, 1)]);
        }
        guest.notify(0);
        (0..2).for_each(|_| assert_eq!(guest.rings[0].wait_used(20).1, 1));
        let now = sectors(guest, 100, 1);
        assert!(now == [0x51; 512] || now == [0x52; 512], "one of the two, whole");
        assert_eq!((sectors(guest, 99, 1), sectors(guest, 101, 1)), (before, behind));
    }),
];
