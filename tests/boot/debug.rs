//! Linux, stepped and under gdb. Breakpoints are not tried: emulated machines have none that work.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Kernel, available, bare, vmm};

#[test]
fn the_first_instructions_of_linux_lead_to_long_mode() {
    if !available("single steps") {
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(["trace", "--step", "--count", "60", "--"]);
    command.args(bare(Kernel::TunedPvh, "console=hvc0").get_args()).args([
        "--mem",
        "256M",
        "--console",
        "off",
    ]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(told.lines().count(), 60, "{told}");
    let mut modes: Vec<_> = told.lines().map(|line| line.split('|').nth(1).unwrap().trim()).collect();
    modes.dedup();
    assert_eq!(modes, ["protected 32", "compat 32", "long 64"], "{told}");
    assert!(told.lines().next().unwrap().contains("pvh_start_xen "), "symbols, where they run: {told}");
    for change in ["cr4=0x20+PAE", "efer=0x100+LME", "+PG efer=0x500+LMA", "gs.base=0x"] {
        assert!(told.contains(change), "{change}: {told}");
    }
}

#[test]
fn gdb_interrupts_looks_steps_and_leaves() {
    if !available("gdb") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gdb");
    let mut command = vmm(Kernel::TunedPvh, "echo BEGIN; cat /proc/uptime >/dev/null; sleep 4; echo END");
    command.args(["--mem", "256M", "--cpus", "2"]).arg("--gdb").arg(format!("unix:{}", socket.display()));
    let guest = Guest::start(command);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "no socket");
        thread::sleep(Duration::from_millis(20));
    }
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch"]).arg(Kernel::TunedPvh.file());
    let remote = format!("target remote {}", socket.display());
    for command in [
        "set pagination off",
        &remote,
        "x/i $pc",
        "continue",
        "info threads",
        "bt 3",
        "p $cr0",
        "p $efer",
        "p $gs_base != 0",
        "x/s (char*)&linux_banner",
        "stepi",
        "stepi",
        "x/i $pc",
        "thread 2",
        "bt 3",
        "detach",
    ] {
        gdb.args(["-ex", command]);
    }
    let gdb = gdb.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let gdb = gdb.expect("gdb is there: make tools");
    // Both vCPUs are idle while it sleeps.
    guest.wait_for("BEGIN", 1);
    thread::sleep(Duration::from_secs(1));
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(gdb.id() as i32).unwrap(),
        rustix::process::Signal::INT,
    )
    .unwrap();
    let output = gdb.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let mut rest = &*said;
    for word in [
        "=> 0x1000500:",
        "received signal SIGINT",
        "vcpu0: ",
        "vcpu1: ",
        "#0  0xffffffff8",
        "in default_idle_call ()",
        "= [ PE MP ET NE WP AM PG ]",
        "= [ SCE LME LMA NXE ]",
        "= 1",
        "Linux version 6.",
        "=> 0xffffffff8",
        "Switching to thread 2",
        "#0  0xffffffff8",
        "detached",
    ] {
        rest =
            rest.split_once(word).unwrap_or_else(|| panic!("no {word:?} where it should be in:\n{said}")).1;
    }
    assert_eq!(guest.finish().body(), Vec::<&str>::new(), "it runs on to its end");
    assert!(!socket.exists(), "the socket is gone");
}
