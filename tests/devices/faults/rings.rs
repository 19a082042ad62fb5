//! Split virtqueues (virtio 1.3, 2.7).

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::virtio::queue::Setup;
use vmm_monitor::virtio::testing::{DriverRing, INDIRECT, NEXT, WRITE};

use super::{BODY, Context, Fault, HEADER, STATUS_BYTE, ordinary};
use crate::guest::{BASE, DATA, EVENT_IDX, Guest, HIGH, HIGH_SIZE, LOW, NEEDS_RESET, RINGS, STATUS};
use crate::subjects::{Subject, all};

/// VIRTIO_F_INDIRECT_DESC
const INDIRECT_DESC: u64 = 1 << 28;
/// Where indirect tables lie.
const TABLE_AT: u64 = DATA + 0x4000;

/// What comes of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// The device cannot go on: NEEDS_RESET.
    Broken,
    /// It comes back, with no more bytes written than there was room for.
    Served,
    /// One of the two: the specification leaves it open, or it depends on the device.
    Either,
    /// Anything that a reset mends: the device writes to its own rings.
    Mendable,
}
use Answer::{Broken, Either, Mendable, Served};

/// A chain that starts at descriptor 0, put there by the function, and what comes of it.
type Chain = (&'static str, Answer, fn(&DriverRing));

/// Writes an [`ordinary`] chain from descriptor `at` of a table on.
fn good(ring: &DriverRing, table: u64, at: u16) {
    let parts = [(HEADER, 0), (BODY, WRITE), (STATUS_BYTE, WRITE)];
    for (i, ((address, len), flags)) in (0..).zip(parts) {
        let next = if i < 2 { NEXT } else { 0 };
        ring.write_raw(table + 16 * u64::from(at + i), address, len, flags | next, at + i + 1);
    }
}

/// A chain whose second part, between a good header and a good rest, is of `address`, `len` and `flags`.
fn part(ring: &DriverRing, address: u64, len: u32, flags: u16) {
    let (header, body, status) = (HEADER, BODY, STATUS_BYTE);
    ring.write_descriptor(0, header.0, header.1, NEXT, 1);
    ring.write_descriptor(1, address, len, NEXT | flags, 2);
    ring.write_descriptor(2, body.0, body.1, NEXT | WRITE, 3);
    ring.write_descriptor(3, status.0, status.1, WRITE, 0);
}

/// Descriptor 0 refers to a table of `len` bytes at `at`.
fn indirect(ring: &DriverRing, at: u64, len: u32, flags: u16) {
    ring.write_descriptor(0, at, len, INDIRECT | flags, 1);
}

const CHAINS: &[Chain] = &[
    // Chains.
    ("a descriptor that is its own next", Broken, |r| r.write_descriptor(0, DATA, 16, NEXT, 0)),
    ("a loop through two", Broken, |r| {
        r.write_descriptor(0, DATA, 16, NEXT, 1);
        r.write_descriptor(1, DATA, 16, NEXT, 0);
    }),
    ("a loop through the head behind good parts", Broken, |r| {
        part(r, DATA, 0, 0);
        r.write_descriptor(3, STATUS_BYTE.0, 1, NEXT | WRITE, 0);
    }),
    ("next just out of the table", Broken, |r| r.write_descriptor(0, DATA, 16, NEXT, r.setup().size)),
    ("next far out of the table", Broken, |r| r.write_descriptor(0, DATA, 16, NEXT, u16::MAX)),
    ("as long as the queue", Served, |r| {
        let size = r.setup().size;
        (0..size).for_each(|i| r.write_descriptor(i, DATA + 0x2000, 0, NEXT, i + 1));
        r.write_descriptor(0, HEADER.0, HEADER.1, NEXT, 1);
        r.write_descriptor(size - 1, STATUS_BYTE.0, 1, WRITE, 0);
    }),
    ("longer than the queue", Either, |r| {
        (0..65).for_each(|i| r.write_raw(TABLE_AT + 16 * i, DATA, 0, NEXT, i as u16 + 1));
        r.write_raw(TABLE_AT + 16 * 65, STATUS_BYTE.0, 1, WRITE, 0);
        indirect(r, TABLE_AT, 16 * 66, 0);
    }),
    ("longer than any driver's", Broken, |r| {
        (0..1025).for_each(|i| r.write_raw(TABLE_AT + 16 * i, DATA, 1, NEXT, i as u16 + 1));
        indirect(r, TABLE_AT, 16 * 1026, 0);
    }),
    ("longer than 2^32 bytes", Broken, |r| {
        r.write_descriptor(0, 0, 0x8000_0000, NEXT, 1);
        r.write_descriptor(1, 0, 0x8000_0000, 0, 0);
    }),
    ("only readable parts", Either, |r| r.write_descriptor(0, HEADER.0, HEADER.1, 0, 0)),
    ("only writable parts", Served, |r| r.write_descriptor(0, STATUS_BYTE.0, 16, WRITE, 0)),
    ("readable after writable", Broken, |r| {
        r.write_descriptor(0, BODY.0, 1, NEXT | WRITE, 1);
        r.write_descriptor(1, HEADER.0, HEADER.1, 0, 0);
    }),
    ("reserved flag bits", Served, |r| part(r, DATA + 0x2000, 0, 0xfff8)),
    // Buffers.
    ("address 0", Served, |r| part(r, 0, 8, 0)),
    ("behind RAM", Broken, |r| part(r, HIGH + HIGH_SIZE, 1, 0)),
    ("far behind RAM", Broken, |r| part(r, 1 << 52, 1, WRITE)),
    ("at the device's registers", Broken, |r| part(r, BASE, 4, 0)),
    ("written to the device's registers", Broken, |r| part(r, BASE + STATUS, 4, WRITE)),
    ("read from the driver's own rings", Served, |r| part(r, r.used_at(), 6, 0)),
    ("written to the descriptor table", Mendable, |r| part(r, r.setup().descriptors, 0x400, WRITE)),
    ("written to the available ring", Mendable, |r| part(r, r.available_at(), 0x86, WRITE)),
    ("written to the used ring", Mendable, |r| part(r, r.used_at(), 0x206, WRITE)),
    ("written to the next queue's rings", Mendable, |r| {
        part(r, r.setup().descriptors + 0x3000, 0x800, WRITE)
    }),
    ("length 0", Served, |r| part(r, DATA + 0x2000, 0, 0)),
    ("length 0, nowhere", Either, |r| part(r, u64::MAX, 0, 0)),
    ("length 2^32 - 1", Broken, |r| part(r, DATA, u32::MAX, 0)),
    ("across the end of RAM", Broken, |r| part(r, HIGH + HIGH_SIZE - 8, 16, 0)),
    ("into the hole", Broken, |r| part(r, LOW - 8, 16, 0)),
    ("across the hole", Broken, |r| part(r, LOW - 8, (HIGH - LOW) as u32 + 16, WRITE)),
    ("up to the hole", Served, |r| part(r, LOW - 512, 512, WRITE)),
    ("across a page", Served, |r| part(r, DATA + 0x1f00, 512, WRITE)),
    ("address and length past 2^64", Broken, |r| part(r, u64::MAX - 7, 16, 0)),
    ("address and length to 2^64", Broken, |r| part(r, u64::MAX - 15, 16, 0)),
    ("a second part where the first wraps to", Broken, |r| {
        part(r, u64::MAX - 15, 32, 0);
        r.write_descriptor(2, 16, 512, NEXT | WRITE, 3);
    }),
    // Indirect (2.7.5.3).
    ("an indirect table", Served, |r| {
        good(r, TABLE_AT, 0);
        indirect(r, TABLE_AT, 48, 0);
    }),
    ("a table in a table", Broken, |r| {
        r.write_raw(TABLE_AT, TABLE_AT + 16, 16, INDIRECT, 0);
        good(r, TABLE_AT, 1);
        indirect(r, TABLE_AT, 64, 0);
    }),
    ("a table behind good parts of a table", Broken, |r| {
        r.write_raw(TABLE_AT, HEADER.0, HEADER.1, NEXT, 1);
        r.write_raw(TABLE_AT + 16, TABLE_AT + 32, 32, INDIRECT, 0);
        indirect(r, TABLE_AT, 64, 0);
    }),
    ("a table with a next", Broken, |r| {
        good(r, TABLE_AT, 0);
        indirect(r, TABLE_AT, 48, NEXT);
        r.write_descriptor(1, STATUS_BYTE.0, 1, WRITE, 0);
    }),
    ("two tables in a chain", Broken, |r| {
        good(r, TABLE_AT, 0);
        indirect(r, TABLE_AT, 48, NEXT);
        r.write_descriptor(1, TABLE_AT, 48, INDIRECT, 0);
    }),
    ("direct parts, then a table", Served, |r| {
        good(r, TABLE_AT, 0);
        r.write_descriptor(0, HEADER.0, HEADER.1, NEXT, 1);
        r.write_descriptor(1, TABLE_AT + 16, 32, INDIRECT, 0);
        r.write_raw(TABLE_AT + 16, BODY.0, BODY.1, NEXT | WRITE, 1);
    }),
    ("WRITE on the descriptor of a table: ignored", Served, |r| {
        good(r, TABLE_AT, 0);
        indirect(r, TABLE_AT, 48, WRITE);
    }),
    ("a table of 0 bytes", Broken, |r| indirect(r, TABLE_AT, 0, 0)),
    ("a table of no whole descriptor", Broken, |r| indirect(r, TABLE_AT, 15, 0)),
    ("a table of no multiple of 16 bytes", Broken, |r| {
        good(r, TABLE_AT, 0);
        indirect(r, TABLE_AT, 49, 0);
    }),
    ("a table of 4 GiB", Either, |r| {
        good(r, TABLE_AT, 0);
        indirect(r, TABLE_AT, 0xffff_fff0, 0);
    }),
    ("a table of 64 Ki entries", Either, |r| {
        good(r, TABLE_AT, 0);
        indirect(r, TABLE_AT, 16 << 16, 0);
    }),
    ("a table behind RAM", Broken, |r| indirect(r, HIGH + HIGH_SIZE, 48, 0)),
    ("a table at the end of the address space", Broken, |r| indirect(r, u64::MAX - 15, 48, 0)),
    ("a table half in RAM", Broken, |r| {
        r.write_raw(LOW - 16, HEADER.0, HEADER.1, NEXT, 1);
        indirect(r, LOW - 16, 48, 0);
    }),
    ("a table at the device's registers", Broken, |r| indirect(r, BASE, 48, 0)),
    ("a table across a page, aligned to nothing", Served, |r| {
        good(r, DATA + 0x4ff7, 0);
        indirect(r, DATA + 0x4ff7, 48, 0);
    }),
    ("a table in the descriptor table", Served, |r| {
        good(r, r.setup().descriptors + 16, 0);
        indirect(r, r.setup().descriptors + 16, 48, 0);
    }),
    ("a table in the available ring", Either, |r| indirect(r, r.available_at(), 48, 0)),
    ("a table in the next queue's rings", Either, |r| indirect(r, r.setup().descriptors + 0x3000, 48, 0)),
    ("a loop in a table", Broken, |r| {
        r.write_raw(TABLE_AT, HEADER.0, HEADER.1, NEXT, 1);
        r.write_raw(TABLE_AT + 16, BODY.0, BODY.1, NEXT | WRITE, 0);
        indirect(r, TABLE_AT, 32, 0);
    }),
    ("next out of a table", Broken, |r| {
        r.write_raw(TABLE_AT, HEADER.0, HEADER.1, NEXT, 2);
        good(r, TABLE_AT, 2);
        indirect(r, TABLE_AT, 32, 0);
    }),
];

/// What the device has written of `subject`'s used ring: its index.
fn used_index(guest: &Guest, subject: &Subject) -> u16 {
    let at = GuestAddress(guest.rings[subject.queue].used_at() + 2);
    guest.ram.load(at, Ordering::SeqCst).unwrap()
}

/// Offers the chain at descriptor 0 and waits for what comes of it.
fn answer(guest: &mut Guest, subject: &Subject) -> Answer {
    let queue = subject.queue;
    guest.rings[queue].offer(0);
    guest.notify(queue);
    guest.wait_for("an answer", |guest| {
        guest.read(STATUS) & NEEDS_RESET != 0 || used_index(guest, subject) == 1
    });
    if guest.read(STATUS) & NEEDS_RESET != 0 {
        return Broken;
    }
    let (head, written) = guest.rings[queue].used().expect("the index has moved");
    assert!(head == 0 && written <= 2048, "head {head}, {written} bytes");
    Served
}

/// Tries all chains on all devices, with and without EVENT_IDX and indirect descriptors.
pub fn run_chains() {
    for subject in all() {
        let mut guest = Guest::new((subject.build)());
        for (i, (name, expected, write)) in CHAINS.iter().enumerate() {
            let _context = Context(subject.name, name);
            guest.start(if i % 2 == 0 { 0 } else { EVENT_IDX });
            guest.store(DATA, &[0; 16]);
            guest.store(TABLE_AT, &[0; 0x1000]);
            write(&guest.rings[subject.queue]);
            if *expected == Mendable {
                guest.rings[subject.queue].offer(0);
                guest.notify(subject.queue);
            } else {
                let answer = answer(&mut guest, &subject);
                assert!(answer == *expected || *expected == Either, "{answer:?}, not {expected:?}");
                assert_eq!(guest.read(STATUS) & NEEDS_RESET != 0, answer == Broken);
            }
            guest.start(0);
            ordinary(&mut guest, &subject);
            guest.check_guards();
        }
        // A table without the feature is no worse than with it.
        guest.start(INDIRECT_DESC);
        guest.store(DATA, &[0; 16]);
        good(&guest.rings[subject.queue], TABLE_AT, 0);
        indirect(&guest.rings[subject.queue], TABLE_AT, 48, 0);
        answer(&mut guest, &subject);
        guest.start(0);
        (subject.traffic)(&mut guest);
        guest.check_guards();
    }
}

/// Waits for NEEDS_RESET.
fn breaks(guest: &mut Guest, subject: &Subject) {
    guest.notify(subject.queue);
    guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & NEEDS_RESET != 0);
}

/// The interrupts that `requests` ordinary requests, one by one, make. No callback is under way before and
/// after.
fn interrupts(guest: &mut Guest, subject: &Subject, requests: usize) -> usize {
    let before = guest.interrupts();
    for _ in 0..requests {
        ordinary(guest, subject);
        // Else the next one may be served in the same turn, and both be told by one interrupt.
        guest.settle();
    }
    guest.interrupts() - before
}

/// Puts an [`ordinary`] chain at descriptor `at`, not offered.
fn place(guest: &Guest, subject: &Subject, at: u16) {
    let ring = &guest.rings[subject.queue];
    guest.store(DATA, &[0; 16]);
    good(ring, ring.setup().descriptors, at);
}

/// A driver that enables the subject's queue alone, with so many entries.
fn one_queue(guest: &mut Guest, subject: &Subject, size: u16) {
    guest.negotiate(0);
    guest.rings =
        (0..=subject.queue as u64).map(|i| DriverRing::new(&guest.ram, RINGS + 0x3000 * i, size)).collect();
    let setup = guest.rings[subject.queue].setup();
    guest.set_up_queue(subject.queue as u32, &setup);
    guest.write(STATUS, 15);
}

/// A queue whose setup is changed: whether it was enabled, and the status after DRIVER_OK.
fn with_setup(guest: &mut Guest, change: impl FnOnce(&mut Setup)) -> (bool, u32) {
    guest.negotiate(0);
    let mut setup = DriverRing::new(&guest.ram, RINGS, 16).setup();
    change(&mut setup);
    guest.set_up_queue(0, &setup);
    let ready = guest.read(0x44) == 1;
    guest.write(STATUS, 15);
    guest.notify(0);
    (ready, guest.read(STATUS))
}

pub const TABLE: &[Fault] = &[
    // Available ring (2.7.6).
    Fault("a head just out of range", |guest, subject| {
        guest.start(0);
        let size = guest.rings[subject.queue].setup().size;
        guest.rings[subject.queue].offer(size);
        breaks(guest, subject);
    }),
    Fault("all heads out of range", |guest, subject| {
        guest.start(0);
        let size = guest.rings[subject.queue].setup().size;
        (0..size).for_each(|i| guest.rings[subject.queue].offer(0xffff - i));
        breaks(guest, subject);
    }),
    Fault("the same head twice, and in all entries: served or broken", |guest, subject| {
        for all in [false, true] {
            guest.start(0);
            let count = if all { guest.rings[subject.queue].setup().size } else { 2 };
            place(guest, subject, 0);
            (0..count).for_each(|_| guest.rings[subject.queue].offer(0));
            guest.notify(subject.queue);
            guest.wait_for("an answer", |guest| {
                guest.read(STATUS) & NEEDS_RESET != 0 || used_index(guest, subject) == count
            });
        }
    }),
    Fault("the index jumps forward by more than the size", |guest, subject| {
        for by in [65, 0x100, 0x8000, 0xfffe] {
            guest.start(0);
            guest.rings[subject.queue].set_available(by);
            breaks(guest, subject);
        }
    }),
    Fault("the index goes back by one", |guest, subject| {
        guest.start(0);
        ordinary(guest, subject);
        guest.rings[subject.queue].set_available(0);
        breaks(guest, subject);
    }),
    Fault("the index moves without a kick: served with the next kick", |guest, subject| {
        guest.start(0);
        place(guest, subject, 4);
        guest.rings[subject.queue].offer(4);
        place(guest, subject, 8);
        guest.rings[subject.queue].offer(8);
        guest.notify(subject.queue);
        guest.wait_for("both", |guest| used_index(guest, subject) == 2);
    }),
    Fault("kicks without work, doubled, of an empty ring: nothing", |guest, subject| {
        guest.start(0);
        ordinary(guest, subject);
        for _ in 0..100 {
            (0..guest.rings.len()).for_each(|queue| guest.notify(queue));
        }
        ordinary(guest, subject);
        guest.settle();
        assert_eq!((used_index(guest, subject), guest.read(STATUS)), (2, 15));
    }),
    Fault("all queues kicked at once, with work in one", |guest, subject| {
        guest.start(0);
        for _ in 0..10 {
            (0..guest.rings.len()).for_each(|queue| guest.notify(queue));
            ordinary(guest, subject);
        }
    }),
    Fault("flags of the available ring that mean nothing: ignored", |guest, subject| {
        guest.start(EVENT_IDX);
        let at = guest.rings[subject.queue].available_at();
        guest.store(at, &0xfffeu16.to_le_bytes());
        assert_eq!(interrupts(guest, subject, 3), 3);
    }),
    Fault("a full ring: each request comes back once", |guest, subject| {
        guest.start(0);
        guest.store(DATA, &[0; 16]);
        let ring = &mut guest.rings[subject.queue];
        let mut heads: Vec<_> =
            (0..ring.free() / 3).map(|_| ring.add(&[HEADER], &[BODY, STATUS_BYTE])).collect();
        guest.notify(subject.queue);
        let mut used: Vec<_> = heads.iter().map(|_| guest.rings[subject.queue].wait_used(20).0).collect();
        heads.sort_unstable();
        used.sort_unstable();
        assert_eq!(heads, used);
    }),
    // Used ring (2.7.8).
    Fault("the driver writes the used ring: the device keeps its own count", |guest, subject| {
        guest.start(EVENT_IDX);
        let (at, size) = (guest.rings[subject.queue].used_at(), guest.rings[subject.queue].setup().size);
        for count in 1..4u16 {
            let request = |guest: &mut Guest| {
                place(guest, subject, 0);
                guest.rings[subject.queue].offer(0);
                guest.notify(subject.queue);
                guest.wait_for("the answer", |guest| used_index(guest, subject) == count);
            };
            // Flags, index and all entries.
            guest.store(at, &vec![0x5a; 4 + 8 * usize::from(size)]);
            request(guest);
            let entry = guest.load(at + 4 + 8 * u64::from(count - 1), 4);
            assert_eq!(entry, [0; 4], "the head");
        }
    }),
    Fault(
        "the used index steps by one for each request, id is the head, len what was written",
        |guest, subject| {
            guest.start(0);
            for count in 1..=100 {
                ordinary(guest, subject);
                assert_eq!(used_index(guest, subject), count);
            }
        },
    ),
    // Notifications (2.7.7, 2.7.10).
    Fault(
        "NO_INTERRUPT: none, and the requests are done all the same; cleared: they come",
        |guest, subject| {
            guest.start(EVENT_IDX);
            guest.rings[subject.queue].set_no_interrupt(true);
            assert_eq!(interrupts(guest, subject, 3), 0);
            guest.rings[subject.queue].set_no_interrupt(false);
            assert_eq!(interrupts(guest, subject, 3), 3);
        },
    ),
    Fault("used_event: none before it is reached, one when it is, none behind it", |guest, subject| {
        guest.start(0);
        guest.rings[subject.queue].set_used_event(2);
        assert_eq!(interrupts(guest, subject, 2), 0);
        assert_eq!(interrupts(guest, subject, 1), 1);
        assert_eq!(interrupts(guest, subject, 3), 0);
    }),
    Fault("used_event of the next index, each time: one each", |guest, subject| {
        guest.start(0);
        for index in 0..5 {
            guest.rings[subject.queue].set_used_event(index);
            assert_eq!(interrupts(guest, subject, 1), 1);
        }
    }),
    Fault("used_event far ahead, behind, at the wrap: none, and no harm", |guest, subject| {
        for event in [1000, 0x7fff, 0x8000, 0xfffe, 0xffff] {
            guest.start(0);
            guest.rings[subject.queue].set_used_event(event);
            assert_eq!(interrupts(guest, subject, 3), 0, "{event:#x}");
        }
    }),
    Fault("the driver writes avail_event: the device writes its own", |guest, subject| {
        guest.start(0);
        let ring = &guest.rings[subject.queue];
        let at = ring.used_at() + 4 + 8 * u64::from(ring.setup().size);
        for poison in [0xffffu16, 0x7fff, 0] {
            guest.store(at, &poison.to_le_bytes());
            place(guest, subject, 0);
            guest.rings[subject.queue].offer(0);
            guest.notify(subject.queue);
            guest.rings[subject.queue].wait_used(20);
            let next = guest.rings[subject.queue].available().to_le_bytes();
            guest.wait_for("a kick is asked for", |guest| guest.load(at, 2) == next);
        }
    }),
    // Set-up.
    Fault(
        "rings misaligned, in no RAM, across its end, in registers, or wrapping: NEEDS_RESET",
        |guest, _| {
            let bad: [fn(&mut Setup); 13] = [
                |setup| setup.descriptors += 8,
                |setup| setup.available += 1,
                |setup| setup.used += 2,
                |setup| setup.descriptors = HIGH + HIGH_SIZE,
                |setup| setup.available = HIGH + HIGH_SIZE,
                |setup| setup.used = HIGH + HIGH_SIZE,
                |setup| setup.descriptors = LOW - 16,
                |setup| setup.available = LOW - 2,
                |setup| setup.used = LOW - 4,
                |setup| setup.used = BASE,
                |setup| setup.descriptors = u64::MAX - 15,
                |setup| setup.available = u64::MAX - 1,
                |setup| setup.used = u64::MAX - 3,
            ];
            for (i, change) in bad.into_iter().enumerate() {
                assert_eq!(with_setup(guest, change), (true, 15 | NEEDS_RESET), "{i}");
            }
        },
    ),
    Fault("areas that overlap: no harm", |guest, _| {
        with_setup(guest, |setup| setup.used = setup.descriptors);
        with_setup(guest, |setup| setup.available = setup.descriptors);
        with_setup(guest, |setup| (setup.used, setup.available) = (setup.descriptors, setup.descriptors));
    }),
    Fault("the smallest ring", |guest, subject| {
        one_queue(guest, subject, 4);
        for _ in 0..10 {
            ordinary(guest, subject);
        }
    }),
    Fault("only one queue is enabled: it works alone", |guest, subject| {
        one_queue(guest, subject, 16);
        ordinary(guest, subject);
        for queue in 0..4 {
            guest.notify(queue);
        }
        ordinary(guest, subject);
    }),
    Fault("descriptors changed, and buffers reused, while the device has them", |guest, subject| {
        guest.start(0);
        for round in 0..20u8 {
            place(guest, subject, 0);
            guest.rings[subject.queue].offer(0);
            guest.notify(subject.queue);
            guest.rings[subject.queue].write_descriptor(1, u64::MAX, u32::MAX, 7, 0);
            guest.store(DATA + 0x1000, &[round; 512]);
            guest.wait_for("an answer", |guest| {
                guest.read(STATUS) & NEEDS_RESET != 0 || used_index(guest, subject) == u16::from(round) + 1
            });
            if guest.read(STATUS) & NEEDS_RESET != 0 {
                break;
            }
        }
    }),
];
