//! Limits that hold: CPU time, memory, and what a user may have without being root.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Kernel, available, bundle, ticking, vmm};

const ROOT: &str = "/sys/fs/cgroup";
const NOBODY: u32 = 65534;

/// Whether a guest can run here, and be limited by whoever runs the test.
fn limits_available(test: &str) -> bool {
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).unwrap_or_default();
    let has = |name: &str| controllers.split_whitespace().any(|there| there == name);
    let may = rustix::process::geteuid().is_root();
    if !available(test) {
        return false;
    }
    if !(may && ["cpu", "memory", "io", "pids"].into_iter().all(has)) {
        eprintln!("SKIP: {test}: wants root, and cgroup version 2 with its controllers");
        return false;
    }
    true
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path.as_ref()).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

/// How often the processes of `cgroup` had used up their CPU time.
fn throttled(cgroup: &Path) -> u64 {
    let stat = read(cgroup.join("cpu.stat"));
    stat.lines().find_map(|line| line.strip_prefix("nr_throttled ")).unwrap().parse().unwrap()
}

#[track_caller]
fn await_gone(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while path.exists() {
        assert!(Instant::now() < deadline, "{} stays", path.display());
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guest_that_never_rests_gets_its_share_and_no_more() {
    if !limits_available("CPU limits") {
        return;
    }
    let mut command = vmm(Kernel::TunedPvh, "echo up; while true; do :; done");
    command.args([
        "--mem",
        "192M",
        "--name",
        "a",
        "--cgroup",
        "/vmm-limits/a",
        "--cpu-weight",
        "50",
        "--cpu-max",
        "0.3",
    ]);
    command.args(["--memory-max", "300M", "--pids-max", "64", "--io-max", "7:0,rbps=1M,wiops=10"]);
    let guest = Guest::start(command);
    guest.wait_for("up", 1);
    let cgroup = Path::new(ROOT).join("vmm-limits/a");
    for (file, value) in [
        ("cpu.weight", "50"),
        ("cpu.max", "30000 100000"),
        ("memory.max", "314572800"),
        ("pids.max", "64"),
        ("io.max", "7:0 rbps=1048576 wbps=max riops=max wiops=10"),
        ("cgroup.procs", &guest.pid().to_string()),
    ] {
        assert_eq!(read(cgroup.join(file)).trim(), value, "{file}");
    }
    // Memory was touched after the process had entered.
    assert!(read(cgroup.join("memory.current")).trim().parse::<u64>().unwrap() > 16 << 20);
    let before = throttled(&cgroup);
    thread::sleep(Duration::from_secs(2));
    let after = throttled(&cgroup);
    assert!(after >= before + 5, "throttled {before} times, two seconds later {after}");
    assert_eq!(guest.control(&["kill", "a"]).0, Some(0));
    guest.finish();
    await_gone(&Path::new(ROOT).join("vmm-limits"));
}

#[test]
fn a_guest_that_takes_more_memory_than_it_may_is_killed_and_that_is_said() {
    if !limits_available("memory limits") {
        return;
    }
    let script = "echo up; dd if=/dev/zero of=/tmp/x bs=1M count=150; echo survived";
    let limits = ["--mem", "192M", "--memory-max", "100M"];
    let mut command = vmm(Kernel::TunedPvh, script);
    command
        .args(limits)
        .args(["--cgroup", "/vmm-memory"])
        .env("XDG_RUNTIME_DIR", "/tmp")
        .stderr(Stdio::piped());
    let output = command.stdout(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), None, "{}", output.status);
    assert!(String::from_utf8_lossy(&output.stdout).contains("up") && !said.contains("survived"));
    assert!(
        said.contains(
            "the host's kernel killed the VM: guest and monitor needed more than --memory-max 100M"
        ),
        "{said}"
    );
    await_gone(&Path::new(ROOT).join("vmm-memory"));
}

/// A cgroup that is delegated to another user, and a copy of what that user needs to run a guest.
struct Delegated {
    cgroup: PathBuf,
    dir: tempfile::TempDir,
}

impl Delegated {
    fn new() -> Self {
        fs::write(Path::new(ROOT).join("cgroup.subtree_control"), "+cpu +memory +pids").unwrap();
        let cgroup = Path::new(ROOT).join("vmm-delegated");
        fs::create_dir(&cgroup).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_vmm"), dir.path().join("program")).unwrap();
        for (name, file) in [("kernel", "tuned-vmlinux"), ("initrd", "tuned.cpio")] {
            fs::copy(bundle(file), dir.path().join(name)).unwrap();
        }
        let delegated = ["", "cgroup.procs", "cgroup.subtree_control"].map(|file| cgroup.join(file));
        let copies = ["", "program", "kernel", "initrd"].map(|file| dir.path().join(file));
        for path in delegated.iter().chain(&copies) {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o666)).unwrap();
        Self { cgroup, dir }
    }

    /// `vmm ARGUMENTS` as that user, in that cgroup, which a shell enters first.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("/bin/sh");
        // The way there leads by the root, which is not that user's: whose right it is shows when the file is opened.
        let enter = fs::File::options().write(true).open(self.cgroup.join("cgroup.procs")).unwrap();
        command
            .args(["-c", "echo 0 >&0 && exec ./program \"$@\" </dev/null", "vmm"])
            .args(arguments)
            .current_dir(self.dir.path());
        command.env("XDG_RUNTIME_DIR", self.dir.path()).env("XDG_STATE_HOME", self.dir.path());
        command.uid(NOBODY).gid(NOBODY).stdin(enter);
        command
    }

    fn run(&self, script: &str, more: &[&str]) -> std::process::Output {
        let cmdline = ticking(&format!("console=hvc0 quiet panic=-1 vmm.run=\"{script}\""));
        let run = ["run", "--kernel", "kernel", "--initrd", "initrd", "--mem", "192M", "--cmdline", &cmdline];
        self.command(&[&run, more].concat()).output().unwrap()
    }
}

#[test]
fn a_user_limits_machines_in_a_delegated_cgroup_that_is_theirs_alone() {
    if !limits_available("delegated limits") {
        return;
    }
    let place = Delegated::new();
    let limits = ["--memory-max", "300M", "--cpu-max", "0.9"];
    let output = place.run("echo hello", &limits);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("hello"), "{said}");
    // The machine's cgroup goes; that of processes that start some stays, for the next.
    let left = || -> Vec<_> {
        let entries = fs::read_dir(&place.cgroup).unwrap().map(|entry| entry.unwrap());
        let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        folders.map(|entry| entry.file_name().into_string().unwrap()).collect()
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while left() != ["vmm-starters"] {
        assert!(Instant::now() < deadline, "{:?}", left());
        thread::sleep(Duration::from_millis(20));
    }

    // A command that starts one in the background steps aside, too, and what another process has left goes.
    let gone = Command::new("true").spawn().and_then(|mut child| child.wait().map(|_| child.id())).unwrap();
    fs::create_dir(place.cgroup.join(format!("vmm-{gone}"))).unwrap();
    fs::remove_dir(place.cgroup.join("vmm-starters")).unwrap();
    fs::write(place.cgroup.join("cgroup.subtree_control"), "-cpu -memory").unwrap();
    let output = place.run("sleep 1000", &[&limits[..], &["-d", "--name", "b"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(left().len(), 2, "{:?}", left());
    let own = left().into_iter().find(|name| name != "vmm-starters").unwrap();
    assert_eq!(read(place.cgroup.join(&own).join("memory.max")).trim(), "314572800");
    let kill = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["kill", "b"])
        .env("XDG_RUNTIME_DIR", place.dir.path())
        .uid(NOBODY)
        .gid(NOBODY)
        .status();
    assert!(kill.is_ok());
    await_gone(&place.cgroup.join(own));

    // Whoever shares it with others is told so.
    let _ = fs::remove_dir(place.cgroup.join("vmm-starters"));
    fs::write(place.cgroup.join("cgroup.subtree_control"), "-cpu -memory").unwrap();
    let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(place.cgroup.join("cgroup.procs"), other.id().to_string()).unwrap();
    let output = place.run("echo hello", &limits);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(
        said.contains("cgroup.subtree_control: ") && said.contains("other processes are in that cgroup"),
        "{said}"
    );
    assert_eq!(left(), Vec::<String>::new());
    other.kill().unwrap();
    other.wait().unwrap();
    fs::remove_dir(&place.cgroup).unwrap();
}
