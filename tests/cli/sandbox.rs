//! `--sandbox`: machines that do what they do elsewhere, in processes whose threads may do little else.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// What tells who a thread is and what it may do.
const RIGHTS: [&str; 8] =
    ["Seccomp:", "NoNewPrivs:", "CapEff:", "CapPrm:", "CapBnd:", "Uid:", "Gid:", "Groups:"];

/// The names of the threads of the process `pid`, all of which are inside, by the layers that `layers` tells of.
#[track_caller]
fn inside(pid: i32, layers: &str) -> Vec<String> {
    let all = threads(pid, &RIGHTS);
    let none = "0".repeat(16);
    for (name, values) in &all {
        assert_eq!(values[..4], ["2", "1", &none, &none], "{name}");
    }
    if layers.contains("own user") {
        let user = (0x7000_0000 | pid).to_string();
        let is_own = |values: &[String]| {
            let [uids, gids] =
                [&values[5], &values[6]].map(|ids| ids.split_ascii_whitespace().collect::<Vec<_>>());
            // Real, effective and saved; then whose files it takes for its own.
            uids == [&*user, &user, &user, "0"] && uids == gids && values[7].is_empty()
        };
        all.iter().for_each(|(name, values)| {
            assert!(is_own(values) && values[4] == none, "{name}: {values:?}");
        });
    }
    if layers.contains("namespaces") {
        all.iter().for_each(|(name, values)| assert_eq!(values[4], none, "{name}: the bounding set"));
    }
    let tasks = PathBuf::from(format!("/proc/{pid}/task"));
    let places = fs::read_dir(tasks).unwrap().map(|task| {
        let task = task.unwrap().path();
        ["ns/mnt", "ns/ipc", "ns/uts", "ns/cgroup", "root"].map(|link| fs::read_link(task.join(link)).ok())
    });
    let places: HashSet<_> = places.collect();
    assert_eq!(places.len(), 1, "all threads see the same: {places:?}");
    all.into_iter().map(|(name, _)| name).collect()
}

#[test]
fn every_thread_of_a_machine_that_runs_is_inside() {
    if !has_kvm("every_thread_of_a_machine_that_runs_is_inside") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    ["disk", "other"].into_iter().for_each(|name| place.file(name, vec![0; 1 << 20]));
    let run =
        "--kernel count --mem 32M --serial file=said --console off --name v --sandbox auto --disk disk --rng";
    let guest = Running::new(place.command(&format!("{run} --transport pci --vsock")));
    await_words(&place, "said", 3);
    let layers = place.status("v")["sandbox"].as_str().unwrap().to_owned();
    assert!(layers.starts_with("seccomp, ") && layers.contains("no capabilities"), "{layers}");
    assert!(place.done("status v").contains(&format!("sandbox  {layers}\n")));
    let names = inside(guest.pid(), &layers);
    assert!(names.iter().any(|name| name == "vcpu0") && names.len() > 2, "{names:?}");

    // What is asked of it while it runs.
    place.done("pause v");
    place.done("resume v");
    place.done("device add v disk=other");
    place.done("device remove --force v virtio-blk1");
    for network in ["user", "socket=nowhere", "switch=a", "tap=tap0", "vhost-user=nowhere"] {
        let said = place.fails(&format!("device add v net={network}"), HOST);
        assert!(said.contains("the sandbox of this VM has nothing for such a network"), "{said}");
    }
    place.fails("device remove v nothing", HOST);
    assert_eq!(place.status("v")["state"], "running");
    drop(guest);

    let (place, _guest) = counting("--sandbox auto");
    place.done("snapshot create v s");
    let _restored = Running::new(place.command("restore s --sandbox auto --serial file=more --name w"));
    assert!(is_counted(&await_words(&place, "more", 3)));
    place.done("fork w --name x --sandbox auto --serial file=third -d");
    assert!(is_counted(&await_words(&place, "third", 3)));
    for name in ["w", "x"] {
        assert_eq!(place.status(name)["sandbox"], layers);
    }
    place.done("kill x");
}

/// All files that `pid` can name, with the folders that lead there, but what is in `grants`.
fn named(pid: i32, grants: &[PathBuf]) -> Vec<PathBuf> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let (mut all, mut rest) = (Vec::new(), vec![root.clone()]);
    while let Some(at) = rest.pop() {
        let path = Path::new("/").join(at.strip_prefix(&root).unwrap());
        if !grants.contains(&path) {
            rest.extend(fs::read_dir(&at).into_iter().flatten().map(|entry| entry.unwrap().path()));
        }
        all.push(path);
    }
    all.sort();
    all
}

#[test]
fn there_are_no_files_but_those_that_a_run_needs_whoever_starts_it() {
    let test = "there_are_no_files_but_those_that_a_run_needs_whoever_starts_it";
    if !has_kvm(test) {
        return;
    }
    let [roots, others] = [(); 2].map(|()| Place::new());
    for place in [&roots, &others] {
        place.file("count", kernel(&COUNTING));
        place.file("exit", kernel(&out(0xf4, 21)));
    }
    only_what_it_needs(test, &roots, |arguments| roots.command(arguments));
    if let Some(command) = others.give_to_nobody(test) {
        only_what_it_needs(test, &others, command);
    }
}

fn only_what_it_needs(test: &str, place: &Place, command: impl Fn(&str) -> Command) {
    let run = "--kernel count --mem 32M --serial file=said --console socket=console --name v";
    let guest = Running::new(command(run));
    await_words(place, "said", 3);
    let done = |arguments: &str| {
        let output = finish(command(arguments).spawn().unwrap());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        output.stdout
    };
    let status: Value = serde_json::from_slice(&done("status v --json")).unwrap();
    let layers = status["sandbox"].as_str().unwrap();
    inside(guest.pid(), layers);
    if !layers.contains("namespaces") {
        return eprintln!("SKIP: {test}: needs namespaces, which a container may not have");
    }
    let folder = fs::canonicalize(place.dir.path()).unwrap();
    let grants = [&folder, Path::new("/proc/self"), Path::new("/proc/cpuinfo")].map(Path::to_owned);
    let mut expected: Vec<_> =
        grants.iter().flat_map(|grant| grant.ancestors()).map(Path::to_owned).collect();
    expected.sort();
    expected.dedup();
    assert_eq!(named(guest.pid(), &grants), expected);
    for space in ["mnt", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}")).unwrap();
        assert_ne!(of(&guest.pid().to_string()), of("self"));
    }
    // The socket goes with the run, from where it was.
    assert!(place.path("console").exists());
    done("kill v");
    drop(guest);
    assert!(!place.path("console").exists());
    let strict = finish(command("--kernel exit --mem 32M --debug-exit --sandbox strict").spawn().unwrap());
    let all = "seccomp, landlock, namespaces, no capabilities";
    let has_all = [all.to_owned(), format!("{all}, own user")]
        .contains(&status["sandbox"].as_str().unwrap().to_owned());
    let said = text(&strict.stderr);
    assert_eq!(strict.status.code(), Some(if has_all { 43 } else { HOST }), "{said}");
    assert!(has_all || said.contains("auto runs without"), "{said}");
}

#[test]
fn a_run_of_roots_becomes_the_user_that_it_is_told() {
    let test = "a_run_of_roots_becomes_the_user_that_it_is_told";
    if !has_kvm(test) {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let run = "--kernel count --mem 32M --serial file=said --console off --name v --vsock --sandbox-user";
    for wrong in ["root", "0", "65534:0", "4294967295", ""] {
        let said = place.fails(&format!("{run}={wrong}"), BAD_ARGUMENT);
        assert!(said.contains("not a user other than root"), "{said}");
    }
    if !rustix::process::geteuid().is_root() {
        place.fails(&format!("{run} 65534"), HOST);
        return eprintln!("SKIP: {test}: needs root, to become another user");
    }
    fs::create_dir(place.path("roots")).unwrap();
    let said = place.fails(&format!("{run} 65534:12 --port p=file=roots/o,max=4K"), HOST);
    assert!(said.contains("rotate an output as that user") && said.contains("roots is not theirs"), "{said}");
    let guest = Running::new(place.command(&format!("{run} 65534:12")));
    await_words(&place, "said", 3);
    for (name, values) in threads(guest.pid(), &RIGHTS) {
        assert_eq!(values[5..7], ["65534\t65534\t65534\t65534", "12\t12\t12\t12"], "{name}");
    }
    place.done("pause v");
    place.done("kill v");
    assert_eq!(fs::read_dir(place.path("run/vmm")).unwrap().count(), 0);
}

#[test]
fn a_machine_in_a_segment_enters_others_while_it_runs() {
    if !has_kvm("a_machine_in_a_segment_enters_others_while_it_runs") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let run = "--kernel count --mem 32M --serial file=said --console off --name v --transport pci";
    let _guest = Running::new(place.command(&format!("{run} --net switch=one")));
    await_words(&place, "said", 3);
    let devices = place.done("device add v net=switch=two");
    assert_eq!(place.status("v")["state"], "running", "{devices}");
    let segments = place.path("run/vmm/switch");
    assert!(segments.join("two").is_dir());
    place.done("kill v");
    until("the end of both", || ["one", "two"].iter().all(|name| !segments.join(name).exists()));
}

#[test]
fn what_lies_in_the_root_folder_is_refused_before_it_is_made() {
    if !has_kvm("what_lies_in_the_root_folder_is_refused_before_it_is_made") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let run = "--kernel count --mem 32M --console off --name v";
    for output in ["--serial file=/vmm-tests,max=4K", "--serial socket=/vmm-tests", "--vsock /../vmm-tests"] {
        for more in ["", "-d"] {
            let said = place.fails(&format!("run {run} {output} {more}"), HOST);
            assert!(
                said.contains("directly in the root folder") && said.contains("a folder of its own"),
                "{said}"
            );
            assert!(!Path::new("/vmm-tests").exists(), "{output}");
        }
    }
    let mut command = place.command(&format!(
        "run --mem 32M --console off --dumpable --kernel {}",
        place.path("count").display()
    ));
    let output = finish(command.current_dir("/").spawn().unwrap());
    assert_eq!(output.status.code(), Some(HOST), "{}", text(&output.stderr));
}

#[test]
fn sockets_go_whatever_way_leads_there() {
    if !has_kvm("sockets_go_whatever_way_leads_there") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    fs::create_dir_all(place.path("deep/x")).unwrap();
    std::os::unix::fs::symlink("deep/x", place.path("link")).unwrap();
    for (way, file) in
        [("deep/x/../../s", "s"), ("link/s", "deep/x/s"), ("link/../s", "deep/s"), ("/proc/self/cwd/s", "s")]
    {
        let run = "--kernel count --mem 32M --console off --name v";
        let guest = Running::new(place.command(&format!("{run} --serial file=said --port p=socket={way}")));
        await_words(&place, "said", 3);
        assert!(place.path(file).exists(), "{way}");
        place.done("kill v");
        drop(guest.finish());
        assert!(!place.path(file).exists(), "{way}");
        fs::remove_file(place.path("said")).unwrap();
    }
}

#[test]
fn threads_that_look_into_a_machine_are_inside_as_well() {
    if !has_kvm("threads_that_look_into_a_machine_are_inside_as_well") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let run = "--kernel count --mem 32M --serial file=said --console off --name v";
    for (command, thread) in [
        (format!("{run} --gdb unix:gdb"), "gdb"),
        (format!("{run} --trace record"), "trace"),
        (format!("trace --step --count 1000000000 -- {run}"), "step"),
    ] {
        let mut guest = place.command(&command).spawn().unwrap();
        until(thread, || place.vmm("status v").status.code() == Some(0));
        let status = place.status("v");
        let pid = status["pid"].as_i64().unwrap() as i32;
        until(thread, || {
            let all = threads(pid, &["Seccomp:"]);
            all.iter().any(|(name, _)| name == thread) && all.iter().all(|(_, filters)| filters[0] == "2")
        });
        inside(pid, status["sandbox"].as_str().unwrap());
        place.done("kill v");
        guest.wait().unwrap();
    }
    assert!(!place.path("gdb").exists());
}

/// What the process was started with is none of the guest's business, unless it is told to use it.
#[test]
fn what_is_inherited_is_given_up() {
    if !has_kvm("what_is_inherited_is_given_up") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    for name in ["secret", "used"] {
        place.file(name, "");
    }
    let run = |sandbox: &str| {
        let script = format!(
            "SECRET=hush exec \"$0\" --kernel count --mem 32M --serial file=/dev/fd/8 --console off --name v --sandbox {sandbox} \
             7<secret 8>>used"
        );
        let mut command = Command::new("sh");
        command.args(["-c", &script, crate::PROGRAM]);
        place.set_up(&mut command);
        let guest = Running::new(command);
        await_words(&place, "used", 3);
        let about = |what: &str| PathBuf::from(format!("/proc/{}/{what}", guest.pid()));
        let environment = text(&fs::read(about("environ")).unwrap());
        let open = |name: &str| {
            let path = fs::canonicalize(place.path(name)).unwrap();
            let links = fs::read_dir(about("fd")).unwrap();
            links
                .filter(|link| fs::read_link(link.as_ref().unwrap().path()).is_ok_and(|to| to == path))
                .count()
        };
        let left = (environment.contains("hush"), open("secret"), open("used"));
        assert!(environment.contains("XDG_RUNTIME_DIR="), "{environment}");
        place.done("kill v");
        fs::write(place.path("used"), "").unwrap();
        left
    };
    assert_eq!(run("off"), (true, 1, 2));
    assert_eq!(run("auto"), (false, 0, 1));
}

/// A machine that can connect to sockets finds its own alone.
#[test]
fn a_machine_reaches_no_other_machines_sockets() {
    let test = "a_machine_reaches_no_other_machines_sockets";
    if !has_kvm(test) {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let run = |name: &str, more: &str| {
        let run =
            format!("--kernel count --mem 32M --serial file={name}.out --console off --name {name} {more}");
        let guest = Running::new(place.command(&run));
        await_words(&place, &format!("{name}.out"), 3);
        guest
    };
    let guests =
        [run("plain", ""), run("one", "--vsock"), run("two", "--vsock"), run("three", "--net switch=lan")];
    if !place.status("one")["sandbox"].as_str().unwrap().contains("namespaces") {
        return eprintln!("SKIP: {test}: needs namespaces, which a container may not have");
    }
    let runtime = fs::canonicalize(place.path("run/vmm")).unwrap();
    let seen = |guest: &Running| -> Vec<_> {
        let root = format!("/proc/{}/root{}", guest.pid(), runtime.display());
        let mut names: Vec<_> =
            fs::read_dir(root).into_iter().flatten().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    // It cannot connect to anything.
    assert!(seen(&guests[0]).contains(&"one.sock".into()));
    assert_eq!(seen(&guests[1]), ["one.d"]);
    assert_eq!(seen(&guests[2]), ["two.d"]);
    assert_eq!(seen(&guests[3]), ["switch", "three.d"]);
    // Nor is there a way by a folder that it has open.
    for guest in &guests[1..] {
        for link in fs::read_dir(format!("/proc/{}/fd", guest.pid())).unwrap() {
            let to = fs::read_link(link.unwrap().path()).unwrap_or_default();
            assert_ne!(to, runtime);
        }
    }
    place.done("kill plain one two three");
}

/// What a saved machine starts from anew is opened before it is out of reach.
#[test]
fn a_machine_that_goes_on_has_its_kernel_for_resets() {
    if !has_kvm("a_machine_that_goes_on_has_its_kernel_for_resets") {
        return;
    }
    // A letter at the start of each life, which lasts long enough to be saved in: between two there is no machine to save.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'r', 0xee];
    code.extend([0xb9, 0, 0, 4, 0, 0xec, 0xff, 0xc9, 0x75, 0xfb]); // mov ecx, 0x40000; in al, dx; dec ecx; jnz to the in
    code.extend(out(0x64, 0xfe));
    let place = Place::new();
    place.file("kernel", kernel(&code));
    let run = "--kernel kernel --mem 32M --serial file=said --console off --name v --on-reboot reset";
    let _guest = Running::new(place.command(run));
    await_words(&place, "said", 1);
    place.done("snapshot create v s");
    let _restored = Running::new(place.command("restore s --serial file=more --name w"));
    // The life that was saved had said its letter.
    await_words(&place, "more", 1);
}

/// The machine is in a child of the process that the user sees.
#[test]
fn a_machine_that_is_traced_ends_with_vmm_trace_however_that_ends() {
    if !has_kvm("a_machine_that_is_traced_ends_with_vmm_trace_however_that_ends") {
        return;
    }
    for signal in [Signal::TERM, Signal::KILL] {
        let place = Place::new();
        place.file("count", kernel(&COUNTING));
        let run = "trace --stats -- --kernel count --mem 32M --serial file=said --console off --name v --stop-timeout 0";
        let mut child = place.command(run).spawn().unwrap();
        await_words(&place, "said", 3);
        kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal).unwrap();
        child.wait().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while place.vmm("status v").status.code() == Some(0) {
            assert!(Instant::now() < deadline, "it runs on after {signal:?}");
        }
    }
}
