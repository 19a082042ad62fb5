//! kvmtool. It takes no ELF kernel, so it boots the bzImage, which unpacks itself first; and it has no ACPI, so it ends by a reset.

use super::command::{found, words};
use super::fixed::Fixed;
use super::program::{BY_PORT, RESET, Root, WAIT};
use super::vmm::{cmdline, kernel};
use super::{Found, Life, RAM_MIB, Setting};

/// The console is virtio's, which nobody opens, since kvmtool has the kernel drive the serial port where it is the console.
pub fn kvmtool(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "lkvm");
    let (kernel, check) = kernel(setting.tuned_bzimage(), "tuned-bzImage");
    let initramfs = root.initramfs.to_string_lossy().into_owned();
    let mut rival = Fixed::new("kvmtool", program, move |life| {
        let end = if life == Life::Idle { WAIT } else { RESET };
        let mut arguments = words(["run", "--kernel", &kernel.to_string_lossy(), "--initrd", &initramfs]);
        arguments.extend(words(["--cpus", "1", "--mem", &RAM_MIB.to_string(), "--network", "mode=none"]));
        arguments.extend(words(["--console", "virtio", "--params"]));
        arguments.push(cmdline("8250.nr_uarts=0", 'k', &format!("{BY_PORT}{end}")));
        arguments
    });
    (rival.version, rival.guest_ram) = ("version", true);
    rival.if_possible(there.and(check))
}
