//! Hostile drivers against every device: arbitrary register writes, arbitrary rings, descriptors that change while the
//! device reads them. Nothing may panic, hang, grow, or touch what is not guest RAM, and a reset must mend it all.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::virtio::testing::DriverRing;

use crate::guest::{DATA, Guest, HIGH, HIGH_SIZE, LOW, QUEUE_NOTIFY, STATUS, with_each_transport};
use crate::subjects::{Subject, all};

/// One thing that a driver, or the machine around it, does.
#[derive(Debug, Clone)]
enum Step {
    /// Initializes the device properly, without the features of the mask.
    Start(u64),
    /// A register or configuration write, any width.
    Write { offset: u64, value: u64, width: usize },
    /// A read, any width.
    Read { offset: u64, width: usize },
    /// A descriptor in a queue's table.
    Descriptor { queue: usize, index: u16, descriptor: Descriptor },
    /// A descriptor in the memory that indirect tables come to lie in.
    Indirect { slot: u64, descriptor: Descriptor },
    /// A request header, so that devices look behind it.
    Header { slot: u64, kind: u32, sector: u64 },
    /// Puts any number in the available ring.
    Offer { queue: usize, head: u16 },
    /// Moves the available index anywhere.
    Available { queue: usize, index: u16 },
    /// A request as it should be.
    Request { queue: usize, readable: u32, writable: u32, indirect: bool },
    /// A doorbell.
    Kick(u32),
    /// Machine: pause and resume.
    Pause,
    /// Machine: into a fresh device.
    SaveAndRestore,
    /// Driver: reset, most likely with work in flight.
    Reset,
}

#[derive(Debug, Clone)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Addresses of all kinds: buffers, the rings themselves, both ends of RAM, the hole, nowhere.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0..0x40u64).prop_map(|slot| DATA + slot * 0x20),
        2 => 0..0x8000u64,
        2 => (0..0x20u64).prop_map(|back| LOW - back),
        1 => LOW..HIGH,
        2 => (0..HIGH_SIZE + 0x1000).prop_map(|offset| HIGH + offset),
        1 => (0..64u64).prop_map(|back| u64::MAX - back),
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => prop::sample::select(vec![0, 1, 8, 15, 16, 17, 32, 512, 1024]),
        2 => 0..0x2000u32,
        1 => prop::sample::select(vec![0x10_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX]),
        1 => any::<u32>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![8 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..8u16, 1 => any::<u16>()];
    (address(), len(), flags, next).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let queue = || 0..4usize;
    let sector =
        prop_oneof![4 => 0..0x900u64, 1 => (0..16u64).prop_map(|back| u64::MAX - back), 1 => any::<u64>()];
    let registers = prop_oneof![
        6 => (0..0x50u64).prop_map(|register| register * 4),
        1 => 0..0x200u64,
        1 => 0..0x1000u64,
    ];
    let offset = registers.boxed();
    let width = prop_oneof![6 => Just(4usize), 1 => prop::sample::select(vec![1usize, 2, 8])].boxed();
    let value = prop_oneof![4 => 0..20u64, 1 => address(), 1 => any::<u64>()];
    prop_oneof![
        2 => prop::sample::select(vec![0, 1 << 29, 1 << 28, 0xff_ffff]).prop_map(Step::Start),
        6 => (offset.clone(), value, width.clone())
            .prop_map(|(offset, value, width)| Step::Write { offset, value, width }),
        1 => (offset, width).prop_map(|(offset, width)| Step::Read { offset, width }),
        12 => (queue(), prop_oneof![8 => 0..8u16, 1 => 0..64u16], descriptor())
            .prop_map(|(queue, index, descriptor)| Step::Descriptor { queue, index, descriptor }),
        4 => (0..8u64, descriptor()).prop_map(|(slot, descriptor)| Step::Indirect { slot, descriptor }),
        4 => (0..8u64, 0..16u32, sector).prop_map(|(slot, kind, sector)| Step::Header { slot, kind, sector }),
        10 => (queue(), prop_oneof![12 => 0..8u16, 1 => any::<u16>()])
            .prop_map(|(queue, head)| Step::Offer { queue, head }),
        1 => (queue(), any::<u16>()).prop_map(|(queue, index)| Step::Available { queue, index }),
        8 => (queue(), len(), len(), any::<bool>())
            .prop_map(|(queue, readable, writable, indirect)| Step::Request { queue, readable, writable, indirect }),
        12 => prop_oneof![12 => 0..4u32, 1 => any::<u32>()].prop_map(Step::Kick),
        1 => Just(Step::Pause),
        1 => Just(Step::SaveAndRestore),
        1 => Just(Step::Reset),
    ]
}

/// Does one step. `guest` is an Option only so that a fresh device can take its place.
fn perform(step: &Step, slot: &mut Option<Guest>, subject: &Subject) {
    let guest = slot.as_mut().expect("there is a guest");
    match step {
        Step::Start(without) => guest.start(*without),
        Step::Write { offset, value, width } => {
            guest.write_bytes(*offset, &value.to_le_bytes()[..*width]);
        }
        Step::Read { offset, width } => guest.device.read(*offset, &mut [0xff; 8][..*width]),
        Step::Descriptor { queue, index, descriptor: d } => {
            if let Some(ring) = guest.rings.get(*queue) {
                ring.write_descriptor(*index, d.address, d.len, d.flags, d.next);
            }
        }
        Step::Indirect { slot, descriptor: d } => {
            if let Some(ring) = guest.rings.first() {
                ring.write_raw(DATA + slot * 0x20, d.address, d.len, d.flags, d.next);
            }
        }
        Step::Header { slot, kind, sector } => {
            let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
            guest.store(DATA + slot * 0x20, &header);
        }
        Step::Offer { queue, head } => {
            if let Some(ring) = guest.rings.get_mut(*queue) {
                ring.offer(*head);
            }
        }
        Step::Available { queue, index } => {
            if let Some(ring) = guest.rings.get_mut(*queue) {
                ring.set_available(*index);
            }
        }
        Step::Request { queue, readable, writable, indirect } => {
            if let Some(ring) = guest.rings.get_mut(*queue) {
                while ring.used().is_some() {}
                let (readable, writable) =
                    ([(DATA, 16), (DATA + 0x800, *readable)], [(DATA, *writable), (DATA, 1)]);
                if ring.free() >= 4 && *indirect {
                    ring.add_indirect(DATA + 0x400, &readable, &writable);
                } else if ring.free() >= 4 {
                    ring.add(&readable, &writable);
                }
            }
        }
        Step::Kick(queue) => {
            let queues = guest.rings.len().max(1) as u32;
            guest.ring(queue % queues);
            guest.write(QUEUE_NOTIFY, *queue);
        }
        Step::Pause => {
            guest.pause();
            guest.device.resume();
        }
        Step::SaveAndRestore => {
            guest.pause();
            let saved = guest.device.save_bytes();
            let rest = slot.take().expect("there is a guest").unplug();
            let guest = slot.insert(Guest::on(rest, (subject.build)()));
            // What a device cannot have saved is refused, also here: the driver may have put the rings anywhere.
            guest.device.restore_bytes(&saved).expect("what was saved is taken back");
            assert_eq!(guest.device.save_bytes(), saved);
            guest.device.resume();
        }
        Step::Reset => {
            guest.reset();
        }
    }
}

/// Panics so far, on any thread: one on a worker would otherwise go unnoticed.
fn panics() -> usize {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            COUNT.fetch_add(1, Ordering::SeqCst);
            default(info);
        }));
    });
    COUNT.load(Ordering::SeqCst)
}

/// Runs `steps` on a device, then shows that a reset mends it. With `mutate`, another vCPU writes to the rings and
/// buffers all the while.
fn run(subject: &Subject, started: bool, steps: &[Step], mutate: bool) {
    let before = panics();
    let mut slot = Some(Guest::new((subject.build)()));
    let guest = slot.as_mut().expect("just made");
    if started {
        guest.start(0);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let other = mutate.then(|| {
        let (ram, stop) = (guest.ram.clone(), stop.clone());
        thread::spawn(move || {
            let mut x = 0x9e37_79b9_7f4a_7c15u64;
            while !stop.load(Ordering::Relaxed) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                // Flags, lengths and indices of the first descriptors, available rings, and headers.
                let at = match x >> 60 {
                    0..8 => 0x1000 + (x >> 8) % 0x90,
                    8..10 => 0x1400 + (x >> 8) % 16,
                    10..12 => 0x4000 + (x >> 8) % 0x90,
                    _ => DATA + (x >> 8) % 0x200,
                };
                let _ = ram.write_obj(x as u8 & 7, GuestAddress(at));
                if x & 0x3f00 == 0 {
                    thread::yield_now();
                }
            }
        })
    });
    for step in steps {
        perform(step, &mut slot, subject);
    }
    stop.store(true, Ordering::Relaxed);
    if let Some(other) = other {
        other.join().expect("the other vCPU goes on");
    }
    let guest = slot.as_mut().expect("there is a guest");
    guest.start(0);
    (subject.traffic)(guest);
    guest.check_guards();
    drop(slot);
    assert_eq!(panics(), before, "a worker panicked");
}

/// Runs `test` on its own thread and fails if it takes more than `seconds`: a hang is a failure, not a stuck test run.
fn within(seconds: u64, name: &str, test: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        let _ = sender.send(());
    });
    match receiver.recv_timeout(Duration::from_secs(seconds)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{name}: hangs"),
        _ => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

/// Resident bytes, descriptors and threads of this process.
fn footprint() -> (u64, usize, usize) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    (pages * 4096, count("/proc/self/fd"), count("/proc/self/task"))
}

fn property(mutate: bool, time: Duration) {
    for index in 0..all().len() {
        within(120, all()[index].name, move || {
            with_each_transport(|transport| {
                let subject = &all()[index];
                let end = Instant::now() + time / 2;
                let mut config = Config { max_shrink_time: 20_000, ..Config::default() };
                config.failure_persistence = None;
                let mut runner = TestRunner::new(config);
                let strategy = (prop::bool::weighted(0.8), prop::collection::vec(step(), 1..60));
                let mut cases = 0;
                while Instant::now() < end && cases < 200 {
                    cases += 1;
                    let case = strategy.new_tree(&mut runner).expect("a case");
                    let result = runner.run_one(case, |(started, steps)| {
                        run(subject, started, &steps, mutate);
                        Ok(())
                    });
                    if let Err(error) = result {
                        panic!("{} on {transport:?}: case {cases}: {error}", subject.name);
                    }
                }
                eprintln!("{} on {transport:?}: {cases} cases", subject.name);
                assert!(cases > 0, "{}: not one case in {time:?}", subject.name);
            });
        });
    }
}

#[test]
fn arbitrary_drivers_break_nothing() {
    property(false, Duration::from_millis(1200));
}

#[test]
fn descriptors_that_change_under_the_device_break_nothing() {
    property(true, Duration::from_millis(1200));
}

#[test]
fn resets_with_work_in_flight_leave_nothing_behind() {
    for index in 0..all().len() {
        within(60, all()[index].name, move || {
            let subject = &all()[index];
            let mut guest = Guest::new((subject.build)());
            let mut after_some = None;
            for round in 0..150 {
                guest.start(0);
                for ring in &mut guest.rings {
                    for i in 0..(ring.free() as u64 / 4).min(12) {
                        ring.write_raw(DATA + i * 16, (i % 2) << 32, 0, 0, 0);
                        ring.add(
                            &[(DATA + i * 16, 16), (DATA + 0x1000, 4096)],
                            &[(DATA + 0x2000, 4096), (DATA, 1)],
                        );
                    }
                }
                for queue in 0..guest.rings.len() {
                    guest.notify(queue);
                }
                guest.write(STATUS, 0);
                if round == 50 {
                    after_some = Some(footprint());
                }
            }
            let (then, now) = (after_some.expect("there were rounds"), footprint());
            // Other tests run in this process, too: leaks would show as hundreds.
            assert!(now.0 < then.0 + (64 << 20), "{}: memory grows: {then:?}, {now:?}", subject.name);
            assert!(now.1 < then.1 + 100 && now.2 < then.2 + 100, "{}: {then:?}, {now:?}", subject.name);
            guest.start(0);
            (subject.traffic)(&mut guest);
            guest.check_guards();
        });
    }
}

#[test]
fn a_driver_that_never_stops_cannot_keep_the_machine_from_pausing() {
    for index in 0..all().len() {
        within(60, all()[index].name, move || {
            let subject = &all()[index];
            let mut guest = Guest::new((subject.build)());
            guest.start(0);
            // Another vCPU offers the same chain for ever, as soon as it is back, and kicks.
            let stop = Arc::new(AtomicBool::new(false));
            let (ram, stopped) = (guest.ram.clone(), stop.clone());
            let setup = guest.rings[0].setup();
            let other = thread::spawn(move || {
                let mut ring = DriverRing::new(&ram, setup.descriptors, setup.size);
                while !stopped.load(Ordering::Relaxed) {
                    if ring.free() > 1 {
                        ring.add(&[(DATA, 16)], &[(DATA + 16, 1)]);
                    }
                    while ring.used().is_some() {}
                }
            });
            for _ in 0..20 {
                guest.notify(0);
                thread::sleep(Duration::from_millis(2));
                let start = Instant::now();
                guest.pause();
                assert!(start.elapsed() < Duration::from_secs(5), "{}: pausing takes too long", subject.name);
                guest.device.resume();
            }
            stop.store(true, Ordering::Relaxed);
            other.join().expect("the other vCPU goes on");
            guest.start(0);
            (subject.traffic)(&mut guest);
        });
    }
}
