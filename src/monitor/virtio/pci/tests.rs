//! An entropy device, found and driven as virtio 1.3, 4.1 says, and otherwise.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::pci::{Ecam, Memory, Segment};
use crate::state::Saved;
use crate::virtio::doorbells;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{self, DriverRing};
use crate::vm::Msi;
use crate::vm::fake::FakeVm;

mod registers;

const WINDOW: std::ops::Range<u64> = 0xe000_0000..0xe010_0000;
/// Above 4 GiB.
const HIGH: std::ops::Range<u64> = 0x1_4000_0000..0x1_4010_0000;
const GSI: u32 = 17;
const RING: u64 = 0x1000;
const DATA: u64 = 0x8000;
const ACKNOWLEDGE_AND_DRIVER: u64 = 3;
const FEATURES_OK: u64 = 11;
const DRIVER_OK: u64 = 15;

/// A guest with an entropy device as function 1, found and driven as 4.1 says.
struct Guest {
    vm: Arc<FakeVm>,
    ram: Arc<GuestRam>,
    function: Arc<Mutex<Pci>>,
    segment: Arc<Segment>,
    ecam: Ecam,
    memory: Memory,
    /// The structures by their type: offset in the BAR, and length.
    structures: BTreeMap<u8, (u64, u64)>,
    ring: DriverRing,
}

impl Guest {
    fn new() -> Self {
        let vm = Arc::new(FakeVm::default());
        let weak: Weak<FakeVm> = Arc::downgrade(&vm);
        let ram = testing::ram(0x1_0000);
        let place = Place { number: 1, base: WINDOW.start, line: Arc::new(Line::new(weak.clone(), GSI)) };
        let function = Pci::new(weak, &ram, place, "virtio-rng", Box::new(Rng), &Arc::default()).unwrap();
        let function = Arc::new(Mutex::new(function));
        let segment = Arc::new(Segment::new([WINDOW, HIGH]));
        segment.insert(1, function.clone(), WINDOW.start..WINDOW.start + SIZE).unwrap();
        let (ecam, memory) = (Ecam(segment.clone()), Memory { segment: segment.clone(), base: WINDOW.start });
        let ring = DriverRing::new(&ram, RING, 16);
        let mut guest = Self { vm, ram, function, segment, ecam, memory, structures: BTreeMap::new(), ring };
        guest.find();
        guest
    }

    /// Walks the list of capabilities.
    fn find(&mut self) {
        let mut at = self.config(0x34, 1);
        while at != 0 {
            if self.config(at, 1) == u64::from(VENDOR_SPECIFIC) {
                assert_eq!(self.config(at + 4, 1), 0, "the BAR");
                let (offset, length) = (self.config(at + 8, 4), self.config(at + 12, 4));
                assert!(offset + length <= SIZE);
                let kind = self.config(at + 3, 1) as u8;
                // 4.1.4: with what follows the capability itself.
                let more = if [CAP_NOTIFY_CFG, CAP_PCI_CFG].contains(&kind) { 4 } else { 0 };
                assert_eq!(self.config(at + 2, 1), 16 + more, "cap_len of {kind}");
                self.structures.insert(kind, (offset, length));
            }
            at = self.config(at + 1, 1);
        }
        self.set_config(4, 2, 6);
    }

    fn config(&mut self, register: u64, len: usize) -> u64 {
        let mut data = [0xff; 4];
        self.ecam.read(1 << 15 | register, &mut data[..len]);
        u64::from(u32::from_le_bytes(data)) & u64::MAX >> (64 - 8 * len)
    }

    fn set_config(&mut self, register: u64, len: usize, value: u64) {
        self.ecam.write(1 << 15 | register, &value.to_le_bytes()[..len]);
    }

    fn read(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0xff; 8];
        self.memory.read(offset, &mut data[..len]);
        u64::from_le_bytes(data) & u64::MAX >> (64 - 8 * len)
    }

    fn write(&mut self, offset: u64, len: usize, value: u64) {
        if self.memory.write(offset, &value.to_le_bytes()[..len]) == Effect::Serve {
            self.function.lock().unwrap().resume();
        }
    }

    fn wait_for_reset(&mut self) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.read(0x14, 1) != 0 {
            assert!(Instant::now() < end);
        }
    }

    /// From a reset to DRIVER_OK, with these messages for configuration and queue.
    fn start(&mut self, config: u64, queue: u64) {
        self.write(0x14, 1, 0);
        self.wait_for_reset();
        self.write(0x14, 1, ACKNOWLEDGE_AND_DRIVER);
        for page in 0..2 {
            self.write(0x00, 4, page);
            // Without EVENT_IDX, with which an interrupt comes only where the driver asks for it.
            let offered = self.read(0x04, 4) & !(1 << 29);
            self.write(0x08, 4, page);
            self.write(0x0c, 4, offered);
            assert_eq!(self.read(0x0c, 4), offered, "what was accepted reads back");
        }
        self.write(0x14, 1, FEATURES_OK);
        self.write(0x10, 2, config);
        self.ring = DriverRing::new(&self.ram, RING, 16);
        let setup = self.ring.setup();
        self.write(0x16, 2, 0);
        self.write(0x18, 2, setup.size.into());
        self.write(0x1a, 2, queue);
        self.write(0x20, 4, setup.descriptors & 0xffff_ffff);
        self.write(0x24, 4, setup.descriptors >> 32);
        self.write(0x28, 8, setup.available);
        self.write(0x30, 8, setup.used);
        self.write(0x1c, 2, 1);
        self.write(0x14, 1, DRIVER_OK);
        assert_eq!(self.read(0x14, 1), DRIVER_OK);
    }

    /// One request, kicked by its doorbell.
    fn request(&mut self, bar: u64) {
        self.ring.add(&[], &[(DATA, 16)]);
        let (offset, _) = self.structures[&CAP_NOTIFY_CFG];
        if !self.vm.ring(bar + offset, 0) {
            self.write(bar - WINDOW.start + offset, 2, 0);
        }
        assert_eq!(self.ring.wait_used(10).1, 16);
    }

    fn vector(&mut self, index: u64, message: Msi) {
        let at = TABLE + index * 16;
        self.write(at, 8, message.address);
        self.write(at + 8, 4, message.data.into());
        self.write(at + 12, 4, 0);
    }

    fn msix(&mut self, control: u16) {
        let at = u64::from(self.function.lock().unwrap().msix_capability);
        self.set_config(at + 2, 2, control.into());
    }

    fn wait(&self, mut what: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !what(self) {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

fn message(number: u32) -> Msi {
    Msi { address: 0xfee0_0000, data: number }
}

#[test]
fn a_driver_finds_the_structures_and_gets_its_answers_by_messages() {
    let mut guest = Guest::new();
    assert_eq!((guest.config(0, 4), guest.config(0x2c, 4)), (0x1044_1af4, 0x0044_1af4));
    let kinds: Vec<_> = guest.structures.keys().copied().collect();
    assert_eq!(kinds, [CAP_COMMON_CFG, CAP_NOTIFY_CFG, CAP_ISR_CFG, CAP_PCI_CFG], "it has no configuration");
    guest.msix(msix::ENABLE);
    guest.vector(0, message(0x30));
    guest.vector(1, message(0x31));
    guest.start(0, 1);
    assert_eq!(guest.read(ISR, 1), 0, "nothing changed by DRIVER_OK");
    for _ in 0..3 {
        guest.request(WINDOW.start);
        let mut sent = Vec::new();
        guest.wait(|guest| {
            sent = guest.vm.take_messages();
            !sent.is_empty()
        });
        assert_eq!(sent, [message(0x31)]);
    }
    assert_eq!((guest.read(ISR, 1), guest.vm.levels()), (0, vec![]), "neither ISR nor line");
    // A reset takes the messages away.
    guest.write(0x14, 1, 0);
    assert_eq!((guest.read(0x10, 2), guest.read(0x1a, 2)), (0xffff, 0xffff));
    guest.start(0xffff, 0xffff);
    guest.request(WINDOW.start);
    assert_eq!(guest.vm.take_messages(), [], "the driver polls");
}

#[test]
fn a_queue_takes_another_message_while_it_runs_and_message_control_takes_four_bytes() {
    let mut guest = Guest::new();
    let at = u64::from(guest.function.lock().unwrap().msix_capability);
    guest.set_config(at, 4, u64::from(msix::ENABLE) << 16);
    assert_eq!(guest.config(at + 2, 2), u64::from(msix::ENABLE) | 1, "on, and two vectors");
    guest.vector(0, message(0x30));
    guest.vector(1, message(0x31));
    guest.start(0xffff, 1);
    for (vector, number) in [(1, 0x31), (0, 0x30), (0xffff, 0), (1, 0x31)] {
        guest.write(0x1a, 2, vector);
        guest.request(WINDOW.start);
        if vector == 0xffff {
            continue;
        }
        let mut sent = Vec::new();
        guest.wait(|guest| {
            sent = guest.vm.take_messages();
            !sent.is_empty()
        });
        assert_eq!(sent, [message(number)]);
    }
}

#[test]
fn without_messages_the_line_is_up_until_the_isr_is_read() {
    let mut guest = Guest::new();
    assert_eq!((guest.config(0x3c, 1), guest.config(0x3d, 1)), (GSI.into(), 1));
    guest.start(0xffff, 0xffff);
    guest.request(WINDOW.start);
    guest.wait(|guest| guest.vm.levels() == [(GSI, true)]);
    assert_eq!(guest.config(6, 1) & 8, 8, "the status tells, too");
    assert_eq!((guest.read(ISR, 1), guest.read(ISR, 1)), (1, 0));
    assert_eq!(guest.vm.levels(), [(GSI, true), (GSI, false)]);
    // Not with INTx disabled; it comes when that ends.
    guest.set_config(4, 2, 0x406);
    guest.request(WINDOW.start);
    guest.wait(|guest| guest.function.lock().unwrap().interrupts.holds_line());
    assert_eq!(guest.vm.levels().len(), 2);
    guest.set_config(4, 2, 6);
    assert_eq!(guest.vm.levels()[2..], [(GSI, true)]);
    // Nor once messages are on.
    guest.msix(msix::ENABLE);
    assert_eq!(guest.vm.levels()[3..], [(GSI, false)]);
}

#[test]
fn doorbells_follow_the_memory() {
    let mut guest = Guest::new();
    guest.start(0xffff, 0xffff);
    // A busy queue has one.
    (0..doorbells::EXITS).for_each(|_| guest.request(WINDOW.start));
    assert_eq!(guest.vm.doorbells(), 1);
    let there = WINDOW.start + 4 * SIZE;
    guest.set_config(0x10, 4, there);
    guest.set_config(0x14, 4, 0);
    assert_eq!(guest.vm.doorbells(), 1);
    assert!(!guest.vm.ring(WINDOW.start + NOTIFY, 0));
    assert!(guest.vm.ring(there + NOTIFY, 0));
    guest.request(there);
    let mut status = [0xff];
    guest.memory.read(4 * SIZE + 0x14, &mut status);
    assert_eq!(u64::from(status[0]), DRIVER_OK, "and the device has not noticed");
    guest.set_config(0x10, 4, HIGH.start & 0xffff_ffff);
    guest.set_config(0x14, 4, HIGH.start >> 32);
    assert!(!guest.vm.ring(there + NOTIFY, 0) && guest.vm.doorbells() == 1);
    guest.request(HIGH.start);
    let mut high = Memory { segment: guest.segment.clone(), base: HIGH.start };
    high.read(0x14, &mut status);
    assert_eq!(u64::from(status[0]), DRIVER_OK, "nor above 4 GiB");
}

#[test]
fn the_common_structure_takes_fields_by_their_width_and_says_what_there_is() {
    let mut guest = Guest::new();
    assert_eq!((guest.read(0x12, 2), guest.read(0x16, 2), guest.read(0x18, 2)), (1, 0, 64));
    // A queue that there is not.
    for queue in [1, 7, 0xffff] {
        guest.write(0x16, 2, queue);
        for (offset, len) in [(0x18, 2), (0x1c, 2), (0x1e, 2), (0x20, 8), (0x28, 8), (0x30, 8)] {
            assert_eq!(guest.read(offset, len), 0, "queue {queue}, {offset:#x}");
        }
        assert_eq!(guest.read(0x1a, 2), 0xffff);
        guest.write(0x1a, 2, 0);
        assert_eq!(guest.read(0x1a, 2), 0xffff);
    }
    // Messages that there are not.
    guest.write(0x16, 2, 0);
    for (wanted, got) in [(1, 1), (2, 0xffff), (0, 0), (0xfffe, 0xffff)] {
        for field in [0x10, 0x1a] {
            guest.write(field, 2, wanted);
            assert_eq!(guest.read(field, 2), got);
        }
    }
    // Feature pages above the two that mean something.
    for page in [2, 3, 4, 0x8000_0000, 0xffff_ffff] {
        guest.write(0, 4, page);
        assert_eq!(guest.read(4, 4), 0);
    }
    // Fields of another width, read-only ones, and what lies behind.
    let mut before = [0; 0x38];
    guest.memory.read(0, &mut before);
    for (offset, len) in
        [(0, 2), (0x14, 4), (0x16, 1), (0x18, 4), (0x12, 2), (0x04, 4), (0x15, 1), (0x1e, 2), (0x22, 4)]
    {
        guest.write(offset, len, 0x0101_0101);
    }
    let mut after = [0; 0x38];
    guest.memory.read(0, &mut after);
    assert_eq!(before, after);
    assert_eq!((guest.read(0x38, 4), guest.read(0x34, 8), guest.read(0xfff, 1)), (0, 0, 0));
    guest.write(0x1c, 2, 2);
    guest.write(0x1c, 2, 0xffff);
    assert_eq!(guest.read(0x1c, 2), 0, "queue_enable takes 1 alone");
}

#[test]
fn a_queue_is_frozen_once_the_driver_is_ready() {
    let mut guest = Guest::new();
    guest.start(0xffff, 0xffff);
    let setup = guest.ring.setup();
    for (offset, len) in [(0x18, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)] {
        guest.write(offset, len, 8);
    }
    assert_eq!((guest.read(0x18, 2), guest.read(0x1c, 2)), (setup.size.into(), 1));
    assert_eq!((guest.read(0x20, 8), guest.read(0x30, 8)), (setup.descriptors, setup.used));
    guest.request(WINDOW.start);
}

#[test]
fn configuration_space_has_a_window_to_the_structures() {
    let mut guest = Guest::new();
    let window = u64::from(guest.function.lock().unwrap().window);
    let aim = |guest: &mut Guest, bar, offset, length| {
        guest.set_config(window + 4, 1, bar);
        guest.set_config(window + 8, 4, offset);
        guest.set_config(window + 12, 4, length);
    };
    aim(&mut guest, 0, 0x12, 2);
    assert_eq!(guest.config(window + 16, 2), 1, "num_queues");
    // What is written is what comes there, and not what was read last.
    aim(&mut guest, 0, 0x16, 2);
    guest.set_config(window + 16, 2, 0x1234);
    assert_eq!(guest.read(0x16, 2), 0x1234, "queue_select");
    guest.set_config(window + 16, 2, 0);
    aim(&mut guest, 0, 0x14, 1);
    guest.set_config(window + 16, 1, 1);
    assert_eq!((guest.config(window + 16, 1), guest.read(0x14, 1)), (1, 1), "the status");
    for (bar, offset, length) in [
        (1, 0x14, 1),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x14, 8),
        (0, 0x15, 2),
        (0, SIZE, 4),
        (0, 0xffff_fffc, 4),
    ] {
        aim(&mut guest, bar, offset, length);
        guest.config(window + 16, 4);
        guest.set_config(window + 16, 4, 0);
        assert_eq!(guest.read(0x14, 1), 1, "{bar} {offset:#x} {length}");
    }
    aim(&mut guest, 0, NOTIFY, 2);
    guest.set_config(window + 16, 2, 0);
}

#[test]
fn a_device_is_saved_and_restored_with_its_messages() {
    let mut guest = Guest::new();
    guest.msix(msix::ENABLE);
    guest.vector(1, message(0x31));
    guest.start(0, 1);
    guest.request(WINDOW.start);
    guest.wait(|guest| !guest.vm.take_messages().is_empty());
    let deadline = Instant::now() + Duration::from_secs(10);
    guest.function.lock().unwrap().pause(deadline).unwrap();
    let saved = guest.function.lock().unwrap().save_bytes();
    let mut other = Guest::new();
    other.function.lock().unwrap().restore_bytes(&saved).unwrap();
    assert_eq!(other.function.lock().unwrap().save_bytes(), saved);
    assert_eq!((other.read(0x14, 1), other.read(0x1a, 2)), (DRIVER_OK, 1));
    let Guest { ram, vm, function, .. } = &other;
    assert_eq!(vm.take_messages(), [message(0x31)], "once more: KVM may not have delivered it");
    let mut image = vec![0; 0x1_0000];
    vm_memory::Bytes::read_slice(&*guest.ram, &mut image, vm_memory::GuestAddress(0)).unwrap();
    vm_memory::Bytes::write_slice(&**ram, &image, vm_memory::GuestAddress(0)).unwrap();
    function.lock().unwrap().resume();
    for cut in [0, 1, saved.len() / 2, saved.len() - 1] {
        assert!(function.lock().unwrap().restore_bytes(&saved[..cut]).is_err());
    }
}

/// A write, and a read of the same place: of configuration space, else of the BAR.
#[derive(Debug, Clone)]
struct Step {
    config: bool,
    offset: u64,
    len: usize,
    value: u64,
}

fn step() -> impl Strategy<Value = Step> {
    let value = prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        (0..64u32).prop_map(|bit| 1 << bit),
        (0..16u64).prop_map(|page| page << 12),
        Just(WINDOW.start | 2),
        any::<u64>(),
    ];
    // The first bytes of each page are where the registers are.
    let offset =
        prop_oneof![3 => (0..6u64, 0..0x48u64).prop_map(|(page, at)| page * PAGE + at), 1 => 0..SIZE];
    (any::<bool>(), offset, prop::sample::select(vec![1, 2, 4, 8]), value).prop_map(
        |(config, offset, len, value)| Step { config, offset: offset & !(len as u64 - 1), len, value },
    )
}

proptest! {
    #[test]
    fn whatever_is_written_a_reset_brings_a_working_device_back(
        started in any::<bool>(),
        messages in any::<bool>(),
        steps in prop::collection::vec(step(), 1..100),
    ) {
        let mut guest = Guest::new();
        if messages {
            guest.msix(msix::ENABLE);
        }
        if started {
            guest.start(0, 1);
        }
        let identity = [0, 8, 0x2c, 0x34].map(|register| guest.config(register, 4));
        for Step { config, offset, len, value } in steps {
            if config {
                guest.set_config(offset & 0xff, len.min(4), value);
                guest.config(offset & 0xff, len.min(4));
            } else {
                guest.write(offset, len, value);
                guest.read(offset, len);
            }
            let moved = guest.function.lock().unwrap().wants();
            prop_assert!(moved.is_none_or(|(base, size)| size == SIZE && base.is_multiple_of(SIZE)));
        }
        prop_assert_eq!(identity, [0, 8, 0x2c, 0x34].map(|register| guest.config(register, 4)));
        guest.set_config(4, 2, 6);
        guest.set_config(0x10, 4, WINDOW.start);
        guest.set_config(0x14, 4, 0);
        guest.msix(0);
        guest.start(0xffff, 0xffff);
        guest.request(WINDOW.start);
        prop_assert!(guest.vm.doorbells() <= 1);
    }
}

#[test]
fn a_device_off_the_bus_is_nothing_to_anybody() {
    let mut guest = Guest::new();
    guest.msix(msix::ENABLE);
    guest.vector(0, message(0x30));
    guest.vector(1, message(0x31));
    guest.start(0, 1);
    guest.request(WINDOW.start);
    assert!(guest.vm.vectors_in_use() > 0);
    let device = guest.function.clone();
    let _ = guest.vm.take_messages();
    // One more is under way, or not, as it is removed.
    guest.ring.add(&[], &[(DATA, 16)]);
    guest.segment.remove(1);
    assert_eq!((guest.vm.doorbells(), guest.vm.vectors_in_use()), (0, 0));
    assert_eq!((guest.config(0, 4), guest.read(0x14, 1)), (0xffff_ffff, 0xff));
    // Nor to a vCPU that was on its way to it.
    let mut device = device.lock().unwrap();
    let mut data = [0xff; 4];
    Function::read_config(&mut *device, 0, &mut data);
    Device::read(&mut *device, 0x14, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(Function::write_config(&mut *device, 4, &[6, 0]), Effect::None);
    for offset in (0..SIZE).step_by(4) {
        assert_eq!(Device::write(&mut *device, offset, &[1, 0, 0, 0]), Effect::None);
    }
    device.pause(Instant::now() + Duration::from_secs(10)).unwrap();
    assert_eq!(
        (guest.vm.doorbells(), guest.vm.take_messages(), guest.vm.levels()),
        (0, Vec::new(), Vec::new())
    );
}

#[test]
fn a_vcpu_that_is_at_its_registers_all_the_time_does_not_bring_a_removed_device_back() {
    let vm = Arc::new(FakeVm::default());
    let weak: Weak<FakeVm> = Arc::downgrade(&vm);
    let ram = testing::ram(0x1_0000);
    let segment = Arc::new(Segment::new([WINDOW, HIGH]));
    let line = Arc::new(Line::new(weak.clone(), GSI));
    let over = AtomicBool::new(false);
    let left: Vec<_> = std::thread::scope(|scope| {
        let (mut ecam, mut memory) =
            (Ecam(segment.clone()), Memory { segment: segment.clone(), base: WINDOW.start });
        let over = &over;
        scope.spawn(move || {
            // Decoding off and on elsewhere, messages on and open, and a kick.
            while !over.load(Ordering::SeqCst) {
                for base in [WINDOW.start, WINDOW.start + SIZE] {
                    ecam.write(1 << 15 | 4, &[0, 0]);
                    ecam.write(1 << 15 | 0x10, &base.to_le_bytes());
                    ecam.write(1 << 15 | 4, &[6, 0]);
                    ecam.write(1 << 15 | 0x42, &msix::ENABLE.to_le_bytes());
                    memory.write(base - WINDOW.start + TABLE + 12, &[0; 4]);
                    memory.write(base - WINDOW.start + NOTIFY, &[0; 2]);
                }
            }
        });
        let rounds = (0..300).map(|_| {
            let place = Place { number: 1, base: WINDOW.start, line: line.clone() };
            let function = Pci::new(weak.clone(), &ram, place, "virtio-rng", Box::new(Rng), &Arc::default());
            segment.insert(1, Arc::new(Mutex::new(function.unwrap())), 0..0).unwrap();
            let end = Instant::now() + Duration::from_millis(2);
            while (vm.doorbells() == 0 || vm.vectors_in_use() == 0) && Instant::now() < end {
                std::thread::yield_now();
            }
            let had = vm.doorbells() + vm.vectors_in_use();
            (segment.remove(1), had, vm.doorbells(), vm.vectors_in_use())
        });
        let left = rounds.collect();
        over.store(true, Ordering::SeqCst);
        left
    });
    let clean = |(removed, _, doorbells, vectors): &(bool, usize, usize, usize)| {
        *removed && (*doorbells, *vectors) == (0, 0)
    };
    assert!(left.iter().all(clean), "{left:?}");
    assert!(left.iter().any(|(_, had, ..)| *had > 1), "it was never at work");
}
