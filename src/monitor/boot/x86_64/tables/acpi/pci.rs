//! What the ACPI tables tell of the PCI bus: the host bridge with its windows and interrupts, and where configuration space is.

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Return, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::super::Pci;
use super::{Raw, sdt};
use crate::memory::layout;
use crate::pci::hot_plug::{self, ARRIVED, EJECT, WANTED};
use crate::pci::segment::{ECAM_BUS, PORTS};

/// The method that looks which functions have come or are to go.
pub const CHANGED: &str = "\\_SB_.PCI0.CHGD";
/// The registers ARRIVED, WANTED and EJECT of [`hot_plug`], which follow each other.
const FIELDS: [[u8; 4]; 3] = [*b"ARRV", *b"WANT", *b"EJCT"];
const _: () = assert!(ARRIVED == 0 && WANTED == 4 && EJECT == 8);
/// Notification values (ACPI 6.5, 5.6.6): a device has come; one is to go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// MCFG (PCI Firmware Specification 3.2, 4.1.2): configuration space of segment 0, bus 0, by memory.
pub fn mcfg() -> Sdt {
    let reserved = [0; 8];
    // Segment group, first bus, last bus.
    let buses = [0; 4];
    let body = [&reserved[..], &layout::PCI_ECAM.to_le_bytes(), &buses, &[0; 4]].concat();
    sdt(*b"MCFG", 1, &body)
}

/// The host bridge, and the node that keeps others off configuration space (PCI Firmware Specification 3.2, 4.1.2: it is to be reserved
/// there, and to be no resource of the bridge).
pub fn host_bridge(Pci { lines, memory }: &Pci, sink: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, layout::PCI_ECAM as u32, ECAM_BUS as u32);
    Device::new(
        "ECAM".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(sink);

    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = IO::new(layout::PCI_CONFIG as u16, layout::PCI_CONFIG as u16, 1, PORTS as u8);
    let windows: Vec<_> = memory.iter().map(window).collect();
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports];
    resources.extend(windows.iter().map(|window| &**window));
    // INTA# of each device, wired for good: no link device stands between (ACPI 6.5, 6.2.13).
    let routes: Vec<_> =
        lines.iter().map(|(device, gsi)| (u32::from(*device) << 16 | 0xffff, *gsi)).collect();
    let routes: Vec<_> =
        routes.iter().map(|(address, gsi)| Package::new(vec![address, &0u8, &0u8, gsi])).collect();
    let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            &Name::new("_PRT".into(), &routes),
            &Slots(lines),
            // Whatever the system asks to control it may: there is nothing that firmware would keep.
            &Method::new("_OSC".into(), 4, false, vec![&Return::new(&Arg(3))]),
        ],
    )
    .to_aml_bytes(sink);
}

/// A window of the bridge: as far as the descriptor reaches, a system of 32 bits can use it.
fn window(memory: &Range<u64>) -> Box<dyn Aml> {
    const UNCACHED: AddressSpaceCacheable = AddressSpaceCacheable::NotCacheable;
    let (first, last) = (memory.start, memory.end - 1);
    match (first.try_into(), last.try_into()) {
        (Ok(first), Ok(last)) => Box::new(AddressSpace::<u32>::new_memory(UNCACHED, true, first, last, None)),
        _ => Box::new(AddressSpace::<u64>::new_memory(UNCACHED, true, first, last, None)),
    }
}

/// What tells of functions that come and go: a device for each number at which there may be one, whose `_EJ0` lets it go, and the
/// method that asks `pci::hot_plug` what has changed.
struct Slots<'a>(&'a [(u8, u32)]);

impl Aml for Slots<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &layout::PCI_HOT_PLUG, &hot_plug::SIZE)
            .to_aml_bytes(sink);
        Field::new(
            "HPRG".into(),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            FIELDS.map(|name| FieldEntry::Named(name, 32)).into(),
        )
        .to_aml_bytes(sink);
        let eject = Path::new("EJCT");
        for number in self.numbers() {
            Device::new(
                name(number).as_str().into(),
                vec![
                    &Name::new("_ADR".into(), &(number << 16)),
                    &Name::new("_SUN".into(), &number),
                    &Method::new("_EJ0".into(), 1, false, vec![&Store::new(&eject, &(1u32 << number))]),
                ],
            )
            .to_aml_bytes(sink);
        }
        self.changed(sink);
    }
}

impl Slots<'_> {
    fn numbers(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(|(number, _)| u32::from(*number))
    }

    fn changed(&self, sink: &mut dyn AmlSink) {
        let mut steps = Vec::new();
        let (arrived, wanted) = (Local(0), Local(1));
        Store::new(&arrived, &Path::new("ARRV")).to_aml_bytes(&mut steps);
        Store::new(&wanted, &Path::new("WANT")).to_aml_bytes(&mut steps);
        let mut tell = |register: &Local, number: u32, what: &str, value: u8| {
            let bit = 1u32 << number;
            let is_set = And::new(&ZERO, register, &bit);
            If::new(&is_set, vec![&Notify::new(&Path::new(what), &value)]).to_aml_bytes(&mut steps);
        };
        for number in self.numbers() {
            tell(&arrived, number, &name(number), DEVICE_CHECK);
            tell(&wanted, number, &name(number), EJECT_REQUEST);
        }
        Method::new(Path::new("CHGD"), 0, true, vec![&Raw(steps)]).to_aml_bytes(sink);
    }
}

/// A slot's name below the host bridge.
fn name(number: u32) -> String {
    format!("S{number:03X}")
}
