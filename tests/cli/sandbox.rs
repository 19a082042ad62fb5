//! `--sandbox`: machines that do what they do elsewhere, in processes whose threads may do little else.

use std::fs;

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// The lines of /proc/PID/task/TID/status that begin with these words, of each thread, with its name.
fn threads(pid: &str) -> Vec<(String, Vec<String>)> {
    let task = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim().to_owned()
        };
        Some((value("Name:"), ["Seccomp:", "NoNewPrivs:", "CapEff:", "CapPrm:"].map(value).into()))
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter_map(|entry| task(entry.unwrap())).collect()
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
    assert_eq!(place.status("v")["sandbox"], "seccomp, no capabilities");
    assert!(place.done("status v").contains("sandbox  seccomp, no capabilities\n"));
    let all = threads(&guest.pid().to_string());
    let none = "0".repeat(16);
    for (name, values) in &all {
        assert_eq!(values, &["2", "1", &none, &none], "{name}");
    }
    assert!(all.iter().any(|(name, _)| name == "vcpu0") && all.len() > 2, "{all:?}");

    // What is asked of it while it runs.
    place.done("pause v");
    place.done("resume v");
    place.done("device add v disk=other");
    place.done("device remove --force v virtio-blk1");
    let said = place.fails("device add v net=user", HOST);
    assert!(said.contains("the sandbox of this VM has nothing for such a network"), "{said}");
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
        assert_eq!(place.status(name)["sandbox"], "seccomp, no capabilities");
    }
    place.done("kill x");
}
