//! Drivers that come and go for minutes, and functions found without ACPI: `make pci-whole`.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::guest::{Guest, available, bundle, ticking};
use crate::pci::drivers_come_and_go;

#[test]
#[ignore = "minutes: make pci-whole"]
fn whole_drivers() {
    if available("PCI, 200 rounds") {
        drivers_come_and_go(200, Duration::from_secs(3000));
    }
}

/// Debian's generic kernel, told to do without ACPI and with `words`: how many of its interrupts are virtio's by messages and by
/// lines, and which processors and how much of a disk it reads.
fn without_acpi(words: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let script = "echo BEGIN; nproc; dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | wc -c; \
        dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c; \
        grep -c 'PCI-MSI.*virtio' /proc/interrupts; grep -c 'IO-APIC.*virtio' /proc/interrupts; echo END; reboot -f";
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command
        .arg("--kernel")
        .arg(bundle("generic-6.1-vmlinux"))
        .arg("--initrd")
        .arg(bundle("generic-6.1.cpio"));
    let cmdline = format!("console=ttyS0 quiet panic=-1 acpi=off {words} vmm.run=\"{script}\"");
    command.args(["--cmdline", &ticking(&cmdline), "--mem", "512M", "--cpus", "2", "--transport", "pci"]);
    command.args(["--serial", "stdio", "--console", "off", "--rng"]).stdin(Stdio::null());
    command.arg("--disk").arg(format!("path={}", disk.display()));
    let ended = Guest::start(command).finish();
    ended.body().into_iter().map(str::to_owned).collect()
}

#[test]
#[ignore = "another kernel: make pci-whole"]
fn whole_without_acpi() {
    if available("PCI without ACPI") {
        // Configuration and queue of each of the two; and a line for each, told by the MP tables.
        assert_eq!(without_acpi(""), ["2", "1048576", "256", "4", "0"]);
        assert_eq!(without_acpi("pci=nomsi"), ["2", "1048576", "256", "0", "2"]);
    }
}
