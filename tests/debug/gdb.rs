//! The real gdb, in batch mode.

use std::fs;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::guests::*;
use crate::images::{kernel, out};
use crate::place::*;

/// Each of `words`, in this order.
#[track_caller]
pub fn in_order(said: &str, words: &[&str]) {
    let mut rest = said;
    for word in words {
        match rest.split_once(word) {
            Some((_, after)) => rest = after,
            None => panic!("no {word:?} where it should be in:\n{said}"),
        }
    }
}

#[test]
fn registers_memory_steps_and_the_exit_code() {
    if !has_kvm("registers_memory_steps_and_the_exit_code") {
        return;
    }
    let place = Place::new();
    place.file("up", up());
    let guest = start(&place, "--kernel up");
    let said = ask(
        &place,
        &[
            "p $cr0",
            "p $efer",
            "p/x $cs",
            "x/i $pc",
            "stepi",
            "p/x *(int*)0x1100000",
            "hbreak *0x1000059",
            "continue",
            "p $cr0",
            "p $cr4",
            "p $efer",
            "p/x $cr3",
            "p/x $rcx",
            "stepi 2",
            "p $rcx",
            "set $rcx = 2",
            "set $xmm3.uint128 = 7",
            "p $xmm3.v2_int64",
            "set *(char*)0x100008e = 'H'",
            "x/5c 0x100008e",
            "p *(char*)0x7000000000",
            "info threads",
            "continue",
        ],
    );
    in_order(
        &said,
        &[
            "0x0000000001000000 in ??",
            "= [ PE ET ]",
            "= [ ]",
            "= 0x8",
            "=> 0x1000000:",
            "0x000000000100000a in ??",
            "= 0x1101003",
            "Breakpoint 1, 0x0000000001000059 in ??",
            "= [ PE ET PG ]",
            "= [ PAE ]",
            "= [ LME LMA ]",
            "= 0x1100000",
            "= 0xc0000080",
            "= 5",
            "= {7, 0}",
            "72 'H'",
            "vcpu0: runs",
            "exited with code 05",
        ],
    );
    assert!(said.contains("Cannot access memory at address 0x7000000000"), "{said}");
    let output = guest.finish();
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr)
            .starts_with("vmm: the guest waits for gdb (only you can connect): gdb up -ex 'target remote /")
    );
    assert_eq!(fs::read(place.path("out")).unwrap(), b"He", "as gdb changed it");
    assert!(!place.path("gdb").exists(), "the socket is gone");
}

#[test]
fn breakpoints_in_memory_hide_and_leave_no_trace() {
    if !has_kvm("breakpoints_in_memory_hide_and_leave_no_trace") {
        return;
    }
    let place = Place::new();
    place.file("counter", counter());
    let mut guest = start(&place, "--kernel counter");
    let again = format!("break *{LOOP:#x}");
    let (look, count) = (format!("x/3xb {LOOP:#x}"), format!("p *(long*){COUNT:#x}"));
    let said =
        ask(&place, &[&again, "continue", &look, "continue", "continue", "stepi", "stepi", &count, "detach"]);
    in_order(
        &said,
        &["Breakpoint 1, ", "0x48\t0xff\t0xc0", "Breakpoint 1, ", "Breakpoint 1, ", "= 3", "detached"],
    );
    // It runs on, and over the place where the breakpoint was.
    assert!(guest.child().try_wait().unwrap().is_none());
    let said = ask(&place, &[&look, &count, "stepi 3", &count, "kill"]);
    in_order(&said, &["0x48\t0xff\t0xc0", "= ", "= "]);
    let count = |n: usize| -> u64 {
        said.lines()
            .filter_map(|line| line.strip_prefix(&format!("${n} = ")))
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert!(count(1) > 3 && (1..=2).contains(&(count(2) - count(1))), "{said}");
    assert_eq!(guest.finish().status.code(), Some(KILLED), "gdb killed it");
}

#[test]
fn control_c_stops_all_cpus() {
    if !has_kvm("control_c_stops_all_cpus") {
        return;
    }
    let place = Place::new();
    place.file("counter", counter());
    let guest = start(&place, "--kernel counter --cpus 2");
    let mut child =
        gdb(&place, "gdb", &["continue", "info threads", "p $rax > 0", "thread 2", "p/x $rip", "kill"]);
    let child = child.spawn().expect("gdb is there: make tools");
    until("the guest's output", || fs::read(place.path("out")).is_ok_and(|out| out == b"x"));
    thread::sleep(Duration::from_millis(50));
    signal_child(&child, Signal::INT);
    let said = said(finish(child));
    in_order(
        &said,
        &["received signal SIGINT", "vcpu0: runs", "vcpu1: waits to be started", "= 1", "= 0xfff0"],
    );
    assert_eq!(guest.finish().status.code(), Some(KILLED));
}

#[test]
fn a_gdb_that_vanishes_leaves_the_guest_to_itself() {
    if !has_kvm("a_gdb_that_vanishes_leaves_the_guest_to_itself") {
        return;
    }
    let place = Place::new();
    place.file("counter", counter());
    let mut guest = start(&place, "--kernel counter");
    let again = format!("break *{LOOP:#x}");
    let mut child =
        gdb(&place, "gdb", &[&again, "continue", "python import time; time.sleep(60)"]).spawn().unwrap();
    until("the guest's output", || fs::read(place.path("out")).is_ok_and(|out| out == b"x"));
    thread::sleep(Duration::from_millis(300));
    child.kill().unwrap();
    child.wait().unwrap();
    let count = format!("p *(long*){COUNT:#x} > 1000");
    thread::sleep(Duration::from_millis(300));
    assert!(guest.child().try_wait().unwrap().is_none());
    in_order(&ask(&place, &[&count, "detach"]), &["= 1", "detached"]);
    // Ended from the monitor's side, nobody being there.
    guest.signal(Signal::HUP);
    assert_eq!(guest.finish().status.code(), Some(KILLED));
    assert!(!place.path("gdb").exists());
}

#[test]
fn a_guest_ended_from_outside_while_gdb_looks_at_it() {
    if !has_kvm("a_guest_ended_from_outside_while_gdb_looks_at_it") {
        return;
    }
    let place = Place::new();
    place.file("counter", counter());
    let guest = start(&place, "--kernel counter --name looked-at");
    // Paused and resumed by others, it stays where gdb has it; killed, it is gone for gdb too.
    let vmm = env!("CARGO_BIN_EXE_vmm");
    let shell = |what: &str| format!("shell {vmm} {what} looked-at");
    let said = ask(
        &place,
        &["stepi", &shell("pause"), "p/x $rip", &shell("resume"), "stepi", &shell("kill"), "stepi", "p 6*7"],
    );
    in_order(&said, &["0x0000000001000004", "= 0x1000004", "0x0000000001000006", "= 42"]);
    assert!(said.contains("Remote co"), "the connection is over: {said}");
    assert_eq!(guest.finish().status.code(), Some(KILLED));
}

#[test]
fn a_reboot_stops_at_the_first_instruction_again() {
    if !has_kvm("a_reboot_stops_at_the_first_instruction_again") {
        return;
    }
    let place = Place::new();
    place.file("reset", kernel(&out(0x602, 1)));
    let guest = start(&place, "--kernel reset --on-reboot reset");
    let said =
        ask(&place, &["hbreak *0x1000006", "continue", "continue", "p/x $rip", "continue", "delete", "kill"]);
    in_order(
        &said,
        &[
            "Breakpoint 1, 0x0000000001000006",
            "received signal SIGHUP",
            "= 0x1000000",
            "Breakpoint 1, 0x0000000001000006",
        ],
    );
    assert_eq!(guest.finish().status.code(), Some(KILLED));

    let guest = start(&place, "--kernel reset");
    in_order(&ask(&place, &["continue"]), &["exited normally"]);
    assert_eq!(guest.finish().status.code(), Some(0));
}

#[test]
fn gdb_connects_by_tcp() {
    if !has_kvm("gdb_connects_by_tcp") {
        return;
    }
    let place = Place::new();
    place.file("up", up());
    // Port 0: the kernel chooses, and the message tells.
    let log = fs::File::create(place.path("log")).unwrap();
    let mut command = place.command("--gdb tcp:0 --kernel up --console off --serial file=out --debug-exit");
    let child = command.stderr(log).spawn().unwrap();
    let said_by_vmm = || fs::read_to_string(place.path("log")).unwrap();
    until("the message", || said_by_vmm().ends_with('\n'));
    let log = said_by_vmm();
    let address = log.split("remote ").nth(1).unwrap().trim_end().trim_end_matches('\'');
    assert!(address.starts_with("127.0.0.1:"), "{log}");
    let said = said(finish(gdb(&place, address, &["stepi", "continue"]).spawn().unwrap()));
    in_order(&said, &["0x000000000100000a", "exited with code 05"]);
    assert_eq!(finish(child).status.code(), Some(5));
}

#[test]
fn places_where_nobody_can_listen() {
    let place = Place::new();
    place.file("kernel", kernel(&[0xf4]));
    place.file("file", "");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for (arguments, code, words) in [
        ("--gdb 1234", BAD_ARGUMENT, &["1234", "unix:PATH"][..]),
        ("--gdb tcp:99999", BAD_ARGUMENT, &["99999"]),
        ("--gdb unix:file", HOST, &["file", "not a socket"]),
        ("--gdb unix:no/such/folder", HOST, &["no/such/folder"]),
        (&format!("--gdb tcp:{port}"), HOST, &[&port.to_string()]),
        ("--gdb tcp:0.0.0.0:0", BAD_ARGUMENT, &["0.0.0.0", "not this machine's own"]),
        ("--gdb tcp:[::]:0", BAD_ARGUMENT, &["[::]:0", "not this machine's own"]),
    ] {
        refused(&place, &format!("{arguments} --kernel kernel --console off"), code, words);
    }
    refused(&place, "trace --step -- --kernel kernel --gdb unix:g", BAD_ARGUMENT, &["--gdb"]);
}
