//! `vmm top`: guests of a few instructions, looked at while they run.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::images::*;
use crate::place::*;
use crate::terminal::Terminal;

/// 64-bit code: for ever a byte to the serial port, and a read of a port that nobody answers.
const BUSY: [u8; 17] = [
    0xb0, b'x', // mov al, 'x'
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0x66, 0xba, 0x34, 0x12, // mov dx, 0x1234
    0xec, // in al, dx
    0xeb, 0xf2, // jmp to the first instruction
    0xf4, 0xeb, 0xfd, // never reached
];

/// A guest that runs while the test goes on.
struct Guest<'a> {
    place: &'a Place,
    child: Option<Child>,
}

impl<'a> Guest<'a> {
    /// Starts it under the name `guest`, and waits until it runs.
    fn start(place: &'a Place, arguments: &str) -> Self {
        let child = place.command(&format!("--console off --name guest {arguments}")).spawn().unwrap();
        let guest = Self { place, child: Some(child) };
        guest.await_that("it runs", || text(&place.vmm("status guest").stdout).contains("running"));
        guest
    }

    /// The same, with the guest that is always busy.
    fn busy(place: &'a Place) -> Self {
        place.file("busy", kernel(&BUSY));
        Self::start(place, "--kernel busy --serial file=said")
    }

    #[track_caller]
    fn await_that(&self, what: &str, is: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is() {
            assert!(Instant::now() < deadline, "in vain: {what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Whether somebody adds events up in it.
    fn is_looked_at(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.into_iter().any(|name| name == "top\n")
    }

    fn look(&self, arguments: &str) -> Value {
        let output = self.place.vmm(&format!("top guest --once --json {arguments}"));
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn row<'v>(rows: &'v Value, name: &str) -> &'v Value {
    let found = rows.as_array().unwrap().iter().find(|row| row["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {rows:#}"))
}

#[test]
fn it_counts_what_the_guest_does() {
    if !has_kvm("it_counts_what_the_guest_does") {
        return;
    }
    let place = Place::new();
    let guest = Guest::busy(&place);
    let said = || fs::metadata(place.path("said")).unwrap().len();
    let before = said();
    let look = guest.look("--interval 500ms");
    let said = said() - before;
    let count = |row: &Value| row["count"].as_u64().unwrap();
    let (out, read) = (count(row(&look["reasons"], "out")), count(row(&look["reasons"], "in")));
    assert!(out > 100 && out.abs_diff(read) <= 1, "one of each in turns: {look:#}");
    assert!(out <= said, "it said {said} bytes meanwhile, and before and after: {out}");
    assert_eq!(row(&look["devices"], "serial")["count"], out);
    assert_eq!(row(&look["devices"], "nobody")["count"], read);
    let seconds = look["seconds"].as_f64().unwrap();
    assert!((0.5..5.0).contains(&seconds), "{seconds}");
    let rate = look["exits"].as_f64().unwrap();
    assert!((rate * seconds - (out + read) as f64).abs() < 1.0);
    assert_eq!(
        (&look["name"], &look["state"], &look["lost"]),
        (&"guest".into(), &"running".into(), &0.into())
    );
    // Each instruction is a place. KVM's emulator is behind an OUT when it exits, and at an IN.
    let places: u64 = look["places"].as_array().unwrap().iter().map(count).sum();
    assert_eq!(places, out + read);
    let vcpu = row(&look["vcpus"], "vcpu0");
    let share = |name: &str| vcpu[name].as_f64().unwrap();
    let sum = share("guest") + share("monitor") + share("waiting") + share("idle");
    assert!((0.98..1.02).contains(&sum), "{vcpu:#}");
    // On a busy host the monitor's time, which has the waits in it, may be all there is.
    assert!(share("monitor") > 0.0 && share("guest") >= 0.0, "{vcpu:#}");
    let told = place.vmm("top guest --once --interval 100ms");
    let told = text(&told.stdout);
    assert!(told.lines().count() == 23 && told.lines().all(|line| line.chars().count() <= 80), "{told}");
    for word in ["guest", "running", "vcpu0", "serial", "nobody", "out ("] {
        assert!(told.contains(word), "no {word} in\n{told}");
    }
}

#[test]
fn a_vcpu_that_sleeps_in_kvm_is_idle() {
    if !has_kvm("a_vcpu_that_sleeps_in_kvm_is_idle") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let guest = Guest::start(&place, "--kernel halt --cpus 2");
    // Neither ever comes out by itself, so both have to be called to be known at all.
    let look = guest.look("--interval 300ms");
    for name in ["vcpu0", "vcpu1"] {
        let vcpu = row(&look["vcpus"], name);
        assert!(vcpu["idle"].as_f64().unwrap() > 0.9, "{look:#}");
    }
    assert!(look["exits"].as_f64().unwrap() < 20.0, "{look:#}");
}

#[test]
fn who_leaves_leaves_nothing_on() {
    if !has_kvm("who_leaves_leaves_nothing_on") {
        return;
    }
    let place = Place::new();
    let guest = Guest::busy(&place);
    assert!(!guest.is_looked_at());
    // Killed, not asked to leave.
    let mut viewer = place.command("top guest --json --interval 100ms").spawn().unwrap();
    let mut first = [0; 1];
    viewer.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert!(guest.is_looked_at());
    let both = guest.look("--interval 200ms");
    assert_eq!(both["viewers"], 2);
    assert!(both["exits"].as_f64().unwrap() > 0.0);
    assert!(guest.is_looked_at(), "the first is still there");
    viewer.kill().unwrap();
    viewer.wait().unwrap();
    guest.await_that("it is not looked at any more", || !guest.is_looked_at());
    // And again, with nothing left from before.
    let again = guest.look("--interval 200ms");
    assert_eq!((&again["viewers"], &again["lost"]), (&1.into(), &0.into()));
    assert!(again["exits"].as_f64().unwrap() > 0.0);
    guest.await_that("it is not looked at any more", || !guest.is_looked_at());
}

#[test]
fn a_viewer_that_stops_reading_stalls_nobody() {
    if !has_kvm("a_viewer_that_stops_reading_stalls_nobody") {
        return;
    }
    let place = Place::new();
    let guest = Guest::busy(&place);
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    guest.look("--interval 100ms");
    let before = memory();
    let connect = || UnixStream::connect(place.path("run/vmm/guest.sock")).unwrap();
    let request = b"{\"version\":1,\"command\":\"sample\"}\n";
    // One that asks once and is never heard of again; one that asks on and on.
    let mut silent = connect();
    silent.write_all(request).unwrap();
    let mut greedy = connect();
    greedy.set_write_timeout(Some(PATIENCE)).unwrap();
    while greedy.write_all(&request.repeat(100)).is_ok() {}
    let said = || fs::metadata(place.path("said")).unwrap().len();
    let at = said();
    guest.await_that("the guest goes on", || said() > at + 10_000);
    assert!(guest.look("--interval 100ms")["exits"].as_f64().unwrap() > 0.0, "others can look");
    // A ring of 1.5 MiB has been filled once or not at all; nothing else may grow.
    let grown = memory().saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB more");
    // The silent one is cut off in the end.
    guest.await_that("nobody looks", || !guest.is_looked_at());
    drop(silent);
}

#[test]
fn a_recorded_run_is_recorded_whole_while_somebody_looks() {
    if !has_kvm("a_recorded_run_is_recorded_whole_while_somebody_looks") {
        return;
    }
    const BYTES: u32 = 60_000;
    let place = Place::new();
    // mov ecx, BYTES; mov al, 'x'; mov dx, 0x3f8; out dx, al; dec ecx; jnz to the out; then status 0 to 0xf4.
    let mut code = vec![0xb9];
    code.extend(BYTES.to_le_bytes());
    code.extend([0xb0, b'x', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xff, 0xc9, 0x75, 0xfb]);
    code.extend(out(0xf4, 0));
    place.file("counts", kernel(&code));
    let run = "--trace record --kernel counts --serial file=said --debug-exit";
    let mut guest = Guest::start(&place, run);
    let look = guest.look("--interval 100ms");
    assert_eq!(look["recorded"], true, "{look:#}");
    assert!(row(&look["reasons"], "out")["count"].as_u64().unwrap() > 0);
    let ended = finish(guest.child.take().unwrap());
    assert_eq!(ended.status.code(), Some(1), "{}", text(&ended.stderr));
    let stats = place.vmm("trace report record --stats --json").stdout;
    let stats: Value = serde_json::from_slice(&stats).unwrap();
    assert_eq!(row(&stats["devices"], "serial")["count"], BYTES);
}

#[test]
fn the_terminal_is_given_back_whatever_happens() {
    if !has_kvm("the_terminal_is_given_back_whatever_happens") {
        return;
    }
    use rustix::process::{Pid, Signal, kill_process};
    let place = Place::new();
    for end in ["key", "signal", "kill"] {
        let guest = Guest::busy(&place);
        let mut terminal = Terminal::new();
        let before = terminal.mode();
        let mut command = place.command("top --interval 100ms");
        terminal.give(&mut command);
        command.stderr(Stdio::piped());
        let viewer = command.spawn().unwrap();
        drop(command);
        terminal.expect("vcpu0");
        terminal.expect("nobody");
        assert_ne!(terminal.mode(), before, "not raw");
        if end == "key" {
            // Only cells that change are written, so one word each.
            for (key, shown) in [("s", "time)"), ("p", "paused"), ("h", "columns")] {
                terminal.press(key);
                terminal.expect(shown);
            }
        }
        match end {
            "key" => terminal.press("q"),
            "signal" => kill_process(Pid::from_raw(viewer.id() as i32).unwrap(), Signal::TERM).unwrap(),
            _ => assert!(place.vmm("kill guest").status.success()),
        }
        let ended = finish(viewer);
        let said = text(&ended.stderr);
        assert_eq!(ended.status.code(), Some(0), "{end}: {said}");
        assert_eq!(said, if end == "kill" { "vmm: guest has ended\n" } else { "" }, "{end}");
        assert_eq!(terminal.mode(), before, "{end}");
        // The screen that was there before is back, with its cursor.
        terminal.expect("\x1b[?1049l");
        terminal.expect("\x1b[?25h");
        if end != "kill" {
            guest.await_that("nobody looks", || !guest.is_looked_at());
        }
    }
}

#[test]
fn what_cannot_be_looked_at_is_told() {
    let place = Place::new();
    refused(&place, "top --once", HOST, &["no virtual machine is running"]);
    refused(&place, "top nobody --once", HOST, &["nobody"]);
    refused(&place, "top web", BAD_ARGUMENT, &["terminal"]);
    refused(&place, "trace --live web", BAD_ARGUMENT, &["terminal"]);
    refused(&place, "trace --live web -- --kernel busy", BAD_ARGUMENT, &["--live", "cannot be used"]);
    refused(&place, "top web --once --interval 5ms", BAD_ARGUMENT, &["100ms"]);
    refused(&place, "top web --once --symbols missing", BAD_ARGUMENT, &["missing"]);
    if !has_kvm("what_cannot_be_looked_at_is_told") {
        return;
    }
    let guest = Guest::busy(&place);
    let more = place.command("--kernel busy --console off --serial off --name more").spawn().unwrap();
    let more = Guest { place: &place, child: Some(more) };
    more.await_that("it runs", || text(&place.vmm("status more").stdout).contains("running"));
    let output = place.vmm("top --once");
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(BAD_ARGUMENT), "{error}");
    assert!(error.contains("2 virtual machines are running: guest, more"), "{error}");
    drop(more);
    // A machine that stands still is looked at as well.
    assert!(place.vmm("pause guest").status.success());
    let look = guest.look("--interval 200ms");
    assert_eq!((&look["state"], &look["exits"]), (&"paused".into(), &0.0.into()));
    assert!(place.vmm("resume guest").status.success());
    assert!(guest.look("--interval 200ms")["exits"].as_f64().unwrap() > 0.0);
}
