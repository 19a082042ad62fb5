//! `--cgroup`, `--pin` and limits: what is refused, and where a machine runs. That limits hold is seen where the host has the controllers:
//! tests/boot/limits.rs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::counting::*;
use crate::images::*;
use crate::place::*;

#[test]
fn limits_that_cannot_be_are_refused_before_anything_runs() {
    let place = Place::new();
    place.file("exit", kernel(&out(0xf4, 21)));
    let run = "--kernel exit --debug-exit";
    for (limit, said) in [
        ("--cpu-weight 0", "1 to 10000"),
        ("--cpu-max none", "a number of CPUs"),
        ("--memory-max lots", "512M"),
        ("--io-max 8:0", "names no disk, or no limit"),
        ("--io-max 8:0,rbps=fast", "is no limit"),
        ("--io-max /proc/self,rbps=1M", "--io-max /proc/self: its file system is on no disk"),
        ("--io-max 4095:1,rbps=1M", "there is no such disk"),
        ("--pids-max 0", "--pids-max"),
        ("--pids-max 6 --cpus 3", "--pids-max 6 is too low: 3 vCPUs need 7 threads"),
        ("--pin 3-1", "vCPU 0 on CPU 2"),
        ("--pin 1023", "CPU 1023 does not exist or is not allowed here; allowed: 0"),
        ("--pin 0:0,2:0", "there is no vCPU 2; the last is 0\nhint: give it more: --cpus 3"),
        ("--mem 64M,prefault --memory-max 32M", "--memory-max 32M is less than --mem 64M"),
        ("--cgroup ../x", "--cgroup ../x: not a path of a cgroup"),
        ("--cgroup /", "--cgroup /: not a path of a cgroup"),
    ] {
        if limit.starts_with("--cgroup") && hierarchy().is_none() {
            eprintln!("SKIP: limits_that_cannot_be_are_refused: {limit} wants a cgroup2 file system");
            continue;
        }
        let all = place.fails(&format!("{run} {limit}"), BAD_ARGUMENT);
        assert!(all.contains(said), "{limit}: {all}");
    }
    // What only shows in a run leaves a dry one alone.
    place.done(&format!("{run} --cpu-max 1 --memory-max 1G --pin 1023 --cgroup x --dry-run"));
}

#[test]
fn a_user_to_whom_no_cgroup_is_delegated_is_told_what_to_do() {
    let test = "a_user_to_whom_no_cgroup_is_delegated_is_told_what_to_do";
    if !has_kvm(test) {
        return;
    }
    let place = Place::new();
    place.file("exit", kernel(&out(0xf4, 21)));
    let Some(command) = place.give_to_nobody(test) else { return };
    for limit in ["--cgroup x", "--memory-max 1G", "--cpu-max 0.5"] {
        let output =
            finish(command(&format!("--kernel exit --mem 32M --debug-exit {limit}")).spawn().unwrap());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(HOST), "{said}");
        assert!(said.contains("cannot limit the VM: ") && said.contains("\nhint: "), "{said}");
    }
    // For this nobody has to be asked.
    let output = finish(command("--kernel exit --mem 32M --debug-exit --pin 0").spawn().unwrap());
    assert_eq!(output.status.code(), Some(43), "{}", text(&output.stderr));
}

/// Names and CPUs of a process's threads, but for one that is the kernel's own (KVM's, for huge pages) and runs where that likes.
fn cpus(pid: i32) -> Vec<(String, String)> {
    let all = threads(pid, &["Cpus_allowed_list:"]).into_iter();
    all.filter(|(name, _)| !name.starts_with("kvm-nx-lpage"))
        .map(|(name, values)| (name, values.concat()))
        .collect()
}

#[test]
fn a_machine_has_cores_of_its_own_or_does_not_run() {
    let place = Place::new();
    place.file("exit", kernel(&out(0xf4, 21)));
    let run = "--kernel exit --mem 32M --debug-exit --own-cores";
    if !fs::read_to_string("/sys/devices/system/cpu/smt/active").is_ok_and(|text| text.trim() == "1") {
        assert!(place.fails(run, HOST).contains("cores have several threads (SMT)"));
        return;
    }
    if !has_kvm("a_machine_has_cores_of_its_own_or_does_not_run") {
        return;
    }
    use rustix::process::Pid;
    use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
    let cookie = |more: &str| {
        let (_place, guest) = counting(more);
        let pid = Pid::from_raw(guest.pid()).unwrap();
        core_scheduling_cookie(pid, CoreSchedulingScope::Thread).unwrap()
    };
    let (one, another) = (cookie("--dumpable --own-cores"), cookie("--dumpable --own-cores"));
    assert!(one != another && one != 0 && another != 0);
    assert_eq!(cookie("--dumpable"), 0);
}

#[test]
fn threads_run_on_the_cpus_that_they_are_pinned_to() {
    if !has_kvm("threads_run_on_the_cpus_that_they_are_pinned_to") {
        return;
    }
    // The last CPU of those where this test may run.
    let own = cpus(process::id() as i32).remove(0).1;
    let last = own.rsplit([',', '-']).next().unwrap().to_owned();
    let (_place, guest) = counting(&format!("--rng --pin {last}"));
    let all = cpus(guest.pid());
    assert!(all.len() > 2 && all.iter().all(|(_, cpus)| *cpus == last), "{all:?}");
    let (_place, guest) = counting(&format!("--rng --cpus 2 --pin 1:{last}"));
    for (name, cpus) in cpus(guest.pid()) {
        assert_eq!(cpus, if name == "vcpu1" { &last } else { &own }.as_str(), "{name}");
    }
}

/// Where this process is in the cgroup2 file system.
fn hierarchy() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let root = mounts
        .lines()
        .find_map(|line| line.split_once(" cgroup2 ")?.0.split(' ').nth(1))
        .map(PathBuf::from)?;
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(own)).filter(|own| own.is_dir())
}

/// A cgroup of a test's own, for cgroups of machines.
struct Group(PathBuf);

impl Group {
    fn new(test: &str) -> Option<Self> {
        let made = hierarchy().and_then(|own| {
            let path = own.join(format!("vmm-test-{}-{:?}", process::id(), thread::current().id()));
            fs::create_dir(&path).ok()?;
            Some(path)
        });
        if made.is_none() {
            eprintln!("SKIP: {test}: wants a cgroup of version 2 in which this user may make others");
        }
        made.map(Self)
    }

    fn processes(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name).join("cgroup.procs")).unwrap_or_default()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[track_caller]
fn await_gone(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while path.exists() {
        assert!(Instant::now() < deadline, "{} stays", path.display());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_cgroup_that_was_made_for_a_machine_goes_with_it_however_it_ends() {
    let test = "a_cgroup_that_was_made_for_a_machine_goes_with_it_however_it_ends";
    let Some(group) = Group::new(test).filter(|_| has_kvm(test)) else { return };
    let cgroup = group.0.join("a/b");
    let (place, guest) = counting(&format!("--cgroup {}", cgroup.display()));
    assert_eq!(group.processes("a/b").trim(), guest.pid().to_string());
    assert_eq!(place.status("v")["cgroup"], cgroup.to_str().unwrap());
    assert!(place.done("status v").contains(&format!("\ncgroup   {}\n", cgroup.display())));
    // Another one in it: it stays until that has gone, too.
    place.done(&format!(
        "run -d --name w --kernel count --mem 32M --serial off --cgroup {}",
        cgroup.display()
    ));
    assert_eq!(group.processes("a/b").lines().count(), 2);
    place.done("kill v");
    guest.finish();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(group.processes("a/b").lines().count(), 1);
    place.done("kill w");
    await_gone(&group.0.join("a"));

    let (_place, guest) = counting(&format!("--cgroup {}", cgroup.display()));
    guest.signal(rustix::process::Signal::KILL);
    guest.finish();
    await_gone(&group.0.join("a"));

    // One that was there stays.
    fs::create_dir(group.0.join("c")).unwrap();
    place.file("exit", kernel(&out(0xf4, 21)));
    place.fails(&format!("--kernel exit --mem 32M --debug-exit --cgroup {}/c", group.0.display()), 43);
    fs::remove_dir(group.0.join("c")).unwrap();
}

#[test]
fn a_cgroup_that_others_have_entered_stays_and_nobody_waits_for_them() {
    let test = "a_cgroup_that_others_have_entered_stays_and_nobody_waits_for_them";
    let Some(group) = Group::new(test).filter(|_| has_kvm(test)) else { return };
    let (cgroup, other) = (group.0.join("a"), Command::new("sleep").arg("60").stdout(Stdio::null()).spawn());
    let (place, guest) = counting(&format!("--cgroup {}", cgroup.display()));
    let mut other = other.unwrap();
    fs::write(cgroup.join("cgroup.procs"), other.id().to_string()).unwrap();
    place.done("kill v");
    // Its standard error has ended, too.
    assert_eq!(guest.finish().status.code(), Some(KILLED));
    assert_eq!(group.processes("a").trim(), other.id().to_string());
    other.kill().unwrap();
    other.wait().unwrap();
    await_gone(&cgroup);
}

#[test]
fn copies_of_a_machine_enter_the_cgroup_that_they_are_given() {
    let test = "copies_of_a_machine_enter_the_cgroup_that_they_are_given";
    let Some(group) = Group::new(test).filter(|_| has_kvm(test)) else { return };
    let (place, guest) = counting("");
    assert_eq!(place.status("v")["cgroup"], serde_json::Value::Null);
    let cgroup = group.0.join("copies");
    place.done(&format!("fork v --count 2 --cgroup {}", cgroup.display()));
    assert_eq!(group.processes("copies").lines().count(), 2);
    place.done("kill v-1 v-2");
    drop(guest);
    await_gone(&cgroup);
}
