//! `vmm run --dry-run`: what would run, as JSON, without opening any of it.

use std::ops::Range;

use serde::Serialize;

use super::exit::pretty;
use crate::config::{Console, VmConfig, Where};
use crate::memory::layout;

#[derive(Serialize)]
struct Plan {
    config: VmConfig,
    memory_map: Vec<Row>,
    ports: Vec<Row>,
}

/// A range of addresses; `end` belongs to it. Hexadecimal text, because JSON has no such numbers.
#[derive(Serialize)]
struct Row {
    start: String,
    end: String,
    what: String,
}

/// The resolved configuration and the guest's address map.
pub fn plan(mut config: VmConfig) -> String {
    // The one default that depends on other values.
    config.console = Console(Some(config.console()));
    pretty(&Plan { memory_map: memory_map(&config), ports: ports(&config), config })
}

fn row(range: Range<u64>, what: impl Into<String>) -> Row {
    let [start, end] = [range.start, range.end - 1].map(|address| format!("{address:#x}"));
    Row { start, end, what: what.into() }
}

fn sized(start: u64, size: u64, what: impl Into<String>) -> Row {
    row(start..start + size, what)
}

/// What the guest finds at its physical addresses, ascending.
fn memory_map(config: &VmConfig) -> Vec<Row> {
    let ram = layout::ram(config.mem.size.bytes());
    let mut map = vec![
        row(0..layout::LOW_END.min(ram[0].end), "RAM: boot parameters, page tables, command line"),
        sized(layout::ACPI, layout::ACPI_SIZE, "ACPI tables"),
        row(layout::HIGH_RAM..ram[0].end, "RAM: kernel, then free memory, then initrd"),
    ];
    for (slot, device) in (0..).zip(devices(config)) {
        let gsi = layout::VIRTIO_GSIS.get(slot as usize).map_or("none left".to_owned(), ToString::to_string);
        let start = layout::VIRTIO_MMIO + slot * layout::VIRTIO_MMIO_SIZE;
        map.push(sized(start, layout::VIRTIO_MMIO_SIZE, format!("{device}, interrupt {gsi}")));
    }
    map.push(sized(layout::IO_APIC, 0x1000, "I/O APIC"));
    map.push(sized(layout::LOCAL_APIC, 0x1000, "local APIC"));
    map.push(sized(layout::KVM_IDENTITY_MAP, 0x4000, "reserved for KVM"));
    map.extend(ram.into_iter().skip(1).map(|range| row(range, "RAM: above the hole")));
    map
}

/// The virtio-mmio devices in the order of their slots.
fn devices(config: &VmConfig) -> Vec<String> {
    let mut devices = Vec::new();
    if config.console() != Where::Off || !config.port.is_empty() {
        devices.push("virtio console".to_owned());
    }
    devices.extend(config.disk.iter().map(|disk| format!("virtio block: {}", disk.path.display())));
    if config.rng {
        devices.push("virtio entropy".to_owned());
    }
    devices
}

/// What the guest finds at its I/O ports, ascending.
fn ports(config: &VmConfig) -> Vec<Row> {
    let mut ports = vec![(layout::I8042, layout::I8042_SIZE, "i8042: reset only")];
    if config.boot_marks {
        ports.push((layout::POST, 1, "boot marks"));
    }
    if let Some(port) = config.debug_exit {
        ports.push((port.into(), 4, "debug exit"));
    }
    if config.serial != Where::Off {
        ports.push((layout::COM1, 8, "serial port COM1, interrupt 4"));
    }
    ports.push((layout::ACPI_PM, layout::ACPI_PM_SIZE, "ACPI sleep, reset and event registers"));
    ports.sort_unstable();
    ports.into_iter().map(|(start, size, what)| sized(start, size, what)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn the_map_is_ascending_and_names_every_device() {
        let json = r#"{"kernel": "k", "mem": "5G", "disk": ["a.img", "b.img"], "rng": true, "serial": "pty",
            "debug_exit": 244}"#;
        let config: VmConfig = serde_json::from_str(json).unwrap();
        let plan: Value = serde_json::from_str(&plan(config)).unwrap();
        let number = |row: &Value, key: &str| {
            u64::from_str_radix(row[key].as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap()
        };
        for map in ["memory_map", "ports"] {
            let rows = plan[map].as_array().unwrap();
            assert!(rows.windows(2).all(|w| number(&w[0], "end") < number(&w[1], "start")), "{rows:#?}");
        }
        let text = plan["memory_map"].to_string();
        for word in ["console", "a.img", "b.img", "entropy", "above the hole", "0x17fffffff"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(plan["config"]["console"], "stdio");
    }
}
