//! MMIO registers (virtio 1.3, 4.2.2).

use vmm_monitor::virtio::testing::DriverRing;

use super::{Fault, ordinary};
use crate::guest::{EVENT_IDX, Guest, QUEUE_NOTIFY, STATUS};

const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const GENERATION: u64 = 0xfc;
/// Registers that a driver writes.
const WRITABLE: [u64; 17] = [
    0x14,
    0x20,
    0x24,
    QUEUE_SEL,
    QUEUE_SIZE,
    READY,
    QUEUE_NOTIFY,
    INTERRUPT_ACK,
    STATUS,
    0x80,
    0x84,
    0x90,
    0x94,
    0xa0,
    0xa4,
    // SHMSel and QueueReset: neither is there, but their places are no holes.
    0xac,
    0xc0,
];
/// Registers that read as something else than 0.
const READABLE: [u64; 15] = [
    0,
    4,
    8,
    0xc,
    0x10,
    QUEUE_SIZE_MAX,
    READY,
    INTERRUPT_STATUS,
    STATUS,
    0xb0,
    0xb4,
    0xb8,
    0xbc,
    GENERATION,
    // Reads as 0 where there is no QueueReset.
    0xc0,
];

/// All registers, and the configuration space, as the driver sees them.
fn dump(guest: &mut Guest) -> Vec<u32> {
    (0..0x180).step_by(4).map(|offset| guest.read(offset)).collect()
}

/// Runs `what`, which must change nothing that can be seen.
fn changes_nothing(guest: &mut Guest, what: impl FnOnce(&mut Guest)) {
    let before = dump(guest);
    what(guest);
    assert_eq!(dump(guest), before);
}

/// A queue that is not enabled by `size`.
fn size_is_refused(guest: &mut Guest, size: u32) {
    guest.negotiate(0);
    guest.write(QUEUE_SEL, 0);
    guest.write(QUEUE_SIZE, size);
    guest.write(READY, 1);
    assert_eq!(guest.read(READY), 0, "size {size:#x}");
}

pub const TABLE: &[Fault] = &[
    Fault("registers read 1, 2 or 8 bytes wide, or at odd offsets: nothing there", |guest, _| {
        for offset in 0..0x100 {
            for width in [1, 2, 8] {
                let mut data = [0xff; 8];
                guest.device.read(offset, &mut data[..width]);
                assert_eq!(data, [0xff; 8], "{width} bytes at {offset:#x}");
            }
            assert!(offset % 4 == 0 || guest.read(offset) == 0);
        }
    }),
    Fault("registers written 1, 2 or 8 bytes wide, or at odd offsets: ignored", |guest, _| {
        changes_nothing(guest, |guest| {
            for offset in 0..0x100 {
                for width in [1, 2, 8] {
                    guest.write_bytes(offset, &[1; 8][..width]);
                }
                if offset % 4 != 0 {
                    guest.write(offset, 1);
                }
            }
        });
    }),
    Fault("the configuration space is one, however wide it is read", |guest, _| {
        let bytes: Vec<u8> = (0..72).map(|at| guest.config::<1>(at)[0]).collect();
        for at in 0..64 {
            let (two, four, eight) = (guest.config::<2>(at), guest.config::<4>(at), guest.config::<8>(at));
            for wide in [&two[..], &four, &eight] {
                let single = &bytes[at as usize..][..wide.len()];
                // Where the space ends inside, nothing answers.
                assert!(wide == single || wide.iter().all(|byte| *byte == 0xff), "{wide:x?} at {at}");
            }
        }
    }),
    Fault("configuration space at and past its end: all ones, and writes go nowhere", |guest, _| {
        changes_nothing(guest, |guest| {
            for offset in [0x13d, 0x1f8, 0xff8, 0xfff, u64::MAX - 0x100] {
                for width in [1, 2, 4, 8] {
                    guest.write_bytes(0x100 + offset, &[0x41; 8][..width]);
                    let mut data = [0xff; 8];
                    guest.device.read(0x100 + offset, &mut data[..width]);
                    assert_eq!(data, [0xff; 8]);
                }
            }
        });
    }),
    Fault("holes, and registers that are only written, read as 0", |guest, _| {
        for offset in (0..0x100).step_by(4).filter(|offset| !READABLE.contains(offset)) {
            assert_eq!(guest.read(offset), 0, "{offset:#x}");
        }
    }),
    Fault("holes, and registers that are only read, are written: ignored", |guest, _| {
        guest.start(0);
        changes_nothing(guest, |guest| {
            for offset in (0..0x100).step_by(4).filter(|offset| !WRITABLE.contains(offset)) {
                for value in [0, 1, u32::MAX] {
                    guest.write(offset, value);
                }
            }
        });
    }),
    Fault("queue registers before QueueSel: those of queue 0", |guest, _| {
        assert_ne!(guest.read(QUEUE_SIZE_MAX), 0);
        assert_eq!(guest.read(READY), 0);
    }),
    Fault("QueueSel of no queue: QueueSizeMax reads 0, and nothing can be set up", |guest, _| {
        guest.negotiate(0);
        for queue in [0xff, 0xffff, 0x1_0000, 0x7fff_ffff, u32::MAX] {
            guest.write(QUEUE_SEL, queue);
            assert_eq!((guest.read(QUEUE_SIZE_MAX), guest.read(READY)), (0, 0));
            for (register, value) in [(QUEUE_SIZE, 1), (0x80, 0x1000), (READY, 1)] {
                guest.write(register, value);
            }
            assert_eq!((guest.read(QUEUE_SIZE_MAX), guest.read(READY)), (0, 0));
        }
        guest.write(QUEUE_SEL, 0);
        assert_eq!(guest.read(READY), 0, "no cut number means queue 0");
    }),
    Fault("feature pages from 2 on read 0", |guest, _| {
        for page in [2, 3, 4, 0x0800_0000, 0x8000_0000, u32::MAX] {
            guest.write(0x14, page);
            assert_eq!(guest.read(0x10), 0, "page {page:#x}");
        }
    }),
    Fault("SHMSel of no region: all ones, on each read", |guest, _| {
        for region in [0, 1, 0xff, u32::MAX] {
            guest.write(0xac, region);
            for offset in [0xb0, 0xb4, 0xb8, 0xbc, 0xb0] {
                assert_eq!(guest.read(offset), u32::MAX);
            }
        }
    }),
    Fault("queue sizes of 0, no power of two, beyond the maximum, and cut ones: not enabled", |guest, _| {
        let max = guest.read(QUEUE_SIZE_MAX);
        let bad = [0, 3, max - 1, max + 1, 2 * max, 0x8000, 0x1_0000, 0x1_0000 + max, 0x8000_0000, u32::MAX];
        bad.into_iter().for_each(|size| size_is_refused(guest, size));
    }),
    Fault("QueueReady written twice: ready", |guest, subject| {
        guest.negotiate(0);
        guest.set_up();
        guest.write(QUEUE_SEL, 0);
        guest.write(READY, 1);
        assert_eq!(guest.read(READY), 1);
        guest.write(STATUS, 15);
        ordinary(guest, subject);
    }),
    Fault("QueueReady written with neither 0 nor 1: no change, and it reads as 0 or 1", |guest, subject| {
        guest.negotiate(0);
        for value in [2, 0xfe, 0xff, 0x100, 0xffff_fffe, u32::MAX] {
            guest.write(READY, value);
            assert_eq!(guest.read(READY), 0, "{value:#x}");
        }
        guest.set_up_and_run();
        guest.write(QUEUE_SEL, subject.queue as u32);
        for value in [2, 0xfe, 0xff, 0x100, 0xffff_fffe, u32::MAX] {
            guest.write(READY, value);
            assert_eq!(guest.read(READY), 1, "{value:#x}");
        }
        ordinary(guest, subject);
    }),
    Fault("QueueReady without addresses: NEEDS_RESET at DRIVER_OK", |guest, _| {
        guest.negotiate(0);
        guest.write(QUEUE_SEL, 0);
        guest.write(READY, 1);
        guest.write(STATUS, 15);
        assert_eq!(guest.read(STATUS), 15 | 64);
        assert_eq!(guest.read(INTERRUPT_STATUS), 2, "the driver hears of it (2.1.2)");
    }),
    Fault("QueueSel moved while queues are ready: each keeps its own", |guest, subject| {
        guest.start(0);
        for queue in [0xffff, 1, 0, 77] {
            guest.write(QUEUE_SEL, queue);
            ordinary(guest, subject);
        }
    }),
    Fault("queue registers written while the queue is ready: ignored", |guest, subject| {
        guest.negotiate(0);
        guest.set_up();
        guest.write(QUEUE_SEL, subject.queue as u32);
        for offset in [QUEUE_SIZE, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
            guest.write(offset, 8);
        }
        guest.write(STATUS, 15);
        ordinary(guest, subject);
    }),
    Fault("a queue set up after DRIVER_OK: not enabled", |guest, _| {
        guest.negotiate(0);
        guest.write(STATUS, 15);
        let ring = DriverRing::new(&guest.ram, 0x1000, 8);
        guest.set_up_queue(0, &ring.setup());
        assert_eq!((guest.read(READY), guest.read(STATUS)), (0, 15));
    }),
    Fault("DRIVER_OK with no queue enabled, and kicks: nothing", |guest, _| {
        guest.negotiate(0);
        guest.write(STATUS, 15);
        for queue in [0, 1, 0xffff, u32::MAX] {
            guest.write(QUEUE_NOTIFY, queue);
        }
        guest.notify(0);
        assert_eq!((guest.read(STATUS), guest.read(INTERRUPT_STATUS)), (15, 0));
    }),
    Fault("kicks of no queue: ignored", |guest, subject| {
        guest.start(0);
        for queue in [0xff, 0xffff, 0x1_0000, 0x7fff_ffff, u32::MAX] {
            guest.write(QUEUE_NOTIFY, queue);
        }
        ordinary(guest, subject);
    }),
    Fault("ids stay readable in every state", |guest, _| {
        let ids = [0, 4, 8, 0xc];
        let expected = ids.map(|offset| guest.read(offset));
        guest.start(0);
        assert_eq!(ids.map(|offset| guest.read(offset)), expected);
        guest.write(STATUS, 15 | 128);
        assert_eq!(ids.map(|offset| guest.read(offset)), expected);
        guest.reset();
        assert_eq!(ids.map(|offset| guest.read(offset)), expected);
    }),
    Fault("an interrupt that is never acknowledged: the next one comes all the same", |guest, subject| {
        guest.start(EVENT_IDX);
        ordinary(guest, subject);
        guest.wait_for("an interrupt", |guest| guest.read(INTERRUPT_STATUS) & 1 != 0);
        let before = guest.interrupts();
        ordinary(guest, subject);
        guest.wait_for("another interrupt", |guest| guest.interrupts() > before);
        assert_eq!(guest.read(INTERRUPT_STATUS) & 1, 1);
    }),
    Fault("one bit of two acknowledged leaves the other", |guest, subject| {
        guest.start(EVENT_IDX);
        ordinary(guest, subject);
        guest.wait_for("an interrupt", |guest| guest.read(INTERRUPT_STATUS) & 1 != 0);
        guest.rings[subject.queue].offer(u16::MAX);
        guest.notify(subject.queue);
        guest.wait_for("both reasons", |guest| guest.read(INTERRUPT_STATUS) == 3);
        guest.write(INTERRUPT_ACK, 1);
        assert_eq!(guest.read(INTERRUPT_STATUS), 2);
        guest.write(INTERRUPT_ACK, 2);
        assert_eq!(guest.read(INTERRUPT_STATUS), 0);
    }),
    Fault("bits that are not set, or mean nothing, acknowledged: the others stay", |guest, subject| {
        guest.write(INTERRUPT_ACK, u32::MAX);
        guest.start(EVENT_IDX);
        ordinary(guest, subject);
        guest.wait_for("an interrupt", |guest| guest.read(INTERRUPT_STATUS) == 1);
        for bits in [0, 2, 0xffff_fffe, 0x100] {
            guest.write(INTERRUPT_ACK, bits);
            assert_eq!(guest.read(INTERRUPT_STATUS), 1);
        }
    }),
    Fault("QueueReset without the feature: reads 0, does nothing", |guest, subject| {
        guest.start(0);
        for value in [1, 0, u32::MAX] {
            guest.write(0xc0, value);
            assert_eq!(guest.read(0xc0), 0);
        }
        ordinary(guest, subject);
    }),
    Fault("notification data without the feature: no queue of that number", |guest, subject| {
        guest.start(0);
        for index in [1, 0x8000, 0xffff] {
            guest.write(QUEUE_NOTIFY, index << 16 | subject.queue as u32);
        }
        ordinary(guest, subject);
    }),
    Fault("ConfigGeneration moves by no read, and by no write of itself", |guest, _| {
        guest.start(0);
        let generation = guest.read(GENERATION);
        for _ in 0..10 {
            guest.write(GENERATION, 77);
            guest.config::<4>(0);
            guest.config::<8>(0);
            assert_eq!(guest.read(GENERATION), generation);
        }
    }),
];
