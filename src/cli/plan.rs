//! `vmm run --dry-run`: what would run, as JSON, without opening any of it.

use std::ops::Range;

use serde::Serialize;

use super::exit::{Failure, pretty};
use crate::boot::{self, tables::Platform};
use crate::config::{Console, VmConfig, Where};
use crate::legacy::{crtc, fw_cfg, rtc_cmos, testdev};
use crate::memory::layout;
use crate::{machine, virtio};

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
///
/// # Errors
/// More devices than there is room for.
pub fn plan(mut config: VmConfig) -> Result<String, Failure> {
    let platform = machine::platform(&config)?;
    // The defaults that depend on other values.
    let cmdline = boot::cmdline::default_for(&config);
    config.cmdline.get_or_insert(cmdline);
    config.console = Console(Some(config.console()));
    Ok(pretty(&Plan { memory_map: memory_map(&config, &platform), ports: ports(&config), config }))
}

fn row(range: Range<u64>, what: impl Into<String>) -> Row {
    let [start, end] = [range.start, range.end - 1].map(|address| format!("{address:#x}"));
    Row { start, end, what: what.into() }
}

fn sized(start: u64, size: u64, what: impl Into<String>) -> Row {
    row(start..start + size, what)
}

/// What the guest finds at its physical addresses, ascending.
fn memory_map(config: &VmConfig, platform: &Platform) -> Vec<Row> {
    let ram = layout::ram(config.mem.size.bytes());
    let mut map = vec![
        row(0..layout::LOW_END.min(ram[0].end), "RAM: boot parameters, page tables, command line"),
        row(layout::ACPI..layout::HIGH_RAM, "ACPI and MP tables, reset vector"),
        row(layout::HIGH_RAM..ram[0].end, "RAM: kernel, then free memory, then initrd"),
    ];
    for (device, at) in virtio::Device::list(config).iter().zip(&platform.virtio_mmio) {
        let file = if let virtio::Device::Block(_, disk) = device { disk.path.to_str() } else { None };
        let file = file.map(|path| format!(" ({path})")).unwrap_or_default();
        let what = format!("{}{file}, interrupt {}", device.name(), at.gsi);
        map.push(sized(at.base.into(), layout::VIRTIO_MMIO_SIZE, what));
    }
    map.push(sized(layout::IO_APIC, 0x1000, "I/O APIC"));
    map.push(sized(layout::LOCAL_APIC, 0x1000, "local APIC"));
    map.push(sized(layout::KVM_IDENTITY_MAP, 0x4000, "reserved for KVM"));
    if config.test_device {
        map.push(sized(layout::TEST_MEMORY, testdev::MEMORY, "test device: memory"));
    }
    if let Some(firmware) = &config.firmware {
        let what = format!("firmware ({firmware}): ends here, read-only");
        map.push(sized(layout::ROM_END - 0x1000, 0x1000, what));
    }
    map.extend(ram.into_iter().skip(1).map(|range| row(range, "RAM: above the hole")));
    map
}

/// What the guest finds at its I/O ports, ascending.
fn ports(config: &VmConfig) -> Vec<Row> {
    let mut ports = vec![(layout::I8042, layout::I8042_SIZE, "i8042: reset only")];
    if config.has_pit() {
        ports.push((layout::PIT, layout::PIT_SIZE, "8254 timer, interrupt 0 (in the kernel)"));
    }
    if config.test_device {
        ports.push((layout::TEST_PORTS, testdev::PORTS, "test device: register, page to unmap"));
        ports.push((layout::TEST_IRQS, testdev::LINES, "test device: interrupt lines"));
    }
    if config.boot_marks {
        ports.push((layout::POST, 1, "boot marks"));
    }
    if let Some(port) = config.debug_exit {
        ports.push((port.into(), 4, "debug exit"));
    }
    if config.rtc || config.firmware.is_some() {
        ports.push((layout::CMOS, rtc_cmos::SIZE, "RTC and CMOS"));
    }
    if config.text_screen {
        ports.push((layout::CRTC, crtc::SIZE, "text screen: cursor"));
    }
    if config.firmware.is_some() {
        ports.push((layout::DEBUG_PORT, 1, "the firmware's messages"));
        ports.push((layout::FW_CFG, fw_cfg::SIZE, "fw_cfg"));
    }
    if config.serial != Where::Off {
        ports.push((layout::COM1, 8, "serial port COM1, interrupt 4"));
    }
    ports.push((layout::PVPANIC, 1, "pvpanic: the guest's kernel panicked"));
    ports.push((layout::RESET_CONTROL, 1, "reset control"));
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
            "debug_exit": 244, "firmware": "built-in"}"#;
        let config: VmConfig = serde_json::from_str(json).unwrap();
        let plan: Value = serde_json::from_str(&plan(config).unwrap()).unwrap();
        let number = |row: &Value, key: &str| {
            u64::from_str_radix(row[key].as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap()
        };
        for map in ["memory_map", "ports"] {
            let rows = plan[map].as_array().unwrap();
            assert!(rows.windows(2).all(|w| number(&w[0], "end") < number(&w[1], "start")), "{rows:#?}");
        }
        let text = plan["memory_map"].to_string();
        for word in ["console", "a.img", "b.img", "virtio-rng", "above the hole", "0x17fffffff", "built-in"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(plan["config"]["console"], "stdio");
    }
}
