//! The I/O APIC against its data sheet.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::state::Saved;
use crate::vm::fake::FakeVm;

const SELECT: u64 = IOREGSEL;

struct Chip {
    vm: Arc<FakeVm>,
    io_apic: IoApic,
}

impl Default for Chip {
    fn default() -> Self {
        Self::with_pins(PINS as u32)
    }
}

impl Chip {
    fn with_pins(pins: u32) -> Self {
        let vm = Arc::new(FakeVm::default());
        let weak: Weak<FakeVm> = Arc::downgrade(&vm);
        Self { vm, io_apic: IoApic::new(weak, pins) }
    }

    fn read(&mut self, register: u8) -> u32 {
        self.io_apic.write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0xff; 4];
        self.io_apic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: u8, value: u32) {
        self.io_apic.write(SELECT, &u32::from(register).to_le_bytes());
        self.io_apic.write(IOWIN, &value.to_le_bytes());
    }

    fn entry(&mut self, pin: u8) -> u64 {
        let (low, high) = (self.read(IOREDTBL + 2 * pin), self.read(IOREDTBL + 2 * pin + 1));
        u64::from(low) | u64::from(high) << 32
    }

    fn set(&mut self, pin: u8, entry: u64) {
        self.write(IOREDTBL + 2 * pin + 1, (entry >> 32) as u32);
        self.write(IOREDTBL + 2 * pin, entry as u32);
    }

    /// The message that a signal on each pin sends.
    fn routes(&self) -> Vec<Option<Msi>> {
        self.vm.pins().pop().unwrap_or_else(|| vec![None; PINS])
    }
}

#[test]
fn after_a_reset_all_pins_are_masked() {
    let mut chip = Chip::default();
    assert_eq!([0, 1, 2].map(|register| chip.read(register)), [0, 0x17_0011, 0]);
    assert!((0..24).all(|pin| chip.entry(pin) == 1 << 16));
    assert!(chip.vm.pins().is_empty(), "nothing to route");
}

#[test]
fn each_register_keeps_the_bits_that_it_has() {
    for value in [0, 1, u32::MAX, 0xaaaa_aaaa, 0x5555_5555, 1 << 14, 1 << 12, 0x8000_0000] {
        let mut chip = Chip::default();
        (0..=u8::MAX).for_each(|register| chip.write(register, value));
        assert_eq!(
            [0, 1, 2].map(|register| chip.read(register)),
            [value & 0xf00_0000, 0x17_0011, value & 0xf00_0000]
        );
        for pin in 0..24 {
            // Neither the delivery status nor the remote IRR.
            let kept = u64::from(value & 0x1_afff) | u64::from(value & 0xff00_0000) << 32;
            assert_eq!(chip.entry(pin), kept, "{pin}: {value:#x}");
        }
        for register in (3..0x10).chain(0x40..=u8::MAX) {
            assert_eq!(chip.read(register), u32::MAX, "there is no {register:#x}");
        }
    }
}

#[test]
fn pins_that_it_does_not_have_cannot_be_written_or_raised() {
    for pins in [1, 7, 23] {
        let mut chip = Chip::with_pins(pins);
        assert_eq!(chip.read(1), 0x11 | (pins - 1) << 16);
        for pin in 0..24u8 {
            chip.set(pin, 0x40);
            chip.io_apic.set_level(pin.into(), true);
            let is_there = u32::from(pin) < pins;
            assert_eq!(chip.entry(pin), if is_there { 0x40 } else { u64::MAX }, "{pin} of {pins}");
            assert_eq!(chip.vm.take_sent().len(), usize::from(is_there));
        }
        let state = chip.io_apic.save();
        assert_eq!(chip.routes(), state.entries.map(route));
        chip.io_apic.restore(state).unwrap();
        let (mut open, mut high) = (state, state);
        open.entries[23] = 0x40;
        high.high |= 1 << 23;
        for wrong in [open, high] {
            assert!(matches!(chip.io_apic.restore(wrong), Err(StateError::Invalid(_))), "{wrong:x?}");
        }
    }
}

#[test]
fn the_selector_has_eight_bits_and_only_two_places_of_the_memory_are_registers() {
    let mut chip = Chip::default();
    chip.io_apic.write(SELECT, &0xffff_ff01u32.to_le_bytes());
    for (offset, value) in [(0u64, 1), (0x10, 0x17_0011), (4, u32::MAX), (0x20, u32::MAX), (0x40, u32::MAX)] {
        let mut data = [0xff; 4];
        chip.io_apic.read(offset, &mut data);
        assert_eq!(u32::from_le_bytes(data), value, "{offset:#x}");
    }
    for offset in [1, 4, 0x11, 0x20, 0x40, 0xffc] {
        assert_eq!(chip.io_apic.write(offset, &[0xff; 4]), Effect::None);
    }
    assert_eq!(chip.io_apic.save(), Registers { select: 1, ..Registers::default() });
    // Any width, as KVM's own takes it.
    for size in [1, 2, 8] {
        let mut data = vec![0xff; size];
        chip.io_apic.read(IOWIN, &mut data);
        let expected = 0x17_0011u64.to_le_bytes();
        assert_eq!(data, expected[..size]);
    }
}

#[test]
fn an_edge_is_a_route_while_its_pin_is_open() {
    let mut chip = Chip::default();
    // Logical destination 3, lowest priority, vector 0x31.
    chip.set(16, 3 << 56 | LOGICAL | 1 << 8 | 0x31);
    let message = Msi { address: 0xfee0_3004, data: 0x131 };
    let mut expected = vec![None; PINS];
    expected[16] = Some(message);
    assert_eq!(chip.routes(), expected);
    let told = chip.vm.pins().len();
    chip.set(16, 3 << 56 | LOGICAL | 1 << 8 | 0x31);
    chip.set(16, 3 << 56 | LOGICAL | ACTIVE_LOW | 1 << 8 | 0x31);
    assert_eq!(chip.vm.pins().len(), told, "nothing that the hypervisor must know has changed");
    chip.set(16, 3 << 56 | LOGICAL | MASKED | 1 << 8 | 0x31);
    assert_eq!(chip.routes(), [None; PINS]);
    // Reserved delivery modes.
    for mode in [3, 6] {
        chip.set(16, mode << 8 | 0x31);
        assert_eq!(chip.routes(), [None; PINS]);
    }
}

#[test]
fn a_level_set_by_hand_on_an_edge_interrupts_as_it_rises() {
    let mut chip = Chip::default();
    chip.set(5, 0x40);
    for (high, sent) in [(true, 1), (true, 0), (false, 0), (true, 1)] {
        chip.io_apic.set_level(5, high);
        assert_eq!(chip.vm.take_sent().len(), sent);
    }
    chip.io_apic.set_level(5, false);
    chip.set(5, MASKED | 0x40);
    chip.io_apic.set_level(5, true);
    chip.set(5, 0x40);
    assert_eq!(chip.vm.take_sent(), [], "what comes while it is masked is lost");
}

#[test]
fn a_level_interrupts_until_it_is_low_once_for_each_end_of_interrupt() {
    let mut chip = Chip::default();
    let entry = LEVEL | 0x50;
    chip.set(17, entry);
    let message = Msi { address: 0xfee0_0000, data: 0xc050 };
    chip.io_apic.set_level(17, true);
    chip.io_apic.set_level(17, true);
    assert_eq!(chip.vm.take_sent(), [message]);
    assert_eq!(chip.entry(17), entry | REMOTE_IRR);
    // Written over, and with another's vector ended: it stands.
    chip.set(17, entry);
    chip.io_apic.end_of_interrupt(0x51);
    assert_eq!((chip.entry(17), chip.vm.take_sent().len()), (entry | REMOTE_IRR, 0));
    chip.io_apic.end_of_interrupt(0x50);
    assert_eq!((chip.entry(17), chip.vm.take_sent().len()), (entry | REMOTE_IRR, 1));
    chip.io_apic.set_level(17, false);
    assert_eq!(chip.entry(17), entry | REMOTE_IRR, "in service still");
    chip.io_apic.end_of_interrupt(0x50);
    assert_eq!((chip.entry(17), chip.vm.take_sent().len()), (entry, 0));
}

#[test]
fn a_handler_that_masks_its_level_first_hears_of_it_again_after_it_has_opened_it() {
    let mut chip = Chip::default();
    chip.set(17, LEVEL | 0x50);
    chip.io_apic.set_level(17, true);
    assert_eq!(chip.vm.take_sent().len(), 1);
    chip.set(17, LEVEL | MASKED | 0x50);
    assert_ne!(chip.routes(), [None; PINS], "the hypervisor tells of the end by the route");
    chip.io_apic.end_of_interrupt(0x50);
    assert_eq!((chip.entry(17), chip.vm.take_sent().len()), (LEVEL | MASKED | 0x50, 0));
    chip.set(17, LEVEL | 0x50);
    assert_eq!(chip.vm.take_sent().len(), 1);
    // Made an edge, it is no longer in service; and a level again, it interrupts again.
    chip.set(17, MASKED | 0x50);
    assert_eq!(chip.entry(17), MASKED | 0x50);
    chip.set(17, LEVEL | 0x50);
    assert_eq!(chip.vm.take_sent().len(), 1);
}

#[test]
fn what_it_saves_it_takes_back_and_nothing_else() {
    let mut chip = Chip::default();
    chip.write(0, 0x500_0000);
    chip.set(4, 0x34);
    chip.set(17, LEVEL | 0x50);
    chip.io_apic.set_level(17, true);
    let (state, routes) = (chip.io_apic.save(), chip.routes());
    let mut other = Chip::default();
    other.io_apic.restore_bytes(&chip.io_apic.save_bytes()).unwrap();
    assert_eq!((other.io_apic.save(), other.routes()), (state, routes));
    assert_eq!(other.vm.take_sent(), [], "it is in service there, too");
    other.io_apic.end_of_interrupt(0x50);
    assert_eq!(other.vm.take_sent().len(), 1);
    let entries = |entry| [entry; PINS];
    for wrong in [
        Registers { id: 1, ..state },
        Registers { high: 1 << 24, ..state },
        Registers { entries: entries(1 << 12), ..state },
        Registers { entries: entries(1 << 17), ..state },
        Registers { entries: entries(REMOTE_IRR), ..state },
    ] {
        assert!(matches!(other.io_apic.restore(wrong), Err(StateError::Invalid(_))), "{wrong:x?}");
    }
}

proptest! {
    /// Whatever is written: the routes are those that the entries say, and a level that is high and open is in service.
    #[test]
    fn routes_and_levels_follow_the_entries(steps in prop::collection::vec((0u8..4, any::<u8>(), any::<u32>()), 1..200)) {
        let mut chip = Chip::default();
        for (step, at, value) in steps {
            match step {
                0 => chip.write(at % 0x42, value),
                1 => chip.write(IOREDTBL + at % 48, value & 0x1_83ff),
                2 => chip.io_apic.set_level((at % 26).into(), value & 1 != 0),
                _ => chip.io_apic.end_of_interrupt(at),
            }
            let Registers { entries, high, .. } = chip.io_apic.save();
            prop_assert_eq!(chip.routes(), entries.map(route).to_vec());
            for (pin, entry) in entries.into_iter().enumerate() {
                prop_assert_eq!(entry & !(WRITABLE | REMOTE_IRR), 0);
                let in_service = entry & REMOTE_IRR != 0;
                prop_assert!(!in_service || entry & LEVEL != 0);
                let due = high & 1 << pin != 0 && entry & (LEVEL | MASKED) == LEVEL && message(entry).is_some();
                prop_assert!(!due || in_service, "{pin}: {entry:#x}");
            }
            prop_assert!(chip.vm.take_sent().iter().all(|sent| sent.address >> 20 == 0xfee));
        }
    }
}
