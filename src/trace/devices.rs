//! What an access meant to the device that answered it, in a few words: `THR <- 'H'`.
//!
//! By the device's name and the offset; where nothing better is known, the plain numbers.

use super::file::Header;
use super::pci;
use vmm_monitor::memory::layout;
use vmm_monitor::recorder::{Event, Kind};
use vmm_monitor::virtio::pci::SIZE;

/// Who answered `event`, and what it was to them. `None` for an exit that no device is asked about.
pub fn tell(header: &Header, event: &Event) -> Option<String> {
    let (ranges, read) = match event.kind()? {
        Kind::PioIn => (&header.ports, true),
        Kind::PioOut => (&header.ports, false),
        Kind::MmioRead => (&header.addresses, true),
        Kind::MmioWrite => (&header.addresses, false),
        Kind::MsrRead | Kind::MsrWrite if event.count == 0 => {
            return Some("denied by the CPU model: #GP".to_owned());
        }
        Kind::MsrWrite => return Some("noted: Hyper-V's interrupt controller".to_owned()),
        Kind::Hypercall => return Some(format!("status {:#x}", event.value)),
        _ => return None,
    };
    let Some((name, offset)) = Header::find(ranges, event.address) else {
        return Some(format!("nobody {}", access("", read, event).trim_start()));
    };
    let what = match name {
        "serial" => serial(offset, read, event),
        "i8042" => i8042(offset, read, event),
        "acpi-pm" => access(acpi_pm(offset), read, event),
        "fw-cfg" => access(fw_cfg(offset), read, event),
        "ioapic" => access(io_apic(offset), read, event),
        "debug-exit" | "boot-marks" | "reset-control" | "pvpanic" => access("", read, event),
        "pci-hot-plug" => pci::hot_plug(offset, read, event),
        "pci-ports" => pci::ports(offset, read, event),
        "pci-ecam" => pci::ecam(offset, read, event),
        // Above 4 GiB nothing else answers. Who is not known by its place has its structures where all have them.
        _ if name.starts_with("pci-memory")
            || layout::PCI_MEMORY.contains(&event.address)
            || event.address >= layout::HOLE.end =>
        {
            pci::virtio(offset % SIZE, read, event)
        }
        _ if name.starts_with("virtio-") => virtio_mmio(offset, read, event),
        _ => access(&format!("+{offset:#x}"), read, event),
    };
    Some(format!("{name} {}", what.trim_start()))
}

/// The name of the device that answered.
pub fn name<'a>(header: &'a Header, event: &Event) -> Option<&'a str> {
    let ranges = match event.kind()? {
        Kind::PioIn | Kind::PioOut => &header.ports,
        Kind::MmioRead | Kind::MmioWrite => &header.addresses,
        _ => return None,
    };
    Some(Header::find(ranges, event.address).map_or("nobody", |(name, _)| name))
}

/// `register -> value` for a read, `register <- value` for a write.
pub(super) fn access(register: &str, read: bool, event: &Event) -> String {
    let arrow = if read { "->" } else { "<-" };
    let more = if event.count > 1 { format!(" and {} more", event.count - 1) } else { String::new() };
    format!("{register} {arrow} {:#x}{more}", event.value)
}

/// Registers of a 16550 (PC16550D data sheet, table II). Which of two share an offset only the divisor latch bit tells, and
/// that is rarely set.
fn serial(offset: u64, read: bool, event: &Event) -> String {
    let register = match (offset, read) {
        (0, true) => "RBR",
        (0, false) => "THR",
        (1, _) => "IER",
        (2, true) => "IIR",
        (2, false) => "FCR",
        (3, _) => "LCR",
        (4, _) => "MCR",
        (5, _) => "LSR",
        (6, _) => "MSR",
        _ => "SCR",
    };
    match (offset, u8::try_from(event.value)) {
        (0, Ok(byte)) if event.count == 1 => {
            let arrow = if read { "->" } else { "<-" };
            format!("{register} {arrow} {:?}", char::from(byte))
        }
        _ => access(register, read, event),
    }
}

fn i8042(offset: u64, read: bool, event: &Event) -> String {
    match (offset, read, event.value) {
        (4, false, 0xfe) => "command <- 0xfe: reset".to_owned(),
        (4, false, _) => access("command", read, event),
        (4, true, _) => access("status", read, event),
        (0, ..) => access("data", read, event),
        _ => access(&format!("+{offset:#x}"), read, event),
    }
}

fn acpi_pm(offset: u64) -> &'static str {
    match offset {
        0 => "sleep control",
        1 => "sleep status",
        2 => "reset",
        4 => "events",
        5 => "nothing to boot",
        _ => "reserved",
    }
}

/// QEMU's docs/specs/fw_cfg.rst. The address of a request is in big-endian order; its low half starts it.
fn fw_cfg(offset: u64) -> &'static str {
    match offset {
        0 => "selector",
        1 => "data",
        4..8 => "DMA address high",
        8.. => "DMA address low",
        _ => "reserved",
    }
}

/// Registers of an I/O APIC (82093AA data sheet, 3.1). Which of its registers the window leads to, the selector has said before.
fn io_apic(offset: u64) -> &'static str {
    match offset {
        0 => "register",
        0x10 => "window",
        _ => "reserved",
    }
}

/// Registers of virtio over MMIO (virtio 1.3, 4.2.2).
fn virtio_mmio(offset: u64, read: bool, event: &Event) -> String {
    let register = match offset {
        0x00 => "MagicValue",
        0x04 => "Version",
        0x08 => "DeviceID",
        0x0c => "VendorID",
        0x10 => "DeviceFeatures",
        0x14 => "DeviceFeaturesSel",
        0x20 => "DriverFeatures",
        0x24 => "DriverFeaturesSel",
        0x30 => "QueueSel",
        0x34 => "QueueSizeMax",
        0x38 => "QueueSize",
        0x44 => "QueueReady",
        0x50 => return format!("QueueNotify <- {}: kick", event.value),
        0x60 => "InterruptStatus",
        0x64 => "InterruptACK",
        0x70 => return format!("{}{}", access("Status", read, event), status(event.value)),
        0x80 => "QueueDescLow",
        0x84 => "QueueDescHigh",
        0x90 => "QueueDriverLow",
        0x94 => "QueueDriverHigh",
        0xa0 => "QueueDeviceLow",
        0xa4 => "QueueDeviceHigh",
        0xb0 => "SHMLenLow",
        0xfc => "ConfigGeneration",
        0x100.. => return access(&format!("config+{:#x}", offset - 0x100), read, event),
        _ => return access(&format!("+{offset:#x}"), read, event),
    };
    access(register, read, event)
}

/// Bits of the device status (virtio 1.3, 2.1).
pub(super) fn status(value: u64) -> String {
    let bits = [
        (1, "ACKNOWLEDGE"),
        (2, "DRIVER"),
        (8, "FEATURES_OK"),
        (4, "DRIVER_OK"),
        (64, "DEVICE_NEEDS_RESET"),
        (128, "FAILED"),
    ];
    let set: Vec<_> = bits.into_iter().filter(|(bit, _)| value & bit != 0).map(|(_, name)| name).collect();
    if set.is_empty() { ": reset".to_owned() } else { format!(": {}", set.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::super::file::Range;
    use super::*;

    #[test]
    fn accesses_read_as_sentences() {
        let range = |name: &str, base, size| Range { name: name.to_owned(), base, size };
        let header = Header {
            ports: vec![range("serial", 0x3f8, 8), range("i8042", 0x60, 5), range("pci-hot-plug", 0x610, 12)],
            addresses: vec![
                range("pci-memory", 0xe000_0000, 0x1800_0000),
                range("virtio-rng", 0xe000_0000, 0x8000),
                range("virtio-blk0", 0xe000_8000, 0x8000),
                range("virtio-console", 0xfe00_0000, 0x1000),
                range("pci-memory-high", 0x1_4000_0000, 0x4000_0000),
                range("pci-00:03.0", 0x1_4000_0000, 0x8000),
            ],
            ..Header::default()
        };
        let event = |kind: Kind, address, value| Event {
            kind: kind as u8,
            address,
            value,
            size: 1,
            count: 1,
            ..Event::default()
        };
        for (kind, address, value, text) in [
            (Kind::PioOut, 0x3f8, 0x48, "serial THR <- 'H'"),
            (Kind::PioOut, 0x3f8, 0x0a, "serial THR <- '\\n'"),
            (Kind::PioIn, 0x3fd, 0x60, "serial LSR -> 0x60"),
            (Kind::PioOut, 0x64, 0xfe, "i8042 command <- 0xfe: reset"),
            (Kind::PioIn, 0xcf8, 0xff, "nobody -> 0xff"),
            (Kind::PioIn, 0x610, 0x28, "pci-hot-plug arrived -> 0x28: 00:03.0 00:05.0"),
            (Kind::PioIn, 0x614, 0x8, "pci-hot-plug wanted back -> 0x8: 00:03.0"),
            (Kind::PioIn, 0x614, 0, "pci-hot-plug wanted back -> 0x0: none"),
            (Kind::PioOut, 0x618, 0x8000_0000, "pci-hot-plug eject <- 0x80000000: 00:1f.0"),
            (Kind::MmioWrite, 0xfe00_0050, 1, "virtio-console QueueNotify <- 1: kick"),
            (Kind::MmioWrite, 0xe000_0014, 0, "virtio-rng device_status <- 0x0: reset"),
            (Kind::MmioRead, 0xe000_9000, 1, "virtio-blk0 ISR status -> 0x1"),
            (Kind::MmioRead, 0xe001_1000, 1, "pci-memory ISR status -> 0x1"),
            (Kind::MmioRead, 0x1_4000_1000, 1, "pci-00:03.0 ISR status -> 0x1"),
            (Kind::MmioRead, 0x1_4000_9000, 1, "pci-memory-high ISR status -> 0x1"),
            (Kind::MmioWrite, 0xfe00_0070, 3, "virtio-console Status <- 0x3: ACKNOWLEDGE DRIVER"),
            (Kind::MmioRead, 0xfe00_0100, 0x50, "virtio-console config+0x0 -> 0x50"),
        ] {
            assert_eq!(tell(&header, &event(kind, address, value)).as_deref(), Some(text));
        }
        let denied = Event { count: 0, ..event(Kind::MsrWrite, 0x174, 0) };
        assert_eq!(tell(&header, &denied).as_deref(), Some("denied by the CPU model: #GP"));
        let synic = event(Kind::MsrWrite, 0x4000_0080, 1);
        assert_eq!(tell(&header, &synic).as_deref(), Some("noted: Hyper-V's interrupt controller"));
        assert_eq!(tell(&header, &event(Kind::Hypercall, 0x5c, 0x12)).as_deref(), Some("status 0x12"));
        assert_eq!(tell(&header, &event(Kind::Halt, 0, 0)), None);
    }
}
