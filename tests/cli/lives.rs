//! Tiny guests from their start to their exit code, controlled as from another terminal.
//!
//! They are a few instructions in an ELF file, so they run wherever there is a KVM at all.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::images::*;
use crate::place::*;

impl Place {
    fn sockets(&self) -> Vec<PathBuf> {
        let dir = fs::read_dir(self.path("run/vmm")).into_iter().flatten();
        dir.map(|entry| entry.unwrap().path()).collect()
    }
}

#[test]
fn the_exit_code_tells_how_the_guest_ended() {
    if !has_kvm("the_exit_code_tells_how_the_guest_ended") {
        return;
    }
    let place = Place::new();
    place.file("exit", kernel(&out(0xf4, 21)));
    place.file("off", kernel(&out(0x600, 5 << 2 | 1 << 5)));
    place.file("reset", kernel(&out(0x602, 1)));
    place.file("i8042", kernel(&out(0x64, 0xfe)));
    place.file("crash", kernel(&[0x0f, 0x0b]));
    for (guest, code) in
        [("exit --debug-exit", 43), ("off", 0), ("reset", 0), ("i8042", 0), ("crash", GUEST_CRASH)]
    {
        let output = place.vmm(&format!("--kernel {guest} --mem 64M"));
        assert_eq!(output.status.code(), Some(code), "{guest}: {}", text(&output.stderr));
        if code == GUEST_CRASH {
            assert!(text(&output.stderr).starts_with("vmm: error: vcpu0: triple fault"), "{guest}");
        } else {
            assert!(output.stderr.is_empty(), "{guest}: {}", text(&output.stderr));
        }
        assert!(place.sockets().is_empty(), "{guest} left its socket");
    }
}

#[test]
fn a_panicked_guest_ends_starts_again_or_waits_as_it_is() {
    if !has_kvm("a_panicked_guest_ends_starts_again_or_waits_as_it_is") {
        return;
    }
    let place = Place::new();
    // Says so, and then resets the machine, as a kernel does after a panic.
    place.file("panic", kernel(&[out(0x505, 1)[..7].to_vec(), out(0x602, 1)].concat()));
    for (how, code) in [("", GUEST_PANIC), ("--on-panic exit --on-reboot reset", GUEST_PANIC)] {
        let output = place.vmm(&format!("--kernel panic --mem 64M {how}"));
        assert_eq!(output.status.code(), Some(code), "{how}: {}", text(&output.stderr));
        assert_eq!(
            text(&output.stderr),
            "vmm: error: the guest's kernel panicked, and wrote nothing to its console\n"
        );
    }
    for how in ["--on-panic reset", "--on-reboot reset"] {
        let log = place.path("log");
        let mut command =
            place.command(&format!("-v --kernel panic --mem 64M --console off --name again {how}"));
        command.stderr(fs::File::create(&log).unwrap());
        let guest = Running::new(command);
        let deadline = Instant::now() + PATIENCE;
        while fs::read_to_string(&log).unwrap().matches("starting it again").count() < 3 {
            assert!(Instant::now() < deadline, "{how}: {}", fs::read_to_string(&log).unwrap());
            thread::sleep(Duration::from_millis(5));
        }
        place.done("kill again");
        assert_eq!(guest.finish().status.code(), Some(KILLED), "{how}");
    }
    let command = "--kernel panic --mem 64M --console off --cpus 2 --name waits --on-panic pause";
    let guest = Running::new(place.command(command));
    let deadline = Instant::now() + PATIENCE;
    while place.status("waits")["state"] != "paused" {
        assert!(Instant::now() < deadline, "it is not paused");
        thread::sleep(Duration::from_millis(5));
    }
    // Let on, it goes on where it was: to the reset.
    place.done("resume waits");
    let output = guest.finish();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("panicked") && text(&output.stderr).contains("it is paused"));
}

#[test]
fn a_short_lived_vm_has_let_go_of_its_disk_when_it_ends() {
    if !has_kvm("a_short_lived_vm_has_let_go_of_its_disk_when_it_ends") {
        return;
    }
    let place = Place::new();
    place.file("exit", kernel(&out(0xf4, 21)));
    place.file("disk", vec![0; 4096]);
    for _ in 0..10 {
        // Fails if somebody still had the lock of the image.
        let output = place.vmm("--kernel exit --debug-exit --disk disk");
        assert_eq!(output.status.code(), Some(43), "{}", text(&output.stderr));
    }
}

#[test]
fn a_guest_is_controlled_from_another_terminal() {
    if !has_kvm("a_guest_is_controlled_from_another_terminal") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let first = place.start("first", "--mem 64M --serial pty");
    let second = place.start("second", "--mem 32M --cpus 2");
    let status = place.status("first");
    assert_eq!(status["pid"], first.pid());
    assert_eq!((&status["cpus"], &status["memory_bytes"]), (&1.into(), &(64 << 20).into()));
    assert_eq!(status["kernel"], place.path("halt").canonicalize().unwrap().to_str().unwrap());
    let pty = status["ptys"][0]["path"].as_str().unwrap();
    assert!(fs::metadata(pty).unwrap().file_type().is_char_device(), "{pty}");
    assert!(place.done("status first").contains(pty));
    let list: Value = serde_json::from_str(&place.done("list --json")).unwrap();
    assert_eq!((&list[0]["name"], &list[1]["name"]), (&"first".into(), &"second".into()));
    assert_eq!(place.done("list").lines().count(), 3);

    // Two vCPUs: one in its HLT, the other never started. They go on as they were.
    let states: Value = serde_json::from_str(&place.done("status second --vcpus --json")).unwrap();
    assert_eq!(
        (&states[0]["run"], &states[1]["run"]),
        (&"halted".into(), &"waits for INIT".into()),
        "{states:#}"
    );
    assert!(states[0]["rip"].as_u64().unwrap() >= 0x10_0000, "{states:#}");
    assert_eq!(place.status("second")["state"], "running");
    assert!(place.done("status second --vcpus").contains("vcpu1  waits for INIT"));

    refused(&place, "--kernel halt --console file=out --name first", HOST, &["first", "already"]);
    place.done("pause first");
    place.done("pause first");
    assert_eq!(place.status("first")["state"], "paused");
    assert!(place.done("status first --vcpus").contains("halted"), "also while it is paused");
    assert_eq!(place.status("first")["state"], "paused");
    assert_eq!(place.status("second")["state"], "running");
    place.done("resume first");
    assert_eq!(place.status("first")["state"], "running");

    // These guests do not know what a power button is.
    let asked = Instant::now();
    place.done("stop second --timeout 1");
    assert!(asked.elapsed() >= Duration::from_secs(1));
    let second = second.finish();
    assert_eq!(second.status.code(), Some(KILLED));
    assert!(text(&second.stderr).contains("did not power off in time"));
    // Killed although paused, and the name is free when the command returns.
    place.done("pause first");
    place.done("kill first");
    place.start("first", "");
    let first = first.finish();
    assert_eq!(first.status.code(), Some(KILLED));
    assert!(text(&first.stderr).contains(pty), "the pseudo-terminal is told at the start");
}

#[test]
fn one_command_orders_several_guests_and_reports_each_that_is_not_there() {
    if !has_kvm("one_command_orders_several_guests_and_reports_each_that_is_not_there") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let states = || ["a", "b"].map(|name| place.status(name)["state"].clone());
    for ends_by in ["stop a nobody b --timeout 0", "kill a nobody b"] {
        let guests = ["a", "b"].map(|name| place.start(name, ""));
        for (order, state) in [("pause", "paused"), ("resume", "running")] {
            let output = place.vmm(&format!("{order} a nobody b"));
            let said = text(&output.stderr);
            assert_eq!((output.status.code(), said.matches("error").count()), (Some(HOST), 1), "{said}");
            assert!(said.contains("\"nobody\""), "{said}");
            assert_eq!(states(), [state; 2]);
        }
        assert_eq!(place.vmm(ends_by).status.code(), Some(HOST));
        guests.into_iter().for_each(|guest| drop(guest.finish()));
        assert!(place.sockets().is_empty());
    }
}

#[test]
fn what_a_guest_writes_to_is_not_emptied_by_another() {
    if !has_kvm("what_a_guest_writes_to_is_not_emptied_by_another") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let dump = "--net user --net-dump frames";
    for (output, file) in [(dump, "frames"), ("--serial file=log", "log"), ("--trace told", "told")] {
        let running = place.start("first", output);
        let length = || fs::metadata(place.path(file)).unwrap().len();
        let before = length();
        let again = format!("--kernel halt --console off {output}");
        let refused = place.vmm(&again);
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(BAD_ARGUMENT), "{said}");
        assert!(said.contains(file) && said.contains("another virtual machine writes to it"), "{said}");
        assert!(length() >= before, "{file} was emptied");
        assert!(place.vmm("kill first").status.success());
        running.finish();
    }
}

#[test]
fn signals_stop_a_guest() {
    use rustix::process::Signal;
    if !has_kvm("signals_stop_a_guest") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    for (signals, timeout) in [
        (&[Signal::TERM][..], 1),
        (&[Signal::TERM, Signal::TERM], 600),
        (&[Signal::INT, Signal::INT], 600),
        (&[Signal::HUP], 600),
    ] {
        let guest = place.start("guest", &format!("--stop-timeout {timeout}"));
        for signal in signals {
            guest.signal(*signal);
            // Those that come within a second are one wish.
            thread::sleep(Duration::from_millis(1100));
        }
        assert_eq!(guest.finish().status.code(), Some(KILLED), "{signals:?}");
        assert!(place.sockets().is_empty());
    }
    // Started by nohup, a hang-up is none of its business.
    let mut nohup = Command::new("sh");
    nohup.args(["-c", "trap '' HUP; exec \"$0\" --kernel halt --console off --name guest"]);
    nohup.arg(env!("CARGO_BIN_EXE_vmm"));
    place.set_up(&mut nohup);
    let guest = Running::new(nohup);
    place.await_running("guest");
    guest.signal(Signal::HUP);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(place.status("guest")["state"], "running");
    place.done("kill guest");
}

#[test]
fn a_guest_that_heeds_its_power_button_ends_well() {
    if !has_kvm("a_guest_that_heeds_its_power_button_ends_well") {
        return;
    }
    let place = Place::new();
    // Reads the event register (port 0x604) until the button is pressed, then powers off.
    let mut code = vec![0x66, 0xba, 0x04, 0x06, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    code.extend(out(0x600, 5 << 2 | 1 << 5));
    place.file("halt", kernel(&code));
    let guest = place.start("guest", "");
    guest.signal(rustix::process::Signal::TERM);
    assert_eq!(guest.finish().status.code(), Some(0));
    let guest = place.start("guest", "");
    place.done("pause guest");
    place.done("stop guest");
    assert_eq!(guest.finish().status.code(), Some(0));
}

/// It is in front of a person, who hears what to do while the run lasts, and at its end.
#[test]
fn a_console_that_nobody_opens_is_told() {
    if !has_kvm("a_console_that_nobody_opens_is_told") {
        return;
    }
    let place = Place::new();
    place.file("speaks", kernel(&out(0x3f8, b'r')));
    place.file("silent", kernel(&HALT));
    place.file("reboots", kernel(&out(0x64, 0xfe)));
    place.file("disk", vec![0; 4096]);
    // They begin before the silent one, so their time is over before its is.
    let quiet = [
        "--kernel speaks --serial stdio",
        "--kernel silent --console off",
        "--kernel silent --console file=out",
    ];
    let quiet = quiet.map(|arguments| Running::new(place.command(arguments)));
    let silent = ["--kernel silent", "--kernel silent --serial stdio"];
    let mut silent = silent.map(|arguments| Running::new(place.command(arguments)));
    for (guest, word) in silent.iter_mut().zip(["(hvc0)", "(ttyS0)"]) {
        let stderr = guest.child().stderr.take().unwrap();
        let (send, lines) = channel();
        thread::spawn(move || {
            send.send(BufReader::new(stderr).lines().take(2).flatten().collect::<Vec<_>>())
        });
        let lines = lines.recv_timeout(PATIENCE).expect("nothing is told");
        assert!(lines[0].contains("nobody in the guest") && lines[0].contains(word), "{lines:?}");
        assert!(lines[1].starts_with("hint: ") && lines[1].contains("console="), "{lines:?}");
    }
    for guest in quiet {
        guest.signal(rustix::process::Signal::KILL);
        assert_eq!(text(&guest.finish().stderr), "");
    }
    // A machine without disk and initrd may well have nothing to say.
    for (arguments, told) in [("", false), ("--disk disk", true), ("--disk disk --serial stdio", true)] {
        let output = place.vmm(&format!("--kernel reboots {arguments}"));
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert_eq!(stderr.contains("nobody there ever") && stderr.contains("hint: "), told, "{stderr}");
    }
}

#[test]
fn a_reboot_really_restarts_if_asked_to() {
    if !has_kvm("a_reboot_really_restarts_if_asked_to") {
        return;
    }
    let place = Place::new();
    let mut code = out(0x3f8, b'r');
    code.truncate(7);
    code.extend(out(0x64, 0xfe));
    place.file("halt", kernel(&code));
    let output = place.vmm("--kernel halt --console off --serial file=out");
    assert_eq!((output.status.code(), fs::read(place.path("out")).unwrap()), (Some(0), b"r".to_vec()));

    let wire = UnixListener::bind(place.path("wire")).unwrap();
    let arguments =
        "--kernel halt --console off --serial file=out --net socket=wire --on-reboot reset --name guest";
    let guest = Running::new(place.command(arguments));
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(place.path("out")).map_or(0, |meta| meta.len()) < 5 {
        assert!(Instant::now() < deadline, "it does not restart");
        thread::sleep(Duration::from_millis(5));
    }
    wire.set_nonblocking(true).unwrap();
    let connections = std::iter::from_fn(|| wire.accept().ok()).count();
    assert_eq!(connections, 1, "the network's peer notices nothing");
    // The end that was asked for is not undone by the next reboot.
    guest.signal(rustix::process::Signal::TERM);
    let output = guest.finish();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(fs::read(place.path("out")).unwrap().iter().all(|byte| *byte == b'r'));
}

#[test]
fn monitors_that_are_stopped_are_listed_as_such_and_delay_nobody() {
    use rustix::process::Signal;
    if !has_kvm("monitors_that_are_stopped_are_listed_as_such_and_delay_nobody") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    // One before them and one behind them.
    let (runs, too) = (place.start("runs", ""), place.start("too", ""));
    let stopped: Vec<_> = (0..4).map(|n| place.start(&format!("stopped{n}"), "")).collect();
    stopped.iter().for_each(|guest| guest.signal(Signal::STOP));
    let asked = Instant::now();
    let list = place.done("list");
    // One after the other, with the patience of a single command, it would be 40 s.
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    let rows: Vec<Vec<_>> = list.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let [first, others @ .., last] = &rows[..] else { panic!("{list}") };
    assert_eq!(first[..3], ["runs", &runs.pid().to_string(), "running"]);
    assert_eq!(last[..3], ["too", &too.pid().to_string(), "running"], "{list}");
    assert_eq!(others.len(), 4);
    for (row, guest) in others.iter().zip(&stopped) {
        assert_eq!(row[1..4], [guest.pid().to_string().as_str(), "no", "answer"], "{list}");
    }
    let json: Value = serde_json::from_str(&place.done("list --json")).unwrap();
    assert_eq!((&json[0]["state"], &json[1]["name"]), (&"running".into(), &"stopped0".into()));
    assert_eq!(
        (&json[1]["pid"], &json[1]["error"]),
        (&stopped[0].pid().into(), &"\"stopped0\" does not answer".into())
    );
    // Who asks for one of them hears so at once, and not when a monitor's time to answer is over.
    let asked = Instant::now();
    for command in ["status", "status --vcpus", "pause", "resume", "stop", "device list"] {
        let output = place.vmm(&format!("{command} stopped0"));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(HOST), "{command}: {said}");
        assert!(said.contains("does not answer") && said.contains("kill -CONT"), "{command}: {said}");
    }
    // Its end comes all the same to one that is killed.
    place.done("kill stopped0");
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    // Woken, the others answer again.
    stopped[1..].iter().for_each(|guest| guest.signal(Signal::CONT));
    for n in 1..4 {
        place.await_running(&format!("stopped{n}"));
        place.done(&format!("kill stopped{n}"));
    }
    place.done("kill runs");
    place.done("kill too");
}

#[test]
fn a_path_that_is_not_utf_8_has_a_status() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    if !has_kvm("a_path_that_is_not_utf_8_has_a_status") {
        return;
    }
    let place = Place::new();
    let name = OsStr::from_bytes(b"k\xff");
    fs::write(place.dir.path().join(name), kernel(&HALT)).unwrap();
    let mut command = place.command("--console off --name odd");
    command.arg("--kernel").arg(name);
    let guest = Running::new(command);
    place.await_running("odd");
    let status = place.status("odd");
    let bytes = status["kernel"].as_array().unwrap_or_else(|| panic!("{status}"));
    assert!(bytes.ends_with(&[b'k'.into(), 0xff.into()]), "{status}");
    let list: Value = serde_json::from_str(&place.done("list --json")).unwrap();
    assert_eq!(list[0]["kernel"], status["kernel"]);
    assert!(place.done("status odd").contains("k\u{fffd}"));
    place.done("top odd --once --interval 100ms");
    place.done("kill odd");
    assert_eq!(guest.finish().status.code(), Some(KILLED));
}

#[test]
fn what_a_killed_monitor_leaves_does_not_take_its_name() {
    if !has_kvm("what_a_killed_monitor_leaves_does_not_take_its_name") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let guest = place.start("guest", "");
    guest.signal(rustix::process::Signal::KILL);
    guest.finish();
    assert_eq!(place.sockets().len(), 1);
    let guest = place.start("guest", "");
    guest.signal(rustix::process::Signal::KILL);
    guest.finish();
    assert_eq!(place.done("list --json").trim(), "[]");
    assert!(place.sockets().is_empty(), "list cleans up");
}
