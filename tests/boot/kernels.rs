//! Each kernel by each protocol, with one, two and four CPUs and several sizes of memory: what the guest sees, and that
//! it complains of nothing that it does not complain of elsewhere.

use std::collections::BTreeSet;
use std::process::Command;

use crate::guest::{Guest, Kernel, available, bare, run, ticking};

pub const LOOK: &str = "echo BEGIN; nproc; grep MemTotal /proc/meminfo; dmesg -r; echo END";

/// Lines of level warning and above, without what differs from boot to boot.
pub fn complaints(lines: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in lines {
        let Some((level, text)) = line.strip_prefix('<').and_then(|l| l.split_once('>')) else { continue };
        if level.parse::<u32>().is_ok_and(|level| level & 7 <= 4) {
            let text = text.split_once("] ").map_or(text, |(_, text)| text);
            // Tells how slow the host was, not what the machine is.
            if text.starts_with("hrtimer: interrupt took") {
                continue;
            }
            let plain = text.split(|c: char| c.is_ascii_hexdigit()).filter(|part| !part.is_empty());
            found.insert(plain.collect::<Vec<_>>().join("#"));
        }
    }
    found
}

/// What the same kernel complains of on QEMU's microvm with the same KVM.
fn on_microvm(kernel: Kernel) -> BTreeSet<String> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=off",
        "-enable-kvm",
        "-cpu",
        "host",
    ]);
    command.args([
        "-m",
        "512",
        "-smp",
        "2",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args([
        "-chardev",
        "stdio,id=c",
        "-device",
        "virtio-serial-device",
        "-device",
        "virtconsole,chardev=c",
    ]);
    command.arg("-kernel").arg(kernel.file()).arg("-initrd").arg(kernel.initramfs());
    let cmdline = format!("console=hvc0 quiet panic=-1 vmm.run=\"{LOOK}\"");
    command.args(["-append", &ticking(&cmdline)]);
    command.stdin(std::process::Stdio::null());
    let ended = Guest::start(command).finish();
    complaints(&ended.body())
}

fn boots(kernel: Kernel) {
    for cpus in [1, 2, 4] {
        let ended = run(kernel, &["--mem", "512M", "--cpus", &cpus.to_string()], LOOK);
        let body = ended.body();
        assert_eq!(body[0], cpus.to_string(), "{kernel:?}: nproc");
        assert!(mem_total(&body) > 440 << 10, "{kernel:?}: {}", body[1]);
        let errors = body.iter().filter(|line| line.contains("BUG:") || line.contains("Oops"));
        assert_eq!(errors.count(), 0, "{kernel:?}: {body:#?}");
    }
}

/// KiB of memory that the guest says it has.
fn mem_total(body: &[&str]) -> u64 {
    let line = body.iter().find(|line| line.starts_with("MemTotal")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn stock_bzimage() {
    if available("stock bzImage") {
        boots(Kernel::Stock);
    }
}

#[test]
fn tuned_bzimage() {
    if available("tuned bzImage") {
        boots(Kernel::TunedBzImage);
    }
}

#[test]
fn tuned_vmlinux_by_the_64_bit_protocol() {
    if available("tuned vmlinux") {
        boots(Kernel::TunedLinux64);
    }
}

#[test]
fn tuned_vmlinux_by_pvh() {
    if available("tuned vmlinux, PVH") {
        boots(Kernel::TunedPvh);
    }
}

#[test]
fn complains_of_nothing_that_microvm_does_not() {
    if !available("complaints") {
        return;
    }
    for kernel in [Kernel::Stock, Kernel::TunedPvh] {
        let ended = run(kernel, &["--mem", "512M", "--cpus", "2"], LOOK);
        let ours = complaints(&ended.body());
        let theirs = on_microvm(kernel);
        let new: Vec<_> = ours.difference(&theirs).collect();
        assert!(new.is_empty(), "{kernel:?}: {new:#?}\nmicrovm: {theirs:#?}");
    }
}

#[test]
fn sixty_four_cpus() {
    if available("64 CPUs") {
        // Idle ones without a tick: 64 of them are too much for one emulated processor.
        let cmdline = format!("console=hvc0 quiet panic=-1 nohz=on vmm.run=\"{LOOK}\"");
        let mut command = bare(Kernel::TunedPvh, &cmdline);
        command.arg("--initrd").arg(Kernel::TunedPvh.initramfs()).args(["--mem", "1G", "--cpus", "64"]);
        assert_eq!(Guest::start(command).finish().body()[0], "64", "nproc");
    }
}

#[test]
fn all_memory_is_seen() {
    if !available("memory sizes") {
        return;
    }
    for (size, mib) in [("128M", 128), ("512M", 512), ("5G", 5 << 10)] {
        let ended = run(Kernel::TunedPvh, &["--mem", size], LOOK);
        let kib = mem_total(&ended.body());
        assert!(kib > mib * 1024 * 9 / 10 - (16 << 10) && kib < mib * 1024, "{size}: {kib} KiB");
    }
}
