//! The file that a restored machine's memory is in is cut short under it, by somebody who should not.

use std::fs::{self, File};

use crate::counting::*;
use crate::place::*;
use crate::terminal::Terminal;

/// Counts aloud, and reads another page before each character, from 2 to 31 MiB; then stands still.
pub const READING: [u8; 47] = [
    0x31, 0xdb, // xor ebx, ebx
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0x8b, 0x07, // mov eax, [edi]
    0xff, 0xc3, // inc ebx
    0x88, 0xd8, // mov al, bl
    0x24, 0x3f, // and al, 63
    0x04, 0x30, // add al, '0'
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xb9, 0x00, 0x40, 0x00, 0x00, // mov ecx, 0x4000
    0xff, 0xc9, // dec ecx
    0x75, 0xfc, // jnz to the dec
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xff, 0x00, 0x00, 0xf0, 0x01, // cmp edi, 0x1f00000
    0x72, 0xda, // jb to the mov from [edi]
    0xeb, 0xfe, // jmp to itself
];

/// A place with a snapshot `s` of a machine with this kernel.
fn saved(code: &[u8]) -> Place {
    let (place, _guest) = speaking(code, "");
    place.done("snapshot create v s");
    place
}

fn cut(place: &Place, file: &str) {
    File::options().write(true).open(place.path(file)).unwrap().set_len(0x10_0000).unwrap();
}

/// One error that names the file and what happened, and one hint.
#[track_caller]
fn is_told(said: &str) {
    let lines: Vec<_> = said.lines().map(str::trim).collect();
    let [error, hint] = lines[..] else { panic!("not one error and one hint: {said}") };
    assert!(error.starts_with("vmm: error: the guest's memory is lost: "), "{said}");
    assert!(error.contains("s/memory: it was cut short: 1048576 bytes are left of 33554432"), "{said}");
    assert!(hint.starts_with("hint: ") && hint.contains("vmm snapshot verify"), "{said}");
}

#[test]
fn a_guest_whose_memory_is_cut_short_ends_with_one_error_and_the_terminal_is_given_back() {
    if !has_kvm("a_guest_whose_memory_is_cut_short_ends_with_one_error_and_the_terminal_is_given_back") {
        return;
    }
    let place = saved(&READING);
    let terminal = Terminal::new();
    let before = terminal.mode();
    let mut command = place.command("restore s --serial stdio");
    terminal.give(&mut command);
    let guest = Running::new(command);
    while terminal.seen().len() < 3 {
        std::thread::yield_now();
    }
    assert_ne!(terminal.mode(), before, "it is raw");
    cut(&place, "s/memory");
    let output = guest.finish();
    is_told(&text(&output.stderr));
    assert_eq!(output.status.code(), Some(HOST));
    assert_eq!(terminal.mode(), before);
}

#[test]
fn a_monitor_that_meets_the_loss_itself_ends_in_the_same_way() {
    if !has_kvm("a_monitor_that_meets_the_loss_itself_ends_in_the_same_way") {
        return;
    }
    let place = saved(&COUNTING);
    let terminal = Terminal::new();
    let before = terminal.mode();
    let mut command = place.command("restore s --serial stdio --name w");
    terminal.give(&mut command);
    let guest = Running::new(command);
    while terminal.seen().len() < 3 {
        std::thread::yield_now();
    }
    cut(&place, "s/memory");
    // All of it is read, in the monitor's own process.
    let create = finish(place.command("snapshot create --stop w t").spawn().unwrap());
    assert!(!create.status.success(), "{}", text(&create.stderr));
    let output = guest.finish();
    is_told(&text(&output.stderr));
    assert_eq!(output.status.code(), Some(HOST));
    assert_eq!(terminal.mode(), before);
    assert!(!place.path("t").exists());
}

#[test]
fn a_machine_in_the_background_whose_memory_is_lost_leaves_why_and_its_exit_code() {
    if !has_kvm("a_machine_in_the_background_whose_memory_is_lost_leaves_why_and_its_exit_code") {
        return;
    }
    for (code, is_met_by_monitor) in [(&READING[..], false), (&COUNTING[..], true)] {
        let place = saved(code);
        place.done("restore -d s --serial stdio --name w");
        while place.done("logs w").len() < 3 {}
        if is_met_by_monitor {
            // Its guest meets nothing any more.
            place.done("pause w");
        }
        cut(&place, "s/memory");
        if is_met_by_monitor {
            finish(place.command("snapshot create --stop w t").spawn().unwrap());
        }
        assert_eq!(place.done("wait w").trim(), HOST.to_string());
        is_told(&place.done("logs --monitor w"));
    }
    let place = saved(&COUNTING);
    cut(&place, "s/memory");
    // The next is refused before it begins.
    let said = place.fails("restore s", BAD_ARGUMENT);
    assert!(said.contains("s/memory: 1048576 bytes, and 33554432 were saved"), "{said}");
}

#[test]
fn a_snapshot_that_cannot_be_read_ends_no_machine_that_does_not_need_it() {
    if !has_kvm("a_snapshot_that_cannot_be_read_ends_no_machine_that_does_not_need_it") {
        return;
    }
    let (place, _guest) = counting("");
    place.done("snapshot create v s");
    fs::write(place.path("s/memory"), [0; 4096]).unwrap();
    let said = place.fails("snapshot create v t --base s", BAD_ARGUMENT);
    assert!(said.contains("s/memory: 4096 bytes, and 33554432 were saved"), "{said}");
    assert_eq!(place.status("v")["state"], "running");
}
