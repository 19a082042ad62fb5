//! Firecracker, without its API thread, as its documentation has it for measuring: no serial console, no i8042 probing.
//!
//! Its serial port is its only way to standard output, and a kernel that drives that port starts later. So the kernel is told of
//! no port, and the program writes its line to the port itself: one exit a byte, and nothing else.

use std::fs;

use serde_json::json;

use super::command::{found, words};
use super::fixed::Fixed;
use super::program::{BY_PORT, RESET, Root, WAIT};
use super::vmm::{cmdline, kernel};
use super::{Found, Life, RAM_MIB, Setting};

/// What the kernel need not look for: serial ports (the program uses one without it), a keyboard's four ways to be odd, PCI.
pub const SPARED: &str = "8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd pci=off";

/// It ends when its guest resets itself: it knows no power-off.
pub fn firecracker(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "firecracker");
    let (kernel, check) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let file = |life: Life| if life == Life::Idle { "firecracker-idle.json" } else { "firecracker.json" };
    let write = |life: Life| {
        let end = if life == Life::Idle { WAIT } else { RESET };
        let config = json!({
            "boot-source": {
                "kernel_image_path": kernel,
                "initrd_path": root.initramfs,
                "boot_args": cmdline(SPARED, 'k', &format!("{BY_PORT}{end}")),
            },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": RAM_MIB },
        });
        let path = setting.scratch.join(file(life));
        fs::write(&path, config.to_string()).map_err(|error| format!("write {}: {error}", path.display()))
    };
    let written = write(Life::Once).and_then(|()| write(Life::Idle));
    let scratch = setting.scratch.clone();
    let mut rival = Fixed::new("Firecracker", program, move |life| {
        words(["--no-api", "--level", "Error", "--config-file", &scratch.join(file(life)).to_string_lossy()])
    });
    rival.guest_ram = true;
    rival.if_possible(there.and(check).and(written))
}
