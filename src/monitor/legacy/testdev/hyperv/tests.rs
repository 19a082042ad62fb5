//! The device against a guest's memory, with a VM that takes notes.

use super::*;
use crate::memory::Memory;
use crate::state::Saved;
use crate::vm::testdev::fake::FakeTestVm;

/// Message page, event page, hypercall input.
const MESSAGES: u64 = 0x4000;
const EVENTS: u64 = 0x5000;
const INPUT: u64 = 0x6000;

struct Bench {
    vm: Arc<FakeTestVm>,
    ram: Arc<GuestRam>,
    device: Arc<Mutex<HypervTestDevice>>,
}

impl Bench {
    /// Two vCPUs, and the second has its pages set up.
    fn new() -> Self {
        let ram = Memory::new(&"2M".parse().unwrap()).unwrap().ram().clone();
        let vm = Arc::new(FakeTestVm::default());
        let weak: Weak<FakeTestVm> = Arc::downgrade(&vm);
        let device = HypervTestDevice::new(weak, ram.clone(), 2).unwrap();
        let synic = Synic { control: 1, events: EVENTS | 1, messages: MESSAGES | 1 };
        lock(&device).set_synic(1, synic);
        Self { vm, ram, device }
    }

    fn ask(&self, command: u8, vcpu: u8, sint: u8, id: u8) {
        assert_eq!(lock(&self.device).write(0, &[sint, vcpu, command, id]), Effect::None);
    }

    fn raised(&self, sint: u32) -> usize {
        self.vm.synthetic(1, sint).map_or(0, |interrupt| interrupt.count())
    }

    fn post(&self, connection: u32, size: u32, first: u64) -> u64 {
        let words = [connection, 0, 0x1234_5678, size];
        let at = |offset| GuestAddress(INPUT + offset);
        (0..).zip(words).for_each(|(i, word)| self.ram.write_obj(word, at(i * 4)).unwrap());
        self.ram.write_obj(first, at(16)).unwrap();
        lock(&self.device).call(0x5c, [INPUT, 0])
    }

    fn slot<T: vm_memory::ByteValued>(&self, sint: u64, offset: u64) -> T {
        self.ram.read_obj(GuestAddress(MESSAGES + sint * 256 + offset)).unwrap()
    }
}

#[test]
fn a_route_is_raised_and_goes() {
    let bench = Bench::new();
    bench.ask(1, 1, 3, 0);
    bench.ask(1, 1, 3, 0);
    bench.ask(3, 1, 3, 0);
    bench.ask(3, 0, 3, 0);
    assert_eq!(bench.raised(3), 1);
    bench.ask(4, 1, 3, 9);
    bench.ask(2, 1, 3, 0);
    assert!(bench.vm.synthetic(1, 3).is_some(), "a connection needs it still");
    bench.ask(5, 0, 0, 9);
    assert!(bench.vm.synthetic(1, 3).is_none());
    for (vcpu, sint, command) in [(2, 0, 1), (0, 16, 4), (255, 255, 6), (0, 0, 0), (0, 0, 8)] {
        bench.ask(command, vcpu, sint, 1);
    }
    assert_eq!(lock(&bench.device).state.connections.len(), 0);
}

#[test]
fn a_message_waits_for_its_slot() {
    let bench = Bench::new();
    assert_eq!(bench.post(0x10, 8, 1), INVALID_CONNECTION_ID);
    bench.ask(4, 1, 8, 0x10);
    assert_eq!(bench.post(0x10, 8, 1), SUCCESS);
    assert_eq!(
        (bench.slot::<u32>(8, 0), bench.slot::<u8>(8, 4), bench.slot::<u64>(8, 16)),
        (0x1234_5678, 8, 1)
    );
    assert_eq!((bench.slot::<u8>(8, 5), bench.raised(8)), (0, 1));
    assert_eq!(bench.post(0x10, 8, 2), SUCCESS);
    assert_eq!((bench.slot::<u64>(8, 16), bench.slot::<u8>(8, 5), bench.raised(8)), (1, 1, 1));
    assert_eq!(bench.post(0x10, 8, 3), INSUFFICIENT_BUFFERS);

    let saved = lock(&bench.device).save_bytes();
    let other = Bench::new();
    lock(&other.device).restore_bytes(&saved).unwrap();
    for (bench, is_paused) in [(bench, true), (other, false)] {
        let before = bench.raised(8);
        bench.ram.write_obj(0u32, GuestAddress(MESSAGES + 8 * 256)).unwrap();
        if is_paused {
            lock(&bench.device).pause(Instant::now()).unwrap();
            lock(&bench.device).deliver_all();
            assert_eq!(bench.raised(8), before, "at rest");
            lock(&bench.device).resume();
        } else {
            lock(&bench.device).eoi.signal();
        }
        let start = std::time::Instant::now();
        while bench.raised(8) == before && start.elapsed().as_secs() < 20 {
            std::thread::yield_now();
        }
        assert_eq!((bench.slot::<u64>(8, 16), bench.slot::<u8>(8, 5), bench.raised(8)), (2, 0, before + 1));
    }
}

#[test]
fn an_event_is_a_flag_and_an_interrupt_until_it_is_cleared() {
    let bench = Bench::new();
    bench.ask(6, 1, 9, 0x23);
    let flag = GuestAddress(EVENTS + 9 * 256 + 4);
    let signal = |input, parameter| lock(&bench.device).call(input, [parameter, 0]);
    assert_eq!(signal(0x1_005d, 0x23), SUCCESS);
    assert_eq!((bench.ram.read_obj::<u8>(flag).unwrap(), bench.raised(9)), (1 << 3, 1));
    bench.ram.write_obj(0x23u64, GuestAddress(INPUT)).unwrap();
    assert_eq!(signal(0x5d, INPUT), SUCCESS);
    assert_eq!(bench.raised(9), 1, "set already");
    bench.ram.write_obj(0u8, flag).unwrap();
    assert_eq!((signal(0x5d, INPUT), bench.raised(9)), (SUCCESS, 2));
    assert_eq!(signal(0x1_005d, 0x24), INVALID_CONNECTION_ID);
}

#[test]
fn hostile_input_has_a_status_each() {
    let bench = Bench::new();
    bench.ask(4, 1, 8, 0);
    bench.ask(6, 1, 9, 0);
    let call = |input, parameter| lock(&bench.device).call(input, [parameter, u64::MAX]);
    for (input, parameter, status) in [
        (0x5c, 4, INVALID_ALIGNMENT),
        (0x5c, 0x20_0000 - 8, INVALID_HYPERCALL_INPUT),
        (0x5c, !7, INVALID_HYPERCALL_INPUT),
        (0x1_005c, 0, INVALID_HYPERCALL_CODE),
        (0x5d, 0x100_0000, INVALID_HYPERCALL_INPUT),
        (0x5d, 1, INVALID_ALIGNMENT),
        (0x1_005d, u64::MAX, INVALID_CONNECTION_ID),
        (0x8001, 0, INVALID_HYPERCALL_CODE),
    ] {
        assert_eq!(call(input, parameter), status, "{input:#x} {parameter:#x}");
    }
    assert_eq!(bench.post(0, 241, 0), INVALID_HYPERCALL_INPUT);
    // Pages outside of memory, or at its end.
    for page in [u64::MAX, 0x20_0000 | 1, 0x1f_f001, 0] {
        lock(&bench.device).set_synic(1, Synic { control: 1, events: page, messages: page });
        bench.post(0, 8, 0);
        call(0x1_005d, 0);
    }
    lock(&bench.device).set_synic(7, Synic::default());
    assert_eq!(lock(&bench.device).state.synics.len(), 1);
    let wrong = State { routes: vec![(2, 0)], ..State::default() };
    assert!(lock(&bench.device).restore(wrong).is_err());
}
