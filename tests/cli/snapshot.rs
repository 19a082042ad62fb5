//! `vmm snapshot` and `vmm restore` with a tiny guest that counts.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// Writes the number of its turn to the start of each page from 2 to 10 MiB, turn after turn.
const TURNS: [u8; 27] = [
    0x31, 0xdb, // xor ebx, ebx
    0xff, 0xc3, // inc ebx
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0x89, 0x1f, // mov [edi], ebx
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xff, 0x00, 0x00, 0xa0, 0x00, // cmp edi, 0xa00000
    0x72, 0xf0, // jb to the mov to [edi]
    0xeb, 0xe7, // jmp to the inc
];

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
    let (place, _guest) = counting("--rng");
    place.done("snapshot create v s");
    assert_eq!(names(&place.path("s")), ["config.json", "memory", "state"]);
    let said = fs::read_to_string(place.path("said")).unwrap();
    let said = await_words(&place, "said", said.len() + 3);
    assert!(said.starts_with("123") && is_counted(&said), "it runs on: {said}");
    place.done("snapshot verify s");
    assert!(place.done("snapshot show s").contains("\"rng\": true"));

    // Two at once, the second from another folder.
    let mut two = place.command("restore ../s --serial file=../two --name w");
    fs::create_dir(place.path("elsewhere")).unwrap();
    two.current_dir(place.path("elsewhere"));
    let _two = Running::new(two);
    let _one = Running::new(place.command("restore s --serial file=one --name u"));
    let [one, two] = ["one", "two"].map(|file| await_words(&place, file, 20));
    assert!(is_counted(&one) && one[..20] == two[..20] && !one.starts_with('1'), "{one}\n{two}");

    // A snapshot of one that was restored goes on from there: its memory is the first one's and what was written since.
    let three = Running::new(place.command("restore s --serial file=three --name x"));
    await_words(&place, "three", 3);
    place.done("snapshot create --stop x t");
    assert_eq!(three.finish().status.code(), Some(KILLED), "it was to stop");
    let _four = Running::new(place.command("restore t --serial file=four"));
    let four = fs::read_to_string(place.path("three")).unwrap() + &await_words(&place, "four", 3);
    assert!(
        is_counted(&four) && four.starts_with(&one[..3]),
        "nothing is lost, and nothing said twice: {four}"
    );
    place.done("snapshot verify s");
}

#[test]
fn snapshots_are_listed_and_removed_and_nothing_that_is_none() {
    if !has_kvm("snapshots_are_listed_and_removed_and_nothing_that_is_none") {
        return;
    }
    let (place, _guest) = counting("");
    place.done("snapshot create v s");
    place.done("snapshot create v t");
    let list = |folder: &str| -> Vec<String> {
        let told = place.done(&format!("snapshot list --json {folder}"));
        let rows: Vec<serde_json::Value> = serde_json::from_str(&told).unwrap();
        rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!((list(""), list("s")), (vec!["s".to_owned(), "t".to_owned()], vec![]));
    let table = place.done("snapshot list");
    assert!(table.lines().nth(1).unwrap().starts_with("s ") && table.contains(" 32M  count\n"), "{table}");
    // More than a snapshot, a link to one, no folder, and a folder without one.
    fs::write(place.path("t/mine"), "mine").unwrap();
    std::os::unix::fs::symlink("s", place.path("link")).unwrap();
    for (what, why) in
        [("t", "it has mine, too"), ("link", "symbolic link"), ("said", "state"), ("run", "state")]
    {
        let before = place.contents().len();
        let said = place.fails(&format!("snapshot rm {what}"), BAD_ARGUMENT);
        assert!(said.contains(why) && place.contents().len() >= before, "{said}");
    }
    for name in ["t/mine", "link"] {
        fs::remove_file(place.path(name)).unwrap();
    }
    fs::write(place.path("t/memory"), "damaged").unwrap();
    assert_eq!(list(""), ["s"]);
    place.done("snapshot rm s t");
    assert!(!place.path("s").exists() && !place.path("t").exists());
    assert!(place.fails("snapshot list nowhere", BAD_ARGUMENT).contains("nowhere"));
}

#[test]
fn memory_is_saved_as_it_was_at_one_moment_while_the_guest_runs_on() {
    if !has_kvm("memory_is_saved_as_it_was_at_one_moment_while_the_guest_runs_on") {
        return;
    }
    let place = Place::new();
    place.file("turns", kernel(&TURNS));
    let _guest = Running::new(place.command("--kernel turns --mem 32M --console off --name v"));
    place.await_running("v");
    let mut turns = Vec::new();
    for name in ["a", "b", "c"] {
        place.done(&format!("snapshot create v {name}"));
        let memory = fs::read(place.path(name).join("memory")).unwrap();
        let pages = memory[2 << 20..10 << 20].chunks(4096);
        let numbers: Vec<u32> = pages.map(|page| u32::from_le_bytes(page[..4].try_into().unwrap())).collect();
        // Those that the turn has come to have its number, and the others that of the last.
        let turn = numbers[0];
        let changed = numbers.iter().take_while(|number| **number == turn).count();
        assert!(numbers[changed..].iter().all(|number| *number == turn - 1), "{name}: {numbers:?}");
        turns.push(turn);
    }
    assert!(turns[0] < turns[1] && turns[1] < turns[2], "it runs on: {turns:?}");
}

#[test]
fn a_snapshot_over_another_has_what_differs_and_needs_it_as_it_was() {
    if !has_kvm("a_snapshot_over_another_has_what_differs_and_needs_it_as_it_was") {
        return;
    }
    let (place, guest) = counting("");
    place.done("snapshot create v a");
    let blocks = |name: &str| fs::metadata(place.path(name).join("memory")).unwrap().blocks();
    // Each over the one before: of the running machine, then of one that goes on from the last, and from a copy.
    await_words(&place, "said", 100);
    place.done("snapshot create v b --base a");
    drop(guest);
    let restored = Running::new(place.command("restore b --serial file=one --name w"));
    await_words(&place, "one", 3);
    place.done("snapshot create --stop w c --base b");
    restored.finish();
    let sizes = ["a", "b", "c"].map(blocks);
    assert!(sizes[1] < sizes[0] && sizes[2] < sizes[0], "what is the same is left out: {sizes:?}");
    place.done("snapshot verify c");
    place.done("fork ./c --name f");
    let one = fs::read_to_string(place.path("one")).unwrap();
    let logged = |name: &str| place.done(&format!("logs {name}"));
    while logged("f").len() < 3 {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(is_counted(&(one.clone() + &logged("f"))), "a copy goes on from there");
    place.done("snapshot create f d --base c");
    place.done("kill f");
    // They are moved together, and all of it is still there.
    fs::create_dir(place.path("moved")).unwrap();
    for name in ["a", "b", "c", "d"] {
        fs::rename(place.path(name), place.path("moved").join(name)).unwrap();
    }
    let _two = Running::new(place.command("restore moved/c --serial file=two"));
    assert!(is_counted(&(one + &await_words(&place, "two", 3))));
    let _three = Running::new(place.command("restore moved/d --serial file=three"));
    assert!(is_counted(&await_words(&place, "three", 3)));

    let refused = |arguments: &str, code: i32, why: &str| {
        let failed = place.fails(arguments, code);
        assert!(failed.contains(why), "{arguments}: {failed}");
    };
    let memory = place.path("moved/a/memory");
    let kept = fs::read(&memory).unwrap();
    let mut changed = kept.clone();
    changed[0x5000] ^= 1;
    fs::write(&memory, changed).unwrap();
    refused("snapshot verify moved/c", BAD_ARGUMENT, "a/memory: its checksum is wrong");
    fs::write(&memory, kept).unwrap();
    place.done("snapshot verify moved/c");
    // Another of its name, and none.
    fs::rename(place.path("moved/a"), place.path("away")).unwrap();
    refused("restore moved/c", BAD_ARGUMENT, "moved/a cannot be read: open");
    let (_guest, other) = (Running::new(place.command("restore away --serial file=four --name o")), "o");
    await_words(&place, "four", 3);
    place.done(&format!("snapshot create {other} moved/a"));
    refused("restore moved/c", BAD_ARGUMENT, "is not what it was");
    refused(&format!("snapshot create {other} e --base nowhere"), BAD_ARGUMENT, "nowhere");
    assert!(!place.path("e").exists());
}

#[test]
fn a_snapshot_of_another_kernel_whose_kvm_has_as_much_is_restored() {
    if !has_kvm("a_snapshot_of_another_kernel_whose_kvm_has_as_much_is_restored") {
        return;
    }
    let (place, _guest) = counting("");
    place.done("snapshot create v s");
    let path = place.path("s/state");
    let mut bytes = fs::read(&path).unwrap();
    let release = rustix::system::uname().release().to_bytes().to_vec();
    let at = bytes.windows(release.len()).position(|part| part == release).expect("the host's kernel");
    // Behind the magic number, the version and the header's checksum: those of configuration and state, in groups of seven bits.
    let number = |from: usize| from..=from + bytes[from..].iter().position(|byte| byte & 0x80 == 0).unwrap();
    let parts = (0..5).fold(vec![number(16)], |mut parts, _| {
        parts.push(number(parts.last().unwrap().end() + 1));
        parts
    });
    // The last says that there is no base.
    let (checksum, state) = (parts[1].clone(), *parts[5].end() + 1);
    bytes[at] ^= 1;
    let mut left = crc32fast::hash(&bytes[state..]);
    let mut encoded = Vec::new();
    while left >= 0x80 {
        encoded.push(left as u8 | 0x80);
        left >>= 7;
    }
    encoded.push(left as u8);
    let state = state + encoded.len() - checksum.clone().count();
    bytes.splice(checksum, encoded);
    let header = crc32fast::hash(&bytes[16..state]);
    bytes[12..16].copy_from_slice(&header.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    place.done("restore -d s --serial file=more --name w");
    assert!(is_counted(&await_words(&place, "more", 3)));
    place.done("kill w");
}

#[test]
fn each_restored_machine_has_a_generation_id_of_its_own() {
    if !has_kvm("each_restored_machine_has_a_generation_id_of_its_own") {
        return;
    }
    let (place, _guest) = counting("");
    place.done("snapshot create v s");
    let _restored = ["one", "two"].map(|name| {
        let running = Running::new(place.command(&format!("restore s --serial file={name} --name {name}")));
        await_words(&place, name, 3);
        place.done(&format!("snapshot create {name} {name}.snap"));
        running
    });
    // Behind the RSDP.
    let id = |folder| fs::read(place.path(folder).join("memory")).unwrap()[0xe_0030..0xe_0040].to_vec();
    let [saved, one, two] = ["s", "one.snap", "two.snap"].map(id);
    assert!(saved != one && one != two && two != saved, "{saved:x?} {one:x?} {two:x?}");
    assert!([saved, one, two].iter().all(|id| *id != [0; 16]));
}

#[test]
fn a_paused_machine_stays_paused_and_is_saved_twice_alike() {
    if !has_kvm("a_paused_machine_stays_paused_and_is_saved_twice_alike") {
        return;
    }
    let (place, _guest) = counting("--rng --cpus 2 --transport pci");
    place.done("pause v");
    place.done("snapshot create v s");
    place.done("snapshot create v t");
    assert_eq!(place.status("v")["state"], "paused");
    for file in ["config.json", "memory"] {
        let [one, two] = ["s", "t"].map(|folder| fs::read(place.path(folder).join(file)).unwrap());
        assert!(one == two, "{file}");
    }
    let [one, two] = ["s", "t"].map(|folder| fs::read(place.path(folder).join("state")).unwrap());
    // The host's clock and counters are at the beginning, as numbers of different lengths; the devices are at the end.
    let alike = one.iter().rev().zip(two.iter().rev()).take_while(|(one, two)| one == two).count();
    assert!(alike > 300 && one.len().abs_diff(two.len()) < 20, "{alike} of {} and {}", one.len(), two.len());
}

#[test]
fn what_cannot_be_saved_is_told_and_leaves_nothing() {
    if !has_kvm("what_cannot_be_saved_is_told_and_leaves_nothing") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    place.file("disk", vec![0; 1 << 20]);
    let _running = place.start("v", "");
    for options in ["", "--stop "] {
        for (folder, why) in
            [("disk", "File exists"), ("nowhere/s", "No such file"), ("/", "not a folder's name")]
        {
            let before = names(place.dir.path());
            let said = place.fails(&format!("snapshot create {options}v {folder}"), BAD_ARGUMENT);
            assert!(said.contains(why), "{said}");
            assert_eq!(names(place.dir.path()), before, "{options}");
            place.await_running("v");
        }
    }
    assert!(place.fails("snapshot create nobody s", HOST).contains("nobody"));
}

#[test]
fn a_disk_that_is_full_is_told_and_the_machine_runs_on() {
    if !has_kvm("a_disk_that_is_full_is_told_and_the_machine_runs_on") {
        return;
    }
    let place = Place::new();
    place.file("turns", kernel(&TURNS));
    // A limit on files is what a full disk can be without a disk: the same error path, by another number.
    let mut limited = std::process::Command::new("sh");
    let run = "ulimit -f 2000; exec \"$0\" --kernel turns --mem 32M --console off --name v";
    limited.args(["-c", run, crate::PROGRAM]);
    place.set_up(&mut limited);
    let _guest = Running::new(limited);
    place.await_running("v");
    for options in ["", "--stop "] {
        let before = names(place.dir.path());
        let said = place.fails(&format!("snapshot create {options}v s"), HOST);
        assert!(
            said.contains("s/memory: File too large") || said.contains("memory: File too large"),
            "{said}"
        );
        assert_eq!(names(place.dir.path()), before);
        assert_eq!(place.status("v")["state"], "running");
    }
}

/// Ctrl-C, at some moment of it.
#[test]
fn who_is_interrupted_leaves_a_whole_snapshot_or_none_and_a_machine_that_runs() {
    if !has_kvm("who_is_interrupted_leaves_a_whole_snapshot_or_none_and_a_machine_that_runs") {
        return;
    }
    let place = Place::new();
    place.file("turns", kernel(&TURNS));
    let _guest = Running::new(place.command("--kernel turns --mem 32M --console off --name v"));
    place.await_running("v");
    let (mut named, mut none) = (0, 0);
    for round in 0..20 {
        let folder = format!("s{round}");
        let create = Running::new(place.command(&format!("snapshot create v {folder}")));
        thread::sleep(Duration::from_millis(2 * round));
        create.signal(rustix::process::Signal::INT);
        let _ = create.finish();
        let left: Vec<_> =
            names(place.dir.path()).into_iter().filter(|name| name.contains(&folder)).collect();
        match left.as_slice() {
            [] => none += 1,
            [only] if *only == folder => {
                place.done(&format!("snapshot verify {folder}"));
                named += 1;
            }
            other => panic!("{other:?}"),
        }
        place.await_running("v");
    }
    assert!(none > 0, "{named} of 20 were too fast");
}

#[test]
fn a_monitor_that_is_killed_while_it_saves_leaves_a_whole_snapshot_or_none_and_nobody() {
    if !has_kvm("a_monitor_that_is_killed_while_it_saves_leaves_a_whole_snapshot_or_none_and_nobody") {
        return;
    }
    let place = Place::new();
    place.file("turns", kernel(&TURNS));
    for round in 0..12 {
        let name = format!("killed-{round}-{}", std::process::id());
        let guest =
            Running::new(place.command(&format!("--kernel turns --mem 32M --console off --name {name}")));
        place.await_running(&name);
        let create = Running::new(place.command(&format!("snapshot create {name} s{round}")));
        // Some are killed before they begin, some meanwhile, some after.
        thread::sleep(Duration::from_millis(3 * round));
        guest.signal(rustix::process::Signal::KILL);
        create.finish();
        guest.finish();
        let folder = place.path(&format!("s{round}"));
        if folder.exists() {
            place.done(&format!("snapshot verify s{round}"));
        }
        let deadline = Instant::now() + PATIENCE;
        let lives = |process: io::Result<fs::DirEntry>| {
            let command = process.and_then(|process| fs::read(process.path().join("cmdline")));
            command.is_ok_and(|command| command.windows(name.len()).any(|part| part == name.as_bytes()))
        };
        while fs::read_dir("/proc").unwrap().any(lives) {
            assert!(Instant::now() < deadline, "somebody works on");
        }
    }
}

#[test]
fn a_machine_whose_devices_are_not_those_of_its_configuration_is_not_saved() {
    if !has_kvm("a_machine_whose_devices_are_not_those_of_its_configuration_is_not_saved") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    ["a", "b"].into_iter().for_each(|name| place.file(name, vec![0; 1 << 20]));
    let _running = place.start("v", "--transport pci --disk a,readonly");
    // The name is that of the disk that was there, and the guest may write to this one.
    place.done("device remove --force v virtio-blk0");
    place.done("device add v disk=b");
    let said = place.fails("snapshot create v s", HOST);
    assert!(said.contains("devices that came or went"), "{said}");
    assert!(!place.path("s").exists() && place.status("v")["state"] == "running");
}

#[test]
fn a_folder_that_is_no_snapshot_or_a_damaged_one_is_refused_with_the_reason() {
    if !has_kvm("a_folder_that_is_no_snapshot_or_a_damaged_one_is_refused_with_the_reason") {
        return;
    }
    let (place, guest) = counting("");
    place.done("snapshot create v s");
    place.done("kill v");
    guest.finish();
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
        ("state", &|bytes| bytes[8] += 1, "version 4, and this vmm reads version 3"),
        ("state", &|bytes| bytes.truncate(bytes.len() - 1), "checksum"),
        ("state", &|bytes| *bytes.last_mut().unwrap() ^= 1, "checksum"),
        ("memory", &|bytes| bytes.truncate(4096), "4096 bytes, and 33554432 were saved"),
        ("memory", &|bytes| bytes.extend([0; 4096]), "were saved"),
    ] {
        damaged(file, change);
        for command in ["restore d", "snapshot verify d"] {
            let said = place.fails(command, BAD_ARGUMENT);
            assert!(said.contains(why) && said.contains("hint: "), "{command}, {file}: {said}");
        }
    }
    damaged("memory", &|bytes| bytes[(1 << 20) + 5] ^= 1);
    assert!(place.fails("snapshot verify d", BAD_ARGUMENT).contains("checksum"));
    for folder in ["nowhere", "said"] {
        for command in ["restore", "snapshot show", "snapshot verify"] {
            assert!(place.fails(&format!("{command} {folder}"), BAD_ARGUMENT).contains(folder));
        }
    }
    // Another machine than the one that was saved.
    for (options, why) in [
        ("--cpus 2", "with 1 vCPUs, and the configuration has 2"),
        ("--mem 64M", "32M, and the machine 64M"),
        ("--rng", "virtio-rng"),
        ("--transport pci", "pci"),
    ] {
        let said = place.fails(&format!("restore s --serial file=more {options}"), BAD_ARGUMENT);
        assert!(said.contains(why), "{options}: {said}");
    }
    assert!(!place.path("run/vmm").exists() || names(&place.path("run/vmm")).is_empty());
}

#[test]
fn another_user_than_root_saves_what_the_guest_has_touched_and_reads_no_more() {
    let test = "another_user_than_root_saves_what_the_guest_has_touched_and_reads_no_more";
    if !has_kvm(test) {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let Some(command) = place.give_to_nobody(test) else { return };
    let start = "--kernel count --mem 512M --serial file=said --console off --name v";
    let mut guest = Running::new(command(start));
    await_words(&place, "said", 3);
    // Page faults of children that it has waited for (proc_pid_stat(5)).
    let faults = |pid: i32| -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(8).unwrap().parse().unwrap()
    };
    let before = faults(guest.pid());
    let saved = finish(command("snapshot create v s").spawn().unwrap());
    assert_eq!(saved.status.code(), Some(0), "{}", text(&saved.stderr));
    let more = faults(guest.pid()) - before;
    assert!(more < 10_000, "{more} page faults, where memory has {} pages", 512 << 8);
    guest.child().kill().unwrap();
    let restored = Running::new(command("restore s --serial file=more --console off --name w"));
    assert!(is_counted(&await_words(&place, "more", 10)));
    drop(restored);
}

#[test]
fn a_folder_with_a_fifo_in_it_is_refused_at_once() {
    let (place, name) = (Place::new(), |file: &str| format!("d/{file}"));
    for fifo in ["config.json", "state", "memory"] {
        let _ = fs::remove_dir_all(place.path("d"));
        fs::create_dir(place.path("d")).unwrap();
        for file in ["config.json", "state", "memory"] {
            match file == fifo {
                true => mknodat(CWD, place.path(&name(file)), FileType::Fifo, Mode::from(0o600), 0).unwrap(),
                false => place.file(&name(file), "{}"),
            }
        }
        for command in ["restore d", "fork ./d", "snapshot show d", "snapshot verify d"] {
            let said = place.fails(command, BAD_ARGUMENT);
            assert!(said.contains(&format!("{fifo}: not a regular file\nhint: ")), "{command}: {said}");
        }
        assert_eq!(place.done("snapshot list").lines().count(), 1, "the heading alone");
    }
}

/// Of a machine whose memory is being written, by a process of its own that stands still meanwhile.
#[test]
fn a_pause_that_was_given_up_does_not_happen() {
    if !has_kvm("a_pause_that_was_given_up_does_not_happen") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let run = "--kernel count --mem 512M,prefault --serial file=said --console off --name v";
    let guest = Running::new(place.command(run));
    await_words(&place, "said", 3);
    let children = || -> Vec<i32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
        let all = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        all.collect::<String>().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    };
    let saving = place.command("snapshot create v s").spawn().unwrap();
    until("the process that writes", || !children().is_empty());
    let writer = Pid::from_raw(children()[0]).unwrap();
    kill_process(writer, Signal::STOP).unwrap();
    let mut pausing = place.command("pause v").spawn().unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(pausing.try_wait().unwrap().is_none(), "it waits");
    pausing.kill().unwrap();
    pausing.wait().unwrap();
    kill_process(writer, Signal::CONT).unwrap();
    assert_eq!(finish(saving).status.code(), Some(0));
    thread::sleep(Duration::from_millis(300));
    assert_eq!(place.status("v")["state"], "running");
    place.done("snapshot verify s");
}

#[test]
fn what_is_damaged_is_named_beside_what_is_listed() {
    if !has_kvm("what_is_damaged_is_named_beside_what_is_listed") {
        return;
    }
    let (place, _guest) = counting("");
    for folder in ["good", "bad"] {
        place.done(&format!("snapshot create v {folder}"));
    }
    File::options().write(true).open(place.path("bad/state")).unwrap().set_len(10).unwrap();
    let listed = place.vmm("snapshot list");
    assert_eq!(listed.status.code(), Some(0));
    assert!(text(&listed.stdout).contains("good") && !text(&listed.stdout).contains("bad"));
    let said = text(&listed.stderr);
    assert!(said.contains("warn: bad (damaged: ") && !said.contains("good"), "{said}");
    assert!(place.fails("snapshot create v good", BAD_ARGUMENT).contains("vmm snapshot rm"), "it exists");
    assert!(place.fails("snapshot rm nothing", BAD_ARGUMENT).contains("vmm snapshot create"));
}
