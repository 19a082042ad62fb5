//! Guests that are not Linux, as they are. Debian packages two; those that one builds are given by path, in a variable that each
//! test names (docs/guests.md): cargo test --test boot -- --ignored others::xv6

use std::io::{PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guest::{Guest, available};

const MEMTEST: &str = "/boot/memtest86+x64.bin";
const IPXE: &str = "/boot/ipxe.lkrn";
const SEABIOS: &str = "/usr/share/seabios/bios-microvm.bin";
const LINUXBOOT: &str = "/usr/share/qemu/linuxboot_dma.bin";

/// `vmm` with the serial port as this process's to write to.
fn start(kernel: &Path, arguments: &[&str]) -> (Guest, PipeWriter) {
    let (keys, to_guest) = std::io::pipe().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--kernel").arg(kernel).args(["--serial", "stdio", "--console", "off"]).args(arguments);
    command.stdin(keys);
    (Guest::start(command), to_guest)
}

/// Whether this is a place for Linux guests that has these files of that package, too. Says so if not, and fails if it must be.
fn packaged(test: &str, package: &str, files: &[&str]) -> bool {
    if !available(test) {
        return false;
    }
    let Some(missing) = files.iter().find(|file| !Path::new(file).exists()) else { return true };
    let text = format!("{test}: no {missing}: apt-get install {package}");
    assert!(std::env::var_os("VMM_REQUIRE_LINUX_GUESTS").is_none(), "{text}");
    eprintln!("SKIP: {text}");
    false
}

/// The image that `variable` names.
fn given(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable);
    PathBuf::from(path.unwrap_or_else(|| panic!("{variable} must name the image: see docs/guests.md")))
}

#[test]
fn memtest86plus_tests_memory_with_two_processors() {
    if !packaged("memtest86+", "memtest86+", &[MEMTEST]) {
        return;
    }
    let cmdline = "console=ttyS0,115200 nopause nobench";
    let arguments = ["--mem", "16M", "--cpus", "2", "--pit", "--cmdline", cmdline];
    let (guest, mut keys) = start(Path::new(MEMTEST), &arguments);
    guest.wait_for("SMP: 2T (PAR)", 1);
    // The screen is drawn every two seconds, so that a quick test is not seen. Data is tested by both processors; the test
    // after those waits for minutes.
    guest.wait_for("All Cores", 1);
    guest.wait_for("[Bit fade test", 1);
    let text = guest.text();
    let errors: Vec<_> =
        text.split("Errors: ").skip(1).map(|rest| rest.trim_start().chars().next()).collect();
    assert!(errors.len() > 1 && errors.iter().all(|digit| *digit == Some('0')), "{errors:?}:\n{text}");
    // It reboots for Esc, which ends the run.
    keys.write_all(b"\x1b").unwrap();
    let ended = guest.finish();
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

/// It has no 64-bit entry point: a BIOS boots it, whose text screen is the serial port.
#[test]
fn ipxe_runs_commands_under_seabios() {
    if !packaged("iPXE", "ipxe seabios qemu-system-data", &[IPXE, SEABIOS, LINUXBOOT]) {
        return;
    }
    let arguments = ["--mem", "64M", "--firmware", SEABIOS, "--option-rom", LINUXBOOT];
    // SeaBIOS holds the last character back.
    let command = ["--cmdline", "echo This is ${platform} here"];
    for transport in ["mmio", "pci"] {
        let arguments = [&arguments[..], &command, &["--transport", transport]].concat();
        let (guest, _keys) = start(Path::new(IPXE), &arguments);
        guest.wait_for("Open Source Network Boot Firmware", 1);
        guest.wait_for("This is pcbios", 1);
    }
}

#[test]
#[ignore = "takes VMM_GUEST_SOLO5=FILE, a test_hello.virtio"]
fn solo5() {
    let (guest, _keys) = start(&given("VMM_GUEST_SOLO5"), &["--mem", "64M", "--cmdline", "Hello_Solo5"]);
    guest.wait_for("Clock source: KVM paravirtualized clock", 1);
    guest.wait_for("Hello_Solo5", 1);
    guest.wait_for("SUCCESS", 1);
    guest.wait_for("solo5_exit(0) called", 1);
}

#[test]
#[ignore = "takes VMM_GUEST_UNIKRAFT=FILE, a helloworld for Firecracker"]
fn unikraft() {
    let (guest, _keys) = start(&given("VMM_GUEST_UNIKRAFT"), &["--mem", "64M", "--rtc"]);
    let ended = guest.finish();
    assert!(ended.code == Some(0) && ended.text.contains("Hello world!"), "{ended:?}");
}

#[test]
#[ignore = "takes VMM_GUEST_XV6=FILE, a kernelmemfs; minutes in the rig"]
fn xv6() {
    let kernel = given("VMM_GUEST_XV6");
    let arguments = ["--mem", "240M,thp", "--text-screen"];
    let (guest, _keys) = start(&kernel, &[&arguments[..], &["--cpus", "2"]].concat());
    guest.wait_for("cpu1: starting 1", 1);
    drop(guest);
    // Its processors spin for locks: on the rig's single one, two take many minutes to the shell.
    let (guest, mut keys) = start(&kernel, &arguments);
    guest.wait_for("init: starting sh", 1);
    guest.wait_for("$ ", 1);
    keys.write_all(b"ls\n").unwrap();
    guest.wait_for("README", 1);
    guest.wait_for("$ ", 2);
}
