//! Linux told to do without ACPI or the APICs: it has a timer that ticks all the same, and interrupts for its
//! serial port.

use std::process::{Command, Stdio};

use crate::guest::{Guest, available, bundle, ticking};

fn ticks(kernel: &str, words: &str, processors: &str) {
    let script = "echo BEGIN; nproc; sleep 1; grep -c ttyS0 /proc/interrupts; echo END; reboot -f";
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command
        .arg("--cmdline")
        .arg(ticking(&format!("console=ttyS0 quiet panic=-1 {words} vmm.run=\"{script}\"")));
    command.arg("--kernel").arg(bundle(&format!("{kernel}-vmlinux"))).stdin(Stdio::null());
    command.arg("--initrd").arg(bundle(&format!("{kernel}.cpio")));
    command.args(["--mem", "512M", "--cpus", "2", "--serial", "stdio", "--console", "off"]);
    let ended = Guest::start(command).finish();
    assert_eq!(ended.body(), [processors, "1"], "{kernel}: {words}");
}

#[test]
fn debians_cloud_kernel_ticks_without_acpi() {
    if available("no ACPI") {
        // It does not read MP tables.
        ticks("stock", "acpi=off", "1");
    }
}

#[test]
#[ignore = "another kernel: make reboots"]
fn debians_generic_kernel_ticks_without_acpi_and_apics() {
    if available("no ACPI, no APICs") {
        for (words, processors) in [("acpi=off", "2"), ("acpi=off noapic", "2"), ("acpi=off nolapic", "1")] {
            ticks("generic-6.1", words, processors);
        }
    }
}
