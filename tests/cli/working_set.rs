//! What a restored machine touches at its start, for those that follow it: `working-set` in a snapshot's folder.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// Writes the number of its turn to the start of each page from 2 to 4 MiB, turn after turn, and says when it begins one.
pub const TURNS: [u8; 34] = [
    0x31, 0xdb, // xor ebx, ebx
    0xff, 0xc3, // inc ebx
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b't', // mov al, 't'
    0xee, // out dx, al
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0x89, 0x1f, // mov [edi], ebx
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xff, 0x00, 0x00, 0x40, 0x00, // cmp edi, 0x400000
    0x72, 0xf0, // jb to the mov to [edi]
    0xeb, 0xe0, // jmp to the inc
];
/// Pages that it writes to.
const PAGES: u64 = 512;

/// One that is saved as `s`, and was killed.
fn saved() -> Place {
    let place = Place::new();
    place.file("turns", kernel(&TURNS));
    let guest = "--kernel turns --mem 32M --console off --serial file=said --name v";
    let guest = Running::new(place.command(guest));
    await_words(&place, "said", 2);
    place.done("snapshot create --stop v s");
    assert_eq!(guest.finish().status.code(), Some(KILLED));
    place
}

fn await_record(place: &Place) {
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(place.path("s/working-set")).map_or(0, |file| file.len()) == 0 {
        assert!(Instant::now() < deadline, "nothing is written down");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether the memory of snapshot `name` is that of one moment: those pages that the turn has come to have its number, and the others
/// that of the last.
pub fn is_one_turn(place: &Place, name: &str) -> bool {
    let memory = fs::read(place.path(name).join("memory")).unwrap();
    let pages = memory[2 << 20..4 << 20].chunks(4096);
    let numbers: Vec<u32> = pages.map(|page| u32::from_le_bytes(page[..4].try_into().unwrap())).collect();
    let changed = numbers.iter().take_while(|number| **number == numbers[0]).count();
    let is_so = numbers[0] > 1 && numbers[changed..].iter().all(|number| *number == numbers[0] - 1);
    if !is_so {
        eprintln!("{numbers:?}");
    }
    is_so
}

/// Restores `s` until it has said `words`, and gives what a trace of that says of its memory.
fn restored(place: &Place, name: &str, words: usize) -> Value {
    let guest = format!("restore s --name {name} --serial file={name} --trace {name}.trace");
    let guest = Running::new(place.command(&guest));
    await_words(place, name, words);
    place.done(&format!("snapshot create --stop {name} {name}.snap"));
    assert_eq!(guest.finish().status.code(), Some(KILLED));
    assert!(is_one_turn(place, &format!("{name}.snap")));
    let stats = place.done(&format!("trace report {name}.trace --stats --json"));
    serde_json::from_str::<Value>(&stats).unwrap()["saved_memory"].clone()
}

/// What the trace `name` says of who touched which memory first: the pages from 2 to 4 MiB were written to, `ahead` of them by no
/// guest. Where the kernel's trace cannot be read, nobody knows by whom.
#[track_caller]
fn told_first_touches(place: &Place, name: &str, ahead: u64) -> String {
    let stats = place.done(&format!("trace report {name}.trace --stats --json"));
    let touches = serde_json::from_str::<Value>(&stats).unwrap()["first_touches"].clone();
    let ranges = touches["ranges"].as_array().unwrap();
    let turns = ranges.iter().find(|range| range["from"].as_u64().unwrap() <= 2 << 20);
    let turns = turns.unwrap_or_else(|| panic!("{touches}"));
    assert!(turns["to"].as_u64().unwrap() >= (4 << 20) - 1, "{touches}");
    assert!(turns["written"].as_u64().unwrap() >= PAGES, "{touches}");
    assert!(turns["ahead"].as_u64().unwrap() >= ahead, "{touches}");
    let told = place.done(&format!("trace report {name}.trace --stats"));
    if touches["faults"].is_null() {
        // With why, or where a KVM without hardware virtualization was asked and has none.
        assert!(told.contains("first touches of guest memory: ? page faults in KVM ("), "{told}");
    }
    told
}

#[test]
fn what_the_first_start_touches_is_fetched_by_the_next() {
    if !has_kvm("what_the_first_start_touches_is_fetched_by_the_next") {
        return;
    }
    let place = saved();
    let first = restored(&place, "a", 5);
    // On a slow host its start was over before it was killed.
    let _ = fs::remove_file(place.path("s/working-set"));
    assert!(first["written"].as_u64().unwrap() >= PAGES, "{first}");
    assert_eq!((&first["copied_ahead"], &first["read_ahead"]), (&0.into(), &0.into()));
    assert!(first["faults"].as_u64().unwrap() >= PAGES, "{first}");
    let advice = place.done("trace report a.trace --advise");
    assert!(advice.contains("pages of saved memory were copied one at a time"), "{advice}");
    let told = told_first_touches(&place, "a", 0);
    assert!(!told.contains("copied ahead of the guest"), "{told}");
    for step in ["memory", "VM", "devices", "vCPUs", "state", "clocks", "saved memory: the guest wrote to"] {
        assert!(told.contains(step), "{step}: {told}");
    }

    let guest = Running::new(place.command("restore s --serial file=b --name b"));
    await_record(&place);
    place.done("kill b");
    guest.finish();
    let names = fs::read_dir(place.path("s")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names, ["config.json", "memory", "state", "working-set"]);

    let next = restored(&place, "c", 5);
    let ahead = next["copied_ahead"].as_u64().unwrap();
    assert!((PAGES..=next["written"].as_u64().unwrap()).contains(&ahead), "{next}");
    let advice = place.done("trace report c.trace --advise");
    assert!(!advice.contains("saved memory"), "{advice}");
    let told = told_first_touches(&place, "c", PAGES);
    assert!(told.contains("fetch ") && told.contains("copied ahead of the guest"), "{told}");
    place.done("snapshot verify s");

    // A fork of it has a trace as well.
    place.done("fork ./s --name d --serial file=d --trace d.trace");
    await_words(&place, "d", 3);
    place.done("kill d");
    assert_eq!(place.done("wait d"), "10\n");
    let told = told_first_touches(&place, "d", 0);
    assert!(told.contains("state ") && told.contains("saved memory: the guest wrote to"), "{told}");
}

#[test]
fn whatever_stands_in_its_place_the_machine_is_as_it_was_saved() {
    if !has_kvm("whatever_stands_in_its_place_the_machine_is_as_it_was_saved") {
        return;
    }
    let place = saved();
    let path = place.path("s/working-set");
    for (index, what) in ["garbage", "a pipe", "a folder", "a link"].into_iter().enumerate() {
        match what {
            "garbage" => fs::write(&path, [b"VMMPAGE\x01".as_slice(), &[0xff; 4000]].concat()).unwrap(),
            "a pipe" => mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap(),
            "a folder" => fs::create_dir(&path).unwrap(),
            _ => symlink("/dev/zero", &path).unwrap(),
        }
        let memory = restored(&place, &format!("m{index}"), 3);
        assert_eq!(memory["copied_ahead"], 0, "{what}: {memory}");
        if what == "a folder" { fs::remove_dir(&path) } else { fs::remove_file(&path) }.unwrap();
    }
}

#[test]
fn a_folder_of_another_user_or_that_nobody_may_write_to_stays_as_it_is() {
    if !has_kvm("a_folder_of_another_user_or_that_nobody_may_write_to_stays_as_it_is") {
        return;
    }
    let place = saved();
    let folder = place.path("s");
    // Root may write everywhere, and nobody else may give a folder away.
    match rustix::process::geteuid().is_root() {
        true => chown(&folder, Some(1), Some(1)).unwrap(),
        false => rustix::fs::chmod(&folder, Mode::RUSR | Mode::XUSR).unwrap(),
    }
    let guest = Running::new(place.command("restore s --serial file=a --name a"));
    await_words(&place, "a", 1);
    thread::sleep(Duration::from_millis(1500));
    place.done("kill a");
    guest.finish();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
    rustix::fs::chmod(&folder, Mode::RWXU).unwrap();
}
