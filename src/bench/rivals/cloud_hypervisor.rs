//! Cloud Hypervisor, by its command line. Like Firecracker it gets the program's line by the serial port, with no driver for it.

use super::command::{found, words};
use super::fixed::Fixed;
use super::program::{BY_PORT, Root};
use super::vmm::{cmdline, end, kernel};
use super::{Found, RAM_MIB, Setting};

/// PVH entry; no console, so no PCI device but the host bridge and the entropy source that it always has.
pub fn cloud_hypervisor(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "cloud-hypervisor");
    let (kernel, check) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let initramfs = root.initramfs.to_string_lossy().into_owned();
    let mut rival = Fixed::new("Cloud Hypervisor", program, move |life| {
        let mut arguments = words(["--kernel", &kernel.to_string_lossy(), "--initramfs", &initramfs]);
        arguments.extend(words(["--cpus", "boot=1", "--memory", &format!("size={RAM_MIB}M")]));
        arguments.extend(words(["--console", "off", "--serial", "tty", "--cmdline"]));
        arguments.push(cmdline("8250.nr_uarts=0", 't', &format!("{BY_PORT}{}", end(life))));
        arguments
    });
    rival.guest_ram = true;
    rival.if_possible(there.and(check))
}
