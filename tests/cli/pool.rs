//! `vmm pool` with tiny guests.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// A place whose machines and pools end with it, however the test ends: they are no children of its process.
pub struct World(pub Place);

impl Deref for World {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.0
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (list, end) in [("pool list --json", "pool stop"), ("list --json", "kill")] {
            let all: Value = serde_json::from_slice(&self.vmm(list).stdout).unwrap_or_default();
            let names = all.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str());
            let names: Vec<_> = names.collect();
            if !names.is_empty() {
                self.vmm(&format!("{end} {}", names.join(" ")));
            }
        }
    }
}

/// A place with a guest called `v`, which counts.
fn world(more: &str) -> (World, Running) {
    let (place, guest) = counting(more);
    (World(place), guest)
}

/// What `vmm pool list` says of the pool `name`; null if there is none.
fn pool(place: &Place, name: &str) -> Value {
    let pools: Value = serde_json::from_str(&place.done("pool list --json")).unwrap();
    pools.as_array().unwrap().iter().find(|pool| pool["name"] == name).cloned().unwrap_or_default()
}

#[track_caller]
fn await_true(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn await_full(place: &Place, name: &str) {
    await_true("the pool is full", || {
        let pool = pool(place, name);
        pool["ready"] == pool["size"]
    });
}

/// The processes whose parent is `parent`: zombies do not count.
fn children(parent: i32) -> Vec<i32> {
    let pids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_child = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        fields.next().is_some_and(|state| state != "Z") && fields.next() == Some(&parent.to_string())
    };
    pids.filter(is_child).collect()
}

fn pid(of: &Value) -> i32 {
    of["pid"].as_i64().unwrap() as i32
}

fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

/// What pools and spares have left in the folders of sockets and records.
fn left_of_pools(place: &Place) -> Vec<PathBuf> {
    let folders = ["run/vmm", "state/vmm"].map(|folder| place.path(folder));
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.to_str().unwrap().contains('@')).collect()
}

/// What the guest `name` has said in the background, once that is `least` characters.
fn await_log(place: &Place, name: &str, least: usize) -> String {
    let mut said = String::new();
    await_true("it speaks", || {
        said = place.done(&format!("logs {name}"));
        said.len() >= least
    });
    said
}

#[test]
fn machines_that_are_taken_are_like_those_that_a_fork_starts() {
    if !has_kvm("machines_that_are_taken_are_like_those_that_a_fork_starts") {
        return;
    }
    let (place, first) = world("--rng --vsock sock");
    assert_eq!(place.done("pool start web v --size 3"), "web\n");
    let stands = pool(&place, "web");
    assert_eq!(
        (&stands["ready"], &stands["size"], &stands["taken"], &stands["source"], &stands["gave_up"]),
        (&3.into(), &3.into(), &0.into(), &"v".into(), &false.into())
    );
    assert!(stands["private_bytes"].as_u64().unwrap() > 0);
    assert!(place.done("pool list").lines().nth(1).unwrap().starts_with("web "));
    // What they are copies of need not be there, and they are no machines yet.
    assert_eq!(place.done("list --all").lines().skip(1).count(), 1, "{}", place.done("list --all"));
    drop(first);
    assert_eq!(place.done("list --all").lines().skip(1).count(), 0, "{}", place.done("list --all"));

    assert_eq!(place.done("pool take web"), "web-1\n");
    assert_eq!(place.done("pool take web --count 4 --name try"), "try-1\ntry-2\ntry-3\ntry-4\n");
    assert_eq!(place.done("pool take web --name last"), "last\n");
    let names = ["web-1", "try-1", "try-2", "try-3", "try-4", "last"];
    let said = names.map(|name| await_log(&place, name, 10));
    for one in &said {
        assert!(is_counted(one) && one[..10] == said[0][..10] && !one.starts_with('1'), "{said:?}");
    }
    for name in names {
        let status = place.status(name);
        assert_eq!((&status["name"], &status["state"]), (&name.into(), &"running".into()));
        assert!(status["uptime_seconds"].as_f64().unwrap() < 20.0, "{status}");
        let vsock = Path::new(status["vsock"].as_str().unwrap());
        assert!(vsock.ends_with(format!("{name}.d/vsock")) && vsock.exists(), "{status}");
    }
    await_full(&place, "web");
    assert_eq!(pool(&place, "web")["taken"], 6);

    // Each of the others' commands.
    place.done("pause web-1");
    assert_eq!(place.status("web-1")["state"], "paused");
    place.done("resume web-1");
    assert_eq!(place.done("fork web-1"), "web-1-1\n");
    assert!(is_counted(&await_log(&place, "web-1-1", 3)));
    place.done("snapshot create try-1 saved");
    place.done("snapshot verify saved");
    let waiting = place.command("wait try-2").spawn().unwrap();
    place.done("kill try-2");
    assert_eq!(text(&finish(waiting).stdout), "10\n");
    assert_eq!(place.done("wait try-2"), "10\n");
    assert!(place.done("list --all").contains("exit 10"));

    // A pool of a folder, beside the other; names go on.
    assert_eq!(place.done("pool start more ./saved --size 1"), "more\n");
    assert_eq!(place.done("pool take more --name web --count 2"), "web-2\nweb-3\n");
    place.done("pool stop web more");
    assert_eq!(pool(&place, "web"), Value::Null);
    assert!(left_of_pools(&place).is_empty());
    let left = ["web-1", "web-2", "web-3", "web-1-1", "try-1", "try-3", "try-4", "last"];
    assert!(left.iter().all(|name| place.status(name)["state"] == "running"), "{}", place.done("list"));
    place.done(&format!("kill {}", left.join(" ")));
    assert_eq!(fs::read_dir(place.path("run/vmm")).unwrap().count(), 0);
    place.done("rm --all");
    assert_eq!(fs::read_dir(place.path("state/vmm")).unwrap().count(), 0);
}

#[test]
fn spares_end_with_their_pool_and_what_was_taken_does_not() {
    if !has_kvm("spares_end_with_their_pool_and_what_was_taken_does_not") {
        return;
    }
    let (place, _first) = world("");
    place.done("pool start web v --size 2");
    let keeper = pid(&pool(&place, "web"));
    let spares = children(keeper);
    assert_eq!(spares.len(), 2, "{spares:?}");
    place.done("pool take web");
    await_full(&place, "web");
    let taken = pid(&place.status("web-1"));
    let spares: Vec<_> = children(keeper).into_iter().filter(|pid| *pid != taken).collect();
    assert_eq!(spares.len(), 2, "{spares:?}");
    // One of them is killed: another takes its place, and nothing is left of it.
    kill(spares[0]);
    await_true("it is replaced", || {
        let now = children(keeper);
        now.len() == 3 && !now.contains(&spares[0]) && pool(&place, "web")["ready"] == 2
    });
    await_true("nothing is left of it", || left_of_pools(&place).len() == 5);

    let spares: Vec<_> = children(keeper).into_iter().filter(|pid| *pid != taken).collect();
    kill(keeper);
    let lives = |pid: i32| Path::new(&format!("/proc/{pid}/status")).exists();
    await_true("spares end", || !spares.iter().any(|spare| lives(*spare)));
    assert_eq!(place.status("web-1")["state"], "running");
    assert_eq!(pool(&place, "web"), Value::Null);
    assert!(left_of_pools(&place).is_empty());
    assert!(place.fails("pool take web", HOST).contains("no pool called \"web\""));
    // Its name is free.
    place.done("pool start web v --size 1");
    assert_eq!(place.done("pool take web"), "web-2\n");
    place.done("pool stop web");
    place.done("kill web-1 web-2");
}

#[test]
fn whoever_waits_for_one_that_does_nothing_hears_of_it() {
    if !has_kvm("whoever_waits_for_one_that_does_nothing_hears_of_it") {
        return;
    }
    let (place, _first) = world("");
    place.done("pool start web v --size 2");
    let spare = Pid::from_raw(children(pid(&pool(&place, "web")))[0]).unwrap();
    kill_process(spare, Signal::STOP).unwrap();
    // What would wait for ever ends with it.
    let late = thread::spawn(move || {
        thread::sleep(Duration::from_secs(60));
        let _ = kill_process(spare, Signal::KILL);
    });
    let said = place.fails("pool take web --count 2", HOST);
    assert!(said.contains("1 of 2") && said.contains("takes too long"), "{said}");
    assert!(!late.is_finished(), "{said}");
    // Another takes its place.
    await_full(&place, "web");
}

#[test]
fn one_that_is_there_for_a_command_ends_with_it_however_that_ends() {
    if !has_kvm("one_that_is_there_for_a_command_ends_with_it_however_that_ends") {
        return;
    }
    let (place, first) = world("--vsock sock");
    place.done("pool start web v --size 2");
    drop(first);
    // Its guest has no agent, so whoever runs the command waits until that is clear.
    let ends = [("killed", Signal::KILL), ("told to end", Signal::TERM), ("hung up", Signal::HUP)];
    for (index, (how, signal)) in ends.into_iter().enumerate() {
        let command = Running::new(place.command(&format!("pool take web --name c{index} -- true")));
        place.await_running(&format!("c{index}"));
        command.signal(signal);
        let status = command.finish().status;
        assert!(!status.success(), "{how}: {status}");
        await_true("its machine is gone", || place.done("list --all").lines().count() == 1);
        assert!(!place.path(&format!("state/vmm/c{index}")).exists(), "{how}: nothing is kept");
        await_full(&place, "web");
    }
    let waited = Instant::now();
    let said = place.fails("pool take web --timeout 6 -- true", NOT_RUN);
    assert!(said.contains("agent") && waited.elapsed() > Duration::from_secs(5), "{said}");
    // It ends with its own process, too, which tells nobody.
    let command = Running::new(place.command("pool take web --name own -- true"));
    place.await_running("own");
    kill(pid(&place.status("own")));
    let output = command.finish();
    assert_eq!(output.status.code(), Some(NOT_RUN), "{}", text(&output.stderr));
    await_true("nothing is left of them", || {
        place.vmm("pool list");
        place.done("list --all").lines().count() == 1
    });
    place.done("pool stop web");
    assert_eq!(fs::read_dir(place.path("run/vmm")).unwrap().count(), 0);
}

#[test]
fn what_nobody_waits_for_any_more_is_not_made() {
    if !has_kvm("what_nobody_waits_for_any_more_is_not_made") {
        return;
    }
    let (place, _first) = world("");
    let start = Running::new(place.command("pool start web v --size 256"));
    await_true("it begins", || left_of_pools(&place).len() > 5);
    start.signal(Signal::INT);
    start.finish();
    await_true("all of it goes", || left_of_pools(&place).is_empty());
    assert_eq!(pool(&place, "web"), Value::Null);
}

#[test]
fn a_full_pool_of_a_hundred_is_taken_at_once() {
    if !has_kvm("a_full_pool_of_a_hundred_is_taken_at_once") {
        return;
    }
    let (place, _first) = world("");
    place.file("halt", kernel(&HALT));
    let _other = place.start("h", "");
    place.done("pool start web h --size 100");
    let taken = place.done("pool take web --count 100");
    let names: Vec<_> = taken.lines().collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 100);
    place.done("pool stop web");
    assert_eq!(place.done("list").lines().count(), 103);
    place.done(&format!("kill {}", names.join(" ")));
    assert!(left_of_pools(&place).is_empty());
}

/// What the descriptors of `pid` are.
fn descriptors(pid: i32) -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    entries.filter_map(|path| Some((path.clone(), fs::read_link(path).ok()?.display().to_string()))).collect()
}

#[test]
fn a_spare_has_nothing_of_its_pool_or_of_others_but_memory_that_nobody_changes() {
    if !has_kvm("a_spare_has_nothing_of_its_pool_or_of_others_but_memory_that_nobody_changes") {
        return;
    }
    let (place, _first) = world("--vsock sock");
    // Their descriptors can be seen then, whoever runs this.
    place.done("pool start web v --size 3 --dumpable");
    let keeper = pid(&pool(&place, "web"));
    let spares = children(keeper);
    let sockets = |pid| -> BTreeSet<String> {
        descriptors(pid)
            .into_iter()
            .map(|(_, what)| what)
            .filter(|what| what.starts_with("socket:"))
            .collect()
    };
    let mut seen = sockets(keeper);
    for spare in &spares {
        let own = sockets(*spare);
        assert!(!own.is_empty() && own.is_disjoint(&seen), "{own:?}: {seen:?}");
        seen.extend(own);
        // What it opens when it is taken is not to wait until the kernel has made its table longer.
        let status = fs::read_to_string(format!("/proc/{spare}/status")).unwrap();
        let room = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        assert!(room.trim().parse::<u32>().unwrap() >= 256, "{room}");
        let all = descriptors(*spare);
        let own_folder =
            all.iter().find_map(|(_, what)| what.strip_suffix("/console.log")).unwrap().to_owned();
        for (path, what) in &all {
            // Its own pages are its own affair.
            let is_own = what.starts_with(&own_folder)
                || *what == format!("/proc/{spare}/pagemap")
                || Path::new(what).parent() == Some(&place.path("run/vmm")) && what.ends_with(".d");
            let is_common = ["anon_inode:", "socket:", "/dev/null", "/dev/kvm", "/memfd:", "pipe:"];
            assert!(is_own || is_common.iter().any(|start| what.starts_with(start)), "{what}");
            if what.starts_with("/memfd:") {
                let mut file = File::options().write(true).open(path).unwrap();
                assert!(file.write_all(&[0; 8]).is_err(), "{what} can be written to");
            }
        }
    }
    place.done("pool stop web");
}

#[test]
fn pools_that_cannot_be_are_told() {
    if !has_kvm("pools_that_cannot_be_are_told") {
        return;
    }
    let (place, _first) = world("--net user");
    place.done("pool start web v --size 1");
    for (arguments, code, why) in [
        ("pool start other nobody", HOST, "nobody"),
        ("pool start other ./nothing", BAD_ARGUMENT, "nothing"),
        ("pool start web v", HOST, "called \"web\" is there"),
        ("pool start a@b v", BAD_ARGUMENT, "a@b"),
        ("pool start other v --size 0", BAD_ARGUMENT, "--size"),
        ("pool start other v --size 257", BAD_ARGUMENT, "--size"),
        ("pool start other v --name x", BAD_ARGUMENT, "--name"),
        ("pool start other v --cpus 2", BAD_ARGUMENT, "vCPUs"),
        ("pool start other v --console file=x", BAD_ARGUMENT, "for one machine"),
        ("pool start other v -p 8080:80", BAD_ARGUMENT, "for one machine"),
        ("pool start other v --net switch=lan", BAD_ARGUMENT, "switch=lan"),
        ("pool take nobody", HOST, "no pool called \"nobody\""),
        ("pool take web --name v", HOST, "\"v\" is already running"),
        ("pool take web --name .x", BAD_ARGUMENT, "\".x\" cannot be the name"),
        ("pool take web --count 0", BAD_ARGUMENT, "--count"),
        ("pool take web -i", BAD_ARGUMENT, "there is no command"),
        ("pool take web --timeout 5", BAD_ARGUMENT, "COMMAND"),
        ("pool take web --count 2 -- true", BAD_ARGUMENT, "--count"),
        ("pool take nobody -- true", NOT_RUN, "no pool called \"nobody\""),
        ("pool take web -- true", NOT_RUN, "have no vsock device"),
        ("pool stop nobody", HOST, "no pool called \"nobody\""),
        ("status web", HOST, "\"web\""),
    ] {
        let said = place.fails(arguments, code);
        assert!(said.contains(why), "{arguments}: {said}");
    }
    // Whatever was refused, nothing is missing but the one that was of no use.
    await_full(&place, "web");
    assert_eq!(place.done("pool take web"), "web-2\n");
    place.done("pool stop web");
    place.done("kill web-2");
    assert!(left_of_pools(&place).is_empty());
}

#[test]
fn what_cannot_be_made_is_told_and_not_tried_for_ever() {
    if !has_kvm("what_cannot_be_made_is_told_and_not_tried_for_ever") {
        return;
    }
    let (place, _first) = world("");
    // In a sandbox a spare has the folder of records itself, wherever that goes.
    place.done("pool start web v --size 2 --sandbox off");
    // There is no room for records any more.
    fs::rename(place.path("state/vmm"), place.path("state/away")).unwrap();
    place.file("state/vmm", "");
    kill(children(pid(&pool_in(&place)))[0]);
    await_true("it gives up", || pool_in(&place)["gave_up"] == true);
    let failure = pool_in(&place)["failure"].as_str().unwrap().to_owned();
    assert!(failure.contains("Not a directory"), "{failure}");
    assert_eq!(pool_in(&place)["ready"], 1);
    let lost = place.fails("pool take web --count 2", HOST);
    assert!(lost.contains("2 of 2 could not be taken"), "{lost}");
    fs::remove_file(place.path("state/vmm")).unwrap();
    fs::rename(place.path("state/away"), place.path("state/vmm")).unwrap();
    assert!(place.done("pool list").contains("gave up"));
    place.done("pool stop web");
    assert_eq!(place.done("list").lines().count(), 2, "v alone");
}

/// [`pool`] where records cannot be read.
fn pool_in(place: &Place) -> Value {
    let output = place.vmm("pool list --json");
    let pools: Value = serde_json::from_slice(&output.stdout).unwrap();
    pools[0].clone()
}

/// Shows on COM1, by 64 characters, how the local APIC's timer counts down 34 s: interrupts are masked.
const COUNTDOWN: [u8; 72] = [
    0xbf, 0x00, 0x00, 0xe0, 0xfe, // mov edi, 0xfee00000
    0xc7, 0x87, 0xf0, 0x00, 0x00, 0x00, 0xff, 0x01, 0x00, 0x00, // mov [edi + 0xf0], 0x1ff: on
    0xc7, 0x87, 0xe0, 0x03, 0x00, 0x00, 0x0a, 0x00, 0x00, 0x00, // mov [edi + 0x3e0], 10: by 128
    0xc7, 0x87, 0x20, 0x03, 0x00, 0x00, 0x20, 0x00, 0x01,
    0x00, // mov [edi + 0x320], 0x10020: once, masked
    0xc7, 0x87, 0x80, 0x03, 0x00, 0x00, 0xff, 0xff, 0xff, 0x0f, // mov [edi + 0x380], 0xfffffff
    0x8b, 0x87, 0x90, 0x03, 0x00, 0x00, // mov eax, [edi + 0x390]
    0xc1, 0xe8, 0x16, // shr eax, 22
    0x04, 0x30, // add al, '0'
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xb9, 0x00, 0x00, 0x01, 0x00, // mov ecx, 0x10000
    0xff, 0xc9, // dec ecx
    0x75, 0xfc, // jnz to the dec
    0xeb, 0xe5, // jmp to the load of the count
];

#[test]
fn a_timer_stands_still_while_its_machine_stands_ready() {
    if !has_kvm("a_timer_stands_still_while_its_machine_stands_ready") {
        return;
    }
    let place = World(Place::new());
    place.file("down", pvh_kernel(&COUNTDOWN));
    let guest = place.command("--kernel down --mem 32M --serial file=said --console off --name v");
    let guest = Running::new(guest);
    await_words(&place, "said", 3);
    place.done("pool start web v --size 1");
    drop(guest);
    let before = *fs::read(place.path("said")).unwrap().iter().min().unwrap();
    // It would be elsewhere by now: a character is half a second.
    thread::sleep(Duration::from_secs(10));
    place.done("pool take web");
    let first = *await_log(&place, "web-1", 1).as_bytes().first().unwrap();
    assert!(first + 10 >= before, "{} was before {}", before as char, first as char);
    await_true("it counts down", || place.done("logs web-1").bytes().any(|byte| byte < first));
    place.done("kill web-1");
    place.done("pool stop web");
}
