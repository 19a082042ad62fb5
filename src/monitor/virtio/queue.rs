//! [`Virtqueue`]: a split virtqueue as devices see it, with owned request buffers instead of descriptors.
//!
//! Devices pop and complete; the core sets it up and looks after each callback. The ring belongs to an adversary:
//! each index and descriptor is read once, and what breaks the rules breaks the queue, never the monitor.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::guest_warn;
use crate::memory::{Buffers, GuestRam, NotRam};

/// How a transport tells the driver of something. Called with the device's mutex held; takes no device's lock.
pub trait Notifier: Send + Sync {
    /// There are used buffers in queue `queue`.
    fn used(&self, queue: usize);
    /// The configuration space or the device status changed.
    fn config_changed(&self);
    /// An eventfd that interrupts the driver for used buffers in queue `queue` without coming by here, for others that run it. From
    /// then on the driver may find at any time that there are some. `None` if there is none.
    fn direct(&self, _queue: usize) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// The most descriptors that a chain may have, unless the queue itself is larger. Drivers stay below the device's
/// segment limits, which are far smaller; it bounds what an indirect table of 64 Ki entries could cost.
pub const MAX_CHAIN: usize = 1024;

/// A request: what the driver wrote for the device, and where the device answers.
#[derive(Debug)]
pub struct Chain {
    /// Identifies the chain to [`Virtqueue::complete`]. Unique among those that are not completed.
    pub head: u16,
    /// What the driver wrote, in order.
    pub readable: Buffers,
    /// Where the device may write, in order.
    pub writable: Buffers,
}

/// What breaks a queue. Only ever the driver's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Broken {
    #[error("ring: {0}")]
    Ring(String),
    #[error("chain {head} is offered while the device still has it")]
    Twice { head: u16 },
    #[error("chain {head} is not in the table of {size} descriptors")]
    Head { head: u16, size: u16 },
    #[error("chain {head} has more than {most} descriptors")]
    Long { head: u16, most: usize },
    #[error("chain {head} loops, or leaves its table, or nests indirect tables")]
    Chain { head: u16 },
    #[error("chain {head} has a readable part after a writable one")]
    Order { head: u16 },
    #[error("chain {head}: {what}")]
    Memory { head: u16, what: NotRam },
}

impl From<virtio_queue::Error> for Broken {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Ring(error.to_string())
    }
}

/// What the driver says of a queue before it uses it. Held by the core, whose registers these are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring (the driver area).
    pub available: u64,
    /// Guest address of the used ring (the device area).
    pub used: u64,
}

/// How far the device has come in the rings. All that a saved queue needs beside its [`Setup`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Index of the next available entry to take.
    pub next_available: u16,
    /// Index of the next used entry to write.
    pub next_used: u16,
}

/// A split virtqueue (virtio 1.3, 2.7), the device's side.
pub struct Virtqueue {
    ram: Arc<GuestRam>,
    notifier: Arc<dyn Notifier>,
    index: usize,
    queue: Queue,
    /// By head: popped and not completed.
    taken: Box<[bool]>,
    in_flight: usize,
    /// Completed something since the last [`Virtqueue::notify`].
    completed: bool,
    /// Index of the used entry up to which it is decided whether the driver wants an interrupt.
    considered: u16,
    /// The used ring's flags ask for no kicks. (Not with EVENT_IDX, where no kick comes unless asked for.)
    quiet: bool,
    broken: bool,
    /// Chains that may be popped before the worker must look at its other duties.
    budget: usize,
    exhausted: bool,
}

impl Virtqueue {
    /// Queue `index` of a device, of at most `max_size` descriptors (a power of two); not enabled.
    ///
    /// # Panics
    /// If `max_size` is no power of two up to 32768: it comes from a device's own constant.
    pub fn new(ram: Arc<GuestRam>, notifier: Arc<dyn Notifier>, index: usize, max_size: u16) -> Self {
        Self {
            ram,
            notifier,
            index,
            queue: Queue::new(max_size).expect("a device's queue size is a power of two"),
            taken: vec![false; usize::from(max_size)].into(),
            in_flight: 0,
            completed: false,
            considered: 0,
            quiet: false,
            broken: false,
            budget: usize::MAX,
            exhausted: false,
        }
    }

    /// Enables the queue as the driver set it up, at `position`. False if the rings cannot be there: the queue then
    /// stays disabled.
    pub fn enable(&mut self, setup: &Setup, position: Position, event_idx: bool) -> bool {
        self.disable();
        let size = u64::from(setup.size);
        // Sizes of 2.7: 16 bytes a descriptor; rings of 2 or 8 bytes an entry, with flags, index and event index.
        let rings =
            [(setup.descriptors, 16 * size), (setup.available, 6 + 2 * size), (setup.used, 6 + 8 * size)];
        let in_ram = |(at, len): &(u64, u64)| self.ram.check_range(GuestAddress(*at), *len as usize);
        let queue = &mut self.queue;
        // The crate takes an available ring at 0 for one that is not set up.
        let fine = setup.available != 0
            && rings.iter().all(in_ram)
            && queue.try_set_size(setup.size).is_ok()
            && queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).is_ok()
            && queue.try_set_avail_ring_address(GuestAddress(setup.available)).is_ok()
            && queue.try_set_used_ring_address(GuestAddress(setup.used)).is_ok();
        if fine {
            queue.set_next_avail(position.next_available);
            queue.set_next_used(position.next_used);
            queue.set_event_idx(event_idx);
            self.considered = position.next_used;
            queue.set_ready(true);
        } else {
            guest_warn!("queue {}: rings at impossible addresses: {setup:x?}", self.index);
            queue.reset();
        }
        fine
    }

    /// Back to as built. Chains that a device still has are forgotten: completing them does nothing.
    pub fn disable(&mut self) {
        self.queue.reset();
        self.taken.fill(false);
        self.in_flight = 0;
        self.completed = false;
        self.quiet = false;
        self.broken = false;
        self.exhausted = false;
    }

    /// How far the device has come.
    pub fn position(&self) -> Position {
        Position { next_available: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// What the driver said of it; `None` if it is not enabled.
    pub fn setup(&self) -> Option<Setup> {
        let (descriptors, available, used) =
            (self.queue.desc_table(), self.queue.avail_ring(), self.queue.used_ring());
        self.queue.ready().then(|| Setup {
            size: self.queue.size(),
            ready: true,
            descriptors,
            available,
            used,
        })
    }

    /// VIRTIO_F_EVENT_IDX is agreed on.
    pub fn event_idx(&self) -> bool {
        self.queue.event_idx_enabled()
    }

    /// Goes on at `position`: others have run the queue up to there.
    pub fn go_on_at(&mut self, position: Position) {
        self.queue.set_next_avail(position.next_available);
        self.queue.set_next_used(position.next_used);
        self.considered = position.next_used;
    }

    /// Breaks it, for who has found that the driver broke the rules.
    pub fn give_up(&mut self) {
        self.broken = true;
    }

    /// The driver has enabled the queue and has not broken it.
    pub fn is_usable(&self) -> bool {
        self.queue.ready() && !self.broken
    }

    /// The driver broke the rules; only a reset helps.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Chains popped and not completed: at most the queue's size.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes the next request, its descriptors (direct or indirect) read once into owned buffers.
    ///
    /// `None` if there is none: the driver then kicks when there is. A device that stops before it saw `None` gets no
    /// kick for what is left, nor for what comes behind it, and must look again by itself. The core limits how many
    /// come out per callback, and calls again.
    pub fn pop(&mut self) -> Option<Chain> {
        if !self.is_usable() {
            return None;
        }
        if self.budget == 0 {
            self.exhausted = true;
            return None;
        }
        match self.take_next() {
            Ok(chain) => chain,
            Err(broken) => {
                self.fail(&broken.to_string());
                None
            }
        }
    }

    fn take_next(&mut self) -> Result<Option<Chain>, Broken> {
        // A driver that moves its index back and forth could keep this from ending: a few rounds are plenty.
        for _ in 0..8 {
            let Some(head) = self.queue.iter(&*self.ram)?.next().map(|chain| chain.head_index()) else {
                // Empty: ask for a kick, and look again in case the driver was faster.
                self.quiet = false;
                if self.queue.enable_notification(&*self.ram)? {
                    continue;
                }
                return Ok(None);
            };
            let chain = self.read(head)?;
            if !self.quiet && !self.queue.event_idx_enabled() {
                self.queue.disable_notification(&*self.ram)?;
                self.quiet = true;
            }
            self.taken[usize::from(chain.head)] = true;
            self.in_flight += 1;
            self.budget -= 1;
            return Ok(Some(chain));
        }
        Err(Broken::Ring("the available index does not stand still".to_owned()))
    }

    /// Reads the chain's descriptors. Each comes out of guest memory once.
    fn read(&self, head: u16) -> Result<Chain, Broken> {
        match self.taken.get(usize::from(head)) {
            Some(false) if head < self.queue.size() => {}
            Some(true) => return Err(Broken::Twice { head }),
            _ => return Err(Broken::Head { head, size: self.queue.size() }),
        }
        let most = MAX_CHAIN.max(usize::from(self.queue.size()));
        let mut readable = Buffers::empty(self.ram.clone());
        let mut writable = Buffers::empty(self.ram.clone());
        let (mut count, mut more, mut answering) = (0, true, false);
        let mut total = 0u32;
        for descriptor in Descriptors::of(self, head) {
            count += 1;
            if count > most {
                return Err(Broken::Long { head, most });
            }
            more = descriptor.has_next();
            // 2.7.5.2: no chain is longer than 2^32 bytes in total.
            total = total.checked_add(descriptor.len()).ok_or(Broken::Chain { head })?;
            let part = match (descriptor.is_write_only(), answering) {
                (false, false) => &mut readable,
                (true, _) => &mut writable,
                (false, true) => return Err(Broken::Order { head }),
            };
            answering |= descriptor.is_write_only();
            if descriptor.len() > 0 {
                part.push(descriptor.addr().0, descriptor.len() as usize)
                    .map_err(|what| Broken::Memory { head, what })?;
            }
        }
        // Where the walk could not go on, the last descriptor still promised more.
        if more { Err(Broken::Chain { head }) } else { Ok(Chain { head, readable, writable }) }
    }

    /// Takes chain `head` once more, read anew: one that was popped before the device was saved, and not
    /// completed. Breaks the queue if there is no such chain.
    pub fn retake(&mut self, head: u16) -> Option<Chain> {
        if !self.is_usable() {
            return None;
        }
        match self.read(head) {
            Ok(chain) => {
                self.taken[usize::from(head)] = true;
                self.in_flight += 1;
                Some(chain)
            }
            Err(broken) => {
                self.fail(&broken.to_string());
                None
            }
        }
    }

    /// Whether the driver has put something there that is not popped yet. Changes nothing, asks for no kick.
    pub fn has_work(&self) -> bool {
        let available = || self.queue.avail_idx(&*self.ram, Ordering::Acquire).ok();
        self.is_usable() && available().is_some_and(|index| index.0 != self.queue.next_avail())
    }

    /// Gives chain `head` back to the driver, `written` bytes of whose writable part were written. Ignored if the
    /// queue was reset or broken since the chain was popped.
    pub fn complete(&mut self, head: u16, written: u32) {
        let taken = self.taken.get_mut(usize::from(head)).is_some_and(std::mem::take);
        if !taken {
            return;
        }
        self.in_flight -= 1;
        if !self.is_usable() {
            return;
        }
        match self.queue.add_used(&*self.ram, head, written) {
            Ok(()) => self.completed = true,
            Err(error) => self.fail(&error.to_string()),
        }
    }

    /// Gives `chains` back together, as [`Virtqueue::complete`] does each: the driver sees none before it can see all.
    pub fn complete_together(&mut self, chains: &[(u16, u32)]) {
        let Some(((last, written), before)) = chains.split_last() else { return };
        let next = self.queue.next_used();
        if self.is_usable() {
            for ((head, written), place) in before.iter().zip(0u16..) {
                let place = u64::from(next.wrapping_add(place) & (self.queue.size() - 1));
                // Used elements follow flags and index, 8 bytes each (2.7.8).
                let at = GuestAddress(self.queue.used_ring() + 4 + 8 * place);
                let element = [u32::from(*head).to_le_bytes(), written.to_le_bytes()].concat();
                let taken = self.taken.get_mut(usize::from(*head)).is_some_and(std::mem::take);
                if !taken {
                    return;
                }
                self.in_flight -= 1;
                if let Err(error) = self.ram.write_slice(&element, at) {
                    return self.fail(&error.to_string());
                }
            }
            self.queue.set_next_used(next.wrapping_add(before.len() as u16));
        }
        self.complete(*last, *written);
    }

    /// Undoes the pop of chain `head`, the last one popped: it comes out again, read anew. For a device that must come
    /// to rest while it cannot finish a request. Ignored if the queue was reset or broken since.
    pub fn put_back(&mut self, head: u16) {
        let taken = self.taken.get_mut(usize::from(head)).is_some_and(std::mem::take);
        if taken {
            self.in_flight -= 1;
            self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
        }
    }

    /// Interrupts the driver for what was completed since the last call, if it wants that. The core calls this after
    /// each callback; a device does so only to have the interrupt earlier. True if it did.
    pub fn notify(&mut self) -> bool {
        if !std::mem::take(&mut self.completed) || !self.is_usable() {
            return false;
        }
        match self.interrupt_wanted() {
            Ok(true) => {
                self.notifier.used(self.index);
                return true;
            }
            Ok(false) => {}
            Err(error) => self.fail(&error.to_string()),
        }
        false
    }

    fn interrupt_wanted(&mut self) -> Result<bool, Broken> {
        // The used index must be visible before the driver's wishes are looked at (2.7.7.2).
        fence(Ordering::SeqCst);
        let wish = |offset| {
            let at = GuestAddress(self.queue.avail_ring() + offset);
            let value: u16 =
                self.ram.load(at, Ordering::Relaxed).map_err(|error| Broken::Ring(error.to_string()))?;
            Ok::<_, Broken>(u16::from_le(value))
        };
        if !self.queue.event_idx_enabled() {
            return Ok(u32::from(wish(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        // used_event is behind the ring. The crate would count what was completed together as one.
        let event = wish(4 + 2 * u64::from(self.queue.size()))?;
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.considered, new);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Declares the queue broken by the driver: nothing comes out of it or goes into it until a reset, and the core
    /// asks the driver for that one. For what makes going on pointless; most bad requests deserve an error answer.
    pub fn fail(&mut self, why: &str) {
        if !self.broken {
            guest_warn!("queue {} is broken: {why}", self.index);
            self.broken = true;
        }
    }

    /// Lets `chains` come out before [`Virtqueue::pop`] pauses.
    pub(super) fn allow(&mut self, chains: usize) {
        self.budget = chains;
        self.exhausted = false;
    }

    /// A pop was refused because the allowance was used up.
    pub(super) fn wants_more(&self) -> bool {
        self.exhausted && self.is_usable()
    }
}

/// A chain's descriptors, each read once. Ends early where the chain leaves the rules: the last one then
/// promises more.
struct Descriptors<'a> {
    ram: &'a GuestRam,
    table: GuestAddress,
    size: u32,
    next: Option<u32>,
    /// Descriptors that may still come: a loop ends.
    left: u32,
    indirect: bool,
}

impl<'a> Descriptors<'a> {
    fn of(queue: &'a Virtqueue, head: u16) -> Self {
        let (table, size) = (GuestAddress(queue.queue.desc_table()), queue.queue.size().into());
        Self { ram: &queue.ram, table, size, next: Some(head.into()), left: size, indirect: false }
    }
}

impl Iterator for Descriptors<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            let index = self.next.take().filter(|index| *index < self.size)?;
            self.left = self.left.checked_sub(1)?;
            let at = self.table.0.checked_add(16 * u64::from(index))?;
            let descriptor: Descriptor = self.ram.read_obj(GuestAddress(at)).ok()?;
            if !descriptor.refers_to_indirect_table() {
                self.next = descriptor.has_next().then(|| descriptor.next().into());
                return Some(descriptor);
            }
            // 2.7.5.3: a table of whole descriptors, no second one in or behind it. WRITE says nothing here.
            if self.indirect || descriptor.has_next() || !descriptor.len().is_multiple_of(16) {
                return None;
            }
            (self.table, self.size) = (descriptor.addr(), descriptor.len() / 16);
            (self.next, self.left, self.indirect) = (Some(0), self.size, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::testing::{CountingNotifier, DriverRing, INDIRECT, NEXT, WRITE, ram};
    use super::*;

    const DATA: u64 = 0x8000;

    fn ring(event_idx: bool) -> (DriverRing, Virtqueue, Arc<CountingNotifier>) {
        let ram = ram(0x10000);
        let notifier = Arc::new(CountingNotifier::default());
        let ring = DriverRing::new(&ram, 0x1000, 8);
        let queue = ring.virtqueue(notifier.clone(), event_idx);
        (ring, queue, notifier)
    }

    #[test]
    fn requests_go_round_and_round_direct_and_indirect() {
        for event_idx in [false, true] {
            let (mut ring, mut queue, notifier) = ring(event_idx);
            for round in 0..70_000u32 {
                let head = if round % 2 == 0 {
                    ring.add(&[(DATA, 4), (DATA + 8, 0)], &[(DATA + 16, 2), (DATA + 32, 2)])
                } else {
                    ring.add_indirect(DATA + 64, &[(DATA, 4)], &[(DATA + 16, 2), (DATA + 32, 2)])
                };
                if event_idx {
                    ring.set_used_event(round as u16);
                }
                let mut chain = queue.pop().unwrap();
                assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (head, 4, 4));
                assert!(queue.pop().is_none());
                let mut word = [0; 4];
                chain.readable.read_exact(&mut word).unwrap();
                chain.writable.write_all(b"back").unwrap();
                queue.complete(head, 4);
                queue.notify();
                queue.notify();
                assert_eq!(ring.used(), Some((head, 4)));
                assert_eq!(notifier.used_count(), round as usize + 1);
            }
            assert_eq!((queue.in_flight(), ring.free()), (0, 8));
        }
    }

    #[test]
    fn interrupts_and_kicks_come_only_where_wanted() {
        let (mut ring, mut queue, notifier) = ring(false);
        ring.set_no_interrupt(true);
        assert!(ring.wants_kick(0, false));
        ring.add(&[(DATA, 1)], &[]);
        assert!(queue.has_work());
        let chain = queue.pop().unwrap();
        assert!(!ring.wants_kick(0, false), "the device is looking");
        assert!(queue.pop().is_none());
        assert!(ring.wants_kick(0, false));
        queue.complete(chain.head, 0);
        queue.notify();
        assert_eq!(notifier.used_count(), 0);

        let (mut ring, mut queue, notifier) = self::ring(true);
        ring.set_used_event(1);
        for expect in [0, 1, 1] {
            let old = ring.available();
            ring.add(&[(DATA, 1)], &[]);
            assert!(ring.wants_kick(old, true));
            let old = ring.available();
            let chain = queue.pop().unwrap();
            ring.add(&[(DATA, 1)], &[]);
            assert!(!ring.wants_kick(old, true), "the device is looking");
            let second = queue.pop().unwrap();
            assert!(queue.pop().is_none());
            queue.complete(chain.head, 0);
            queue.complete(second.head, 0);
            queue.notify();
            ring.used().unwrap();
            ring.used().unwrap();
            assert_eq!(notifier.used_count(), expect.max(1));
        }
    }

    #[test]
    fn what_breaks_the_rules_breaks_the_queue_until_reset() {
        type Break = fn(&mut DriverRing);
        let breaks: [(&str, Break); 12] = [
            ("loop", |r| r.write_descriptor(0, DATA, 1, NEXT, 0)),
            ("next out of table", |r| r.write_descriptor(0, DATA, 1, NEXT, 8)),
            ("not RAM", |r| r.write_descriptor(0, 0xffff, 2, 0, 0)),
            ("address wraps", |r| r.write_descriptor(0, u64::MAX, 2, 0, 0)),
            ("huge", |r| r.write_descriptor(0, 0, u32::MAX, 0, 0)),
            ("4 GiB in all", |r| {
                r.write_descriptor(0, 0, 0x1000, NEXT, 1);
                r.write_descriptor(1, 0, 0xffff_f000, 0, 0);
            }),
            ("read after write", |r| {
                r.write_descriptor(0, DATA, 0, NEXT | WRITE, 1);
                r.write_descriptor(1, DATA, 1, 0, 0);
            }),
            ("indirect in indirect", |r| {
                r.write_descriptor(0, DATA, 16, INDIRECT, 0);
                r.write_raw(DATA, DATA + 16, 16, INDIRECT, 0);
                r.write_raw(DATA + 16, DATA, 1, 0, 0);
            }),
            ("indirect table of odd length", |r| r.write_descriptor(0, DATA, 17, INDIRECT, 0)),
            ("empty indirect table", |r| r.write_descriptor(0, DATA, 0, INDIRECT, 0)),
            ("indirect table not in RAM", |r| r.write_descriptor(0, 0xfff8, 32, INDIRECT, 0)),
            ("too long", |r| {
                for i in 0..1025 {
                    r.write_raw(0x4000 + 16 * i, DATA, 1, NEXT, i as u16 + 1);
                }
                r.write_descriptor(0, 0x4000, 16 * 1026, INDIRECT, 0);
            }),
        ];
        for (name, do_break) in breaks {
            let (mut ring, mut queue, _) = ring(true);
            do_break(&mut ring);
            ring.offer(0);
            assert!(queue.pop().is_none() && queue.is_broken(), "{name}");
            ring.write_descriptor(1, DATA, 1, 0, 0);
            ring.offer(1);
            assert!(queue.pop().is_none(), "{name}: stays broken");
            let mut ring = DriverRing::new(&queue.ram.clone(), 0x1000, 8);
            assert!(queue.enable(&ring.setup(), Position::default(), false));
            ring.add(&[(DATA, 1)], &[]);
            assert!(queue.pop().is_some(), "{name}: works after a reset");
        }
    }

    #[test]
    fn a_chain_cannot_be_taken_twice_nor_the_index_run_ahead() {
        let (mut ring, mut queue, _) = ring(false);
        let head = ring.add(&[(DATA, 1)], &[]);
        ring.offer(head);
        assert!(queue.pop().is_some());
        assert!(queue.pop().is_none() && queue.is_broken());
        queue.complete(head, 0);
        assert_eq!((queue.in_flight(), ring.used()), (0, None));

        for bad in [8, u16::MAX] {
            let (mut ring, mut queue, _) = self::ring(false);
            ring.offer(bad);
            assert!(queue.pop().is_none() && queue.is_broken(), "head {bad}");
        }
        let (mut ring, mut queue, _) = self::ring(false);
        ring.set_available(9);
        assert!(queue.pop().is_none() && queue.is_broken());
    }

    #[test]
    fn what_was_put_back_comes_out_again_in_order() {
        for event_idx in [false, true] {
            let (mut ring, mut queue, _) = ring(event_idx);
            let heads = [ring.add(&[(DATA, 1)], &[]), ring.add(&[(DATA, 2)], &[])];
            let first = queue.pop().unwrap();
            queue.put_back(first.head);
            queue.put_back(first.head);
            assert_eq!((queue.in_flight(), queue.position().next_available), (0, 0));
            let again: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|chain| chain.head).collect();
            assert_eq!(again, heads);
            queue.complete(heads[0], 0);
            assert_eq!(ring.used(), Some((heads[0], 0)));
        }
    }

    #[test]
    fn what_is_completed_together_comes_at_once_and_interrupts_wherever_the_event_lies() {
        for event_idx in [false, true] {
            let (mut ring, mut queue, notifier) = ring(event_idx);
            for round in 0..30_000u16 {
                let heads = [(); 3].map(|()| ring.add(&[], &[(DATA, 1)]));
                let [one, two, three] = heads.map(|_| queue.pop().unwrap().head);
                ring.set_used_event(round.wrapping_mul(3).wrapping_add(round % 3));
                queue.complete_together(&[(one, 1), (two, 2), (three, 3)]);
                queue.notify();
                assert_eq!(notifier.used_count(), usize::from(round) + 1);
                let used = [(); 3].map(|()| ring.used().unwrap());
                assert_eq!(used, [(one, 1), (two, 2), (three, 3)]);
            }
            let heads = [ring.add(&[], &[(DATA, 1)]), ring.add(&[], &[(DATA, 1)])];
            queue.pop().unwrap();
            queue.complete_together(&[]);
            queue.complete_together(&[(heads[1], 1), (heads[0], 1)]);
            assert_eq!((ring.used(), queue.in_flight()), (None, 1), "one of them is not the device's");
            queue.disable();
            queue.complete_together(&[(heads[0], 1), (heads[0], 1)]);
            assert_eq!((ring.used(), queue.in_flight()), (None, 0));
        }
    }

    #[test]
    fn completions_after_a_reset_go_nowhere() {
        let (mut ring, mut queue, notifier) = ring(false);
        let head = ring.add(&[(DATA, 1)], &[]);
        assert!(queue.pop().is_some());
        queue.disable();
        queue.complete(head, 0);
        queue.complete(u16::MAX, 0);
        queue.notify();
        assert_eq!((ring.used(), notifier.used_count()), (None, 0));
    }

    #[test]
    fn rings_that_cannot_be_are_refused() {
        let (ring, mut queue, _) = ring(false);
        let good = ring.setup();
        for setup in [
            Setup { size: 0, ..good },
            Setup { size: 3, ..good },
            Setup { size: 16, ..good },
            Setup { descriptors: 0x1008, ..good },
            Setup { descriptors: 0xfff0, ..good },
            Setup { available: 0, ..good },
            Setup { available: 0xfffe, ..good },
            Setup { used: u64::MAX - 3, ..good },
        ] {
            assert!(!queue.enable(&setup, Position::default(), false), "{setup:x?}");
            assert!(queue.pop().is_none());
            assert_eq!(queue.queue.max_size(), 8);
        }
        assert!(queue.enable(&good, Position::default(), false));
    }

    #[test]
    fn an_allowance_keeps_a_busy_driver_from_holding_the_worker() {
        let (mut ring, mut queue, _) = ring(true);
        for _ in 0..3 {
            ring.add(&[(DATA, 1)], &[]);
        }
        queue.allow(2);
        assert_eq!(std::iter::from_fn(|| queue.pop()).count(), 2);
        assert!(queue.wants_more());
        queue.allow(2);
        assert_eq!(std::iter::from_fn(|| queue.pop()).count(), 1);
        assert!(!queue.wants_more());
    }
}
