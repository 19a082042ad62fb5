//! A bus with functions that only remember: where they are decoded, what a guest can change, and what interrupts come to.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, Weak};

use proptest::prelude::*;

use super::segment::PORTS;
use super::*;
use crate::bus::lock;
use crate::state::{Saved, StateError, Stateful};
use crate::vm::fake::FakeVm;
use crate::vm::{Msi, Vm};

const WINDOW: std::ops::Range<u64> = 0xe000_0000..0xe010_0000;
/// The other one, above 4 GiB.
const HIGH: std::ops::Range<u64> = 0x1_4000_0000..0x1_4010_0000;
const SIZE: u64 = 0x1000;
const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    class: 0x0a_0b0c,
    revision: 0xd,
    subsystem_vendor: 0x9abc,
    subsystem: 0xdef0,
};

/// A function that remembers where it was told to be, and answers with its number.
struct Probe {
    number: u8,
    config: ConfigSpace,
    /// Where its doorbells are.
    at: Option<u64>,
    /// It cannot be moved.
    stuck: bool,
}

impl Probe {
    fn new(number: u8) -> Self {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.add_memory(SIZE, home(number).start);
        config.add_interrupt(16);
        let at = config.add_capability(0x09, &[1, 2, 3, 4, 5]);
        config.allow(at + 4, &[0xf0]);
        config.add_capability(0x11, &[0; 10]);
        Self { number, config, at: None, stuck: false }
    }
}

fn home(number: u8) -> std::ops::Range<u64> {
    let base = WINDOW.start + u64::from(number) * SIZE;
    base..base + SIZE
}

impl Function for Probe {
    fn read_config(&mut self, register: u8, data: &mut [u8]) {
        self.config.read(register, data);
    }
    fn write_config(&mut self, register: u8, data: &[u8]) -> Effect {
        self.config.write(register, data);
        Effect::None
    }
    fn wants(&self) -> Option<(u64, u64)> {
        self.config.memory()
    }
    fn move_to(&mut self, base: u64) -> io::Result<()> {
        if self.stuck {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.at = Some(base);
        Ok(())
    }
    fn leave(&mut self) {
        self.at = None;
    }
    fn remove(&mut self) {
        self.leave();
    }
}

impl Device for Probe {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(if offset < SIZE { self.number } else { 0xee });
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Effect {
        Effect::Exit(self.number)
    }
}

impl Stateful for Probe {
    type State = config_space::State;
    fn save(&self) -> Self::State {
        self.config.save()
    }
    fn restore(&mut self, state: Self::State) -> Result<(), StateError> {
        self.config.restore(state)
    }
}

/// A register.
#[derive(Default)]
struct Latch(u8);

impl Device for Latch {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data[0] = self.0;
    }
    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        self.0 = data[0];
        Effect::None
    }
}

impl Stateful for Latch {
    type State = u8;
    fn save(&self) -> u8 {
        self.0
    }
    fn restore(&mut self, state: u8) -> Result<(), StateError> {
        self.0 = state;
        Ok(())
    }
}

/// A segment with two functions, and its windows.
struct Bus {
    segment: Arc<Segment>,
    probes: Vec<Arc<Mutex<Probe>>>,
    ecam: Ecam,
    ports: ConfigPorts,
    memory: Memory,
    high: Memory,
}

impl Bus {
    fn new() -> Self {
        let segment = Arc::new(Segment::new([WINDOW, HIGH]));
        let probes: Vec<_> = [1, 2].map(|number| Arc::new(Mutex::new(Probe::new(number)))).into();
        for (number, probe) in (1..).zip(&probes) {
            segment.insert(number, probe.clone(), home(number)).unwrap();
        }
        Self {
            segment: segment.clone(),
            probes,
            ecam: Ecam(segment.clone()),
            ports: ConfigPorts::new(segment.clone(), Box::new(Latch::default())),
            memory: Memory { segment: segment.clone(), base: WINDOW.start },
            high: Memory { segment, base: HIGH.start },
        }
    }

    fn read(&mut self, device: u64, register: u64, len: usize) -> u64 {
        let mut data = [0xff; 8];
        self.ecam.read(device << 15 | register, &mut data[..len]);
        u64::from_le_bytes(data) & u64::MAX >> (64 - 8 * len)
    }

    fn write(&mut self, device: u64, register: u64, len: usize, value: u64) {
        self.ecam.write(device << 15 | register, &value.to_le_bytes()[..len]);
    }

    /// Who answers at `address`.
    fn who(&mut self, address: u64) -> Option<u8> {
        let mut data = [0xff];
        match address.checked_sub(HIGH.start) {
            Some(offset) => self.high.read(offset, &mut data),
            None => self.memory.read(address - WINDOW.start, &mut data),
        }
        (data[0] != 0xff).then_some(data[0])
    }

    fn doorbells(&self, index: usize) -> Option<u64> {
        lock(&self.probes[index]).at
    }
}

const COMMAND: u64 = 4;
const BAR0: u64 = 0x10;

#[test]
fn ports_and_memory_lead_to_the_same_registers_and_nobody_answers_with_ones() {
    let mut bus = Bus::new();
    assert_eq!(bus.read(1, 0, 4), 0x5678_1234);
    assert_eq!(bus.read(1, 8, 8), 0x0a0b_0c0d, "eight bytes are two registers");
    assert_eq!(bus.read(1, 0x100, 4), 0, "no extended capabilities");
    for (device, register, len) in [(0, 0, 4), (3, 0, 2), (31, 8, 1), (1, 1, 4), (1, 2, 4), (1, 0xffe, 4)] {
        let ones = u64::MAX >> (64 - 8 * len);
        assert_eq!(bus.read(device, register, len), ones, "{device}, {register:#x} by {len}");
    }
    // Another function of the device, and another bus.
    let mut data = [0xff; 4];
    bus.ecam.read(1 << 15 | 1 << 12, &mut data);
    assert_eq!(data, [0xff; 4]);
    for address in 0..=0xffu32 {
        let mut data = [0xff; 4];
        bus.ports.write(0, &(0x8000_0000 | 1 << 11 | address).to_le_bytes());
        bus.ports.read(4, &mut data);
        let register = u64::from(address & 0xfc);
        assert_eq!(u64::from(u32::from_le_bytes(data)), bus.read(1, register, 4), "{register:#x}");
        for offset in 0..4 {
            let mut byte = [0xff];
            bus.ports.read(4 + offset, &mut byte);
            assert_eq!(u64::from(byte[0]), bus.read(1, register + offset, 1));
        }
    }
    for address in [1u32 << 11, 0x8001_0800, 0x8000_0900] {
        let mut data = [0xff; 4];
        bus.ports.write(0, &address.to_le_bytes());
        bus.ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4], "{address:#x}: disabled, another bus, another function");
    }
}

#[test]
fn the_address_port_takes_four_bytes_and_a_byte_in_it_is_the_reset_control() {
    let mut bus = Bus::new();
    bus.ports.write(0, &0xffff_ffffu32.to_le_bytes());
    bus.ports.write(1, &[0x42]);
    bus.ports.write(0, &[1]);
    bus.ports.write(2, &[1, 2]);
    let (mut address, mut byte) = ([0; 4], [0]);
    bus.ports.read(0, &mut address);
    bus.ports.read(1, &mut byte);
    assert_eq!((u32::from_le_bytes(address), byte), (0x80ff_fffc, [0x42]));
    let saved = bus.ports.save_bytes();
    let mut other = Bus::new();
    other.ports.restore_bytes(&saved).unwrap();
    assert_eq!(other.ports.save_bytes(), saved);
    for (offset, len) in (0..PORTS).flat_map(|offset| [1, 2, 4].map(|len| (offset, len))) {
        other.ports.write(offset, &[0xff; 4][..len]);
        other.ports.read(offset, &mut [0; 4][..len]);
    }
}

#[test]
fn memory_is_decoded_where_the_bar_says_and_only_when_it_is_to() {
    let mut bus = Bus::new();
    assert_eq!(bus.who(home(1).start), None, "decoding is off");
    assert_eq!(bus.doorbells(0), Some(home(1).start), "its doorbells wait there");
    bus.write(1, COMMAND, 2, 2);
    assert_eq!((bus.who(home(1).start), bus.who(home(1).end - 1)), (Some(1), Some(1)));
    assert_eq!(bus.who(home(2).start), None);
    // Sized with decoding on, as sloppy systems do: it stays where it is.
    bus.write(1, BAR0, 4, 0xffff_ffff);
    assert_eq!(bus.read(1, BAR0, 4), 0xffff_f004);
    bus.write(1, BAR0 + 4, 4, 0xffff_ffff);
    assert_eq!(bus.read(1, BAR0 + 4, 4), 0xffff_ffff);
    assert_eq!((bus.who(home(1).start), bus.doorbells(0)), (Some(1), Some(home(1).start)));
    // A move: nothing happens on half an address.
    let there = WINDOW.start + 0x8_0000;
    bus.write(1, BAR0, 4, there);
    assert_eq!((bus.who(home(1).start), bus.who(there)), (Some(1), None));
    bus.write(1, BAR0 + 4, 4, 0);
    assert_eq!((bus.who(home(1).start), bus.who(there), bus.doorbells(0)), (None, Some(1), Some(there)));
    // While decoding is off, all is written before anything moves.
    bus.write(1, COMMAND, 2, 0);
    bus.write(1, BAR0, 4, home(5).start);
    bus.write(1, BAR0 + 4, 4, 0);
    assert_eq!((bus.who(there), bus.who(home(5).start), bus.doorbells(0)), (None, None, Some(there)));
    bus.write(1, COMMAND, 2, 2);
    assert_eq!((bus.who(home(5).start), bus.doorbells(0)), (Some(1), Some(home(5).start)));
    assert_eq!(bus.memory.write(5 * SIZE + 8, &[0]), Effect::Exit(1));
    let mut across = [0xff; 8];
    bus.memory.read(6 * SIZE - 4, &mut across);
    assert_eq!(across, [0xff; 8], "an access over its end is nobody's");
}

#[test]
fn memory_moves_above_4_gib_and_back() {
    let mut bus = Bus::new();
    bus.write(1, COMMAND, 2, 2);
    let there = HIGH.start + 2 * SIZE;
    // As Linux does it: decoding is off meanwhile.
    bus.write(1, COMMAND, 2, 0);
    bus.write(1, BAR0, 4, there & 0xffff_ffff);
    bus.write(1, BAR0 + 4, 4, there >> 32);
    bus.write(1, COMMAND, 2, 2);
    assert_eq!((bus.who(home(1).start), bus.who(there), bus.doorbells(0)), (None, Some(1), Some(there)));
    assert_eq!(bus.segment.place(1), Some(there..there + SIZE));
    assert_eq!(bus.high.write(2 * SIZE + 8, &[0]), Effect::Exit(1));
    // With decoding on, and each half alone is not a place: what is below 4 GiB is another function's.
    bus.write(2, BAR0, 8, home(3).start);
    bus.write(2, COMMAND, 2, 2);
    bus.write(1, BAR0, 4, home(3).start);
    assert_eq!((bus.who(there), bus.who(home(3).start)), (Some(1), Some(2)));
    bus.write(1, BAR0 + 4, 4, 0);
    assert_eq!((bus.who(there), bus.who(home(3).start)), (Some(1), Some(2)), "it is taken");
    for place in [HIGH.end, HIGH.start - SIZE, HIGH.end - SIZE, HIGH.start, home(1).start] {
        bus.write(1, BAR0, 4, place & 0xffff_ffff);
        bus.write(1, BAR0 + 4, 4, place >> 32);
        let followed = HIGH.contains(&place) || WINDOW.contains(&place);
        let expected = if followed { place } else { there };
        assert_eq!((bus.who(expected), bus.doorbells(0)), (Some(1), Some(expected)), "{place:#x}");
    }
    assert_eq!(bus.who(HIGH.start), None);
}

#[test]
fn a_move_that_cannot_be_leaves_a_function_where_it_was() {
    let mut bus = Bus::new();
    bus.write(1, COMMAND, 2, 2);
    bus.write(2, COMMAND, 2, 2);
    let before = (Some(1), Some(home(1).start));
    let attempt = |bus: &mut Bus, low: u64, high: u64| {
        bus.write(1, BAR0, 4, low);
        bus.write(1, BAR0 + 4, 4, high);
        (bus.who(home(1).start), bus.doorbells(0))
    };
    for (low, high) in [
        (home(2).start, 0),
        (WINDOW.end, 0),
        (WINDOW.start - SIZE, 0),
        (0, 0),
        (home(1).start, 1),
        (0xffff_f000, 0xffff_ffff),
    ] {
        assert_eq!(attempt(&mut bus, low, high), before, "{high:#x} {low:#x}");
        assert_eq!(bus.who(home(2).start), Some(2), "the other one stays, too");
    }
    lock(&bus.probes[0]).stuck = true;
    assert_eq!(attempt(&mut bus, home(9).start, 0), before, "its doorbells cannot be there");
    lock(&bus.probes[0]).stuck = false;
    // On top of one that is not decoded: what that one has left there goes.
    bus.write(2, COMMAND, 2, 0);
    assert_eq!(attempt(&mut bus, home(2).start, 0), (None, Some(home(2).start)));
    assert_eq!((bus.who(home(2).start), bus.doorbells(1)), (Some(1), None));
    // It finds its place taken, and gets another.
    bus.write(2, COMMAND, 2, 2);
    assert_eq!((bus.who(home(2).start), bus.doorbells(1)), (Some(1), None));
    bus.write(2, BAR0, 4, home(1).start);
    bus.write(2, BAR0 + 4, 4, 0);
    assert_eq!((bus.who(home(1).start), bus.doorbells(1)), (Some(2), Some(home(1).start)));
}

proptest! {
    #[test]
    fn no_write_changes_what_is_not_the_guests_to_change(
        writes in prop::collection::vec((any::<u8>(), 0usize..3, any::<u32>()), 1..64),
    ) {
        let mut probe = Probe::new(1);
        let image = |probe: &Probe| { let mut all = [0; 256]; probe.config.read(0, &mut all); all };
        let before = image(&probe);
        for (register, width, value) in writes {
            let width = 1 << width;
            probe.write_config(register & !(width as u8 - 1), &value.to_le_bytes()[..width]);
            let memory = probe.config.memory();
            prop_assert!(memory.is_none_or(|(base, size)| size == SIZE && base.is_multiple_of(SIZE)));
        }
        let mine: BTreeSet<usize> = [4, 5, 0xc, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x3c, 0x44].into();
        for (at, (old, new)) in before.iter().zip(image(&probe)).enumerate() {
            prop_assert!(*old == new || mine.contains(&at), "{at:#x}: {old:#x} to {new:#x}");
        }
        let saved = probe.save_bytes();
        let mut other = Probe::new(1);
        other.restore_bytes(&saved).unwrap();
        prop_assert_eq!((image(&other), other.config.memory()), (image(&probe), probe.config.memory()));
    }

    #[test]
    fn any_bytes_are_a_state_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut probe = Probe::new(1);
        if probe.restore_bytes(&bytes).is_ok() {
            prop_assert_eq!(&probe.save_bytes()[..], &bytes[..]);
        }
    }
}

#[test]
fn capabilities_are_a_list_that_ends() {
    let mut probe = Probe::new(1);
    let mut read = |register| {
        let mut byte = [0];
        probe.read_config(register, &mut byte);
        byte[0]
    };
    assert_eq!(read(6) & 0x10, 0x10, "the status says that there are some");
    let (mut at, mut found) = (read(0x34), Vec::new());
    while at != 0 {
        assert!(at >= 0x40 && at.is_multiple_of(4) && found.len() < 48);
        found.push((at, read(at)));
        at = read(at + 1);
    }
    assert_eq!(found, [(0x40, 0x09), (0x48, 0x11)]);
}

fn message(number: u32) -> Msi {
    Msi { address: 0xfee0_0000 | u64::from(number) << 12, data: 0x4000 | number }
}

struct Vectors {
    vm: Arc<FakeVm>,
    msix: Msix,
}

impl Vectors {
    fn new(count: u16) -> Self {
        let vm = Arc::new(FakeVm::default());
        let weak: Weak<FakeVm> = Arc::downgrade(&vm);
        Self { msix: Msix::new(weak, count), vm }
    }

    fn set(&mut self, index: u64, message: Msi, masked: bool) {
        let at = index * 16;
        self.msix.write_table(at, &(message.address as u32).to_le_bytes());
        self.msix.write_table(at + 4, &((message.address >> 32) as u32).to_le_bytes());
        self.msix.write_table(at + 8, &message.data.to_le_bytes());
        self.msix.write_table(at + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(&self) -> u8 {
        let mut bits = [0; 8];
        self.msix.read_pending(0, &mut bits);
        assert_eq!(bits[1..], [0; 7]);
        bits[0]
    }

    fn sent(&self, raised: u16) -> Vec<Msi> {
        self.msix.lines().raise(raised);
        self.vm.take_messages()
    }
}

#[test]
fn a_message_is_sent_once_the_driver_has_opened_its_vector() {
    let mut vectors = Vectors::new(3);
    assert_eq!(vectors.sent(0), [], "not enabled");
    vectors.set(0, message(1), false);
    vectors.msix.set_control(msix::ENABLE | msix::FUNCTION_MASK);
    assert_eq!((vectors.sent(0), vectors.pending()), (vec![], 1), "the function is masked");
    vectors.msix.set_control(msix::ENABLE);
    assert_eq!((vectors.vm.take_messages(), vectors.pending()), (vec![message(1)], 0), "it was kept");
    assert_eq!((vectors.sent(2), vectors.pending()), (vec![], 4), "vector 2 is masked");
    vectors.set(2, message(7), true);
    assert_eq!(vectors.pending(), 4);
    vectors.set(2, message(7), false);
    assert_eq!((vectors.vm.take_messages(), vectors.pending()), (vec![message(7)], 0));
    // Another message from now on, also without a mask around it.
    vectors.set(2, message(9), false);
    assert_eq!(vectors.sent(2), [message(9)]);
    assert_eq!((vectors.sent(3), vectors.sent(u16::MAX)), (vec![], vec![]), "there is none such");
    // Switched off, nothing is kept.
    vectors.set(0, message(1), true);
    assert_eq!(vectors.sent(0), []);
    vectors.msix.set_control(0);
    assert_eq!(vectors.pending(), 0);
    vectors.msix.set_control(msix::ENABLE);
    vectors.set(0, message(1), false);
    assert_eq!(vectors.vm.take_messages(), []);
}

#[test]
fn the_table_takes_whole_words_only_and_reads_back() {
    let mut vectors = Vectors::new(2);
    let mut table = [0; 32];
    vectors.msix.read_table(0, &mut table);
    assert_eq!((table[12], table[28]), (1, 1), "all begin masked");
    vectors.msix.write_table(0, &0x1234_5678_9abc_def3u64.to_le_bytes());
    vectors.msix.write_table(24, &0xffff_ffff_0000_0042u64.to_le_bytes());
    for (offset, len) in [(1, 1), (2, 2), (4, 8), (6, 4), (32, 4), (4096 - 8, 8), (8, 3)] {
        vectors.msix.write_table(offset, &[0xee; 8][..len]);
    }
    vectors.msix.read_table(0, &mut table);
    let expected = [0x1234_5678_9abc_def0u64, 0x1_0000_0000, 0, 0x1_0000_0042].map(u64::to_le_bytes);
    assert_eq!(table[..], expected.concat(), "an address has no low bits, a control word only its mask");
    vectors.msix.read_table(16 * 300, &mut table);
    assert_eq!(table, [0; 32], "behind the table");
}

#[test]
fn masked_and_pending_vectors_are_saved_and_restored() {
    let mut vectors = Vectors::new(3);
    vectors.msix.set_control(msix::ENABLE);
    vectors.set(0, message(1), false);
    vectors.set(1, message(2), true);
    assert_eq!(vectors.sent(1), []);
    let saved = vectors.msix.save_bytes();
    let mut restored = Vectors::new(3);
    restored.msix.restore_bytes(&saved).unwrap();
    assert_eq!((restored.msix.save_bytes(), restored.pending()), (saved.clone(), 2));
    assert_eq!(restored.sent(0), [message(1)]);
    restored.set(1, message(2), false);
    assert_eq!(restored.vm.take_messages(), [message(2)]);
    assert!(Vectors::new(2).msix.restore_bytes(&saved).is_err(), "another size");
}

#[test]
fn a_line_stays_up_until_the_last_function_lets_go() {
    let vm = Arc::new(FakeVm::default());
    let weak: Weak<dyn Vm> = Arc::downgrade(&vm) as Weak<dyn Vm>;
    let line = Line::new(weak, 17);
    for (device, high) in [(1, true), (9, true), (1, true), (1, false), (9, false), (9, false), (31, true)] {
        line.set(device, || high);
    }
    assert_eq!(vm.levels(), [(17, true), (17, false), (17, true)]);
}

#[test]
fn the_bridge_is_found_and_has_nothing_to_decode() {
    let segment = Arc::new(Segment::new([WINDOW, HIGH]));
    segment.insert(0, Arc::new(Mutex::new(HostBridge::default())), 0..0).unwrap();
    let mut ecam = Ecam(segment);
    let mut class = [0; 4];
    ecam.read(8, &mut class);
    assert_eq!(class[1..], [0, 0, 6]);
    for register in (0..256).step_by(4) {
        ecam.write(register, &[0xff; 4]);
    }
    let mut bars = [[0xff; 4]; 6];
    bars.iter_mut().zip((0x10..).step_by(4)).for_each(|(bar, at)| ecam.read(at, bar));
    assert_eq!(bars, [[0; 4]; 6]);
}

#[test]
fn a_place_on_the_bus_is_free_again_when_its_function_is_removed() {
    let mut bus = Bus::new();
    bus.write(1, COMMAND, 2, 2);
    assert_eq!(bus.who(home(1).start), Some(1));
    assert!(bus.segment.remove(1) && !bus.segment.remove(1) && !bus.segment.remove(31));
    assert_eq!((bus.read(1, 0, 4), bus.who(home(1).start), bus.doorbells(0)), (0xffff_ffff, None, None));
    // Another function's memory may be where its was.
    bus.write(2, BAR0, 8, home(1).start);
    bus.write(2, COMMAND, 2, 2);
    assert_eq!(bus.who(home(1).start), Some(2));
    // What comes next has no memory before the guest says where.
    let next = Arc::new(Mutex::new(Probe::new(1)));
    bus.segment.insert(1, next.clone(), 0..0).unwrap();
    assert_eq!((bus.read(1, 0, 4), lock(&next).at), (0x5678_1234, None));
    bus.write(1, COMMAND, 2, 2);
    assert_eq!((bus.who(home(1).start), lock(&next).at), (Some(2), None), "it is taken");
    bus.write(1, BAR0, 8, home(5).start);
    assert_eq!((bus.who(home(5).start), lock(&next).at), (Some(1), Some(home(5).start)));
}

proptest! {
    /// Accesses of any place and size, to a guest that was asked for device 2 or not.
    #[test]
    fn a_guest_takes_nothing_away_that_was_not_asked_for(
        asked: bool,
        accesses in proptest::collection::vec((any::<bool>(), 0..hot_plug::SIZE, 1..=8usize, any::<u64>()), 1..40),
    ) {
        let mut bus = Bus::new();
        let mut registers = HotPlug::new(bus.segment.clone());
        registers.announce(1);
        if asked {
            registers.ask_for(2);
        }
        for (read, offset, len, value) in accesses {
            let len = len.min((hot_plug::SIZE - offset) as usize);
            let mut data = value.to_le_bytes();
            if read {
                registers.read(offset, &mut data[..len]);
            } else {
                let lets_go = offset == hot_plug::EJECT && len == 4 && value & 4 != 0;
                let there = bus.read(2, 0, 2) == 0x1234;
                let effect = registers.write(offset, &data[..len]);
                prop_assert_eq!(effect == Effect::Serve, lets_go && asked && there);
            }
        }
        prop_assert_eq!(bus.read(1, 0, 2), 0x1234);
        let there = bus.read(2, 0, 2) == 0x1234;
        prop_assert!(there || asked);
        prop_assert_eq!(registers.take_ejected(), if there { Vec::new() } else { std::vec![2] });
        // Saved and restored, it says the same.
        let mut other = HotPlug::new(bus.segment.clone());
        other.restore(registers.save()).unwrap();
        prop_assert_eq!(other.save(), registers.save());
    }
}
