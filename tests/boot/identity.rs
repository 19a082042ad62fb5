//! Machines restored of one snapshot, told apart: their random numbers, generations, names and clocks.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vmm_agent::client::{Patience, Session, dial};
use vmm_agent::protocol::{PORT, Request};

use crate::guest::{Guest, Kernel, available, bundle, ticking, vmm};
use crate::snapshot::exec;

const UUIDS: &str = "cat /proc/sys/kernel/random/uuid; head -c 32 /dev/urandom | od -An -tx1";
/// What the kernel says that has heard of its generation. (Not the command line, which may have this in it, and is said, too.)
const HEARD: &str = "dmesg | grep -c 'crng reseeded due to virtual machine [f]ork' || true";
/// The host's failure.
const HOST: i32 = 4;

fn start(kernel: Kernel, name: &str) -> Guest {
    let mut command = vmm(kernel, "echo up; while :; do sleep 1; done");
    command.args(["--name", name, "--vsock"]);
    let guest = Guest::start(command);
    guest.wait_for("up", 1);
    guest
}

fn save(guest: &Guest, name: &str, folder: &Path) {
    let saved = guest.control(&["snapshot", "create", name, folder.to_str().unwrap()]);
    assert_eq!(saved.0, Some(0), "{}", saved.1);
}

/// `vmm restore` as `name`, on this process's streams.
fn restore(guest: &Guest, folder: &Path, name: &str) -> Guest {
    let mut command = guest.command(&["restore", folder.to_str().unwrap(), "--name", name]);
    command.stdin(Stdio::null());
    let restored = Guest::start_in(command, guest.runtime());
    let deadline = Instant::now() + restored.patience;
    while !guest.control(&["status", name]).1.contains("running") {
        assert!(Instant::now() < deadline, "{name} does not run");
        thread::sleep(Duration::from_millis(20));
    }
    restored
}

/// `vmm restore -d --renew` with more options, to its end.
fn restore_renewed(guest: &Guest, folder: &Path, name: &str, options: &[&str]) -> Output {
    let mut command = guest.command(&["restore", "-d", "--renew", "--name", name]);
    command.args(options).arg(folder).env("XDG_STATE_HOME", guest.runtime());
    command.output().unwrap()
}

/// What `script` says in each of these guests, all asked at the same time.
fn ask_all(guest: &Guest, names: &[&str], script: &str) -> Vec<String> {
    let ask = |name: &&str| {
        let mut command = guest.command(&["exec", name, "sh", "-c", script]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let asked: Vec<_> = names.iter().map(ask).collect();
    let told = asked.into_iter().map(|child| child.wait_with_output().unwrap());
    told.map(|output| {
        assert!(output.status.success(), "{script}: {:?}", output.status);
        String::from_utf8(output.stdout).unwrap()
    })
    .collect()
}

#[track_caller]
fn assert_distinct(told: &[String]) {
    assert_eq!(told.iter().collect::<BTreeSet<_>>().len(), told.len(), "{told:?}");
    assert!(told.iter().all(|told| told.len() > 1), "{told:?}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `hears`: the kernel knows generation IDs.
fn copies_are_told_apart(kernel: Kernel, hears: bool) {
    let first = start(kernel, "web");
    let program = "#!/bin/sh\n[ ! -e /tmp/fail ] || exit 3\necho $1 >/tmp/told\n";
    exec(&first, "web", "mkdir -p /etc/vmm/generation.d; echo 1 >/etc/machine-id");
    exec(&first, "web", &format!("cd /etc/vmm/generation.d; printf '{program}' >note; chmod +x note"));
    exec(&first, "web", "date -s @1234567890");
    exec(&first, "web", UUIDS);
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("web");
    save(&first, "web", &saved);

    let _one = restore(&first, &saved, "one");
    let renewed = restore_renewed(&first, &saved, "two", &["--hostname", "copy", "--machine-id"]);
    assert_eq!((renewed.status.code(), &*text(&renewed.stdout)), (Some(0), "two\n"), "{renewed:?}");
    let mut fork = first.command(&["fork", "web", "--renew", "--name", "forked"]);
    let forked = fork.env("XDG_STATE_HOME", first.runtime()).output().unwrap();
    assert_eq!((forked.status.code(), &*text(&forked.stdout)), (Some(0), "forked\n"), "{forked:?}");
    // That of the second was waited for, that of the first comes by itself.
    let told =
        "i=0; until [ -e /tmp/told ] || [ $i = 600 ]; do i=$((i + 1)); sleep 0.1; done; [ -e /tmp/told ]";
    exec(&first, "one", told);
    let all = ["web", "one", "two", "forked"];
    assert_distinct(&ask_all(&first, &all, UUIDS));
    assert_distinct(&ask_all(&first, &all[1..], "cat /run/vmm/generation"));
    for name in &all[1..] {
        exec(&first, name, "cmp /tmp/told /run/vmm/generation");
        assert_eq!(exec(&first, name, HEARD), if hears { "1" } else { "0" }, "{name}");
    }
    assert_eq!(exec(&first, "web", HEARD), "0", "the one that was saved is no copy");
    assert_eq!(ask_all(&first, &all, "hostname"), ["guest\n", "guest\n", "copy\n", "guest\n"]);
    let seconds: Vec<f64> =
        ask_all(&first, &all, "date +%s").iter().map(|told| told.trim().parse().unwrap()).collect();
    assert!(seconds[0] < 1_300_000_000.0, "a clock that is wrong is the saved machine's own: {seconds:?}");
    assert!(seconds[1..].iter().all(|seconds| (seconds - now()).abs() < 60.0), "{seconds:?}");
    let ids = ask_all(&first, &all, "cat /etc/machine-id");
    assert!(ids[0] == "1\n" && ids[1] == ids[0] && ids[2].trim().len() == 32 && ids[3] == ids[0], "{ids:?}");

    // What fails in the guest is told, and a copy that was to be another is none if it is not.
    exec(&first, "web", "touch /tmp/fail");
    let output = first.command(&["agent", "renew", "web"]).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(HOST) && said.contains("note: exit status: 3"), "{output:?}");
    let failing = folder.path().join("failing");
    save(&first, "web", &failing);
    let output = restore_renewed(&first, &failing, "three", &[]);
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(HOST) && said.contains("note: exit status: 3"), "{output:?}");
    let deadline = Instant::now() + first.patience;
    while first.control(&["list"]).1.contains("three") {
        assert!(Instant::now() < deadline, "it was to be killed");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(first.control(&["kill", "two", "forked"]).0, Some(0));
}

#[test]
fn copies_of_our_kernel_are_told_apart() {
    if available("copies_of_our_kernel_are_told_apart") {
        copies_are_told_apart(Kernel::TunedPvh, true);
    }
}

/// It is built without a driver for generation IDs: the agent's seed is all that it gets.
#[test]
fn copies_of_debians_cloud_kernel_are_told_apart() {
    if available("copies_of_debians_cloud_kernel_are_told_apart") {
        copies_are_told_apart(Kernel::Stock, false);
    }
}

/// Without an agent: by what the kernel does about its generation ID alone.
fn kernel_hears(kernel: &str) {
    let script = format!("echo up; while read line; do {UUIDS}; echo heard $({HEARD}); done");
    let cmdline = ticking(&format!("console=hvc0 quiet panic=-1 vmm.run=\"{script}\""));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--kernel").arg(bundle(&format!("{kernel}-bzImage")));
    command.arg("--initrd").arg(bundle(&format!("{kernel}.cpio")));
    command.args(["--cmdline", &cmdline, "--mem", "512M", "--serial", "off", "--console", "stdio"]);
    command.args(["--name", "web"]).stdin(Stdio::piped());
    let mut first = Guest::start(command);
    first.wait_for("up", 1);
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("web");
    save(&first, "web", &saved);
    let mut copies = ["one", "two"].map(|name| {
        let mut command = first.command(&["restore", saved.to_str().unwrap(), "--name", name]);
        command.stdin(Stdio::piped());
        Guest::start_in(command, first.runtime())
    });
    copies.iter_mut().for_each(|copy| copy.stdin().write_all(b"\n").unwrap());
    copies.iter().for_each(|copy| copy.wait_for("heard 1", 1));
    first.stdin().write_all(b"\n").unwrap();
    first.wait_for("heard 0", 1);
    let said = |guest: &Guest| {
        let text = guest.text();
        let lines = text.lines().map(str::trim).filter(|line| line.len() > 35).map(str::to_owned);
        lines.collect::<Vec<_>>()
    };
    let said: Vec<_> = copies.iter().chain([&first]).flat_map(said).collect();
    assert_eq!(said.len(), 9, "a UUID and two lines of bytes of each: {said:?}");
    assert_distinct(&said);
}

#[test]
#[ignore = "other kernels: make copies"]
fn debians_generic_kernels_hear_that_they_are_copies() {
    if available("debians_generic_kernels_hear_that_they_are_copies") {
        ["generic-6.1", "cloud-6.12", "generic-6.12"].into_iter().for_each(kernel_hears);
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// By how many seconds the clock of guest `name` is ahead of this host's, from at least to at most.
fn clock_ahead(guest: &Guest, name: &str) -> (f64, f64) {
    let script = "while read line; do echo $EPOCHREALTIME; done";
    let mut command = guest.command(&["exec", "-i", name, "sh", "-c", script]);
    let mut asked = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut questions = asked.stdin.take().unwrap();
    let mut answers = BufReader::new(asked.stdout.take().unwrap()).lines();
    let (mut least, mut most) = (f64::MIN, f64::MAX);
    for _ in 0..50 {
        let before = now();
        questions.write_all(b"\n").unwrap();
        let clock: f64 = answers.next().unwrap().unwrap().parse().unwrap();
        (least, most) = (least.max(clock - now()), most.min(clock - before));
    }
    drop(questions);
    assert!(asked.wait().unwrap().success());
    (least, most)
}

/// Sets the clock of guest `name` to one that is ahead by less than a minute: that much an agent takes for the time that its message
/// took, and leaves alone.
fn set_ahead(guest: &Guest, name: &str) {
    let status = guest.control(&["status", name, "--json"]).1;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let (path, later) = (status["vsock"].as_str().unwrap(), Instant::now() + guest.patience);
    let agent = dial(Path::new(path), PORT, Patience { boot: later, answer: later }).unwrap();
    let time = ((now() + 0.4) * 1e9) as u64;
    Session::order(agent, Request::SetTime(time), later).unwrap();
}

/// The clock of a copy goes on as if the machine had slept, whatever it counts by.
fn clock_goes_on(source: &str) {
    const LIMIT: f64 = 0.01;
    let first = start(Kernel::TunedPvh, "web");
    let current = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    exec(&first, "web", &format!("echo {source} >{current}"));
    assert_eq!(exec(&first, "web", &format!("cat {current}")), source);
    set_ahead(&first, "web");
    let before = clock_ahead(&first, "web");
    assert!(before.0 > 0.0 && before.1 < 0.5, "{before:?}");
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("web");
    save(&first, "web", &saved);
    assert_eq!(first.control(&["kill", "web"]).0, Some(0));
    let pool = |arguments: &[&str]| {
        let mut command = first.command(&[&["pool"], arguments].concat());
        assert!(command.env("XDG_STATE_HOME", first.runtime()).status().unwrap().success(), "{arguments:?}");
    };
    pool(&["start", "web", saved.to_str().unwrap(), "--size", "1"]);
    // So that a clock which stood still shows.
    thread::sleep(Duration::from_secs(3));
    let check = |name: &str| {
        let after = clock_ahead(&first, name);
        assert_eq!(exec(&first, name, &format!("cat {current}")), source);
        println!("{source}: ahead by {before:?} s, and in {name} by {after:?} s");
        let (least, most) = (after.0 - before.1, after.1 - before.0);
        assert!(least <= LIMIT && most >= -LIMIT, "{source}, {name}: it gained {least} to {most} s");
        assert!(most - least < 0.2, "too slow a guest to tell: {least} to {most} s");
    };
    pool(&["take", "web", "--name", "taken"]);
    pool(&["stop", "web"]);
    check("taken");
    assert_eq!(first.control(&["kill", "taken"]).0, Some(0));
    let _copy = restore(&first, &saved, "copy");
    check("copy");
}

#[test]
fn a_copys_clock_goes_on_by_kvm_clock() {
    if available("a_copys_clock_goes_on_by_kvm_clock") {
        clock_goes_on("kvm-clock");
    }
}

#[test]
fn a_copys_clock_goes_on_by_tsc() {
    if available("a_copys_clock_goes_on_by_tsc") {
        clock_goes_on("tsc");
    }
}
