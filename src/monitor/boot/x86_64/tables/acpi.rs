//! ACPI tables of a hardware-reduced platform (ACPI 6.5, 3.11.1): RSDP, XSDT, FADT, MADT, DSDT.
//!
//! [`write()`](super::write) puts them into guest memory. What is not described does not exist for the guest, which
//! saves it the search.

mod pci;

use acpi_tables::aml::{
    And, Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace,
    Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink, aml_as_bytes};
use zerocopy::{Immutable, IntoBytes};

use super::{Platform, VirtioMmio};
use crate::legacy::acpi_pm::{
    EVENT, EVENT_GENERATION, EVENT_PCI, EVENT_POWER_BUTTON, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS,
    SLEEP_TYPE_S5,
};
use crate::memory::layout;

const OEM_ID: [u8; 6] = *b"VMM   ";
const OEM_TABLE_ID: [u8; 8] = *b"VMM     ";
const OEM_REVISION: u32 = 1;
const CREATOR_ID: [u8; 4] = *b"VMM ";
const CREATOR_ID_OFFSET: usize = 28;
const HEADER_SIZE: u32 = 36;

/// FADT, IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): there is no VGA and no CMOS RTC. The bit for an 8042 is clear, since
/// what is at its ports (`legacy::i8042`) only resets.
const IAPC_BOOT_ARCH: u16 = 1 << 2 | 1 << 5;
/// Likewise: there are devices that are found only by their known address (a serial port).
const LEGACY_DEVICES: u16 = 1;
/// FADT and MADT of ACPI 6.3: the newest that all kernels in use know.
const MADT_REVISION: u8 = 5;
/// DSDT with 64-bit integers.
const DSDT_REVISION: u8 = 2;
/// Notification value of a pressed power button (ACPI 6.5, 5.6.6).
const NOTIFY_PRESSED: u8 = 0x80;
/// Notification value of a VM generation ID that has changed ("Virtual Machine Generation ID", Microsoft 2012).
const NOTIFY_GENERATION: u8 = 0x80;
/// The device of the generation ID.
const GENERATION: &str = "\\_SB_.VGEN";
/// The largest APIC id that a Processor Local APIC structure can hold is 254; 255 means all.
const LAST_XAPIC_ID: u32 = 254;

/// Processor Local x2APIC (ACPI 6.5, 5.2.12.12), for APIC ids that do not fit into the other structure.
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalX2Apic {
    r#type: u8,
    length: u8,
    reserved: u16,
    id: u32,
    flags: u32,
    uid: u32,
}
aml_as_bytes!(LocalX2Apic);

/// All tables as they lie in guest memory from `base`; the RSDP is first.
pub fn tables(platform: &Platform, base: u64) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let mut put = |table: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        let at = base + bytes.len() as u64;
        bytes.extend_from_slice(table);
        at
    };
    let dsdt = put(dsdt(platform).as_slice());
    let mut list = vec![put(&bytes_of(&fadt(platform, dsdt))), put(madt(platform.cpus).as_slice())];
    if platform.pci.is_some() {
        list.push(put(pci::mcfg().as_slice()));
    }
    let list: Vec<u8> = list.into_iter().flat_map(u64::to_le_bytes).collect();
    let xsdt = put(sdt(*b"XSDT", 1, &list).as_slice());
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut sdt = Sdt::new(signature, HEADER_SIZE, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.write_bytes(CREATOR_ID_OFFSET, &CREATOR_ID);
    sdt.append_slice(body);
    sdt
}

fn fadt(platform: &Platform, dsdt: u64) -> acpi_tables::fadt::FADT {
    let register = |offset| {
        let address = layout::ACPI_PM + offset;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::Wbinvd)
        // Set means: not a fixed-hardware button. The power button is a device in the DSDT; there is no other.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.creator_id = CREATOR_ID;
    let legacy = if platform.com1 { LEGACY_DEVICES } else { 0 };
    fadt.iapc_boot_arch = (IAPC_BOOT_ARCH | legacy).into();
    fadt.reset_reg = register(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL);
    fadt.sleep_status_reg = register(SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u32) -> Sdt {
    let mut body = Vec::new();
    body.extend_from_slice(&(layout::LOCAL_APIC as u32).to_le_bytes());
    // Flags: PCAT_COMPAT is clear, there are no 8259 interrupt controllers to disable.
    body.extend_from_slice(&0u32.to_le_bytes());
    for id in 0..cpus {
        match u8::try_from(id) {
            Ok(small) if id <= LAST_XAPIC_ID => {
                ProcessorLocalApic::new(small, small, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            _ => {
                let flags = EnabledStatus::Enabled as u32;
                LocalX2Apic { r#type: 9, length: 16, reserved: 0, id, flags, uid: id }
                    .to_aml_bytes(&mut body);
            }
        }
    }
    IoApic::new(0, layout::IO_APIC as u32, 0).to_aml_bytes(&mut body);
    sdt(*b"APIC", MADT_REVISION, &body)
}

fn dsdt(platform: &Platform) -> Sdt {
    let mut devices = Vec::new();
    for (index, device) in (0u32..).zip(&platform.virtio_mmio) {
        virtio_mmio(index, *device, &mut devices);
    }
    if let Some(bus) = &platform.pci {
        pci::host_bridge(bus, &mut devices);
    }
    if platform.com1 {
        com1(&mut devices);
    }
    generation(platform.generation, &mut devices);
    events(platform, &mut devices);
    pvpanic(&mut devices);

    let mut body = Vec::new();
    Scope::new("\\_SB_".into(), vec![&Raw(devices)]).to_aml_bytes(&mut body);
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8]);
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut body);
    sdt(*b"DSDT", DSDT_REVISION, &body)
}

/// AML that is encoded already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// An edge-triggered, active-high interrupt that its consumer has to itself: what an irqfd on a pin gives.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A node that Linux's virtio-mmio driver binds to (its HID is LNRO0005).
fn virtio_mmio(index: u32, device: VirtioMmio, sink: &mut Vec<u8>) {
    let name = format!("V{index:03X}");
    let registers = Memory32Fixed::new(true, device.base, layout::VIRTIO_MMIO_SIZE as u32);
    let interrupt = edge(device.gsi);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

fn com1(sink: &mut Vec<u8>) {
    let port = layout::COM1 as u16;
    let (ports, interrupt) = (IO::new(port, port, 1, 8), edge(layout::COM1_GSI));
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

/// The VM generation ID, as Linux's and FreeBSD's drivers and Windows look for it ("Virtual Machine Generation ID", Microsoft 2012).
/// The second compatible ID is for who takes no more than 8 characters.
fn generation(at: u64, sink: &mut Vec<u8>) {
    const NAME: &str = "VM_Gen_Counter";
    Device::new(
        GENERATION.into(),
        vec![
            &Name::new("_HID".into(), &"VMM0001"),
            &Name::new("_CID".into(), &Package::new(vec![&NAME, &"VMGENCTR"])),
            &Name::new("_DDN".into(), &NAME),
            &Name::new("ADDR".into(), &Package::new(vec![&(at as u32), &0u8])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The power button, and the Generic Event Device (ACPI 6.5, 5.6.9) that reports it, a new generation ID, and PCI functions that come
/// and go: its interrupt runs `_EVT`, which reads (and so clears) the event register and notifies.
fn events(platform: &Platform, sink: &mut Vec<u8>) {
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(sink);

    let events = layout::ACPI_PM + EVENT;
    let fields = Field::new(
        "EREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    let (button, register) = (Path::new("\\_SB_.PWRB"), Path::new("EVTS"));
    let read = Store::new(&Local(0), &register);
    let is_pressed = And::new(&ZERO, &Local(0), &EVENT_POWER_BUTTON);
    let press = Notify::new(&button, &NOTIFY_PRESSED);
    let pressed = If::new(&is_pressed, vec![&press]);
    let is_pci = And::new(&ZERO, &Local(0), &EVENT_PCI);
    let look = MethodCall::new(pci::CHANGED.into(), Vec::new());
    let changed = If::new(&is_pci, vec![&look]);
    let generation = Path::new(GENERATION);
    let is_another = And::new(&ZERO, &Local(0), &EVENT_GENERATION);
    let tell = Notify::new(&generation, &NOTIFY_GENERATION);
    let copied = If::new(&is_another, vec![&tell]);
    let mut told: Vec<&dyn Aml> = vec![&read, &pressed, &copied];
    if platform.pci.is_some() {
        told.push(&changed);
    }
    Device::new(
        "GED0".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(layout::ACPI_GSI)])),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &events, &1u8),
            &fields,
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(&Equal::new(&Arg(0), &layout::ACPI_GSI), told)],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// QEMU's pvpanic device, which Linux's pvpanic_mmio binds to: a port (`legacy::pvpanic`).
fn pvpanic(sink: &mut Vec<u8>) {
    const PRESENT: u8 = 0xf;
    let port = layout::PVPANIC as u16;
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)])),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::super::{Pci, generation};
    use super::*;
    use std::path::Path as FilePath;
    use std::process::Command;

    fn platform(cpus: u32) -> Platform {
        let slots = (0u32..).zip(layout::VIRTIO_GSIS);
        let base = |slot| (layout::VIRTIO_MMIO + u64::from(slot) * layout::VIRTIO_MMIO_SIZE) as u32;
        let virtio_mmio = slots.map(|(slot, gsi)| VirtioMmio { base: base(slot), gsi }).collect();
        let lines = (1..32).zip(layout::PCI_GSIS.into_iter().cycle()).collect();
        let pci = Some(Pci { lines, memory: vec![layout::PCI_MEMORY, 5 << 30..6 << 30] });
        Platform {
            cpus,
            io_apic_pins: layout::IO_APIC_PINS,
            virtio_mmio,
            com1: true,
            generation: layout::GENERATION,
            pci,
        }
    }

    fn int(bytes: &[u8], at: usize, len: usize) -> u64 {
        bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Follows the pointers from the RSDP as a guest does; gives each table by its signature.
    fn walk(bytes: &[u8], base: u64) -> Vec<(String, &[u8])> {
        let table = |address: u64| {
            let at = usize::try_from(address - base).unwrap();
            let table = &bytes[at..at + int(bytes, at + 4, 4) as usize];
            assert_eq!(sum(table), 0, "checksum at {address:#x}");
            (String::from_utf8(table[..4].to_vec()).unwrap(), table)
        };
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((bytes[15], sum(&bytes[..20]), sum(&bytes[..36])), (2, 0, 0));
        let (name, xsdt) = table(int(bytes, 24, 8));
        assert_eq!(name, "XSDT");
        let mut tables = vec![(name, xsdt)];
        for at in (36..xsdt.len()).step_by(8) {
            let (name, found) = table(int(xsdt, at, 8));
            if name == "FACP" {
                tables.push(table(int(found, 140, 8)));
            }
            tables.push((name, found));
        }
        tables
    }

    fn find<'a>(tables: &[(String, &'a [u8])], name: &str) -> &'a [u8] {
        tables.iter().find(|(n, _)| n == name).expect(name).1
    }

    #[test]
    fn the_fadt_says_what_is_there() {
        let bytes = tables(&platform(1), layout::ACPI);
        let fadt = find(&walk(&bytes, layout::ACPI), "FACP");
        let flags = int(fadt, 112, 4);
        assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
        assert_eq!(flags >> 10 & 1, 1, "reset register");
        assert_eq!(int(fadt, 109, 2), 0b10_0101, "legacy devices, no 8042, no VGA, no RTC");
        // Address space 1 (I/O), 8 bits wide, byte access.
        let register = |port: u64| port << 32 | 0x0100_0801;
        for (at, port) in [(116, 0x602), (244, 0x600), (256, 0x601)] {
            assert_eq!(int(fadt, at, 8), register(port), "register at {at}");
        }
        assert_eq!(fadt[128], RESET_VALUE);
        let bytes = tables(&Platform { com1: false, ..platform(1) }, layout::ACPI);
        assert_eq!(int(find(&walk(&bytes, layout::ACPI), "FACP"), 109, 2), 0b10_0100);
    }

    #[test]
    fn the_madt_lists_each_cpu_and_the_io_apic() {
        for cpus in [1, 64, 254, 300] {
            let bytes = tables(&platform(cpus), layout::ACPI);
            let madt = find(&walk(&bytes, layout::ACPI), "APIC");
            assert_eq!((int(madt, 36, 4), int(madt, 40, 4)), (layout::LOCAL_APIC, 0));
            let (mut ids, mut io_apics, mut at) = (Vec::new(), 0, 44);
            while at < madt.len() {
                match madt[at] {
                    0 => ids.push((int(madt, at + 3, 1), int(madt, at + 4, 4))),
                    9 => ids.push((int(madt, at + 4, 4), int(madt, at + 8, 4))),
                    1 => {
                        assert_eq!((int(madt, at + 4, 4), int(madt, at + 8, 4)), (layout::IO_APIC, 0));
                        io_apics += 1;
                    }
                    other => panic!("structure {other}"),
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(ids, (0..u64::from(cpus)).map(|id| (id, 1)).collect::<Vec<_>>());
            assert_eq!(io_apics, 1);
        }
    }

    #[test]
    fn the_generation_id_has_a_place_that_no_table_takes() {
        let bytes = tables(&platform(1), layout::ACPI);
        let at = (layout::GENERATION - layout::ACPI) as usize;
        assert_eq!(bytes[at..at + generation::SIZE], [0; generation::SIZE]);
        assert!(walk(&bytes, layout::ACPI).iter().all(|(_, table)| table.as_ptr() > bytes[at..].as_ptr()));
        assert_eq!(layout::GENERATION % 8, 0);
    }

    #[test]
    fn the_largest_platform_fits() {
        let cpus = crate::config::Cpus::MAX;
        let size = tables(&platform(cpus), layout::ACPI).len() as u64;
        assert!(size < layout::ACPI_SIZE, "{size} bytes");
    }

    /// The tables as ACPICA, which is what Linux runs, sees them: disassembled, and the DSDT compiled again.
    #[test]
    fn iasl_has_nothing_to_complain_about() {
        if Command::new("iasl").arg("-v").output().is_err() {
            assert!(std::env::var("CI").is_err(), "iasl is missing: install acpica-tools");
            eprintln!("SKIP: iasl_has_nothing_to_complain_about: no iasl (apt-get install acpica-tools)");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let iasl = |flag: &str, file: &FilePath| {
            let out = Command::new("iasl").arg(flag).arg(file).current_dir(&folder).output().unwrap();
            let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
            assert!(out.status.success(), "iasl {flag} {}: {text}", file.display());
            text
        };
        let bytes = tables(&platform(300), layout::ACPI);
        for (name, table) in walk(&bytes, layout::ACPI) {
            let file = folder.path().join(format!("{name}.aml"));
            std::fs::write(&file, table).unwrap();
            let text = iasl("-d", &file).to_lowercase();
            for word in ["warning", "error", "invalid", "unknown"] {
                assert!(!text.contains(word), "{name}: {text}");
            }
        }
        // -we: warnings are errors. (No -f etc.: the disassembly must compile as it is.)
        let text = iasl("-we", &folder.path().join("DSDT.dsl"));
        assert!(text.contains("0 Errors, 0 Warnings, 0 Remarks"), "{text}");
        let source = std::fs::read_to_string(folder.path().join("DSDT.dsl")).unwrap();
        assert_eq!(source.matches("LNRO0005").count(), layout::VIRTIO_GSIS.len());
        for device in [
            "PNP0501", "PNP0C0C", "ACPI0013", "QEMU0001", "VMGENCTR", "PNP0A08", "PNP0C02", "_PRT", "_OSC",
            "_EJ0",
        ] {
            assert!(source.contains(device), "{device}");
        }
        // The windows of the bridge, each from its first to its last address.
        for (kind, ends) in [
            ("DWordMemory", ["0xE0000000", "0xF7FFFFFF"]),
            ("QWordMemory", ["0x0000000140000000", "0x000000017FFFFFFF"]),
        ] {
            let window = &source[source.find(kind).expect(kind)..];
            ends.into_iter().for_each(|end| assert!(window[..800].contains(end), "{kind} {end}"));
        }
    }
}
