//! The MultiProcessor Specification's tables (Intel, version 1.4): processors, I/O APIC and interrupt lines, of PCI functions, too, as kernels from before
//! ACPI look for them.
//!
//! Every guest gets them: a kernel that is told of the ACPI tables takes no notice, but for one that has no ACPI, or none by its
//! command line (`acpi=off`). [`write()`](super::write) puts them below [`layout::MP_TABLES_END`], the built-in firmware's loader below its ROM.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::Platform;
use crate::memory::{GuestRam, layout};

/// Revision 1.4, in both structures.
const REVISION: u8 = 4;
/// Of the floating pointer, and of the table's header (4.1, 4.2).
const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
/// An integrated APIC, as KVM's say of themselves.
const APIC_VERSION: u8 = 0x14;
/// Processor flags: usable, the one that boots (4.3.1).
const ENABLED: u8 = 1;
const BOOTS: u8 = 2;
/// A processor of the sixth family, with FPU and APIC. CPUID tells more.
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 1 | 1 << 9;
/// The PCI bus, where there is one. Its identifier is to be its number (D.2).
const PCI: u8 = 0;
const ISA_LINES: u32 = 16;
/// Interrupt types (4.3.4): vectored, by the 8259s.
const INT: u8 = 0;
const EXT_INT: u8 = 3;
const NMI: u8 = 1;
/// Every local APIC.
const ALL: u8 = 0xff;

/// Writes both structures so that they end at `end`, or a few bytes before it. The I/O APIC has `pins`.
///
/// # Errors
/// There is no RAM.
pub fn write(ram: &GuestRam, platform: &Platform, end: u64) -> Result<(), GuestMemoryError> {
    // The floating pointer is looked for on multiples of 16.
    let base = (end - tables(platform, 0).len() as u64) & !0xf;
    ram.write_slice(&tables(platform, base as u32), GuestAddress(base))
}

/// Both structures as they lie in guest memory from `base`.
fn tables(platform: &Platform, base: u32) -> Vec<u8> {
    let lines = platform.pci.as_ref().map(|bus| bus.lines.as_slice());
    let isa = lines.map_or(0, |_| PCI + 1);
    let (mut entries, mut count) = (Vec::new(), 0u16);
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..u8::try_from(platform.cpus).unwrap_or(u8::MAX) {
        let flags = ENABLED | if id == 0 { BOOTS } else { 0 };
        let words = [SIGNATURE, FEATURES, 0, 0].map(u32::to_le_bytes).concat();
        entry(&[&[0, id, APIC_VERSION, flags][..], &words].concat());
    }
    if lines.is_some() {
        entry(&[&[1, PCI][..], b"PCI   "].concat());
    }
    entry(&[&[1, isa][..], b"ISA   "].concat());
    // Identifier and version are those that its registers have.
    entry(&[&[2, 0, 0x11, ENABLED][..], &(layout::IO_APIC as u32).to_le_bytes()].concat());
    for line in 0..ISA_LINES.min(platform.io_apic_pins) as u8 {
        // Trigger and polarity as the bus has them; each line on the pin of its number.
        entry(&[3, INT, 0, 0, isa, line, 0, line]);
    }
    for (device, gsi) in lines.into_iter().flatten() {
        // The device's number, and INTA# (D.3).
        entry(&[3, INT, 0, 0, PCI, device << 2, 0, *gsi as u8]);
    }
    entry(&[4, EXT_INT, 0, 0, isa, 0, 0, 0]);
    entry(&[4, NMI, 0, 0, isa, 0, ALL, 1]);

    let mut header = Vec::from(*b"PCMP");
    header.extend_from_slice(&((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[REVISION, 0]);
    header.extend_from_slice(b"VMM     VMM         \0\0\0\0\0\0");
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    let mut table = [header, entries].concat();
    table[7] = checksum(&table);

    let mut pointer = Vec::from(*b"_MP_");
    pointer.extend_from_slice(&(base + POINTER_SIZE as u32).to_le_bytes());
    // Length in 16 bytes, revision, checksum; the features say that the table is there and that lines go through the APICs.
    pointer.extend_from_slice(&[1, REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    [pointer, table].concat()
}

/// What brings the sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::super::Pci;
    use super::*;
    use crate::config::Cpus;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// As a kernel reads them: the entries, each with its type.
    fn walk(bytes: &[u8], base: u32) -> Vec<&[u8]> {
        assert!(bytes.starts_with(b"_MP_"));
        assert_eq!(checksum(&bytes[..16]), 0);
        let table = &bytes[(word(bytes, 4) - base) as usize..];
        let length = usize::from(table[4]) | usize::from(table[5]) << 8;
        assert_eq!((table.len(), checksum(table)), (length, 0));
        assert!(table.starts_with(b"PCMP"));
        assert_eq!(u64::from(word(table, 36)), layout::LOCAL_APIC);
        let (mut entries, mut rest) = (Vec::new(), &table[44..]);
        while let Some(kind) = rest.first() {
            let (entry, after) = rest.split_at(if *kind == 0 { 20 } else { 8 });
            entries.push(entry);
            rest = after;
        }
        assert_eq!(entries.len(), usize::from(table[34]) | usize::from(table[35]) << 8);
        entries
    }

    #[test]
    fn a_kernel_finds_each_processor_and_each_line() {
        for (cpus, io_apic_pins) in [(1, 24), (2, 7), (Cpus::MAX, 16)] {
            let bytes = tables(&Platform { cpus, io_apic_pins, ..Platform::default() }, 0x1000);
            let entries = walk(&bytes, 0x1000);
            let of = |kind: u8| entries.iter().filter(move |entry| entry[0] == kind);
            let processors: Vec<_> = of(0).map(|entry| (u32::from(entry[1]), entry[3])).collect();
            let expected: Vec<_> = (0..cpus).map(|id| (id, if id == 0 { 3 } else { 1 })).collect();
            assert_eq!(processors, expected);
            assert_eq!(of(2).map(|entry| u64::from(word(entry, 4))).collect::<Vec<_>>(), [layout::IO_APIC]);
            assert!((0..io_apic_pins.min(16) as u8).eq(of(3).map(|entry| {
                assert_eq!(entry[5], entry[7]);
                entry[7]
            })));
            assert_eq!(of(4).count(), 2);
            assert_eq!(of(1).collect::<Vec<_>>(), [b"\x01\0ISA   "]);
        }
    }

    #[test]
    fn a_kernel_finds_where_the_lines_of_pci_functions_go() {
        let lines: Vec<_> = (1..32).zip(layout::PCI_GSIS.into_iter().cycle()).collect();
        let pci = Some(Pci { lines: lines.clone(), memory: Vec::new() });
        let io_apic_pins = layout::IO_APIC_PINS;
        let platform = Platform { cpus: Cpus::MAX, io_apic_pins, pci, ..Platform::default() };
        let bytes = tables(&platform, 0x1000);
        assert!(bytes.len() as u64 <= layout::MP_TABLES_SIZE, "{}", bytes.len());
        let entries = walk(&bytes, 0x1000);
        let of = |kind: u8| entries.iter().filter(move |entry| entry[0] == kind);
        assert_eq!(of(1).collect::<Vec<_>>(), [b"\x01\0PCI   ", b"\x01\x01ISA   "]);
        // Bus, device and pin, I/O APIC, its pin.
        let inta = |(device, gsi): &(u8, u32)| [0, device << 2, 0, *gsi as u8];
        let found: Vec<_> = of(3).filter(|entry| entry[4] == 0).map(|entry| entry[4..].to_vec()).collect();
        assert_eq!(found, lines.iter().map(inta).collect::<Vec<_>>());
        assert!(
            (0..16).eq(of(3).filter(|entry| entry[4] == 1).map(|entry| entry[7])),
            "those of the ISA bus"
        );
    }
}
