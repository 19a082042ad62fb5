//! [`inventory`]: from a configuration to the list of what the machine has, without building any of it.
//!
//! The assembly walks the list, the dry run prints it, the ACPI tables are made from it and a trace's header carries it: a device
//! that is not here does not exist, and where it is is decided here alone.

use std::ops::Range;

use super::Error;
use crate::backends::Changes;
use crate::boot::tables::{Pci, Platform, VirtioMmio};
use crate::bus::{Kind, Place, Slot};
use crate::config::{CharTarget, Transport, VmConfig};
use crate::legacy::{crtc, debug_exit, fw_cfg, rtc_cmos, testdev};
use crate::memory::layout;
use crate::pci::{hot_plug, segment};
use crate::virtio::{self, pci};

/// Numbers on the PCI bus at which devices may come while the machine runs, beside those that have one: each costs the guest a
/// moment at its start.
const SPARE: usize = 8;

/// Everything that answers at an address of the machine that `config` describes, after `changes`, in the order in which it is built.
/// `rom` is the size of its firmware in bytes.
///
/// # Errors
/// [`Error::TooManyDevices`]
pub fn inventory(config: &VmConfig, changes: &Changes, rom: Option<u64>) -> Result<Vec<Slot>, Error> {
    let mut list = List::default();
    list.port("acpi-pm", Kind::AcpiPm, layout::ACPI_PM, layout::ACPI_PM_SIZE).gsi = Some(layout::ACPI_GSI);
    list.port("i8042", Kind::I8042, layout::I8042, layout::I8042_SIZE);
    match config.transport {
        Transport::Mmio => {
            list.port("reset-control", Kind::ResetControl, layout::RESET_CONTROL, 1);
        }
        Transport::Pci => {
            list.port("pci-ports", Kind::PciPorts, layout::PCI_CONFIG, segment::PORTS);
            list.memory("pci-ecam", Kind::PciEcam, layout::PCI_ECAM, segment::ECAM_BUS);
            list.port("pci-hot-plug", Kind::PciHotPlug, layout::PCI_HOT_PLUG, hot_plug::SIZE);
            let high = layout::pci_memory_high(config.mem.size.bytes()).map(|high| ("pci-memory-high", high));
            let low =
                [("pci-memory", layout::PCI_MEMORY), ("pci-memory-firmware", layout::PCI_MEMORY_FIRMWARE)];
            for (name, Range { start, end }) in low.into_iter().chain(high) {
                list.memory(name, Kind::PciMemory, start, end - start);
            }
        }
    }
    list.port("pvpanic", Kind::PvPanic, layout::PVPANIC, 1);
    if let Some(port) = config.debug_exit {
        list.port("debug-exit", Kind::DebugExit, port.into(), debug_exit::SIZE);
    }
    if config.has_pit() {
        list.port("pit", Kind::InKernel, layout::PIT, layout::PIT_SIZE).gsi = Some(0);
    }
    if config.rtc || config.firmware.is_some() {
        list.port("rtc-cmos", Kind::RtcCmos, layout::CMOS, rtc_cmos::SIZE);
    }
    if config.text_screen {
        list.port("text-screen", Kind::TextScreen, layout::CRTC, crtc::SIZE);
    }
    if config.test_device {
        list.port("test-device", Kind::TestPorts, layout::TEST_PORTS, testdev::pc::PORTS);
        list.port("test-irqs", Kind::TestLines, layout::TEST_IRQS, testdev::pc::LINES);
        list.memory("test-memory", Kind::TestMemory, layout::TEST_MEMORY, testdev::pc::MEMORY);
        if config.cpu.hyperv {
            list.port("hyperv-test", Kind::HypervTest, layout::HYPERV_TEST, testdev::hyperv::SIZE);
        }
    }
    if config.boot_marks {
        list.port("boot-marks", Kind::BootMarks, layout::POST, 1);
    }
    if config.firmware.is_some() {
        list.port("fw-cfg", Kind::FwCfg, layout::FW_CFG, fw_cfg::SIZE);
        list.port("debug-port", Kind::DebugPort, layout::DEBUG_PORT, 1);
    }
    if let Some(size) = rom {
        let size = size.next_multiple_of(0x1000);
        list.memory("rom", Kind::Rom, layout::ROM_END.saturating_sub(size), size);
    }
    let virtio = virtio::Device::list(config);
    let possible = match config.transport {
        Transport::Mmio => layout::VIRTIO_GSIS.len(),
        // Number 0 is the host bridge.
        Transport::Pci => usize::from(segment::DEVICES) - 1,
    };
    let gsis = if config.has_pics() { layout::VIRTIO_GSIS_BESIDE_PICS } else { layout::VIRTIO_GSIS };
    let wanted = virtio.len();
    if wanted > possible {
        return Err(Error::TooManyDevices { wanted, possible });
    }
    for (index, device) in virtio.iter().enumerate().filter(|(index, _)| !changes.removed.contains(index)) {
        let (name, kind) = (device.name(), Kind::Virtio(index));
        match config.transport {
            Transport::Mmio => {
                let base = layout::VIRTIO_MMIO + index as u64 * layout::VIRTIO_MMIO_SIZE;
                list.memory(&name, kind, base, layout::VIRTIO_MMIO_SIZE).gsi = gsis.get(index).copied();
            }
            Transport::Pci => list.0.push(function(name, kind, index as u8 + 1)),
        }
    }
    for (added, index) in changes.added.iter().zip(wanted..) {
        let device = virtio::Device::added(added, None);
        list.0.push(function(device.name(), Kind::Virtio(index), added.number));
    }
    if config.serial != CharTarget::Off {
        list.port("serial", Kind::Serial, layout::COM1, layout::COM1_SIZE).gsi = Some(layout::COM1_GSI);
    }
    let io_apic = if config.has_pics() { Kind::InKernel } else { Kind::IoApic };
    list.memory("ioapic", io_apic, layout::IO_APIC, layout::APIC_SIZE);
    list.memory("lapic", Kind::InKernel, layout::LOCAL_APIC, layout::APIC_SIZE);
    list.memory("kvm", Kind::InKernel, layout::KVM_IDENTITY_MAP, layout::KVM_SIZE);
    Ok(list.0)
}

/// A function on the PCI bus. Where its memory is the guest may change.
pub fn function(name: String, kind: Kind, number: u8) -> Slot {
    let base = layout::PCI_MEMORY.start + u64::from(number.saturating_sub(1)) * pci::SIZE;
    Slot { name, kind, place: Place::Pci(number), base, size: pci::SIZE, gsi: Some(pin_a(number)) }
}

/// The global system interrupt that INTA# of a function is wired to.
fn pin_a(number: u8) -> u32 {
    layout::PCI_GSIS[usize::from(number) % layout::PCI_GSIS.len()]
}

/// The numbers on the PCI bus at which devices may come while the machine runs that has what is on the `list`.
pub fn spare_numbers(list: &[Slot]) -> Vec<u8> {
    let taken = |number: &u8| list.iter().any(|slot| slot.place == Place::Pci(*number));
    (1..segment::DEVICES).filter(|number| !taken(number)).take(SPARE).collect()
}

/// What may come at these numbers (`spare_numbers`), for who tells of accesses to it: named by its place. Their memory is where
/// Linux puts that of devices which come one by one: at the beginning of the last window.
pub fn spare_functions(list: &[Slot]) -> Vec<Slot> {
    let Some(window) = windows(list).last() else { return Vec::new() };
    let spare = |(at, number): (u64, u8)| {
        let low = function(format!("pci-00:{number:02x}.0"), Kind::PciMemory, number);
        let base = if window.start < layout::HOLE.end { low.base } else { window.start + at * pci::SIZE };
        Slot { base, ..low }
    };
    (0..).zip(spare_numbers(list)).map(spare).collect()
}

/// Where PCI functions' memory may be in the machine that has what is on the `list`.
pub fn windows(list: &[Slot]) -> impl Iterator<Item = Range<u64>> {
    let windows = list.iter().filter(|slot| slot.kind == Kind::PciMemory);
    windows.map(|slot| slot.base..slot.base + slot.size)
}

/// Pins of the I/O APIC: all of KVM's own, else as many as what is on the `list` needs. Each is a dozen exits of a boot.
pub fn io_apic_pins(list: &[Slot]) -> u32 {
    let is_ours = list.iter().any(|slot| slot.kind == Kind::IoApic);
    let last = list.iter().filter_map(|slot| slot.gsi).max().filter(|_| is_ours);
    // Functions may come whose lines nobody has yet.
    let last = last.filter(|_| spare_functions(list).is_empty());
    last.map_or(layout::IO_APIC_PINS, |last| last + 1)
}

/// What the guest's tables say of the machine with `cpus` vCPUs and what is on the `list`.
pub fn platform(cpus: u32, list: &[Slot]) -> Platform {
    let virtio = |slot: &Slot| match (slot.kind, slot.place, slot.gsi) {
        // The layout puts these below 4 GiB.
        (Kind::Virtio(_), Place::Mmio, Some(gsi)) => Some(VirtioMmio { base: slot.base as u32, gsi }),
        _ => None,
    };
    let line = |slot: &Slot| match (slot.place, slot.gsi) {
        (Place::Pci(number), Some(gsi)) => Some((number, gsi)),
        _ => None,
    };
    let has = |kind| list.iter().any(|slot| slot.kind == kind);
    let lines = || {
        let spare = spare_numbers(list).into_iter().map(|number| (number, pin_a(number)));
        list.iter().filter_map(line).chain(spare).collect()
    };
    Platform {
        cpus,
        io_apic_pins: io_apic_pins(list),
        virtio_mmio: list.iter().filter_map(virtio).collect(),
        com1: has(Kind::Serial),
        generation: match has(Kind::FwCfg) {
            true => layout::GENERATION_BY_FIRMWARE,
            false => layout::GENERATION,
        },
        pci: has(Kind::PciEcam).then(|| Pci { lines: lines(), memory: windows(list).collect() }),
    }
}

#[derive(Default)]
struct List(Vec<Slot>);

impl List {
    fn port(&mut self, name: &str, kind: Kind, base: u64, size: u64) -> &mut Slot {
        self.add(name, kind, Place::Pio, base, size)
    }

    fn memory(&mut self, name: &str, kind: Kind, base: u64, size: u64) -> &mut Slot {
        self.add(name, kind, Place::Mmio, base, size)
    }

    fn add(&mut self, name: &str, kind: Kind, place: Place, base: u64, size: u64) -> &mut Slot {
        let slot = Slot { name: name.to_owned(), kind, place, base, size, gsi: None };
        self.0.push(slot);
        let last = self.0.len() - 1;
        &mut self.0[last]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that can be asked for, at once.
    fn everything() -> VmConfig {
        let json = r#"{"kernel": "k", "disk": ["a", "b"], "net": ["tap=t"], "rng": true, "vsock": {}, "serial": "stdio", "port": ["p=off"],
            "debug_exit": 244, "firmware": "built-in", "rtc": true, "pit": true, "text_screen": true,
            "test_device": true, "boot_marks": true, "cpu": "host,+hyperv"}"#;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn nothing_overlaps_and_nothing_has_another_things_name_or_interrupt() {
        let roms = [None, Some(4096), Some(layout::ROM_MAX - layout::ROM_MAX / 4)];
        for (rom, transport) in
            roms.into_iter().flat_map(|rom| [(rom, Transport::Mmio), (rom, Transport::Pci)])
        {
            let list = inventory(&VmConfig { transport, ..everything() }, &Changes::default(), rom).unwrap();
            type Here = fn(&&Slot) -> bool;
            let places: [Here; 3] = [
                |slot| slot.place == Place::Pio,
                |slot| slot.place == Place::Mmio,
                |slot| matches!(slot.place, Place::Pci(_)),
            ];
            for here in places {
                let mut ranges: Vec<_> = list.iter().filter(here).collect();
                ranges.sort_by_key(|slot| slot.base);
                for pair in ranges.windows(2) {
                    assert!(pair[0].base + pair[0].size <= pair[1].base, "{pair:x?}");
                }
            }
            for (at, slot) in list.iter().enumerate() {
                let others = &list[..at];
                assert!(others.iter().all(|other| other.name != slot.name), "{slot:?}");
                // Functions share the lines that they raise by level.
                let alone = !matches!(slot.place, Place::Pci(_)) && slot.gsi.is_some();
                assert!(!alone || others.iter().all(|other| other.gsi != slot.gsi), "{slot:?}");
            }
        }
    }

    #[test]
    fn the_tables_name_each_virtio_device_and_the_serial_port() {
        let list = inventory(&everything(), &Changes::default(), None).unwrap();
        let platform = platform(3, &list);
        assert_eq!((platform.cpus, platform.com1, platform.virtio_mmio.len()), (3, true, 6));
        assert_eq!(u64::from(platform.virtio_mmio[0].base), layout::VIRTIO_MMIO);
        assert_eq!(platform.pci, None);
        let config = VmConfig { transport: Transport::Pci, ..everything() };
        let list = inventory(&config, &Changes::default(), None).unwrap();
        let platform = super::platform(3, &list);
        assert_eq!(platform.virtio_mmio, []);
        let lines: Vec<_> = (1..=14).map(|number: u8| (number, 16 + u32::from(number) % 8)).collect();
        let pci = platform.pci.unwrap();
        assert_eq!(pci.lines, lines, "six devices, and room for eight more");
        assert_eq!(pci.memory, [layout::PCI_MEMORY, layout::PCI_MEMORY_FIRMWARE, 4 << 30..5 << 30]);
    }

    #[test]
    fn the_io_apic_has_a_pin_for_each_line_and_few_more() {
        let pins = |json: &str, transport| {
            let config = VmConfig { transport, ..serde_json::from_str(json).unwrap() };
            let list = inventory(&config, &Changes::default(), None).unwrap();
            let pins = platform(1, &list).io_apic_pins;
            assert!(list.iter().filter_map(|slot| slot.gsi).all(|gsi| gsi < pins), "{json}");
            pins
        };
        for (json, few) in [
            (r#"{"kernel": "k", "console": "off", "serial": "off"}"#, 6),
            (r#"{"kernel": "k"}"#, 7),
            (r#"{"kernel": "k", "disk": ["a"], "rng": true, "serial": "stdio"}"#, 8),
            (r#"{"kernel": "k", "pit": true}"#, 24),
            (r#"{"kernel": "k", "firmware": "built-in"}"#, 24),
        ] {
            assert_eq!(pins(json, Transport::Mmio), few, "{json}");
            assert_eq!(pins(json, Transport::Pci), 24, "{json}");
        }
    }

    #[test]
    fn every_function_has_room_to_be_moved_past_all_others() {
        let config = VmConfig {
            disk: vec!["d".parse().unwrap(); 30],
            transport: Transport::Pci,
            ..VmConfig::default()
        };
        let list = inventory(&config, &Changes::default(), None).unwrap();
        let functions: Vec<_> = list.iter().filter(|slot| matches!(slot.place, Place::Pci(_))).collect();
        assert_eq!(functions.len(), 31, "as many as a bus has");
        let window = windows(&list).next().unwrap();
        let taken = functions.iter().map(|slot| slot.base..slot.base + slot.size);
        assert!(taken.clone().all(|range| window.start <= range.start && range.end <= window.end));
        // Behind the last of them there is room for all of them once more, and for a hole as large before each.
        let end = taken.clone().map(|range| range.end).max().unwrap();
        let all: u64 = taken.map(|range| range.end - range.start).sum();
        assert!(window.end - end >= 3 * all, "{all:#x} of {window:x?} up to {end:#x}");
    }

    #[test]
    fn more_devices_than_there_is_room_for_are_refused() {
        let config = VmConfig { disk: vec!["d".parse().unwrap(); 18], ..VmConfig::default() };
        let refused = inventory(&config, &Changes::default(), None).unwrap_err();
        assert!(matches!(refused, Error::TooManyDevices { wanted: 19, possible: 18 }), "{refused}");
        let config = VmConfig {
            disk: vec!["d".parse().unwrap(); 31],
            transport: Transport::Pci,
            ..VmConfig::default()
        };
        let refused = inventory(&config, &Changes::default(), None).unwrap_err();
        assert!(matches!(refused, Error::TooManyDevices { wanted: 32, possible: 31 }), "{refused}");
    }
}
