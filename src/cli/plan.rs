//! `vmm run --dry-run`: what would run, as JSON, without opening any of it.

use serde::Serialize;
use vmm_command::{Code, Failure, pretty};
use vmm_monitor::backends::Changes;
use vmm_monitor::boot::{self, firmware};
use vmm_monitor::bus::{Kind, Place, Slot};
use vmm_monitor::config::{Console, VmConfig};
use vmm_monitor::machine;
use vmm_monitor::memory::layout;
use vmm_monitor::virtio;

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

/// The resolved configuration, and what the guest finds at its addresses.
///
/// # Errors
/// More devices than there is room for; the firmware's file is not there.
pub fn plan(mut config: VmConfig) -> Result<String, Failure> {
    let rom = config.firmware.as_ref().map(firmware::rom_size).transpose().map_err(|error| {
        let path = config.firmware.as_ref().map(ToString::to_string).unwrap_or_default();
        Failure::new(Code::BadArgument, anyhow::Error::new(error).context(format!("firmware {path}")))
    })?;
    let list = machine::inventory(&config, &Changes::default(), rom)?;
    // The defaults that depend on other values.
    let cmdline = boot::cmdline::default_for(&config);
    config.cmdline.get_or_insert(cmdline);
    config.console = Console(Some(config.console()));
    let rows = |ports, mut more: Vec<(u64, u64, String)>| {
        let slots = list.iter().filter(|slot| (slot.place == Place::Pio) == ports);
        more.extend(slots.map(|slot| (slot.base, slot.size, told(slot, &config))));
        more.sort_unstable();
        more.into_iter().map(row).collect()
    };
    let (ports, memory_map) = (rows(true, Vec::new()), rows(false, ram(&config)));
    pretty(&Plan { memory_map, ports, config })
}

fn row((start, size, what): (u64, u64, String)) -> Row {
    let [start, end] = [start, start + (size - 1)].map(|address| format!("{address:#x}"));
    Row { start, end, what }
}

/// A device's name, with what the configuration says of it.
fn told(slot: &Slot, config: &VmConfig) -> String {
    let file = match (slot.kind, &config.firmware) {
        (Kind::Virtio(index), _) => match virtio::Device::list(config).get(index) {
            Some(virtio::Device::Block(_, disk)) => Some(disk.path.display().to_string()),
            Some(virtio::Device::Net(_, net, _)) => Some(net.to.to_string()),
            Some(virtio::Device::Fs(_, _, share)) => Some(share.to_string()),
            Some(virtio::Device::Vsock(vsock)) => Some(format!("address {}", vsock.cid())),
            _ => None,
        },
        (Kind::Rom, Some(firmware)) => Some(firmware.to_string()),
        _ => None,
    };
    let file = file.map(|file| format!(" ({file})")).unwrap_or_default();
    let pci =
        if let Place::Pci(number) = slot.place { format!(", PCI 00:{number:02x}.0") } else { String::new() };
    let gsi = slot.gsi.map(|gsi| format!(", interrupt {gsi}")).unwrap_or_default();
    let kvm = if slot.kind == Kind::InKernel { ", in the kernel" } else { "" };
    format!("{}{file}{pci}{gsi}{kvm}", slot.name)
}

/// The parts of RAM.
fn ram(config: &VmConfig) -> Vec<(u64, u64, String)> {
    let ram = layout::ram(config.mem.size.bytes());
    let low = ram[0].end;
    let parts = [
        (0..layout::LOW_END.min(low), "RAM: boot parameters, page tables, command line"),
        (layout::ACPI..layout::HIGH_RAM, "RAM: ACPI and MP tables, reset vector"),
        (layout::HIGH_RAM..low, "RAM: kernel, then free memory, then initrd"),
    ];
    let above = ram.into_iter().skip(1).map(|range| (range, "RAM: above the hole"));
    let parts = parts.into_iter().chain(above).filter(|(range, _)| range.start < range.end);
    parts.map(|(range, what)| (range.start, range.end - range.start, what.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn the_map_is_ascending_and_names_every_device() {
        let json = r#"{"kernel": "k", "mem": "5G", "disk": ["a.img", "b.img"], "net": ["tap=tap9"], "rng": true, "vsock": "cid=9", "serial": "pty",
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
        for word in [
            "console",
            "a.img",
            "b.img",
            "virtio-rng",
            "virtio-net0 (tap=tap9)",
            "virtio-vsock (address 9)",
            "above the hole",
            "0x17fffffff",
            "built-in",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(plan["config"]["console"], "stdio");
    }
}
