//! Linux from a pool: it stands ready for a while, and then each that is taken goes on from the same moment, alone, at today's time.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Kernel, available, vmm};
use crate::snapshot::{exec, number, well};

/// Ends the pool `p` and what was taken from it, however the test ends: they are no children of it.
struct Pool<'a>(&'a Guest);

impl Pool<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.0.command(&[&["pool"], arguments].concat());
        command.env("XDG_STATE_HOME", self.0.runtime());
        command
    }

    fn say(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command in a copy of its own: what it wrote, and its exit code.
    fn run(&self, options: &[&str], script: &str) -> (String, Option<i32>) {
        let mut command = self.command(&["take", "p"]);
        let output = command.args(options).args(["--", "sh", "-c", script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.is_empty(), "{script}: {said}");
        (String::from_utf8(output.stdout).unwrap(), output.status.code())
    }
}

impl Drop for Pool<'_> {
    fn drop(&mut self) {
        self.0.control(&["pool", "stop", "p"]);
        self.0.control(&["kill", "p-1", "p-2", "p-1-1"]);
    }
}

/// Pages of 4 KiB that KVM has mapped for the children of process `pool`, each of which has a VM.
fn mapped_pages(pool: u64) -> Vec<u64> {
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    let tasks = |process: &str| fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let children: String = tasks(&pool.to_string()).map(|task| read(task.path().join("children"))).collect();
    let vms: Vec<_> =
        fs::read_dir("/sys/kernel/debug/kvm").unwrap().map(|entry| entry.unwrap().path()).collect();
    // KVM calls a VM by the thread that has made it: NUMBER-DESCRIPTOR.
    let has_made = |vm: &PathBuf, child: &str| {
        let name = vm.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.split_once('-').is_some_and(|(thread, _)| tasks(child).any(|task| task.file_name() == *thread))
    };
    let of = |child: &str| {
        let vm = vms.iter().find(|vm| has_made(vm, child))?;
        read(vm.join("pages_4k")).trim().parse().ok()
    };
    children.split_whitespace().filter_map(of).collect()
}

#[test]
fn a_linux_with_two_cpus_that_has_stood_ready_goes_on_as_a_copy_does() {
    if !available("a_linux_with_two_cpus_that_has_stood_ready_goes_on_as_a_copy_does") {
        return;
    }
    let mut command = vmm(Kernel::TunedPvh, "echo up; while :; do echo x >>/tmp/ticks; sleep 0.1; done");
    command.args(["--name", "g", "--vsock", "--rng", "--net", "user", "--cpus", "2", "--transport", "pci"]);
    let first = Guest::start(command);
    first.wait_for("up", 1);
    let nonce = exec(
        &first,
        "g",
        "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ping -c 1 -W 10 10.0.2.2 >/dev/null; \
         cat /proc/sys/kernel/random/uuid | tee /tmp/nonce",
    );
    let ticks = number(&exec(&first, "g", "wc -l </tmp/ticks"));
    let pool = Pool(&first);
    assert_eq!(pool.say(&["start", "p", "g", "--size", "2"]), "p\n");
    // KVM has mapped what its guest has, so that this need not stop at each page.
    let told: serde_json::Value = serde_json::from_str(&pool.say(&["list", "--json"])).unwrap();
    let mapped = mapped_pages(told[0]["pid"].as_u64().unwrap());
    assert!(mapped.len() == 2 && mapped.iter().all(|pages| *pages > 2000), "{mapped:?}");
    let uptime = number(&exec(&first, "g", "cat /proc/uptime"));
    let stood = Duration::from_secs(10);
    thread::sleep(stood);
    assert_eq!(pool.say(&["take", "p"]), "p-1\n");
    let (then, later) = {
        let told = exec(&first, "p-1", "wc -l </tmp/ticks; sleep 2; wc -l </tmp/ticks");
        let told: Vec<_> = told.lines().map(number).collect();
        (told[0], told[1])
    };
    // It has slept: nothing happened in it, and its clock went on.
    assert!(then >= ticks && then < ticks + 80.0 && later > then, "{ticks}, {then}, {later}");
    assert!(number(&exec(&first, "p-1", "cat /proc/uptime")) >= uptime + stood.as_secs_f64());
    // The other one has its agent called by who takes it.
    assert_eq!(pool.say(&["take", "p", "--renew"]), "p-2\n");
    let mut fork = first.command(&["fork", "p-1"]);
    let forked = fork.env("XDG_STATE_HOME", first.runtime()).output().unwrap();
    assert_eq!(forked.status.code(), Some(0), "{}", String::from_utf8_lossy(&forked.stderr));
    let all = ["p-1", "p-2", "p-1-1"];
    for name in all {
        let script = format!("cat /tmp/nonce; echo {name} >/tmp/nonce; ping -c 1 -W 10 10.0.2.2 >/dev/null");
        assert_eq!(exec(&first, name, &script), nonce, "the same run");
    }
    for name in all {
        assert_eq!(exec(&first, name, "cat /tmp/nonce"), name, "its own memory");
        well(&first, name);
    }
    let generation = "i=0; until [ -e /run/vmm/generation ] || [ $i = 600 ]; do i=$((i + 1)); sleep 0.1; done; \
         cat /run/vmm/generation";
    for script in ["cat /proc/sys/kernel/random/uuid", generation] {
        let told: BTreeSet<_> = all.iter().map(|name| exec(&first, name, script)).collect();
        assert_eq!(told.len(), all.len(), "{told:?}");
    }
    // One for a command, by the next free number; nothing of it stays.
    let (one, code) = pool.run(&[], "cat /tmp/nonce /run/vmm/generation; exit 7");
    assert_eq!((one.lines().next(), code), (Some(&*nonce), Some(7)), "{one}");
    let options = ["--hostname", "other", "-t", "-e", "A=b c", "-w", "/tmp"];
    let (other, code) =
        pool.run(&options, "cat /run/vmm/generation; hostname; tty; echo $A; pwd; kill -9 $$");
    let lines: Vec<_> = other.lines().collect();
    let [generation, "other", tty, "b c", "/tmp"] = lines[..] else { panic!("{other}") };
    assert!(!one.contains(generation) && tty.starts_with("/dev/pts/") && code == Some(137), "{other}");
    let mut ends = pool.command(&["take", "p", "--", "sh", "-c", "poweroff -f; sleep 60"]);
    assert_eq!(ends.output().unwrap().status.code(), Some(125));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let (_, listed) = first.control(&["list"]);
        // The title, and the first.
        if listed.lines().count() == 2 + all.len() {
            break;
        }
        assert!(Instant::now() < deadline, "{listed}");
        thread::sleep(Duration::from_millis(100));
    }
    pool.say(&["stop", "p"]);
    for name in all {
        exec(&first, name, "true");
    }
}
