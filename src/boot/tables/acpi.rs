//! ACPI tables of a hardware-reduced platform (ACPI 6.5, 3.11.1): RSDP, XSDT, FADT, MADT, DSDT.
//!
//! [`write`](super::write) puts them into guest memory. What is not described does not exist for the guest, which
//! saves it the search.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Scope, Store,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink, aml_as_bytes};
use zerocopy::{Immutable, IntoBytes};

use super::{Platform, VirtioMmio};
use crate::legacy::acpi_pm::{EVENT, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5};
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
/// FADT and MADT of ACPI 6.3: the newest that all kernels in use know.
const MADT_REVISION: u8 = 5;
/// DSDT with 64-bit integers.
const DSDT_REVISION: u8 = 2;
/// Notification value of a pressed power button (ACPI 6.5, 5.6.6).
const NOTIFY_PRESSED: u8 = 0x80;
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
    let fadt = put(&bytes_of(&fadt(dsdt)));
    let madt = put(madt(platform.cpus).as_slice());
    let xsdt = put(sdt(*b"XSDT", 1, &[fadt, madt].map(u64::to_le_bytes).concat()).as_slice());
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

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
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
    fadt.iapc_boot_arch = IAPC_BOOT_ARCH.into();
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
    if platform.com1 {
        com1(&mut devices);
    }
    power_button(&mut devices);

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

/// The power button, and the Generic Event Device (ACPI 6.5, 5.6.9) that reports it: its interrupt runs `_EVT`, which
/// reads (and so clears) the event register and notifies.
fn power_button(sink: &mut Vec<u8>) {
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(sink);

    let events = layout::ACPI_PM + EVENT;
    let fields = Field::new(
        "EREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"PWRE", 1), FieldEntry::Reserved(7)],
    );
    let button = Path::new("\\_SB_.PWRB");
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
                vec![&If::new(
                    &Equal::new(&Arg(0), &layout::ACPI_GSI),
                    vec![
                        &Store::new(&Local(0), &Path::new("PWRE")),
                        &If::new(&Local(0), vec![&Notify::new(&button, &NOTIFY_PRESSED)]),
                    ],
                )],
            ),
        ],
    )
    .to_aml_bytes(sink);
}
