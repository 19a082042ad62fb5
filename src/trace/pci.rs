//! What an access to PCI configuration space, or to a virtio function's memory, meant: `00:02.0 BAR0 <- 0xe0008000`.

use vmm_monitor::recorder::Event;

use super::devices::{access, status};

/// Configuration space by memory (PCI Express 5.0, 7.2.2).
pub fn ecam(offset: u64, read: bool, event: &Event) -> String {
    let (function, at) = (function(offset >> 12), offset & 0xfff);
    let told = access(&format!("{function} {}", register(at)), read, event);
    // 6.2.5.1: what reads back then has ones where the address can be changed.
    let sizes = !read && (0x10..0x28).contains(&at) && event.size == 4 && event.value == u64::from(u32::MAX);
    if sizes { told + ": asks for its size" } else { told }
}

/// Configuration space by ports (PCI 3.0, 3.2.2.3.2): an address, and then data whose address the record does not have.
pub fn ports(offset: u64, read: bool, event: &Event) -> String {
    match offset {
        0 if !read && event.size == 4 => {
            let at = event.value;
            format!("CONFIG_ADDRESS <- {:#x}: {} {}", at, function(at >> 8), register(at & 0xfc))
        }
        0 => access("CONFIG_ADDRESS", read, event),
        1 => access("reset control", read, event),
        _ => access("CONFIG_DATA", read, event),
    }
}

fn function(routing: u64) -> String {
    format!("{:02x}:{:02x}.{}", routing >> 8 & 0xff, routing >> 3 & 0x1f, routing & 7)
}

/// A register of a type 0 header (PCI 3.0, 6.1).
fn register(offset: u64) -> String {
    let name = match offset {
        0x00 => "vendor ID",
        0x02 => "device ID",
        0x04 => "command",
        0x06 => "status",
        0x08..0x0c => "class and revision",
        0x0c => "cache line size",
        0x0e => "header type",
        0x10..0x28 => return format!("BAR{}", (offset - 0x10) / 4),
        0x2c..0x30 => "subsystem",
        0x34 => "capabilities pointer",
        0x3c => "interrupt line",
        0x3d => "interrupt pin",
        // Where our functions have it.
        0x42 => "MSI-X control",
        0x40..0x100 => return format!("capability +{offset:#x}"),
        _ => return format!("+{offset:#x}"),
    };
    name.to_owned()
}

/// The memory of a virtio function, as our monitor lays it out (virtio 1.3, 4.1.4).
pub fn virtio(offset: u64, read: bool, event: &Event) -> String {
    let within = offset & 0xfff;
    match offset >> 12 {
        0 => common(within, read, event),
        1 => access("ISR status", read, event),
        2 => access(&format!("config+{within:#x}"), read, event),
        3 => format!("notify queue {}: kick", within / 4),
        4 => {
            let field = ["address", "address high", "data", "vector control"][(within / 4 % 4) as usize];
            let told = access(&format!("MSI-X {} {field}", within / 16), read, event);
            told + &if read { String::new() } else { message(within / 4 % 4, event.value) }
        }
        5 => access("MSI-X pending bits", read, event),
        _ => access(&format!("+{offset:#x}"), read, event),
    }
}

/// What a word of the MSI-X table says of the message (Intel SDM vol. 3, 11.11; PCI 3.0, 6.8.2.9).
fn message(word: u64, value: u64) -> String {
    match word {
        0 => format!(": to APIC {}", value >> 12 & 0xff),
        2 => format!(": vector {:#x}", value & 0xff),
        3 if value & 1 == 0 => ": open".to_owned(),
        3 => ": masked".to_owned(),
        _ => String::new(),
    }
}

/// Registers by which functions come and go (`pci::hot_plug`).
pub fn hot_plug(offset: u64, read: bool, event: &Event) -> String {
    let register = match offset {
        0 => "arrived",
        4 => "wanted back",
        8 => "eject",
        _ => return access(&format!("+{offset:#x}"), read, event),
    };
    let bit = |device: &u32| event.value >> device & 1 != 0;
    let told: Vec<_> = (0..32).filter(bit).map(|device| format!("00:{device:02x}.0")).collect();
    let told = if told.is_empty() { "none".to_owned() } else { told.join(" ") };
    format!("{}: {told}", access(register, read, event))
}

/// The common configuration structure (4.1.4.3).
fn common(offset: u64, read: bool, event: &Event) -> String {
    let field = match offset {
        0x00 => "device_feature_select",
        0x04 => "device_feature",
        0x08 => "driver_feature_select",
        0x0c => "driver_feature",
        0x10 => "config_msix_vector",
        0x12 => "num_queues",
        0x14 => return format!("{}{}", access("device_status", read, event), status(event.value)),
        0x15 => "config_generation",
        0x16 => "queue_select",
        0x18 => "queue_size",
        0x1a => "queue_msix_vector",
        0x1c => "queue_enable",
        0x1e => "queue_notify_off",
        0x20..0x28 => "queue_desc",
        0x28..0x30 => "queue_driver",
        0x30..0x38 => "queue_device",
        _ => return access(&format!("+{offset:#x}"), read, event),
    };
    access(field, read, event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_and_structures_read_as_sentences() {
        let event = |value, size| Event { value, size, ..Event::default() };
        for (told, expected) in [
            (ecam(2 << 15 | 0x14, false, &event(0, 4)), "00:02.0 BAR1 <- 0x0"),
            (ecam(31 << 15, true, &event(u64::from(u32::MAX), 4)), "00:1f.0 vendor ID -> 0xffffffff"),
            (
                ecam(2 << 15 | 0x10, false, &event(u64::from(u32::MAX), 4)),
                "00:02.0 BAR0 <- 0xffffffff: asks for its size",
            ),
            (virtio(0x4010, false, &event(0xfee0_3000, 4)), "MSI-X 1 address <- 0xfee03000: to APIC 3"),
            (virtio(0x4018, false, &event(0x31, 4)), "MSI-X 1 data <- 0x31: vector 0x31"),
            (virtio(0x4018, true, &event(0x31, 4)), "MSI-X 1 data -> 0x31"),
            (ports(0, false, &event(0x8000_1004, 4)), "CONFIG_ADDRESS <- 0x80001004: 00:02.0 command"),
            (ports(6, true, &event(0x10, 2)), "CONFIG_DATA -> 0x10"),
            (ports(1, false, &event(6, 1)), "reset control <- 0x6"),
            (virtio(0x14, false, &event(3, 1)), "device_status <- 0x3: ACKNOWLEDGE DRIVER"),
            (virtio(0x3008, false, &event(2, 2)), "notify queue 2: kick"),
            (virtio(0x401c, false, &event(0, 4)), "MSI-X 1 vector control <- 0x0: open"),
            (virtio(0x2004, true, &event(7, 4)), "config+0x4 -> 0x7"),
        ] {
            assert_eq!(told, expected);
        }
    }
}
