//! `vmm fork` with tiny guests.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// What the guest `name` has said in the background, once that is `least` characters.
fn await_log(place: &Place, name: &str, least: usize) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = place.done(&format!("logs {name}"));
        if said.len() >= least {
            return said;
        }
        assert!(Instant::now() < deadline, "{name}: {said}");
    }
}

/// Nobody is left.
fn end(place: &Place, names: &str) {
    place.done(&format!("kill {names}"));
    assert_eq!(fs::read_dir(place.path("run/vmm")).unwrap().count(), 0);
}

#[test]
fn copies_go_on_from_one_moment_and_so_do_copies_of_copies_and_the_first() {
    if !has_kvm("copies_go_on_from_one_moment_and_so_do_copies_of_copies_and_the_first") {
        return;
    }
    let (place, _first) = counting("--rng --vsock sock");
    assert_eq!(place.done("fork v --count 3"), "v-1\nv-2\nv-3\n");
    let said = ["v-1", "v-2", "v-3"].map(|name| await_log(&place, name, 10));
    for one in &said {
        assert!(is_counted(one) && one[..10] == said[0][..10] && !one.starts_with('1'), "{said:?}");
    }
    let first = fs::read_to_string(place.path("said")).unwrap();
    let first = await_words(&place, "said", first.len() + 3);
    assert!(is_counted(&first), "it goes on: {first}");
    let own = |name: &str| place.status(name)["vsock"].as_str().unwrap().to_owned();
    assert!(
        own("v").ends_with("/sock") && own("v-2").ends_with("/v-2.d/vsock"),
        "{} {}",
        own("v"),
        own("v-2")
    );

    assert_eq!(place.done("fork v-2"), "v-2-1\n");
    let grandchild = await_log(&place, "v-2-1", 3);
    let child = await_log(&place, "v-2", 10);
    assert!(is_counted(&grandchild) && is_counted(&child), "{grandchild}\n{child}");
    // A paused one is copied, and stays so; what it is a copy of need not be there.
    place.done("kill v v-2");
    place.done("pause v-1");
    assert_eq!(place.done("fork v-1 --name last"), "last\n");
    assert!(is_counted(&await_log(&place, "last", 3)));
    assert_eq!(place.status("v-1")["state"], "paused");
    end(&place, "v-1 v-3 v-2-1 last");
}

#[test]
fn copies_are_called_by_free_numbers_or_as_one_says() {
    if !has_kvm("copies_are_called_by_free_numbers_or_as_one_says") {
        return;
    }
    let (place, _first) = counting("");
    place.done("snapshot create --stop v saved.snap");
    assert_eq!(place.done("fork ./saved.snap --name w-2"), "w-2\n");
    assert_eq!(place.done("fork ./saved.snap --name w --count 3"), "w-1\nw-3\nw-4\n");
    assert_eq!(place.done("fork ./saved.snap"), "saved-1\n");
    let taken = place.fails("fork ./saved.snap --name w-2", HOST);
    assert!(taken.contains("\"w-2\" is already running"), "{taken}");
    end(&place, "w-1 w-2 w-3 w-4 saved-1");
}

#[test]
fn what_cannot_be_copied_is_told() {
    if !has_kvm("what_cannot_be_copied_is_told") {
        return;
    }
    let (place, first) = counting("--net switch=lan");
    let alone = place.fails("fork v", BAD_ARGUMENT);
    assert!(alone.contains("switch=lan") && alone.contains("--net user"), "{alone}");
    assert_eq!(place.done("fork v --net user"), "v-1\n");
    fs::create_dir(place.path("folder")).unwrap();
    for (arguments, code, why) in [
        ("fork nobody", HOST, "nobody"),
        ("fork ./nothing", BAD_ARGUMENT, "nothing"),
        ("fork folder", HOST, "hint: to name the folder, include a slash: ./folder"),
        ("fork v --count 0", BAD_ARGUMENT, "--count"),
        ("fork v --net user --kernel count", BAD_ARGUMENT, "--kernel"),
        ("fork v --net user --cpus 2", BAD_ARGUMENT, "vCPUs"),
        ("fork v --net user --cpu host", BAD_ARGUMENT, "--cpu"),
        ("fork v --net user --count 2 -p 8080:80", BAD_ARGUMENT, "--publish is for one machine"),
        ("fork v --net user --count 2 --trace x", BAD_ARGUMENT, "--trace is for one machine"),
        ("restore nothing/", BAD_ARGUMENT, "nothing"),
    ] {
        let said = place.fails(arguments, code);
        assert!(said.contains(why), "{arguments}: {said}");
    }
    place.done("kill v-1");
    drop(first);
    place.file("disk", vec![0; 1 << 20]);
    place.file("halt", kernel(&HALT));
    let _guest = place.start("d", "--disk disk");
    let in_place = place.fails("fork d", HOST);
    assert!(in_place.contains("/disk is written to in place"), "{in_place}");
    assert!(in_place.contains("\nhint: give the disk an overlay at its start"), "{in_place}");
}

#[test]
fn copies_whose_names_were_never_printed_end_with_their_command() {
    if !has_kvm("copies_whose_names_were_never_printed_end_with_their_command") {
        return;
    }
    let (place, _guest) = counting("");
    for (signal, milliseconds) in
        [(Signal::TERM, 20), (Signal::TERM, 60), (Signal::HUP, 100), (Signal::INT, 60)]
    {
        let mut command = place.command("fork v --count 30 --serial file=/dev/null");
        if signal == Signal::TERM {
            // Whose children ignore SIGHUP.
            let words: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
            command = Command::new("nohup");
            command.arg(crate::PROGRAM).args(words);
            place.set_up(&mut command);
        }
        let command = command.spawn().unwrap();
        thread::sleep(Duration::from_millis(milliseconds));
        kill_process(Pid::from_child(&command), signal).unwrap();
        let output = finish(command);
        let said = text(&output.stdout);
        let named: Vec<_> = said.lines().collect();
        let running = || {
            let listed = text(&place.vmm("list").stdout);
            let names = listed.lines().filter_map(|line| line.split_whitespace().next());
            names.filter(|name| name.starts_with("v-")).map(str::to_owned).collect::<Vec<_>>()
        };
        // One that ended may have been named at that moment.
        until("the end of those without a name", || running().iter().all(|name| named.contains(&&**name)));
        running().iter().for_each(|name| drop(place.done(&format!("kill {name}"))));
    }
}
