//! The driver's side of a virtqueue, for tests of devices and transports, inside and outside this crate.
//!
//! [`DriverRing`] builds well-formed requests; its raw half writes whatever a hostile driver would.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::queue::{Notifier, Position, Setup, Virtqueue};
use crate::memory::GuestRam;

/// VIRTQ_DESC_F_NEXT
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT
pub const INDIRECT: u16 = 4;

/// Guest RAM of `size` bytes at address 0.
///
/// # Panics
/// If the host has not got it.
pub fn ram(size: usize) -> Arc<GuestRam> {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), size)]).expect("memory for a test"))
}

/// Counts what a device tells its driver.
#[derive(Debug, Default)]
pub struct CountingNotifier {
    used: AtomicUsize,
    config: AtomicUsize,
}

impl CountingNotifier {
    /// Used-buffer interrupts so far, of all queues.
    pub fn used_count(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    /// Configuration interrupts so far.
    pub fn config_count(&self) -> usize {
        self.config.load(Ordering::SeqCst)
    }
}

impl Notifier for CountingNotifier {
    fn used(&self, _: usize) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

/// Guest address of the first ring that [`queues`] lays out; each of the others is [`RING`] further.
pub const RINGS: u64 = 0x1000;
/// From one ring of [`queues`] to the next.
pub const RING: u64 = 0x400;

/// The device's side of a device's queues, without a core: for whoever fills rings with any content. Each has 16 descriptors, its
/// available ring 0x100 bytes behind them, and its used ring 0x200. `ram` is zeroed. `most` is what the device offers of each.
///
/// # Panics
/// If the rings do not fit in RAM.
pub fn queues(ram: &Arc<GuestRam>, most: &[u16], event_idx: bool) -> Vec<Virtqueue> {
    let end = ram.last_addr().0 as usize + 1;
    ram.write_slice(&vec![0; end], GuestAddress(0)).expect("RAM at 0");
    let notifier = Arc::new(CountingNotifier::default());
    let queue = |(index, most): (usize, &u16)| {
        let mut queue = Virtqueue::new(ram.clone(), notifier.clone(), index, *most);
        let descriptors = RINGS + RING * index as u64;
        let (available, used) = (descriptors + 0x100, descriptors + 0x200);
        let setup = Setup { size: 16, ready: true, descriptors, available, used };
        assert!(queue.enable(&setup, Position::default(), event_idx), "the ring is in RAM");
        queue
    };
    most.iter().enumerate().map(queue).collect()
}

/// A driver's virtqueue: descriptor table, available ring and used ring, one behind the other from `base`.
#[derive(Debug)]
pub struct DriverRing {
    ram: Arc<GuestRam>,
    base: u64,
    size: u16,
    available: u16,
    used: u16,
    free: VecDeque<u16>,
    /// By head: the descriptors of a chain that the device has.
    chains: Vec<Vec<u16>>,
}

impl DriverRing {
    /// An empty ring of `size` descriptors at guest address `base` (a multiple of 16), in zeroed memory.
    ///
    /// # Panics
    /// If it does not fit in RAM.
    pub fn new(ram: &Arc<GuestRam>, base: u64, size: u16) -> Self {
        let ring = Self {
            ram: ram.clone(),
            base,
            size,
            available: 0,
            used: 0,
            free: (0..size).collect(),
            chains: vec![Vec::new(); usize::from(size)],
        };
        let zeroes = vec![0; (ring.end() - base) as usize];
        ram.write_slice(&zeroes, GuestAddress(base)).expect("the ring is in RAM");
        ring
    }

    /// The first address behind the ring.
    pub fn end(&self) -> u64 {
        self.used_at() + 6 + 8 * u64::from(self.size)
    }

    /// Guest address of the available ring.
    pub fn available_at(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    /// Guest address of the used ring.
    pub fn used_at(&self) -> u64 {
        (self.available_at() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// What the driver tells the device of the ring.
    pub fn setup(&self) -> Setup {
        Setup {
            size: self.size,
            ready: true,
            descriptors: self.base,
            available: self.available_at(),
            used: self.used_at(),
        }
    }

    /// The device's side of this ring, enabled, without a core: for tests of one device's callbacks.
    ///
    /// # Panics
    /// If the ring is not in RAM.
    pub fn virtqueue(&self, notifier: Arc<dyn Notifier>, event_idx: bool) -> Virtqueue {
        let mut queue = Virtqueue::new(self.ram.clone(), notifier, 0, self.size);
        assert!(queue.enable(&self.setup(), Position::default(), event_idx), "the ring is in RAM");
        queue
    }

    /// Offers a request of `readable` and `writable` parts (guest address, bytes); returns its head.
    ///
    /// # Panics
    /// If it has no parts, or the descriptors do not suffice.
    pub fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let parts = parts(readable, writable);
        assert!(!parts.is_empty() && parts.len() <= self.free.len(), "descriptors for {} parts", parts.len());
        let indices: Vec<u16> = self.free.drain(..parts.len()).collect();
        for (i, (address, len, flags)) in parts.iter().enumerate() {
            let next = indices.get(i + 1);
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(indices[i], *address, *len, flags, next.copied().unwrap_or(0));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.offer(head);
        head
    }

    /// [`DriverRing::add`] through an indirect table written at guest address `table`.
    ///
    /// # Panics
    /// If no descriptor is free, or the table is not in RAM.
    pub fn add_indirect(&mut self, table: u64, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let parts = parts(readable, writable);
        for (i, (address, len, flags)) in parts.iter().enumerate() {
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            let at = table + 16 * i as u64;
            self.write_raw(at, *address, *len, flags | more, i as u16 + 1);
        }
        let head = self.free.pop_front().expect("a free descriptor");
        self.write_descriptor(head, table, 16 * parts.len() as u32, INDIRECT, 0);
        self.chains[usize::from(head)] = vec![head];
        self.offer(head);
        head
    }

    /// The next request that the device has given back: its head and how many bytes it wrote. Frees its descriptors.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.ram.load(GuestAddress(self.used_at() + 2), Ordering::Acquire).ok()?;
        if index == self.used {
            return None;
        }
        let at = self.used_at() + 4 + 8 * u64::from(self.used % self.size);
        let [head, len]: [u32; 2] = self.ram.read_obj(GuestAddress(at)).ok()?;
        self.used = self.used.wrapping_add(1);
        let head = head as u16;
        let freed = self.chains.get_mut(usize::from(head)).map(std::mem::take).unwrap_or_default();
        self.free.extend(freed);
        Some((head, len))
    }

    /// Waits until the device gives a request back.
    ///
    /// # Panics
    /// If none comes within `seconds`.
    pub fn wait_used(&mut self, seconds: u64) -> (u16, u32) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
        loop {
            if let Some(used) = self.used() {
                return used;
            }
            assert!(std::time::Instant::now() < end, "the device did not answer within {seconds} s");
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    /// Whether the device wants a kick for what was offered since the available index was `old`.
    pub fn wants_kick(&self, old: u16, event_idx: bool) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        let load = |at| self.ram.load::<u16>(GuestAddress(at), Ordering::SeqCst).unwrap_or(0);
        if event_idx {
            let event = load(self.used_at() + 4 + 8 * u64::from(self.size));
            self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(old)
        } else {
            load(self.used_at()) & 1 == 0
        }
    }

    /// The available index, as the driver last wrote it.
    pub fn available(&self) -> u16 {
        self.available
    }

    /// Descriptors that no request uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Asks for no interrupts (VIRTQ_AVAIL_F_NO_INTERRUPT), or for them.
    pub fn set_no_interrupt(&self, on: bool) {
        self.poke(self.available_at(), u16::from(on));
    }

    /// Asks for an interrupt when the used index passes `index` (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.poke(self.available_at() + 4 + 2 * u64::from(self.size), index);
    }

    /// Raw: puts `head` in the available ring, whatever it is, and moves the index.
    pub fn offer(&mut self, head: u16) {
        self.poke(self.available_at() + 4 + 2 * u64::from(self.available % self.size), head);
        self.set_available(self.available.wrapping_add(1));
    }

    /// Raw: sets the available index.
    pub fn set_available(&mut self, index: u16) {
        self.available = index;
        let at = GuestAddress(self.available_at() + 2);
        self.ram.store(index, at, Ordering::Release).expect("the ring is in RAM");
    }

    /// Raw: writes descriptor `index` of the table.
    pub fn write_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.write_raw(self.base + 16 * u64::from(index), address, len, flags, next);
    }

    /// Raw: writes a descriptor anywhere in RAM.
    ///
    /// # Panics
    /// If `at` is not in RAM.
    pub fn write_raw(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.write_slice(&bytes, GuestAddress(at)).expect("the descriptor is in RAM");
    }

    fn poke(&self, at: u64, value: u16) {
        self.ram.store(value, GuestAddress(at), Ordering::SeqCst).expect("the ring is in RAM");
    }
}

fn parts(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Vec<(u64, u32, u16)> {
    let readable = readable.iter().map(|(address, len)| (*address, *len, 0));
    readable.chain(writable.iter().map(|(address, len)| (*address, *len, WRITE))).collect()
}
