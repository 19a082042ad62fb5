//! Work in flight that does not end: resets, queues taken away, pauses, saves and ends of the device
//! meanwhile.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmm_monitor::disk::{Disk, Info, Io};
use vmm_monitor::event_loop::Event;
use vmm_monitor::virtio::block::Block;

use crate::guest::{DATA, Guest, STATUS};
use crate::subjects::header;

const IN: u32 = 0;
const OUT: u32 = 1;
const DISCARD: u32 = 11;
const SECTORS: u64 = 64;
/// Register QueueReady.
const READY: u64 = 0x44;
/// A vCPU is never away for this long because of a disk; nor does a pause exceed its deadline by it.
const AT_ONCE: Duration = Duration::from_secs(5);

/// What stands still in a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stuck {
    /// Nothing.
    No,
    /// Requests are begun and do not end: the host's storage hangs.
    Begun,
    /// Requests are not begun.
    Waiting,
}

/// The image, and how far the disk's requests have come.
struct Work {
    bytes: Vec<u8>,
    stuck: Stuck,
    held: bool,
    waiting: VecDeque<(u16, Io)>,
    begun: VecDeque<(u16, Io)>,
    done: VecDeque<(u16, io::Result<u32>)>,
    /// Requests done, ever.
    count: usize,
}

/// A disk whose storage the test stops and lets go. Clones are the same.
#[derive(Clone)]
struct Fake {
    work: Arc<Mutex<Work>>,
    ready: Arc<Event>,
}

impl Fake {
    fn new(stuck: Stuck) -> Self {
        let bytes = (0..SECTORS).flat_map(|sector| [sector as u8; 512]).collect();
        let [waiting, begun] = Default::default();
        let work = Work { bytes, stuck, held: false, waiting, begun, done: VecDeque::new(), count: 0 };
        Self { work: Arc::new(Mutex::new(work)), ready: Arc::new(Event::new().unwrap()) }
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap()
    }

    /// Lets the storage go.
    fn release(&self) {
        self.work().stuck = Stuck::No;
        self.advance();
    }

    fn advance(&self) {
        let work = &mut *self.work();
        if !work.held && work.stuck != Stuck::Waiting {
            work.begun.append(&mut work.waiting);
        }
        if work.stuck == Stuck::No {
            for (tag, io) in work.begun.drain(..) {
                let moved = match io {
                    Io::Read { offset, mut to } => to.write(&work.bytes[offset as usize..][..to.len()]),
                    Io::Write { offset, mut from } => {
                        let len = from.len();
                        from.read(&mut work.bytes[offset as usize..][..len])
                    }
                    _ => Ok(0),
                };
                work.count += 1;
                work.done.push_back((tag, moved.map(|moved| moved as u32)));
                self.ready.signal();
            }
        }
    }
}

impl Disk for Fake {
    fn info(&self) -> Info {
        let size = SECTORS * 512;
        Info { size, readonly: false, block_size: 512, physical_block_size: 512, discard: true }
    }
    fn submit(&mut self, tag: u16, io: Io) {
        self.work().waiting.push_back((tag, io));
        self.advance();
    }
    fn done(&mut self) -> Option<(u16, io::Result<u32>)> {
        let mut work = self.work();
        let next = work.done.pop_front();
        if work.done.is_empty() {
            self.ready.clear();
        }
        next
    }
    fn ready(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
    fn hold(&mut self) {
        self.work().held = true;
    }
    fn is_at_rest(&self) -> bool {
        let work = self.work();
        work.held && work.begun.is_empty() && work.done.is_empty()
    }
    fn go_on(&mut self) {
        self.work().held = false;
        self.advance();
    }
    fn forget(&mut self) {
        self.work().waiting.clear();
    }
}

fn guest(disk: &Fake) -> Guest {
    Guest::new(Box::new(Block::new(Box::new(disk.clone()), "busy")))
}

/// A request of each kind that takes long, all offered and kicked at once; their heads.
fn offer(guest: &mut Guest) -> Vec<u16> {
    let old = guest.rings[0].available();
    guest.store(DATA + 0x3000, &[&8u64.to_le_bytes()[..], &4u32.to_le_bytes(), &[0; 4]].concat());
    guest.store(DATA + 0x2000, &[0x77; 512]);
    let mut heads = Vec::new();
    for (i, (kind, sector, out, back)) in [
        (IN, 3, None, Some((DATA + 0x1000, 512))),
        (OUT, 5, Some((DATA + 0x2000, 512)), None),
        (DISCARD, 0, Some((DATA + 0x3000, 16)), None),
    ]
    .into_iter()
    .enumerate()
    {
        let at = DATA + 0x40 * i as u64;
        header(guest, at, kind, sector);
        guest.store(at + 0x20, &[0xee]);
        let readable: Vec<_> = [(at, 16)].into_iter().chain(out).collect();
        let writable: Vec<_> = back.into_iter().chain([(at + 0x20, 1)]).collect();
        heads.push(guest.rings[0].add(&readable, &writable));
    }
    guest.kick(0, old);
    heads
}

/// Waits for the answers to [`offer`], and checks them.
fn collect(guest: &mut Guest, heads: &[u16]) {
    let mut used: Vec<_> = heads.iter().map(|_| guest.rings[0].wait_used(20)).collect();
    used.sort_by_key(|(head, _)| heads.iter().position(|offered| offered == head));
    assert_eq!(used, [(heads[0], 513), (heads[1], 1), (heads[2], 1)]);
    for i in 0..3 {
        assert_eq!(guest.load(DATA + 0x20 + 0x40 * i, 1), [0]);
    }
    assert_eq!(guest.load(DATA + 0x1000, 512), [3; 512]);
    assert!(guest.rings[0].used().is_none(), "each is answered once");
}

/// A running device whose disk has three requests that it does not finish.
fn stuck(stuck: Stuck) -> (Fake, Guest, Vec<u16>) {
    let disk = Fake::new(stuck);
    let mut guest = guest(&disk);
    guest.start(0);
    let heads = offer(&mut guest);
    let here = disk.clone();
    guest.wait_for("the disk has all three", |_| {
        let work = here.work();
        work.begun.len() + work.waiting.len() == 3
    });
    (disk, guest, heads)
}

/// Fails if `what` takes long.
fn at_once<T>(what: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = what();
    assert!(start.elapsed() < AT_ONCE, "it took {:?}", start.elapsed());
    result
}

#[test]
fn a_reset_with_work_in_flight_is_posted_and_what_is_written_meanwhile_ignored() {
    let (disk, mut guest, _) = stuck(Stuck::Begun);
    let interrupts = guest.interrupts();
    at_once(|| guest.write(STATUS, 0));
    assert_eq!(guest.read(STATUS), 15, "it is not over");
    // Any register, the configuration and the doorbell.
    for offset in (0..0x140).step_by(4) {
        at_once(|| guest.write(offset, 1));
    }
    guest.write(STATUS, 0);
    guest.notify(0);
    assert_eq!((guest.read(STATUS), guest.read(READY), guest.read(0x60)), (15, 0, 0));

    disk.release();
    guest.wait_for("the reset is over", |guest| guest.read(STATUS) == 0);
    assert!(guest.rings[0].used().is_none(), "the old ring is the driver's");
    assert_eq!((guest.interrupts(), guest.config::<1>(32)), (interrupts, [1]));
    for register in [0x14, 0x24, 0x30] {
        guest.write(register, 0);
    }
    assert_eq!(guest.read(0x10), guest.offered() as u32, "no selector has moved");
    guest.start(0);
    let heads = offer(&mut guest);
    collect(&mut guest, &heads);
}

#[test]
fn a_reset_does_not_wait_for_what_is_not_begun() {
    let (disk, mut guest, _) = stuck(Stuck::Waiting);
    guest.write(STATUS, 0);
    assert_eq!(guest.read(STATUS), 0);
    disk.release();
    guest.start(0);
    assert_eq!(disk.work().count, 0, "what was not begun is gone");
    let heads = offer(&mut guest);
    collect(&mut guest, &heads);
}

#[test]
fn a_pause_keeps_its_deadline_and_may_be_taken_back() {
    for reset in [false, true] {
        let (disk, mut guest, heads) = stuck(Stuck::Begun);
        if reset {
            guest.write(STATUS, 0);
        }
        for _ in 0..2 {
            let busy = at_once(|| guest.device.pause(Instant::now() + Duration::from_millis(20)));
            assert!(busy.unwrap_err().to_string().contains("3 disk requests"), "it says what it waits for");
        }
        at_once(|| guest.device.resume());
        assert_eq!(guest.read(STATUS), 15);
        disk.release();
        if reset {
            guest.wait_for("the reset is over", |guest| guest.read(STATUS) == 0);
            guest.start(0);
        } else {
            collect(&mut guest, &heads);
        }
        let heads = offer(&mut guest);
        collect(&mut guest, &heads);
    }
}

#[test]
fn a_pause_that_succeeds_has_done_the_reset_and_can_be_saved() {
    let (disk, mut guest, _) = stuck(Stuck::Begun);
    guest.write(STATUS, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| disk.release());
        guest.pause();
    });
    assert_eq!(guest.read(STATUS), 0);
    let saved = guest.device.save_bytes();
    guest.device.resume();
    guest.start(0);
    let heads = offer(&mut guest);
    collect(&mut guest, &heads);

    let disk = Fake::new(Stuck::No);
    let mut guest = Guest::on(guest.unplug(), Box::new(Block::new(Box::new(disk), "busy")));
    guest.device.restore_bytes(&saved).unwrap();
    assert_eq!(guest.read(STATUS), 0);
    guest.start(0);
}

#[test]
fn a_device_that_hangs_can_be_taken_away() {
    for reset in [false, true] {
        let (disk, mut guest, _) = stuck(Stuck::Begun);
        if reset {
            guest.write(STATUS, 0);
        }
        let rest = at_once(|| guest.unplug());
        disk.release();
        drop(rest);
    }
}

#[test]
fn a_queue_with_work_in_flight_reads_as_ready_until_the_device_has_let_go_of_it() {
    let (disk, mut guest, _) = stuck(Stuck::Begun);
    for then_reset in [false, true, false] {
        guest.write(0x30, 0);
        at_once(|| guest.write(READY, 0));
        assert_eq!((guest.read(READY), guest.read(STATUS)), (1, 15));
        guest.write(READY, 0);
        // Other registers live.
        guest.write(0x30, 7);
        assert_eq!(guest.read(READY), 0);
        guest.write(0x30, 0);
        guest.write_bytes(0x120, &[0]);
        assert_eq!(guest.config::<1>(32), [0]);
        if then_reset {
            guest.write(STATUS, 0);
            assert_eq!((guest.read(STATUS), guest.read(READY)), (15, 1));
        }
        disk.release();
        guest.wait_for("the queue is let go", |guest| guest.read(READY) == 0);
        guest.wait_for("a reset is over", |guest| guest.read(STATUS) == if then_reset { 0 } else { 15 });
        // One reset is enough.
        if !then_reset {
            guest.reset();
        }
        guest.agree(0);
        guest.set_up_and_run();
        let heads = offer(&mut guest);
        collect(&mut guest, &heads);

        disk.work().stuck = Stuck::Begun;
        offer(&mut guest);
        let here = disk.clone();
        guest.wait_for("the disk has all three", |_| here.work().begun.len() == 3);
    }
    disk.release();
}

#[test]
fn what_was_not_begun_at_a_pause_goes_on_after_resume_or_restore() {
    for restore in [false, true] {
        let (disk, mut guest, heads) = stuck(Stuck::Waiting);
        at_once(|| guest.pause());
        let saved = guest.device.save_bytes();
        if restore {
            let fresh = Fake::new(Stuck::No);
            let device = Box::new(Block::new(Box::new(fresh.clone()), "busy"));
            guest = Guest::on(guest.unplug(), device);
            guest.device.restore_bytes(&saved).unwrap();
            assert_eq!(guest.device.save_bytes(), saved, "restored is as saved");
            guest.pause();
            assert_eq!(guest.device.save_bytes(), saved, "also before it has gone on");
            disk.release();
        } else {
            disk.release();
            assert_eq!(disk.work().count, 0, "a paused disk begins nothing");
        }
        guest.device.resume();
        collect(&mut guest, &heads);
        let heads = offer(&mut guest);
        collect(&mut guest, &heads);
    }
}

#[test]
fn unfinished_requests_of_a_damaged_snapshot_are_refused_or_break_the_queue() {
    let (_, mut guest, heads) = stuck(Stuck::Waiting);
    guest.pause();
    let saved = guest.device.save_bytes();
    // Meanwhile, or in the snapshot's memory: a chain that loops.
    guest.rings[0].write_descriptor(heads[1], DATA, 16, 1, heads[1]);
    let mut guest = Guest::on(guest.unplug(), Box::new(Block::new(Box::new(Fake::new(Stuck::No)), "busy")));
    guest.device.restore_bytes(&saved).unwrap();
    guest.device.resume();
    guest.wait_for("NEEDS_RESET", |guest| guest.read(STATUS) & 64 != 0);
    guest.start(0);
    let heads = offer(&mut guest);
    collect(&mut guest, &heads);
    guest.check_guards();
}
