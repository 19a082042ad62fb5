//! [`Guest`]: RAM between guard pages, one virtio device, and a driver that follows the specification.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};
use vmm_monitor::bus::{Device, Effect};
use vmm_monitor::memory::{GuestRam, Memory};
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::mmio::Mmio;
use vmm_monitor::virtio::queue::Setup;
use vmm_monitor::virtio::testing::DriverRing;
use vmm_monitor::vm::Vm;
use vmm_monitor::vm::fake::FakeVm;

use crate::on_pci::OnPci;

/// How guests of this thread find their devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Mmio,
    Pci,
}

thread_local! {
    static TRANSPORT: Cell<Transport> = const { Cell::new(Transport::Mmio) };
}

/// Runs `test` with each transport.
pub fn with_each_transport(mut test: impl FnMut(Transport)) {
    for transport in [Transport::Mmio, Transport::Pci] {
        TRANSPORT.set(transport);
        test(transport);
    }
    TRANSPORT.set(Transport::Mmio);
}

/// Runs `test` with guests that find their devices on PCI.
pub fn on_pci(test: impl FnOnce()) {
    TRANSPORT.set(Transport::Pci);
    test();
    TRANSPORT.set(Transport::Mmio);
}

/// Where the device is.
pub const BASE: u64 = 0xfe00_0000;
const GSI: u32 = 16;
/// Guest address of the first ring; each has [`RING_ROOM`].
pub const RINGS: u64 = 0x1000;
pub const RING_ROOM: u64 = 0x3000;
/// Guest address of memory that tests use for buffers.
pub const DATA: u64 = 0x4_0000;
/// End of the low RAM; there is a hole, then more RAM.
pub const LOW: u64 = 0x10_0000;
/// Guest address of the high RAM.
pub const HIGH: u64 = 0x20_0000;
/// Bytes of the high RAM.
pub const HIGH_SIZE: u64 = 0x1_0000;

pub const STATUS: u64 = 0x70;
pub const QUEUE_NOTIFY: u64 = 0x50;
pub const NEEDS_RESET: u32 = 64;
/// VIRTIO_F_RING_EVENT_IDX
pub const EVENT_IDX: u64 = 1 << 29;

const PAGE: usize = 4096;
const CANARY: u8 = 0xa5;

/// A RAM region between two pages of a known pattern and two inaccessible ones: a stray write shows, a stray read kills
/// the test.
struct Guarded {
    start: *mut u8,
    size: usize,
}

impl Guarded {
    fn new(size: usize) -> Self {
        let all = size + 4 * PAGE;
        // SAFETY: a new private mapping at an address of the kernel's choice; then, inside it, what is not guard.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = libc::mmap(std::ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let start = start.cast::<u8>();
            let open = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(start.add(PAGE).cast(), all - 2 * PAGE, open), 0);
            start.add(PAGE).write_bytes(CANARY, PAGE);
            start.add(2 * PAGE + size).write_bytes(CANARY, PAGE);
            Self { start, size }
        }
    }

    fn region(&self, base: u64) -> GuestRegionMmap<()> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the range is inside the mapping, which `Guest` keeps longer than its RAM.
        let region = unsafe { MmapRegion::build_raw(self.start.add(2 * PAGE), self.size, prot, flags) };
        GuestRegionMmap::new(region.unwrap(), GuestAddress(base)).unwrap()
    }

    fn is_intact(&self) -> bool {
        [PAGE, 2 * PAGE + self.size].iter().all(|offset| {
            // SAFETY: the two canary pages of the mapping, which nobody else refers to.
            let canary = unsafe { std::slice::from_raw_parts(self.start.add(*offset), PAGE) };
            canary.iter().all(|byte| *byte == CANARY)
        })
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the whole mapping made in `new`; the RAM made of it is gone, as `Guest` says.
        unsafe { libc::munmap(self.start.cast(), self.size + 4 * PAGE) };
    }
}

/// A guest with one device.
pub struct Guest {
    /// The device, by the register numbers of virtio over MMIO.
    pub device: Box<dyn Device>,
    transport: Transport,
    pub vm: Arc<FakeVm>,
    pub rings: Vec<DriverRing>,
    /// Negotiated.
    pub features: u64,
    // Dropped after the device, and before the mappings.
    pub ram: Arc<GuestRam>,
    guards: Vec<Guarded>,
}

/// What survives when a device is replaced: memory, and the driver's idea of its rings.
pub struct Rest {
    rings: Vec<DriverRing>,
    features: u64,
    ram: Arc<GuestRam>,
    guards: Vec<Guarded>,
}

impl Guest {
    /// A guest whose device nobody has touched.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let guards = vec![Guarded::new(LOW as usize), Guarded::new(HIGH_SIZE as usize)];
        let regions = vec![guards[0].region(0), guards[1].region(HIGH)];
        let ram = Arc::new(GuestRam::from_regions(regions).unwrap());
        Self::on(Rest { rings: Vec::new(), features: 0, ram, guards }, device)
    }

    /// A guest whose memory other processes can map.
    pub fn shared(device: Box<dyn VirtioDevice>) -> Self {
        let memory = Memory::new(&"4M,backing=memfd".parse().unwrap()).unwrap();
        Self::on(
            Rest { rings: Vec::new(), features: 0, ram: memory.ram().clone(), guards: Vec::new() },
            device,
        )
    }

    /// A fresh device in the place of another, with the guest's memory as it was.
    pub fn on(rest: Rest, device: Box<dyn VirtioDevice>) -> Self {
        let (vm, transport) = (Arc::new(FakeVm::default()), TRANSPORT.get());
        let device: Box<dyn Device> = match transport {
            Transport::Mmio => {
                let name = "virtio-test";
                let dynamic: Arc<dyn Vm> = vm.clone();
                Box::new(Mmio::new(&dynamic, &rest.ram, BASE, GSI, name, device, &Arc::default()).unwrap())
            }
            Transport::Pci => Box::new(OnPci::new(&vm, &rest.ram, device)),
        };
        let Rest { rings, features, ram, guards } = rest;
        Self { device, transport, vm, rings, features, ram, guards }
    }

    /// Takes the device away.
    pub fn unplug(self) -> Rest {
        drop(self.device);
        Rest { rings: self.rings, features: self.features, ram: self.ram, guards: self.guards }
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.write_bytes(offset, &value.to_le_bytes());
    }

    /// A write of any width. A device that wants a worker gets it, as a machine gives it.
    pub fn write_bytes(&mut self, offset: u64, data: &[u8]) {
        if self.device.write(offset, data) == Effect::Serve {
            self.device.resume();
        }
    }

    /// Resets the device, and waits until that is over (2.4.2).
    pub fn reset(&mut self) {
        self.write(STATUS, 0);
        self.wait_for("a reset is over", |guest| guest.read(STATUS) == 0);
    }

    /// Waits until `done`.
    pub fn wait_for(&mut self, what: &str, done: impl Fn(&mut Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Instant::now() < end, "not within 20 s: {what}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Brings the device to rest.
    pub fn pause(&mut self) {
        self.device.pause(Instant::now() + Duration::from_secs(20)).unwrap();
    }

    /// Undoes [`Guest::pause`].
    pub fn resume(&mut self) {
        self.device.resume();
    }

    /// Waits until no callback is under way, so that what has not happened by now does not happen.
    pub fn settle(&mut self) {
        self.pause();
        self.resume();
    }

    /// The configuration space's first `N` bytes.
    pub fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.device.read(0x100 + offset, &mut data);
        data
    }

    pub fn interrupts(&self) -> usize {
        match self.transport {
            Transport::Mmio => self.vm.line(GSI).map_or(0, |line| line.count()),
            Transport::Pci => self.vm.messages(),
        }
    }

    /// The device's features.
    pub fn offered(&mut self) -> u64 {
        let mut page = |i| {
            self.write(0x14, i);
            u64::from(self.read(0x10))
        };
        page(0) | page(1) << 32
    }

    /// Resets and initializes the device as 3.1.1 says, with all offered features but `without`.
    pub fn start(&mut self, without: u64) {
        self.negotiate(without);
        self.set_up_and_run();
    }

    /// [`Guest::start`] up to FEATURES_OK.
    pub fn negotiate(&mut self, without: u64) {
        self.reset();
        self.agree(without);
    }

    /// [`Guest::negotiate`] with a device that is as built.
    pub fn agree(&mut self, without: u64) {
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        self.features = self.offered() & !without;
        for page in 0..2 {
            self.write(0x24, page);
            self.write(0x20, (self.features >> (32 * page)) as u32);
        }
        self.write(STATUS, 11);
        assert_eq!(self.read(STATUS), 11, "FEATURES_OK stands");
    }

    /// [`Guest::start`] from FEATURES_OK on.
    pub fn set_up_and_run(&mut self) {
        self.set_up();
        self.write(STATUS, 15);
        assert_eq!(self.read(STATUS) & 15, 15, "the device runs");
    }

    /// Sets up all queues, with new rings.
    pub fn set_up(&mut self) {
        self.rings.clear();
        for index in 0.. {
            self.write(0x30, index);
            let max = self.read(0x34);
            if max == 0 {
                break;
            }
            let ring = DriverRing::new(&self.ram, RINGS + RING_ROOM * u64::from(index), max.min(64) as u16);
            self.set_up_queue(index, &ring.setup());
            assert_eq!(self.read(0x44), 1, "queue {index} is ready");
            self.rings.push(ring);
        }
    }

    /// Tells the device where queue `index` is, and to enable it.
    pub fn set_up_queue(&mut self, index: u32, setup: &Setup) {
        self.write(0x30, index);
        self.write(0x38, setup.size.into());
        for (register, address) in [(0x80, setup.descriptors), (0x90, setup.available), (0xa0, setup.used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// Kicks `queue` if the device wants to know of what was offered since `old`. True if it did.
    pub fn kick(&mut self, queue: usize, old: u16) -> bool {
        let wanted = self.rings[queue].wants_kick(old, self.features & EVENT_IDX != 0);
        if wanted {
            self.notify(queue);
        }
        wanted
    }

    /// Writes to the notification register: to a doorbell if there is one, else as an exit.
    pub fn notify(&mut self, queue: usize) {
        if !self.ring(queue as u32) {
            self.write(QUEUE_NOTIFY, queue as u32);
        }
    }

    /// Whether a driver can disable a queue: not on PCI, where that takes VIRTIO_F_RING_RESET.
    pub fn can_disable_queues(&self) -> bool {
        self.transport == Transport::Mmio
    }

    /// Rings the doorbell of `queue`. False if there is none.
    pub fn ring(&self, queue: u32) -> bool {
        let address = match self.transport {
            Transport::Mmio => BASE + QUEUE_NOTIFY,
            Transport::Pci => OnPci::doorbell(queue),
        };
        self.vm.ring(address, queue)
    }

    /// Offers one request on `queue`, kicks, and waits for the answer: the bytes written.
    pub fn request(&mut self, queue: usize, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u32 {
        let old = self.rings[queue].available();
        let head = self.rings[queue].add(readable, writable);
        self.kick(queue, old);
        let (done, written) = self.rings[queue].wait_used(10);
        assert_eq!(done, head);
        written
    }

    pub fn store(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn load(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Fails the test if anything wrote outside guest RAM.
    pub fn check_guards(&self) {
        assert!(self.guards.iter().all(Guarded::is_intact), "a write outside guest RAM");
    }
}
