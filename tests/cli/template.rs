//! `vmm run --template` and `vmm template` with a tiny guest that says when it is ready.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// Writes `!` to COM1, takes its time, says that it is ready, and counts.
pub fn readying(turns: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee]; // mov dx, 0x3f8; mov al, '!'; out dx, al
    code.push(0xb9); // mov ecx, turns
    code.extend(turns.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc]); // dec ecx; jnz to the dec
    code.extend([0xb0, 123, 0xe6, 0x80]); // mov al, 123; out 0x80, al
    code.extend(COUNTING);
    kernel(&code)
}

const RUN: &str = "run --template --kernel ready --mem 32M --boot-marks --console off";

fn place() -> Place {
    let place = Place::new();
    place.file("ready", readying(1));
    place
}

/// Starts one called `name`, whose words go to the file of that name, until it has said some, and its template is there. Whether it
/// has booted.
#[track_caller]
fn boots(place: &Place, name: &str, more: &str) -> bool {
    let _running = start(place, name, more);
    booted(place, name)
}

fn start(place: &Place, name: &str, more: &str) -> Running {
    Running::new(place.command(&format!("{RUN} --serial file={name} --name {name} {more}")))
}

#[track_caller]
fn booted(place: &Place, name: &str) -> bool {
    let said = await_words(place, name, 5);
    let counted = said.trim_start_matches('!');
    assert!(is_counted(counted) && said.len() <= counted.len() + 1, "{said}");
    if said.starts_with('!') {
        // It may have counted a little before it was saved.
        await_templates(place, 1);
    }
    said.starts_with('!')
}

fn templates(place: &Place) -> Vec<serde_json::Value> {
    serde_json::from_str(&place.done("template list --json")).unwrap()
}

#[track_caller]
pub fn await_templates(place: &Place, least: usize) {
    let deadline = Instant::now() + PATIENCE;
    while templates(place).len() < least {
        assert!(Instant::now() < deadline, "no template is made");
        thread::sleep(Duration::from_millis(5));
    }
}

fn hidden(place: &Place) -> Vec<String> {
    let names = fs::read_dir(place.path("cache/vmm/templates")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn the_second_run_goes_on_from_where_the_first_was_ready_and_so_do_two_at_once() {
    if !has_kvm("the_second_run_goes_on_from_where_the_first_was_ready_and_so_do_two_at_once") {
        return;
    }
    let place = place();
    assert!(boots(&place, "one", ""));
    assert!(!boots(&place, "two", ""));
    let _three = start(&place, "three", "");
    assert!(!boots(&place, "four", "") && !booted(&place, "three"));
    let all = templates(&place);
    let [template] = &all[..] else { panic!("{all:?}") };
    assert_eq!(template["config"]["mem"]["size"], "32M", "{template}");
    assert!(
        template["bytes"].as_u64().unwrap() > 4096
            && template["used_at"].as_u64() >= template["made_at"].as_u64()
    );
    let table = place.done("template list");
    assert!(table.contains(template["name"].as_str().unwrap()) && table.contains("  ready\n"), "{table}");
    assert_eq!(hidden(&place), Vec::<String>::new());
    let mode = fs::metadata(place.path("cache/vmm/templates")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);

    // In the background, too, and without.
    assert_eq!(place.done(&format!("{RUN} -d --serial file=five --name five")), "five\n");
    assert!(!booted(&place, "five"));
    place.done("kill five");
    assert!(boots(&place, "six", "--no-template"));
    let made = template["made_at"].clone();
    thread::sleep(Duration::from_millis(1100));
    assert!(boots(&place, "seven", "--rebuild"));
    let deadline = Instant::now() + PATIENCE;
    while templates(&place)[0]["made_at"] == made {
        assert!(Instant::now() < deadline, "it is not made anew");
        let _again = start(&place, "eight", "--rebuild");
        thread::sleep(Duration::from_millis(500));
    }
}

#[test]
fn what_was_changed_is_booted_anew() {
    if !has_kvm("what_was_changed_is_booted_anew") {
        return;
    }
    let place = place();
    place.file("initrd", "one");
    place.file("disk", vec![0; 1 << 20]);
    let files = "--initrd initrd --disk disk";
    assert!(boots(&place, "a", files));
    let mut command = place.command(&format!("{RUN} {files} -v --serial file=b --name b"));
    command.stderr(fs::File::create(place.path("log")).unwrap());
    let running = Running::new(command);
    assert!(!booted(&place, "b"));
    assert!(!fs::read_to_string(place.path("log")).unwrap().contains("stale"));
    drop(running);
    // Of the same size, with the same time.
    for (index, file) in ["ready", "initrd", "disk"].into_iter().enumerate() {
        let path = place.path(file);
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        let open = OpenOptions::new().write(true).open(&path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.last_mut().unwrap();
        *last = last.wrapping_add(u8::from(file != "ready"));
        (&open).write_all(&bytes).unwrap();
        open.set_modified(time).unwrap();
        let name = format!("c{index}");
        let mut command = place.command(&format!("{RUN} {files} -v --serial file={name} --name {name}"));
        command.stderr(fs::File::create(place.path("log")).unwrap());
        let running = Running::new(command);
        assert!(booted(&place, &name), "{file}");
        let log = fs::read_to_string(place.path("log")).unwrap();
        assert!(log.contains("is stale") && log.contains(&format!("{file} changed")), "{log}");
        // It is there once the old one is gone.
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(place.path("log")).unwrap().contains(": made") {
            assert!(Instant::now() < deadline, "it is not made anew");
            thread::sleep(Duration::from_millis(5));
        }
        drop(running);
        assert!(!boots(&place, &format!("d{index}"), files), "{file}");
        assert_eq!(templates(&place).len(), 1);
    }
    // Another machine is another template. What is outside of a machine makes none.
    assert!(boots(&place, "e", &format!("{files} --cmdline x")));
    await_templates(&place, 2);
    assert!(
        !boots(&place, "f", &format!("{files} --cmdline x --stop-timeout 1")) && !boots(&place, "g", files)
    );
    place.file(
        "config",
        r#"{"kernel": "ready", "mem": "32M", "boot_marks": true, "initrd": "initrd", "disk": ["disk"]}"#,
    );
    assert!(!boots(&place, "h", "--config config"));
}

#[test]
fn a_disk_is_as_it_was_and_the_image_too() {
    if !has_kvm("a_disk_is_as_it_was_and_the_image_too") {
        return;
    }
    let place = place();
    place.file("disk", vec![7; 1 << 20]);
    assert!(boots(&place, "a", "--disk disk --transport pci"));
    let again = start(&place, "b", "--disk disk --transport pci");
    assert!(!booted(&place, "b"));
    assert_eq!(fs::read(place.path("disk")).unwrap(), vec![7; 1 << 20]);
    // It is in use, and has all that it needs.
    let name = templates(&place)[0]["name"].as_str().unwrap().to_owned();
    place.done(&format!("template rm {name}"));
    assert_eq!(templates(&place), Vec::<serde_json::Value>::new());
    let said = await_words(&place, "b", 0).len();
    await_words(&place, "b", said + 50);
    place.done("snapshot create b s");
    place.done("snapshot verify s");
    drop(again);
    assert!(place.fails(&format!("template rm {name}"), HOST).contains("no template"));
    assert!(boots(&place, "c", "--disk disk --transport pci"));
    place.done("template rm --all");
    assert!(place.fails("template rm ..", HOST).contains("no template"));
    assert!(place.path("cache/vmm").exists());
}

#[test]
fn of_two_first_runs_at_once_one_boots_and_the_other_goes_on_from_there() {
    if !has_kvm("of_two_first_runs_at_once_one_boots_and_the_other_goes_on_from_there") {
        return;
    }
    let place = Place::new();
    place.file("ready", readying(0x10_0000));
    let names = ["a", "b", "c"];
    let _all = names.map(|name| start(&place, name, ""));
    let booted = names.map(|name| booted(&place, name));
    assert_eq!(booted.iter().filter(|booted| **booted).count(), 1, "{booted:?}");
}

#[test]
fn a_run_that_is_killed_before_its_guest_is_ready_leaves_nothing_and_holds_nobody_up() {
    if !has_kvm("a_run_that_is_killed_before_its_guest_is_ready_leaves_nothing_and_holds_nobody_up") {
        return;
    }
    let place = place();
    for round in 0..8u64 {
        let killed = start(&place, &format!("k{round}"), "--cmdline x");
        // Before, while and after it is saved.
        thread::sleep(Duration::from_millis(8 * round));
        killed.signal(Signal::KILL);
        killed.finish();
        for template in templates(&place) {
            let name = template["name"].as_str().unwrap().to_owned();
            place.done(&format!("snapshot verify cache/vmm/templates/{name}"));
            place.done(&format!("template rm {name}"));
        }
    }
    place.file("halt", kernel(&HALT));
    let never = RUN.replace("ready", "halt");
    let killed = Running::new(place.command(&format!("{never} --name v")));
    place.await_running("v");
    assert_eq!(templates(&place).len(), 0);
    killed.signal(Signal::KILL);
    killed.finish();
    assert_ne!(hidden(&place).len(), 0);
    assert!(boots(&place, "a", "--cmdline x") && !boots(&place, "b", "--cmdline x"));
    assert_eq!(hidden(&place), Vec::<String>::new(), "what the killed ones left is gone");
}

#[test]
fn a_guest_that_ends_before_it_is_ready_ends_as_ever_and_there_is_no_template() {
    if !has_kvm("a_guest_that_ends_before_it_is_ready_ends_as_ever_and_there_is_no_template") {
        return;
    }
    let place = Place::new();
    place.file("ready", kernel(&out(0xf4, 3)));
    let output = place.vmm(&format!("{RUN} --debug-exit"));
    assert_eq!(output.status.code(), Some(7));
    assert!(text(&output.stderr).contains("ended before it was ready"), "{}", text(&output.stderr));
    assert_eq!((templates(&place).len(), hidden(&place)), (0, Vec::new()));
    place.file("ready", kernel(&[0x0f, 0x0b]));
    assert!(place.fails(RUN, GUEST_CRASH).contains("ended before it was ready"));
    // With a command that is what is told, and docker's code.
    for options in ["--template", "--no-template"] {
        let said =
            place.fails(&format!("run {options} --kernel ready --mem 32M --console off -- true"), NOT_RUN);
        assert!(said.contains("triple fault"), "{said}");
    }
}

#[test]
fn who_waits_for_a_guest_that_is_never_ready_can_end_it() {
    if !has_kvm("who_waits_for_a_guest_that_is_never_ready_can_end_it") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let run = "run --template --kernel halt --mem 32M --console off --name v";
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let waiting = Running::new(place.command(&format!("{run} -- true")));
        place.await_running("v");
        waiting.signal(signal);
        let output = waiting.finish();
        assert_eq!(output.status.code(), Some(128 + signal.as_raw()), "{}", text(&output.stderr));
    }
    let waiting = Running::new(place.command(&format!("{run} -- true")));
    place.await_running("v");
    place.done("kill v");
    let output = waiting.finish();
    assert_eq!(output.status.code(), Some(NOT_RUN));
    assert!(text(&output.stderr).contains("was killed before the command"), "{}", text(&output.stderr));
    let waiting = Running::new(place.command(&format!("{run} --boot-marks")));
    place.await_running("v");
    place.done("kill v");
    assert_eq!(waiting.finish().status.code(), Some(KILLED));
    assert_eq!((templates(&place).len(), hidden(&place)), (0, Vec::new()));
}

#[test]
fn those_that_were_not_used_for_longest_make_room() {
    if !has_kvm("those_that_were_not_used_for_longest_make_room") {
        return;
    }
    let place = place();
    for index in 0..17 {
        let (name, line) = (format!("a{index}"), format!("--cmdline {index}"));
        let running = start(&place, &name, &line);
        await_words(&place, &name, 3);
        await_templates(&place, (index + 1).min(16));
        let deadline = Instant::now() + PATIENCE;
        let is_there = || {
            let all = templates(&place);
            all.iter().any(|template| template["config"]["cmdline"] == index.to_string().as_str())
        };
        while !is_there() {
            assert!(Instant::now() < deadline, "{name} is not made");
        }
        drop(running);
        // The first is used again, so the second is the one.
        assert!(!boots(&place, &format!("b{index}"), "--cmdline 0"));
    }
    let deadline = Instant::now() + PATIENCE;
    while templates(&place).len() > 16 {
        assert!(Instant::now() < deadline, "there are too many");
    }
    assert!(!boots(&place, "c", "--cmdline 2") && !boots(&place, "d", "--cmdline 0"));
    assert!(boots(&place, "e", "--cmdline 1"));
}

#[test]
fn what_cannot_have_a_template_is_refused_with_the_reason() {
    let place = Place::new();
    place.file("k", kernel(&HALT));
    place.file("d", vec![0; 1 << 20]);
    let refused = |options: &str, code: i32, word: &str| {
        refused(&place, &format!("run --template --kernel k {options}"), code, &[word]);
    };
    refused("", BAD_ARGUMENT, "when the guest is ready");
    refused("--vsock --net tap=t", BAD_ARGUMENT, "tap=t");
    refused("--vsock --net switch=s", BAD_ARGUMENT, "switch=s");
    refused("--vsock --disk d,overlay=o", BAD_ARGUMENT, "overlay=o");
    refused("--vsock --gdb tcp:1", BAD_ARGUMENT, "gdb");
    refused("--vsock -i", BAD_ARGUMENT, "no command");
    refused("--vsock --hostname h", BAD_ARGUMENT, "no command");
    refused("--vsock=vhost=on,cid=9 -- true", NOT_RUN, "vhost=on");
    refused("-d -- true", NOT_RUN, "-d");
    refused("--gdb tcp:1 -- true", NOT_RUN, "gdb");
    refused("-e =x -- true", NOT_RUN, "names no variable");
    refused("--nonsense -- true", NOT_RUN, "--nonsense");
    crate::place::refused(&place, "run --rebuild --kernel k", BAD_ARGUMENT, &["--template"]);
    // What the folder's own troubles are comes later.
    let said = place.fails("run --template --kernel /dev/null --boot-marks", BAD_ARGUMENT);
    assert!(said.contains("not a regular file"), "{said}");
    fs::set_permissions(place.path("cache/vmm/templates"), fs::Permissions::from_mode(0o777)).unwrap();
    let said = place.fails("run --template --kernel k --boot-marks", HOST);
    assert!(said.contains("others may write to it") && said.contains("XDG_CACHE_HOME"), "{said}");
}
