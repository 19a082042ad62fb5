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
        Self::start(place, "--kernel busy --serial file=/dev/null")
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
    let look = guest.look("--interval 500ms");
    let count = |row: &Value| row["count"].as_u64().unwrap();
    let (out, read) = (count(row(&look["reasons"], "out")), count(row(&look["reasons"], "in")));
    assert!(out > 100 && out.abs_diff(read) <= 1, "one of each in turns: {look:#}");
    assert_eq!(row(&look["devices"], "serial")["count"], out);
    assert_eq!(row(&look["devices"], "nobody")["count"], read);
    let seconds = look["seconds"].as_f64().unwrap();
    assert!((0.5..5.0).contains(&seconds), "{seconds}");
    let rate = look["exits"].as_f64().unwrap();
    assert!((rate * seconds - (out + read) as f64).abs() < 1.0);
    assert_eq!((&look["name"], &look["state"], &look["lost"]), (&"guest".into(), &"running".into(), &0.into()));
    // Each instruction is a place. KVM's emulator is behind an OUT when it exits, and at an IN.
    let places: u64 = look["places"].as_array().unwrap().iter().map(count).sum();
    assert_eq!(places, out + read);
    let vcpu = row(&look["vcpus"], "vcpu0");
    let share = |name: &str| vcpu[name].as_f64().unwrap();
    let sum = share("guest") + share("monitor") + share("waiting") + share("idle");
    assert!((0.98..1.02).contains(&sum), "{vcpu:#}");
    assert!(share("monitor") > 0.0 && share("guest") > 0.0, "{vcpu:#}");
    // KVM's own count is another's: the same exits, give or take those at the interval's ends.
    if let Some(counted) = look["kvm"]["io_exits"].as_f64() {
        assert!((counted / rate - 1.0).abs() < 0.05, "KVM counted {counted}, the monitor {rate}");
    }
    let told = place.vmm("top guest --once --interval 100ms");
    let told = text(&told.stdout);
    assert!(told.lines().count() == 23 && told.lines().all(|line| line.chars().count() <= 80), "{told}");
    for word in ["guest", "running", "vcpu0", "serial", "nobody", "out ("] {
        assert!(told.contains(word), "no {word} in\n{told}");
    }
}
