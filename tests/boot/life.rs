//! The life of a guest: asked to stop, paused, started again, and how it ends for the caller.

use std::thread;
use std::time::Duration;

use crate::guest::{Guest, Kernel, available, run, vmm};

#[test]
fn a_terminated_monitor_lets_its_guest_shut_down() {
    if !available("power button") {
        return;
    }
    for kernel in [Kernel::TunedPvh, Kernel::Stock] {
        let mut command =
            vmm(kernel, "trap 'echo asked to stop; exit' TERM; echo up; while true; do sleep 1; done");
        command.args(["--mem", "512M"]);
        let guest = Guest::start(command);
        guest.wait_for("up", 1);
        guest.signal(libc::SIGTERM);
        let ended = guest.finish();
        assert_eq!(ended.code, Some(0), "{kernel:?}: {}", ended.text);
        assert!(ended.text.contains("asked to stop"), "{kernel:?}: {}", ended.text);
    }
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_without_a_complaint() {
    if !available("pause") {
        return;
    }
    let pause = 12;
    let script = "while true; do read up rest </proc/uptime; echo up=$up; dmesg | grep -ciE '[s]oft lockup|[r]cu.*stall|hung [t]ask'; sleep 1; done";
    let mut command = vmm(Kernel::TunedPvh, script);
    command.args(["--mem", "256M", "--cpus", "2", "--name", "p"]);
    let guest = Guest::start(command);
    guest.wait_for("up=", 2);
    assert_eq!(guest.control(&["pause", "p"]).0, Some(0));
    assert!(guest.control(&["status", "p", "--json"]).1.contains("paused"));
    thread::sleep(Duration::from_millis(200));
    let before = guest.text();
    thread::sleep(Duration::from_secs(pause));
    assert_eq!(guest.text(), before, "it runs on");
    assert_eq!(guest.control(&["resume", "p"]).0, Some(0));
    guest.wait_for("up=", before.matches("up=").count() + 2);
    let text = guest.text();
    let ups: Vec<f64> =
        text.split("up=").skip(1).filter_map(|p| p.split_whitespace().next()?.parse().ok()).collect();
    let jump = ups.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
    assert!(jump > pause as f64 - 1.0, "time was lost: {ups:?}");
    let complaints =
        text.lines().filter(|line| line.trim().parse::<u32>().is_ok_and(|count| count > 0)).count();
    assert_eq!(complaints, 0, "{text}");
    assert_eq!(guest.control(&["stop", "p", "--timeout", "60"]).0, Some(0));
    assert_eq!(guest.finish().code, Some(0));
}

#[test]
fn a_reboot_ends_well_or_starts_again() {
    if !available("reboot") {
        return;
    }
    let reboot = "echo booted; reboot -f";
    let ended = run(Kernel::TunedPvh, &["--mem", "256M"], reboot);
    assert_eq!((ended.code, ended.text.matches("booted").count()), (Some(0), 1), "{}", ended.text);
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut command = vmm(Kernel::TunedPvh, reboot);
    command.args(["--mem", "256M", "--on-reboot", "reset", "--name", "r", "--disk"]).arg(&disk);
    let guest = Guest::start(command);
    guest.wait_for("booted", 3);
    assert_eq!(guest.control(&["kill", "r"]).0, Some(0));
    assert_eq!(guest.finish().code, Some(10));
}

#[test]
fn exit_codes_reach_the_caller() {
    if !available("exit codes") {
        return;
    }
    let cmdline = "console=hvc0 quiet vmm.exit=ioport:0xf4 vmm.run=\"exit 3\"";
    let mut command = crate::guest::bare(Kernel::TunedPvh, cmdline);
    command.arg("--initrd").arg(Kernel::TunedPvh.initramfs()).args(["--mem", "256M", "--debug-exit"]);
    assert_eq!(Guest::start(command).finish().code, Some(3 << 1 | 1));
}
