//! `vmm snapshot` and `vmm restore` with a tiny guest that counts.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use crate::images::*;
use crate::place::*;

/// Writes 60 characters to COM1, one after the other and each some time after the last, and ends with 5.
const COUNTING: [u8; 34] = [
    0x31, 0xdb, // xor ebx, ebx
    0xff, 0xc3, // inc ebx
    0x88, 0xd8, // mov al, bl
    0x24, 0x3f, // and al, 63
    0x04, 0x30, // add al, '0'
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xb9, 0x00, 0x80, 0x00, 0x00, // mov ecx, 0x8000
    0xff, 0xc9, // dec ecx
    0x75, 0xfc, // jnz to the dec
    0x83, 0xfb, 0x3c, // cmp ebx, 60
    0x72, 0xe5, // jb to the inc
    0xb0, 0x05, // mov al, 5
    0xe6, 0xf4, // out 0xf4, al
    0xf4, // hlt
];
/// The exit code that it ends with.
const COUNTED: i32 = 5 << 1 | 1;

fn all() -> String {
    (1..=60u8).map(|number| char::from(b'0' + number)).collect()
}

/// A place with the guest, and the guest, called `v`, which has counted for a while.
fn counting(more: &str) -> (Place, Child) {
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let command =
        format!("--kernel count --mem 32M --serial file=said --console off --debug-exit --name v {more}");
    let child = place.command(&command).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(place.path("said")).map_or(0, |file| file.len()) < 3 {
        assert!(Instant::now() < deadline, "nothing is said");
        thread::sleep(Duration::from_millis(1));
    }
    (place, child)
}

#[track_caller]
fn done(place: &Place, arguments: &str) -> String {
    let output = place.vmm(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn refused(place: &Place, arguments: &str, code: i32) -> String {
    let output = place.vmm(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments}: {}", text(&output.stdout));
    text(&output.stderr)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn restored_machines_count_on_from_where_the_saved_one_was_and_it_counts_on_itself() {
    if !has_kvm("restored_machines_count_on_from_where_the_saved_one_was_and_it_counts_on_itself") {
        return;
    }
    let (place, child) = counting("--rng");
    done(&place, "snapshot create v s");
    assert_eq!(names(&place.path("s")), ["config.json", "memory", "state"]);
    assert_eq!(finish(child).status.code(), Some(COUNTED), "it runs on");
    assert_eq!(fs::read_to_string(place.path("said")).unwrap(), all());
    done(&place, "snapshot verify s");
    assert!(done(&place, "snapshot show s").contains("\"rng\": true"));

    // Two at once, the second by another name and from another folder.
    let mut second = place.command("restore ../s --serial file=two --name w");
    fs::create_dir(place.path("elsewhere")).unwrap();
    let second = second.current_dir(place.path("elsewhere")).spawn().unwrap();
    assert_eq!(place.vmm("restore s --serial file=one").status.code(), Some(COUNTED));
    assert_eq!(finish(second).status.code(), Some(COUNTED));
    let one = fs::read_to_string(place.path("one")).unwrap();
    assert_eq!(fs::read_to_string(place.path("elsewhere/two")).unwrap(), one);
    assert!((1..58).contains(&one.len()) && all().ends_with(&one), "{one}");

    // A snapshot of one that was restored goes on from there: its memory is the first one's and what was written since.
    let child = place.command("restore s --serial file=three --name x").spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(place.path("three")).map_or(0, |file| file.len()) < 3 {
        assert!(Instant::now() < deadline, "nothing is said");
        thread::sleep(Duration::from_millis(1));
    }
    done(&place, "snapshot create --stop x t");
    assert_eq!(finish(child).status.code(), Some(KILLED), "it was to stop");
    assert_eq!(place.vmm("restore t --serial file=four").status.code(), Some(COUNTED));
    let four = fs::read_to_string(place.path("four")).unwrap();
    let three = fs::read_to_string(place.path("three")).unwrap();
    assert_eq!(three + &four, one, "nothing is lost, and nothing said twice");
    done(&place, "snapshot verify s");
}

#[test]
fn a_paused_machine_stays_paused_and_is_saved_twice_alike() {
    if !has_kvm("a_paused_machine_stays_paused_and_is_saved_twice_alike") {
        return;
    }
    let (place, mut child) = counting("--rng --cpus 2 --transport pci");
    done(&place, "pause v");
    done(&place, "snapshot create v s");
    done(&place, "snapshot create v t");
    assert_eq!(place.status("v")["state"], "paused");
    for file in ["config.json", "memory"] {
        let [one, two] = ["s", "t"].map(|folder| fs::read(place.path(folder).join(file)).unwrap());
        assert!(one == two, "{file}");
    }
    let [one, two] = ["s", "t"].map(|folder| fs::read(place.path(folder).join("state")).unwrap());
    // The host's clock and counters are at the beginning, as numbers of different lengths; the devices are at the end.
    let alike = one.iter().rev().zip(two.iter().rev()).take_while(|(one, two)| one == two).count();
    assert!(alike > 300 && one.len().abs_diff(two.len()) < 20, "{alike} of {} and {}", one.len(), two.len());
    let _ = child.kill();
}

#[test]
fn what_cannot_be_saved_is_told_and_leaves_nothing() {
    if !has_kvm("what_cannot_be_saved_is_told_and_leaves_nothing") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    place.file("disk", vec![0; 1 << 20]);
    let refuses = |options: &str, folder: &str, why: &str| {
        let _running = place.start("v", options);
        let before = names(place.dir.path());
        let said = refused(&place, &format!("snapshot create v {folder}"), HOST);
        assert!(said.contains(why), "{said}");
        assert_eq!(names(place.dir.path()), before, "{options}");
        assert_eq!(place.status("v")["state"], "running");
    };
    refuses("--disk disk", "s", "disks that the guest may write to");
    refuses("", "disk", "File exists");
    refuses("", "nowhere/s", "No such file");
    refuses("", "/", "not a folder's name");
    assert!(refused(&place, "snapshot create nobody s", HOST).contains("nobody"));
}

#[test]
fn a_folder_that_is_no_snapshot_or_a_damaged_one_is_refused_with_the_reason() {
    if !has_kvm("a_folder_that_is_no_snapshot_or_a_damaged_one_is_refused_with_the_reason") {
        return;
    }
    let (place, mut child) = counting("");
    done(&place, "snapshot create v s");
    done(&place, "kill v");
    let _ = child.wait();
    let original =
        ["config.json", "state", "memory"].map(|file| (file, fs::read(place.path("s").join(file)).unwrap()));
    let damaged = |file: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let _ = fs::remove_dir_all(place.path("d"));
        fs::create_dir(place.path("d")).unwrap();
        for (name, bytes) in &original {
            let mut bytes = bytes.clone();
            if *name == file {
                change(&mut bytes);
            }
            fs::write(place.path("d").join(name), bytes).unwrap();
        }
    };
    for (file, change, why) in [
        ("config.json", (&|bytes: &mut Vec<u8>| bytes.truncate(20)) as &dyn Fn(&mut Vec<u8>), "config.json"),
        ("config.json", &|bytes| *bytes.iter_mut().find(|byte| **byte == b'3').unwrap() = b'4', "checksum"),
        ("state", &|bytes| bytes.clear(), "not a machine's state"),
        ("state", &|bytes| bytes[8] += 1, "version 2, and this vmm reads version 1"),
        ("state", &|bytes| bytes.truncate(bytes.len() - 1), "checksum"),
        ("state", &|bytes| *bytes.last_mut().unwrap() ^= 1, "checksum"),
        ("memory", &|bytes| bytes.truncate(4096), "4096 bytes, and 33554432 were saved"),
        ("memory", &|bytes| bytes.extend([0; 4096]), "were saved"),
    ] {
        damaged(file, change);
        for command in ["restore d", "snapshot verify d"] {
            let said = refused(&place, command, BAD_ARGUMENT);
            assert!(said.contains(why) && said.contains("hint: "), "{command}, {file}: {said}");
        }
    }
    damaged("memory", &|bytes| bytes[(1 << 20) + 5] ^= 1);
    assert!(refused(&place, "snapshot verify d", BAD_ARGUMENT).contains("checksum"));
    for folder in ["nowhere", "said"] {
        for command in ["restore", "snapshot show", "snapshot verify"] {
            assert!(refused(&place, &format!("{command} {folder}"), BAD_ARGUMENT).contains(folder));
        }
    }
    // Another machine than the one that was saved.
    for (options, why) in [
        ("--cpus 2", "with 1 vCPUs, and the configuration has 2"),
        ("--mem 64M", "32M, and the machine 64M"),
        ("--rng", "virtio-rng"),
        ("--transport pci", "pci"),
    ] {
        let said = refused(&place, &format!("restore s --serial file=more {options}"), BAD_ARGUMENT);
        assert!(said.contains(why), "{options}: {said}");
    }
    assert!(!place.path("run/vmm").exists() || names(&place.path("run/vmm")).is_empty());
}
