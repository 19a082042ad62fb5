//! virtio over MMIO (virtio 1.3, 4.2), polled: finding devices, and one queue at a time.
//!
//! A device on another bus would come in by another `devices()`; the queue is the same.

use core::sync::atomic::{AtomicUsize, Ordering, compiler_fence, fence};

/// The monitor's slots (`src/monitor/memory/layout`). An empty one reads as all ones.
const FIRST: u64 = 0xfe00_0000;
const STRIDE: u64 = 0x1000;
const SLOTS: u64 = 18;
const MAGIC: u32 = 0x7472_6976;

// Registers.
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
/// Descriptors, driver's and device's area: low and high half each.
const QUEUE_AREAS: [u64; 3] = [0x80, 0x90, 0xa0];
/// The device's own configuration.
pub const CONFIG: u64 = 0x100;

// Status bits.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// VIRTIO_F_VERSION_1 is bit 0 of the second word of features: all that is asked for.
const VERSION_1: u32 = 1;

/// Descriptors of a queue.
const SIZE: usize = 4;
/// The driver does not want interrupts.
const NO_INTERRUPT: u16 = 1;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Turns of waiting after which a device counts as dead: many seconds.
const PATIENCE: u64 = 1 << 34;

/// A device.
#[derive(Clone, Copy)]
pub struct Device {
    base: u64,
}

/// The devices of a kind, in the order of their slots.
pub fn devices(kind: u32) -> impl Iterator<Item = Device> {
    (0..SLOTS).map(|slot| Device { base: FIRST + slot * STRIDE }).filter(move |device| {
        device.read(0) == MAGIC && device.read(VERSION) == 2 && device.read(DEVICE_ID) == kind
    })
}

/// Makes every device forget the queues, so that none writes into memory that is the kernel's.
pub fn reset_all() {
    [crate::block::KIND, crate::console::KIND]
        .into_iter()
        .flat_map(devices)
        .for_each(|device| device.write(STATUS, 0));
}

impl Device {
    /// Reads a register.
    pub fn read(&self, register: u64) -> u32 {
        // SAFETY: a device's register, which is no memory of ours.
        unsafe { ((self.base + register) as *const u32).read_volatile() }
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: as in `read`.
        unsafe { ((self.base + register) as *mut u32).write_volatile(value) }
    }

    /// Resets the device and sets up its first queues; `start` has to be called after.
    pub fn open<const N: usize>(self) -> Option<[Queue; N]> {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.write(DEVICE_FEATURES_SEL, 1);
        if self.read(DEVICE_FEATURES) & VERSION_1 == 0 {
            return None;
        }
        for (word, features) in [(0, 0), (1, VERSION_1)] {
            self.write(DRIVER_FEATURES_SEL, word);
            self.write(DRIVER_FEATURES, features);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.read(STATUS) & FEATURES_OK == 0 {
            return None;
        }
        let mut queues = [const { Queue::NONE }; N];
        for (index, queue) in queues.iter_mut().enumerate() {
            *queue = Queue::open(self, index as u32)?;
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Some(queues)
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A queue's three areas; the device reads and writes them.
#[repr(C, align(64))]
struct Areas {
    descriptors: [Descriptor; SIZE],
    flags: u16,
    driver_index: u16,
    driver_ring: [u16; SIZE],
    _used_event: u16,
    _pad: [u16; 1],
    device_flags: u16,
    device_index: u16,
    device_ring: [[u32; 2]; SIZE],
}

const NO_AREAS: Areas = Areas {
    descriptors: [Descriptor { address: 0, length: 0, flags: 0, next: 0 }; SIZE],
    flags: 0,
    driver_index: 0,
    driver_ring: [0; SIZE],
    _used_event: 0,
    _pad: [0],
    device_flags: 0,
    device_index: 0,
    device_ring: [[0; 2]; SIZE],
};

/// Room for the queues of four disks and of the console, twice opened if there was a panic.
const MAX_QUEUES: usize = 8;
struct Pool(core::cell::UnsafeCell<[Areas; MAX_QUEUES]>);
// SAFETY: one processor, and each of them is given away once.
unsafe impl Sync for Pool {}
static POOL: Pool = Pool(core::cell::UnsafeCell::new([NO_AREAS; MAX_QUEUES]));
static GIVEN: AtomicUsize = AtomicUsize::new(0);

/// A part of a request: where, how long, and whether the device writes it.
pub type Part = (u64, u32, bool);

/// A queue with one request at a time.
pub struct Queue {
    device: Device,
    index: u32,
    areas: *mut Areas,
    seen: u16,
}

impl Queue {
    const NONE: Self = Self { device: Device { base: 0 }, index: 0, areas: core::ptr::null_mut(), seen: 0 };

    fn open(device: Device, index: u32) -> Option<Self> {
        let number = GIVEN.fetch_add(1, Ordering::Relaxed);
        if number >= MAX_QUEUES {
            return None;
        }
        // SAFETY: inside of the pool.
        let areas = unsafe { POOL.0.get().cast::<Areas>().add(number) };
        device.write(QUEUE_SEL, index);
        if (device.read(QUEUE_SIZE_MAX) as usize) < SIZE {
            return None;
        }
        device.write(QUEUE_SIZE, SIZE as u32);
        // SAFETY: only addresses are taken, and the flags written before the device knows of them.
        let starts = unsafe {
            (*areas).flags = NO_INTERRUPT;
            [
                &raw const (*areas).descriptors as u64,
                &raw const (*areas).flags as u64,
                &raw const (*areas).device_flags as u64,
            ]
        };
        for (register, start) in QUEUE_AREAS.into_iter().zip(starts) {
            device.write(register, start as u32);
            device.write(register + 4, (start >> 32) as u32);
        }
        device.write(QUEUE_READY, 1);
        Some(Self { device, index, areas, seen: 0 })
    }

    /// Gives the device a request of at most [`SIZE`] parts, which must stay where they are until [`Queue::done`].
    pub fn submit(&mut self, parts: &[Part]) {
        let last = parts.len().min(SIZE) - 1;
        for (index, (address, length, write)) in parts.iter().take(SIZE).enumerate() {
            let more = if index < last { NEXT } else { 0 };
            let flags = more | if *write { WRITE } else { 0 };
            let next = (index as u16 + 1) % SIZE as u16;
            // SAFETY: the areas are this queue's; the device reads them after the index.
            unsafe {
                (&raw mut (*self.areas).descriptors[index]).write_volatile(Descriptor {
                    address: *address,
                    length: *length,
                    flags,
                    next,
                });
            }
        }
        // SAFETY: as above. Each request begins at descriptor 0, which is what the ring holds everywhere.
        unsafe {
            fence(Ordering::SeqCst);
            let index = &raw mut (*self.areas).driver_index;
            index.write_volatile(index.read_volatile().wrapping_add(1));
            fence(Ordering::SeqCst);
        }
        self.device.write(QUEUE_NOTIFY, self.index);
    }

    /// Whether the device has answered, and how many bytes it wrote.
    pub fn done(&mut self) -> Option<u32> {
        // SAFETY: the areas are this queue's.
        let index = unsafe { (&raw const (*self.areas).device_index).read_volatile() };
        if index == self.seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let slot = usize::from(self.seen) % SIZE;
        self.seen = self.seen.wrapping_add(1);
        // SAFETY: as above.
        Some(unsafe { (&raw const (*self.areas).device_ring[slot]).read_volatile() }[1])
    }

    /// Waits for the answer; none if the device seems dead.
    pub fn wait(&mut self) -> Option<u32> {
        for _ in 0..PATIENCE {
            if let Some(length) = self.done() {
                compiler_fence(Ordering::SeqCst);
                return Some(length);
            }
            core::hint::spin_loop();
        }
        None
    }
}
