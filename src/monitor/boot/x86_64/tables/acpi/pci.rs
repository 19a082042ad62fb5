//! What the ACPI tables tell of the PCI bus: the host bridge with its windows and interrupts, and where configuration space is.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, Memory32Fixed, Method, Name, Package,
    ResourceTemplate, Return,
};
use acpi_tables::sdt::Sdt;

use super::sdt;
use crate::memory::layout;
use crate::pci::segment::{ECAM_BUS, PORTS};

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
pub fn host_bridge(lines: &[(u8, u32)], sink: &mut Vec<u8>) {
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
    let (first, last) = (layout::PCI_MEMORY.start as u32, (layout::PCI_MEMORY.end - 1) as u32);
    let memory = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
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
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&buses, &ports, &memory])),
            &Name::new("_PRT".into(), &routes),
            // Whatever the system asks to control it may: there is nothing that firmware would keep.
            &Method::new("_OSC".into(), 4, false, vec![&Return::new(&Arg(3))]),
        ],
    )
    .to_aml_bytes(sink);
}
