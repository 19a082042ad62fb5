//! virtio over PCI in Debian's kernels: what they find and how it interrupts, drivers that come and go, and what they complain of.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::guest::{Guest, Kernel, available, bare, bundle, run, ticking, vmm};
use crate::kernels::{LOOK, complaints};

/// With `--rng`, the terminal, a disk, a network and sockets.
const DEVICES: [&str; 8] = ["--mem", "512M", "--transport", "pci", "--rng", "--net", "user", "--vsock"];

#[test]
fn a_stock_kernel_finds_every_device_and_each_queue_has_a_message() {
    if !available("PCI, stock kernel") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; 8 << 20]).unwrap();
    for cpus in [1, 4] {
        // Messages: all vectors that the kernel has taken, those of them that are virtio's, and what else is virtio's.
        let script = "echo BEGIN; cat /sys/bus/pci/devices/*/vendor | sort | uniq -c; \
            for d in /sys/bus/virtio/devices/*; do basename $(readlink $d/driver); done; \
            dd if=/dev/urandom of=/d bs=1M count=4 2>/dev/null; dd if=/d of=/dev/vda bs=64k oflag=direct 2>/dev/null; \
            dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | cmp /d - && echo disk-same; \
            dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c; nproc; \
            ls /sys/bus/pci/devices/*/msi_irqs/ | grep -c [0-9]$; \
            grep -c 'MSI.*virtio' /proc/interrupts; grep -c 'IO-APIC.*virtio' /proc/interrupts; echo END";
        let mut arguments = DEVICES.to_vec();
        let (cpus, disk) = (cpus.to_string(), format!("path={}", disk.display()));
        arguments.extend(["--cpus", &cpus, "--disk", &disk]);
        let ended = run(Kernel::Stock, &arguments, script);
        let body: Vec<_> = ended.body().into_iter().map(str::trim).collect();
        let drivers =
            ["virtio_blk", "virtio_rng", "virtio_net", "vmw_vsock_virtio_transport", "virtio_console"];
        let found = [&["5 0x1af4", "1 0x1b36"], &drivers[..], &["disk-same", "256", &cpus]].concat();
        assert_eq!(body[..found.len()], found, "{body:#?}");
        let counts: Vec<usize> = body[found.len()..].iter().map(|count| count.parse().unwrap()).collect();
        // Block and entropy 1 each, network 2, sockets and console 3 or more.
        assert!(counts[1] >= 10 && counts[0] >= counts[1] && counts[2] == 0, "{cpus} CPUs: {counts:?}");
    }
}

/// Each driver leaves its device and takes it again, so many times, with traffic.
pub fn drivers_come_and_go(rounds: u32, patience: Duration) {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; 8 << 20]).unwrap();
    // Everything but the console, which says how it went. Traffic on each while its driver goes.
    let script = "echo BEGIN; cd /sys/bus/pci/drivers/virtio-pci; ip link set eth0 up; \
        for round in $(seq ROUNDS); do for f in 0000:00:01.0 0000:00:02.0 0000:00:03.0 0000:00:04.0; do \
        dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null & dd if=/dev/hwrng of=/dev/null bs=64 count=4 2>/dev/null & \
        ping -c 1 -W 1 10.0.2.2 >/dev/null 2>&1 & \
        echo $f >unbind; echo $f >bind; wait; done; ip link set eth0 up; done; \
        ls -d 0000:* | wc -l; dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | wc -c; \
        dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c; dmesg | grep -v 'ommand line' | grep -E 'BUG:|Oops|hung task|virtio.*(failed|error)'; echo END";
    let mut command = vmm(Kernel::Stock, &script.replace("ROUNDS", &rounds.to_string()));
    command.args(DEVICES).args(["--cpus", "2", "--disk", &format!("path={}", disk.display())]);
    let mut guest = Guest::start(command);
    guest.patience = patience;
    let ended = guest.finish();
    assert_eq!(ended.body(), ["5", "8388608", "256"], "{}", ended.text);
}

#[test]
fn drivers_come_and_go_under_traffic() {
    if available("PCI, unbind and bind") {
        drivers_come_and_go(8, Duration::from_secs(240));
    }
}

#[test]
fn a_guest_moves_the_memory_of_its_disk_within_its_window_above_ram_and_back() {
    if !available("PCI, BARs that move") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, "vmm.".repeat(2 << 20)).unwrap();
    // By hand, while no driver has it: where the number of its queues is read, below and above 4 GiB and at its own place again.
    // The register's two halves are in octal. Then Linux moves it, which has a preference for what is above RAM.
    let script = r"cd /sys/bus/pci/drivers/virtio-pci; d=$(readlink -f /sys/block/vda/device/..); f=${d##*/}; \
        put() { printf $1 | dd of=$d/config bs=4 seek=$2 conv=notrunc 2>/dev/null; }; move() { put $1 4; put $2 5; }; \
        queues() { for at in 0xe0000012 0xe8000012 0x100100012; do devmem $at 16; done | xargs; }; \
        look() { head -n 1 $d/resource | cut -d ' ' -f 1; dd if=/dev/vda bs=4k iflag=direct 2>/dev/null | md5sum; }; \
        echo BEGIN; look; echo $f >unbind; echo 1 >$d/enable; queues; move '\4\0\0\350' '\0\0\0\0'; queues; \
        move '\4\0\20\0' '\1\0\0\0'; queues; move '\4\0\0\377' '\0\0\0\0'; queues; move '\4\0\0\340' '\0\0\0\0'; queues; \
        echo 0 >$d/enable; echo $f >bind; look; echo 1 >$d/remove; echo 1 >/sys/bus/pci/rescan; look; echo END";
    let disk = format!("path={}", disk.display());
    let arguments = ["--mem", "512M", "--transport", "pci", "--cpus", "2", "--disk", &disk];
    let ended = run(Kernel::Stock, &arguments, script);
    let body = ended.body();
    let (first, queues) = (body[1], body[2].split(' ').next().unwrap());
    let nobody = "0xFFFF";
    let [own, low, high] = [0, 1, 2].map(|at| {
        let mut seen = [nobody; 3];
        seen[at] = queues;
        seen.join(" ")
    });
    assert!(queues != nobody && first.len() > 32, "{}", ended.text);
    let (before, after) = ("0x00000000e0000000", "0x0000000100000000");
    // ff000000 is outside its windows, and it stays where it was.
    let expected = [before, first, &own, &low, &high, &high, &own, before, first, after, first];
    assert_eq!(body, expected, "{}", ended.text);
}

#[test]
fn a_guest_on_pci_resets_in_each_way_and_starts_again() {
    if !available("PCI, reset") {
        return;
    }
    for way in ["acpi", "pci"] {
        let script = format!("echo up; echo {way} >/sys/kernel/reboot/type; reboot -f");
        let mut command = vmm(Kernel::Stock, &script);
        command.args(["--on-reboot", "reset", "--name", "v"]).args(DEVICES);
        let guest = Guest::start(command);
        guest.wait_for("up", 3);
        assert_eq!(guest.control(&["kill", "v"]).0, Some(0));
    }
}

#[test]
fn a_kernel_that_takes_no_messages_has_its_interrupts_by_lines() {
    if !available("PCI, lines") {
        return;
    }
    let script = "echo BEGIN; grep -c 'IO-APIC.*fasteoi.*virtio' /proc/interrupts; grep -c 'MSI.*virtio' /proc/interrupts; \
        dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; \
        ping -q -c 3 -W 20 10.0.2.2 | grep -o '3 packets received'; \
        dmesg | grep -v 'ommand line' | grep -i 'nobody cared'; echo END";
    let mut command =
        bare(Kernel::Stock, &format!("console=hvc0 quiet panic=-1 pci=nomsi vmm.run=\"{script}\""));
    command.arg("--initrd").arg(Kernel::Stock.initramfs()).args(["--cpus", "2"]).args(DEVICES);
    let ended = Guest::start(command).finish();
    assert_eq!(ended.body(), ["4", "0", "256", "3 packets received"], "{}", ended.text);
}

/// What Debian's kernel complains of on QEMU's microvm with PCI Express, with the same KVM and devices.
fn on_microvm() -> std::collections::BTreeSet<String> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(
        "-M microvm,acpi=on,pcie=on,pit=off,pic=off,rtc=off,isa-serial=off -enable-kvm -cpu host".split(' '),
    );
    command.args(
        "-m 512 -smp 2 -nodefaults -no-user-config -display none -no-reboot -chardev stdio,id=c".split(' '),
    );
    command.args("-device virtio-serial-pci -device virtconsole,chardev=c -device virtio-rng-pci".split(' '));
    command.arg("-kernel").arg(bundle("stock-bzImage")).arg("-initrd").arg(bundle("stock.cpio"));
    let cmdline = format!("console=hvc0 quiet panic=-1 vmm.run=\"{LOOK}\"");
    command.args(["-append", &ticking(&cmdline)]).stdin(Stdio::null());
    complaints(&Guest::start(command).finish().body())
}

#[test]
fn a_stock_kernel_complains_of_nothing_on_pci_that_it_does_not_complain_of_on_qemus() {
    if !available("PCI, complaints") {
        return;
    }
    let arguments = [&DEVICES[..], &["--cpus", "2"]].concat();
    let ours = complaints(&run(Kernel::Stock, &arguments, LOOK).body());
    let theirs = on_microvm();
    let new: Vec<_> = ours.difference(&theirs).collect();
    assert!(new.is_empty(), "{new:#?}\nmicrovm: {theirs:#?}");
}
