//! Networks over the life of a VM: hundreds of resets in one process, and hundreds of VMs, leave nothing behind.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::images::*;
use crate::place::*;

/// The back ends that this user may have here.
fn networks(suffix: &str) -> (String, Vec<String>) {
    let tap = format!("vl{}{suffix}", std::process::id());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let published = format!("user,publish={port}:80,publish={port}:53/udp");
    let mut networks = vec![published, "user,restrict=on".to_owned()];
    let made = Command::new("ip").args(["tuntap", "add", "dev", &tap, "mode", "tap"]).output();
    if made.is_ok_and(|output| output.status.success()) {
        let _ = Command::new("ip").args(["link", "delete", &tap]).output();
        networks.push(format!("tap={tap}"));
    } else {
        eprintln!("SKIP: taps over many lives: needs the right to make them (root, iproute2, /dev/net/tun)");
    }
    (tap, networks)
}

/// Open descriptors, threads, and KiB of memory of a process.
fn weight(pid: i32) -> [usize; 3] {
    let entries = |folder: &str| fs::read_dir(format!("/proc/{pid}/{folder}")).unwrap().count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    let kib = resident.split_whitespace().next().unwrap().parse().unwrap();
    [entries("fd"), entries("task"), kib]
}

#[test]
fn a_guest_that_resets_hundreds_of_times_costs_no_more_than_one_that_does_so_twenty_times() {
    if !has_kvm("a_guest_that_resets_hundreds_of_times") {
        return;
    }
    let place = Place::new();
    place.file("reset", kernel(&out(0x602, 1)));
    let (tap, networks) = networks("r");
    for network in networks {
        let log = place.path("log");
        let mut command = place.command(&format!(
            "-v --dumpable --kernel reset --mem 32M --console off --on-reboot reset --net {network}"
        ));
        command.stderr(fs::File::create(&log).unwrap()).stdout(Stdio::null());
        let running = Running::new(command);
        let await_resets = |count: usize| {
            let deadline = Instant::now() + 2 * PATIENCE;
            while fs::read_to_string(&log).unwrap().matches("starting it again").count() < count {
                assert!(Instant::now() < deadline, "{network}: {}", fs::read_to_string(&log).unwrap());
                thread::sleep(Duration::from_millis(5));
            }
        };
        // Between two machines there is less of everything: the most of several looks counts, which may miss the very most. What a
        // reset leaves behind is there two hundred times.
        let most = || {
            let looks = (0..20).map(|_| {
                thread::sleep(Duration::from_millis(3));
                weight(running.pid())
            });
            looks.reduce(|a, b| [0, 1, 2].map(|at| a[at].max(b[at]))).unwrap()
        };
        await_resets(20);
        let early = most();
        await_resets(220);
        let late = most();
        assert!(late[0] < early[0] + 20 && late[1] < early[1] + 20, "{network}: {early:?}, {late:?}");
        assert!(late[2] < early[2] + 1024, "{network}: {early:?}, {late:?}");
    }
    assert!(!Path::new("/sys/class/net").join(tap).exists(), "the tap is left behind");
}

#[test]
fn hundreds_of_vms_one_after_the_other_leave_no_tap_and_no_socket() {
    if !has_kvm("hundreds_of_vms_one_after_the_other") {
        return;
    }
    let place = Place::new();
    place.file("off", kernel(&out(0x600, 5 << 2 | 1 << 5)));
    let (tap, networks) = networks("o");
    let before = place.contents();
    for network in networks {
        for _ in 0..70 {
            let output = place.vmm(&format!("--kernel off --mem 32M --console off --net {network}"));
            assert_eq!(output.status.code(), Some(0), "{network}: {}", text(&output.stderr));
            assert!(!Path::new("/sys/class/net").join(&tap).exists(), "{network}: the tap is left behind");
        }
    }
    assert_eq!(place.contents(), before);
}
