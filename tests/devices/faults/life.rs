//! Device status, features, reset (virtio 1.3, 2.1 to 2.4 and 3.1).

use vmm_monitor::virtio::testing::DriverRing;

use super::{Fault, ordinary};
use crate::guest::{DATA, EVENT_IDX, Guest, NEEDS_RESET, QUEUE_NOTIFY, RING_ROOM, RINGS, STATUS};
use crate::subjects::Subject;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const FAILED: u32 = 128;
const VERSION_1: u64 = 1 << 32;

/// The driver's features, without a look at what is offered.
fn accept(guest: &mut Guest, features: u64) {
    for page in 0..2 {
        guest.write(0x24, page);
        guest.write(0x20, (features >> (32 * page)) as u32);
    }
}

/// The status after the driver wrote `values`, one after the other.
fn after(guest: &mut Guest, values: &[u32]) -> u32 {
    values.iter().for_each(|value| guest.write(STATUS, *value));
    guest.read(STATUS)
}

/// Whether FEATURES_OK stands for a driver that accepts `features`.
fn agrees(guest: &mut Guest, features: u64) -> bool {
    guest.reset();
    after(guest, &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER]);
    accept(guest, features);
    after(guest, &[11]) == 11
}

/// The features that the device does not offer, and those of them that rings or transports would have.
fn unoffered(guest: &mut Guest) -> impl Iterator<Item = u64> + use<> {
    let offered = guest.offered();
    (0..64).map(|bit| 1 << bit).filter(move |bit| offered & bit == 0)
}

/// Offers a request on the subject's queue, and kicks as a driver that does not know whether it may.
fn offer(guest: &mut Guest, subject: &Subject) -> u16 {
    let head = guest.rings[subject.queue].add(&[(DATA, 16)], &[(DATA + 0x1000, 512), (DATA + 0x100, 1)]);
    guest.notify(subject.queue);
    head
}

/// What the device has written to its used ring: the index.
fn used_index(guest: &Guest, queue: usize) -> u16 {
    let bytes = guest.load(guest.rings[queue].used_at() + 2, 2);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

pub const TABLE: &[Fault] = &[
    Fault("features before DRIVER: ignored", |guest, _| {
        let offered = guest.offered();
        accept(guest, offered);
        assert_eq!(after(guest, &[1, 3, 11]), 3, "none were accepted, VERSION_1 neither");
    }),
    Fault("queues before ACKNOWLEDGE: it works", |guest, subject| {
        guest.features = 0;
        guest.set_up();
        let offered = guest.offered();
        after(guest, &[1, 3]);
        accept(guest, offered);
        guest.features = offered;
        assert_eq!(after(guest, &[11, 15]), 15);
        ordinary(guest, subject);
    }),
    Fault("each bit without those before it: refused", |guest, _| {
        for (values, stands) in [
            (&[FEATURES_OK][..], 0),
            (&[DRIVER], 0),
            (&[DRIVER_OK], 0),
            (&[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER_OK], 1),
            (&[ACKNOWLEDGE, ACKNOWLEDGE | FEATURES_OK], 1),
            (&[ACKNOWLEDGE, 3, 3 | DRIVER_OK], 3),
            (&[ACKNOWLEDGE, 3, 15], 3),
        ] {
            guest.reset();
            assert_eq!(after(guest, values), stands, "{values:?}");
        }
    }),
    Fault("all bits at once: those whose turn it is", |guest, _| {
        assert_eq!(after(guest, &[0xff]), FAILED | 3);
        guest.reset();
        assert_eq!(after(guest, &[u32::MAX]), FAILED | 3);
    }),
    Fault("DRIVER_OK twice: it runs on", |guest, subject| {
        guest.start(0);
        ordinary(guest, subject);
        assert_eq!(after(guest, &[15, 15]), 15);
        ordinary(guest, subject);
    }),
    Fault("FAILED alone, and DRIVER_OK with it", |guest, _| {
        assert_eq!(after(guest, &[FAILED]), FAILED);
        guest.negotiate(0);
        guest.set_up();
        assert_eq!(after(guest, &[15 | FAILED]), 15 | FAILED);
    }),
    Fault("reserved bits, and NEEDS_RESET from the driver: ignored", |guest, subject| {
        assert_eq!(after(guest, &[16, 1 | 16, 1 | 32]), 1);
        assert_eq!(after(guest, &[1 | NEEDS_RESET]), 1);
        guest.start(0);
        assert_eq!(after(guest, &[15 | 16 | 32 | NEEDS_RESET]), 15);
        ordinary(guest, subject);
    }),
    Fault("bits above the eighth: no reset, whatever the low ones are", |guest, subject| {
        guest.start(0);
        for value in [0x100, 0x10000, 0x8000_0000, 0xffff_ff00, 0x1_0f, 0xffff_ff0f] {
            assert_eq!(after(guest, &[value]), 15, "{value:#x}");
        }
        ordinary(guest, subject);
    }),
    Fault("single bits cleared, and setting up again without a reset: ignored", |guest, subject| {
        guest.start(0);
        for value in [15 - DRIVER_OK, 15 - FEATURES_OK, 15 - DRIVER, 15 - ACKNOWLEDGE, 1, 3, 11] {
            assert_eq!(after(guest, &[value]), 15, "{value:#x}");
        }
        accept(guest, VERSION_1);
        ordinary(guest, subject);
    }),
    Fault("bit by bit down to 0: the last step is the reset", |guest, _| {
        guest.start(0);
        assert_eq!(after(guest, &[11, 3, 1]), 15);
        guest.reset();
    }),
    Fault("features: none, or no VERSION_1: FEATURES_OK refused", |guest, _| {
        let offered = guest.offered();
        assert!(!agrees(guest, 0) && !agrees(guest, offered & !VERSION_1));
    }),
    Fault("features: VERSION_1 alone works", |guest, subject| {
        guest.start(!VERSION_1);
        ordinary(guest, subject);
    }),
    Fault("features: all, or any that is not offered: FEATURES_OK refused", |guest, _| {
        assert!(!agrees(guest, u64::MAX));
        for bit in unoffered(guest) {
            assert!(!agrees(guest, VERSION_1 | bit), "{bit:#x}");
        }
    }),
    Fault("features above bit 63, on any page: FEATURES_OK refused", |guest, _| {
        for page in [2, 3, 4, 5, 0x0800_0000, 0x8000_0000, u32::MAX] {
            guest.reset();
            after(guest, &[1, 3]);
            accept(guest, VERSION_1);
            guest.write(0x24, page);
            guest.write(0x20, 1);
            assert_eq!(after(guest, &[11]), 3, "page {page:#x}");
        }
    }),
    Fault("no ring feature is offered that is not there", |guest, _| {
        // IOMMU, packed, in-order, SR-IOV, notification data, ring reset, admin queue (6).
        for bit in [33, 34, 35, 37, 38, 40, 41] {
            assert_eq!(guest.offered() & 1 << bit, 0, "bit {bit}");
        }
    }),
    Fault("features rewritten after FEATURES_OK: ignored", |guest, subject| {
        guest.negotiate(0);
        accept(guest, u64::MAX);
        assert_eq!(guest.read(STATUS), 11);
        guest.set_up_and_run();
        accept(guest, 0);
        ordinary(guest, subject);
    }),
    Fault("FEATURES_OK refused, then right features: it stands", |guest, subject| {
        assert!(!agrees(guest, 0));
        let offered = guest.offered();
        accept(guest, offered);
        guest.features = offered;
        assert_eq!(after(guest, &[11]), 11);
        guest.set_up_and_run();
        ordinary(guest, subject);
    }),
    Fault("fewer features after a reset: the old ones are gone", |guest, subject| {
        guest.start(0);
        ordinary(guest, subject);
        guest.start(EVENT_IDX | 1 << 28);
        // Without EVENT_IDX the device must not look for a used_event.
        guest.rings[subject.queue].set_used_event(0x7fff);
        let before = guest.interrupts();
        ordinary(guest, subject);
        guest.wait_for("an interrupt", |guest| guest.interrupts() > before);
    }),
    Fault("reset between any two steps: all is as built", |guest, _| {
        let saved = |guest: &mut Guest| {
            guest.pause();
            let saved = guest.device.save_bytes();
            guest.resume();
            saved
        };
        let steps: [fn(&mut Guest); 6] = [
            |_| (),
            |guest| guest.write(STATUS, 1),
            |guest| guest.write(STATUS, 3),
            |guest| guest.negotiate(0),
            |guest| {
                guest.negotiate(0);
                guest.set_up();
            },
            |guest| guest.start(0),
        ];
        guest.reset();
        let status = |guest: &mut Guest| (guest.read(STATUS), guest.read(0x44), guest.read(0x60));
        // How often the configuration has changed is not part of it.
        let generation = guest.read(0xfc);
        let built = saved(guest);
        for step in steps {
            step(guest);
            guest.reset();
            assert_eq!(status(guest), (0, 0, 0));
            if guest.read(0xfc) == generation {
                assert_eq!(saved(guest), built);
            }
        }
    }),
    Fault("reset with a request on its way, 100 times in a row", |guest, subject| {
        for _ in 0..100 {
            guest.start(0);
            offer(guest, subject);
            guest.write(STATUS, 0);
        }
    }),
    Fault("reset while the configuration is read: it reads on", |guest, _| {
        guest.start(0);
        let first = guest.config::<4>(4);
        guest.reset();
        assert_eq!(guest.config::<4>(4), first);
    }),
    Fault("after a reset another ring size works, and the old rings are never touched", |guest, subject| {
        guest.start(0);
        ordinary(guest, subject);
        guest.reset();
        let old = RINGS..RINGS + RING_ROOM * guest.rings.len() as u64;
        let pattern = vec![0x5a; (old.end - old.start) as usize];
        guest.store(old.start, &pattern);
        guest.negotiate(0);
        let place = 0x8_0000;
        let count = guest.rings.len();
        guest.rings = (0..count as u64).map(|i| DriverRing::new(&guest.ram, place + 0x400 * i, 8)).collect();
        for index in 0..count {
            let setup = guest.rings[index].setup();
            guest.set_up_queue(index as u32, &setup);
        }
        assert_eq!(after(guest, &[15]), 15);
        for _ in 0..20 {
            ordinary(guest, subject);
        }
        assert!(guest.load(old.start, pattern.len()) == pattern);
    }),
    Fault("NEEDS_RESET comes with a configuration interrupt, and stands until a reset", |guest, subject| {
        guest.start(0);
        assert_eq!(guest.read(STATUS), 15, "and not without a cause");
        let (before, queue) = (guest.interrupts(), subject.queue);
        guest.rings[queue].offer(u16::MAX);
        guest.notify(queue);
        guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) == 15 | NEEDS_RESET);
        guest.wait_for("its interrupt", |guest| guest.interrupts() > before && guest.read(0x60) & 2 != 0);
        let used = used_index(guest, queue);
        offer(guest, subject);
        for value in [15, 11, 15 | NEEDS_RESET, 0x100] {
            assert_eq!(after(guest, &[value]), 15 | NEEDS_RESET, "{value:#x}");
        }
        guest.settle();
        assert_eq!(used_index(guest, queue), used, "nothing more is served");
    }),
    Fault("requests after FAILED: they may end; the machine lives", |guest, subject| {
        guest.start(0);
        guest.write(STATUS, 15 | FAILED);
        offer(guest, subject);
        assert_eq!(guest.read(STATUS), 15 | FAILED);
    }),
    Fault("offered and kicked before DRIVER_OK: untouched, then served once", |guest, subject| {
        // A worker that is there from an earlier life must not look, either.
        for _ in 0..2 {
            guest.negotiate(0);
            guest.set_up();
            let head = offer(guest, subject);
            guest.write(QUEUE_NOTIFY, subject.queue as u32);
            guest.settle();
            assert_eq!(used_index(guest, subject.queue), 0, "nothing is taken before DRIVER_OK");
            assert_eq!(guest.read(0x60), 0);
            assert_eq!(after(guest, &[15]), 15);
            guest.notify(subject.queue);
            assert_eq!(guest.rings[subject.queue].wait_used(20).0, head);
            ordinary(guest, subject);
            assert_eq!(used_index(guest, subject.queue), 2);
        }
    }),
    Fault("kicks during set-up, after a reset and after FAILED: nothing", |guest, _| {
        let kick = |guest: &mut Guest| {
            for queue in 0..4 {
                guest.ring(queue);
                guest.write(QUEUE_NOTIFY, queue);
            }
        };
        kick(guest);
        guest.negotiate(0);
        kick(guest);
        guest.set_up();
        kick(guest);
        guest.write(STATUS, 15 | FAILED);
        kick(guest);
        guest.reset();
        kick(guest);
        assert_eq!((guest.read(STATUS), guest.read(0x60)), (0, 0));
    }),
    Fault("a storm of kicks over changes of the status: no harm", |guest, subject| {
        for round in 0..12 {
            guest.negotiate(0);
            guest.set_up();
            for value in [11, 15, 15, 15 | FAILED, 0] {
                offer(guest, subject);
                for _ in 0..round % 7 {
                    guest.notify(subject.queue);
                }
                guest.write(STATUS, value);
            }
        }
    }),
    Fault(
        "a queue disabled and enabled while it works: it stays disabled until a reset",
        |guest, subject| {
            if !guest.can_disable_queues() {
                return;
            }
            guest.start(0);
            offer(guest, subject);
            guest.write(0x30, subject.queue as u32);
            guest.write(0x44, 0);
            guest.wait_for("the queue is let go", |guest| guest.read(0x44) == 0);
            let used = used_index(guest, subject.queue);
            offer(guest, subject);
            guest.write(0x44, 1);
            assert_eq!((guest.read(0x44), guest.read(STATUS)), (0, 15));
            guest.settle();
            assert_eq!(used_index(guest, subject.queue), used);
        },
    ),
];
