//! Virtual machines in the background: `vmm run -d`, and what is kept of them for `logs`, `wait`, `list --all` and `rm`.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::Value;

use crate::images::*;
use crate::place::*;

/// A place with guests whose console is the serial port.
fn place() -> Place {
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    // mov dx, 0x3f8; mov ecx, N; 1: mov al, cl; and al, 0xf; add al, 'A'; out dx, al; loop 1b; halt
    let mut talk = vec![0x66, 0xba, 0xf8, 0x03, 0xb9];
    talk.extend(TALK.to_le_bytes());
    talk.extend([0x88, 0xc8, 0x24, 0x0f, 0x04, 0x41, 0xee, 0xe2, 0xf7]);
    talk.extend(HALT);
    place.file("talk", kernel(&talk));
    place.file("crash", kernel(&[0x0f, 0x0b]));
    place.file("exit", kernel(&out(0xf4, 3)));
    place
}

/// Bytes that the talking guest says.
const TALK: u32 = 3000;

/// What it says.
fn talk() -> String {
    (1..=TALK).rev().map(|left| char::from(b'A' + (left & 0xf) as u8)).collect()
}

impl Place {
    #[track_caller]
    fn says(&self, arguments: &str) -> String {
        let output = self.vmm(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Starts `kernel` in the background; its name.
    #[track_caller]
    fn detach(&self, kernel: &str, arguments: &str) -> String {
        self.says(&format!("run -d --kernel {kernel} --serial stdio {arguments}")).trim().to_owned()
    }

    fn pid(&self, name: &str) -> rustix::process::Pid {
        let status: Value = serde_json::from_str(&self.says(&format!("status {name} --json"))).unwrap();
        rustix::process::Pid::from_raw(status["pid"].as_i64().unwrap() as i32).unwrap()
    }

    /// A `vmm wait NAME` that has asked.
    fn wait_for(&self, name: &str) -> Child {
        let child = self.command(&format!("wait {name}")).spawn().unwrap();
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        let asleep = || {
            let open = fs::read_dir(process.join("fd")).unwrap();
            let connected = open.flatten().any(|entry| {
                fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
            });
            let stat = fs::read_to_string(process.join("stat")).unwrap();
            connected && stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" S"))
        };
        // It never sleeps between connecting and waiting for the answer.
        let deadline = Instant::now() + PATIENCE;
        while !asleep() {
            assert!(Instant::now() < deadline, "it does not wait");
            thread::sleep(Duration::from_millis(2));
        }
        child
    }

    fn all(&self) -> Vec<Value> {
        serde_json::from_str(&self.says("list --all --json")).unwrap()
    }

    /// Waits for `logs NAME` to have `wanted` at its end.
    #[track_caller]
    fn await_log(&self, name: &str, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.says(&format!("logs {name}")).ends_with(wanted) {
            assert!(Instant::now() < deadline, "{}", self.says(&format!("logs {name}")));
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_run_whose_record_is_on_a_full_disk_has_its_exit_code_kept() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    if !has_kvm("a_run_whose_record_is_on_a_full_disk_has_its_exit_code_kept") {
        return;
    }
    let place = place();
    let state = place.path("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
    if mount("vmm-test", &state, "tmpfs", MountFlags::empty(), Some(c"size=256k")).is_err() {
        return eprintln!("SKIP: a_run_whose_record_is_on_a_full_disk: needs to mount a tmpfs");
    }
    place.detach("halt", "--name full");
    let full = std::io::copy(&mut std::io::repeat(0), &mut fs::File::create(state.join("fill")).unwrap());
    assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    place.says("kill full");
    assert_eq!(place.says("wait full"), "10\n");
    let folder = state.join("vmm/full");
    let mut left: Vec<_> = fs::read_dir(&folder).unwrap().map(|file| file.unwrap()).collect();
    left.retain(|file| file.file_name().to_string_lossy().starts_with("end"));
    let [end] = &left[..] else { panic!("{left:?}") };
    assert_eq!(end.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    unmount(&state, UnmountFlags::DETACH).unwrap();
}

#[test]
fn it_runs_on_and_what_it_said_and_how_it_ended_are_kept() {
    if !has_kvm("it_runs_on_and_what_it_said_and_how_it_ended_are_kept") {
        return;
    }
    let place = place();
    assert_eq!(place.detach("talk", "--name web"), "web");
    let session = |pid| rustix::process::getsid(pid).unwrap();
    let monitor = place.pid("web");
    assert_eq!(session(Some(monitor)), monitor, "a session of its own");
    for fd in 0..3 {
        let open = fs::read_link(format!("/proc/{}/fd/{fd}", monitor.as_raw_nonzero()));
        // Only root may look.
        if let Ok(open) = open {
            assert_eq!(open.to_str(), Some("/dev/null"));
        }
    }
    place.await_log("web", &talk());
    assert_eq!(place.says("logs web"), talk());
    assert!(place.says("ps").contains("running"));
    refused(&place, "rm web", HOST, &["is running"]);
    place.says("kill web");
    assert_eq!(place.says("wait web"), "10\n");
    assert_eq!(place.says("logs web"), talk(), "also of one that has ended");
    let all = place.all();
    assert_eq!((all.len(), &all[0]["state"], &all[0]["exit_code"]), (1, &"ended".into(), &10.into()));
    assert!(place.says("ps -a").contains("exit 10"));
    assert_eq!(place.says("list").lines().count(), 1);
    // A new one of this name takes the place of what is kept.
    place.detach("halt", "--name web");
    assert_eq!(place.says("logs web"), "");
    place.says("kill web");
    place.says("rm web");
    assert!(place.all().is_empty());
    assert_eq!(fs::read_dir(place.path("state/vmm")).unwrap().count(), 0);
}

#[test]
fn a_wait_ends_with_the_run_and_tells_its_exit_code() {
    if !has_kvm("a_wait_ends_with_the_run_and_tells_its_exit_code") {
        return;
    }
    let place = place();
    place.detach("halt", "--name a --rm");
    // In the foreground, too.
    let mut front = place.command("--kernel halt --console off --name b").spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !place.says("list").contains("b  ") {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
    let waiting = ["a", "b"].map(|name| place.wait_for(name));
    place.says("kill b");
    place.says("kill a");
    for waiting in waiting {
        assert_eq!(text(&finish(waiting).stdout), "10\n");
    }
    assert_eq!(wait(&mut front).code(), Some(KILLED));
    assert!(place.all().is_empty(), "--rm keeps nothing");
    refused(&place, "wait a", HOST, &["no virtual machine called \"a\""]);
    // Short ones may be over before anybody asks.
    assert_eq!(place.detach("exit", "--name c --debug-exit"), "c");
    assert_eq!(place.says("wait c"), "7\n");
    place.detach("crash", "--name d");
    assert_eq!(place.says("wait d"), "6\n");
    assert!(place.says("logs d --monitor").contains("vmm: error: vcpu0: triple fault"));
    place.says("rm --all");
    assert!(place.all().is_empty());
}

#[test]
fn a_follower_sees_everything_and_leaves_with_the_guest() {
    if !has_kvm("a_follower_sees_everything_and_leaves_with_the_guest") {
        return;
    }
    let place = place();
    place.detach("talk", "--name web");
    let mut follower = place.command("logs -f web").spawn().unwrap();
    let mut said = BufReader::new(follower.stdout.take().unwrap());
    let mut seen = Vec::new();
    // The last that it says is said once in 16.
    while seen.len() < TALK as usize {
        let part = said.fill_buf().unwrap();
        assert!(!part.is_empty(), "it left before the guest");
        seen.extend_from_slice(part);
        let count = part.len();
        said.consume(count);
    }
    assert_eq!(text(&seen), talk());
    assert!(follower.try_wait().unwrap().is_none(), "the guest is still there");
    place.says("kill web");
    assert_eq!(wait(&mut follower).code(), Some(0));
    // Of one that has ended there is no more to come.
    assert_eq!(place.says("logs -f -n 1 web"), talk());
    assert_eq!(place.says("logs -n 0 web"), "");
}

#[test]
fn one_that_does_not_start_says_why_and_leaves_nothing() {
    if !has_kvm("one_that_does_not_start_says_why_and_leaves_nothing") {
        return;
    }
    let place = place();
    fs::create_dir_all(place.path("state/vmm")).unwrap();
    refused(&place, "run -d --kernel nothing", BAD_ARGUMENT, &["cannot open kernel nothing"]);
    refused(&place, "run -d --name web --kernel nothing", BAD_ARGUMENT, &["cannot open kernel nothing"]);
    refused(&place, "run --kernel halt --rm", BAD_ARGUMENT, &["--detach"]);
    refused(&place, "run -d --dry-run --kernel halt", BAD_ARGUMENT, &["--dry-run"]);
    refused(&place, "logs web", HOST, &["no virtual machine called \"web\""]);
    refused(&place, "rm web", HOST, &["nothing is kept"]);
    for evil in ["..", "../../run", ".", ""] {
        let mut command = place.command("rm");
        command.arg(evil);
        refused_command(&place, command, HOST, &["nothing is kept"]);
    }
    place.detach("halt", "--name web");
    let mut again = place.command("run -d --name web --kernel halt --serial stdio");
    again.stdin(std::process::Stdio::null());
    refused_command(&place, again, HOST, &["already running"]);
    assert_eq!(place.says("list").lines().count(), 2, "the first runs on");
    place.says("kill web");
    // What is kept of an earlier run outlasts a start that fails.
    refused(&place, "run -d --name web --kernel nothing", BAD_ARGUMENT, &["cannot open kernel nothing"]);
    assert_eq!(place.says("wait web"), "10\n");
    // Whose console is elsewhere has no log.
    place.says("run -d --name mute --kernel halt --console off --serial file=log");
    refused(&place, "logs mute", BAD_ARGUMENT, &["goes elsewhere"]);
    place.says("kill mute");
    // No place to keep anything.
    fs::remove_dir_all(place.path("state")).unwrap();
    place.file("state", "a file");
    refused(&place, "run -d --kernel halt", HOST, &["cannot keep a record"]);
}

#[test]
fn a_monitor_that_is_killed_leaves_a_record_that_says_so() {
    if !has_kvm("a_monitor_that_is_killed_leaves_a_record_that_says_so") {
        return;
    }
    let place = place();
    place.detach("halt", "--name web");
    let waiting = place.wait_for("web");
    rustix::process::kill_process(place.pid("web"), rustix::process::Signal::KILL).unwrap();
    let output = finish(waiting);
    assert_eq!(output.status.code(), Some(HOST));
    assert!(text(&output.stderr).contains("ended without saying how"), "{}", text(&output.stderr));
    let all = place.all();
    let row = ["state", "exit_code", "ended_at"].map(|key| &all[0][key]);
    assert_eq!(row, [&"killed".into(), &Value::Null, &Value::Null]);
    assert!(place.says("ps -a").lines().any(|line| line.starts_with("web ") && line.contains(" killed ")));
    refused(&place, "wait web", HOST, &["ended without saying how", "was killed"]);
    place.says("logs web");
    place.says("logs -f --monitor web");
    // The name is free: a new run takes the place of what is kept.
    place.detach("halt", "--name web");
    place.says("kill web");
    assert_eq!(place.says("wait web"), "10\n");
    place.says("rm web");
    assert!(place.all().is_empty());
}

#[test]
fn a_monitor_that_is_killed_leaves_nothing_for_long_if_it_was_to_keep_nothing() {
    if !has_kvm("a_monitor_that_is_killed_leaves_nothing_for_long_if_it_was_to_keep_nothing") {
        return;
    }
    let place = place();
    for look in ["ps -a", "rm --all"] {
        place.detach("halt", "--name web --rm");
        place.detach("halt", "--name other --rm");
        let waiting = place.wait_for("web");
        rustix::process::kill_process(place.pid("web"), rustix::process::Signal::KILL).unwrap();
        finish(waiting);
        assert!(place.path("state/vmm/web").exists());
        assert!(!place.says(look).contains("web "));
        assert!(!place.path("state/vmm/web").exists(), "{look}");
        assert!(place.path("state/vmm/other").exists(), "it runs");
        place.says("kill other");
    }
}

#[test]
fn each_name_has_its_turn_whatever_became_of_those_before() {
    if !has_kvm("each_name_has_its_turn_whatever_became_of_those_before") {
        return;
    }
    let place = place();
    place.detach("exit", "--name a --debug-exit");
    place.detach("crash", "--name c");
    let output = place.vmm("wait a b c d");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(HOST), "7\n6\n".to_owned()));
    let said = text(&output.stderr);
    assert!(said.contains("called \"b\"") && said.contains("called \"d\""), "{said}");
    let output = place.vmm("rm b a d c");
    assert_eq!(output.status.code(), Some(HOST));
    assert_eq!(text(&output.stderr).matches("nothing is kept").count(), 2, "{}", text(&output.stderr));
    assert!(place.all().is_empty());
}

#[test]
fn a_command_to_one_that_has_ended_says_so_and_how() {
    if !has_kvm("a_command_to_one_that_has_ended_says_so_and_how") {
        return;
    }
    let place = place();
    place.detach("crash", "--name web");
    place.says("wait web");
    for (command, code) in [
        ("status web", HOST),
        ("stop web", HOST),
        ("kill web", HOST),
        ("pause web", HOST),
        ("exec web true", 125),
        ("cp web:/a .", HOST),
        ("forward web 80", HOST),
        ("agent time web", HOST),
    ] {
        let output = place.vmm(command);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{command}: {said}");
        assert!(said.contains("\"web\" has ended, with exit code 6"), "{command}: {said}");
        assert!(said.contains("hint: see what it said: vmm logs --monitor web"), "{command}: {said}");
    }
    place.says("rm web");
    refused(&place, "status web", HOST, &["no virtual machine called \"web\""]);
}

#[test]
fn a_name_that_cannot_be_printed_is_in_the_error() {
    if !has_kvm("a_name_that_cannot_be_printed_is_in_the_error") {
        return;
    }
    let place = place();
    let mut command = place.command("run -d --kernel halt --serial stdio");
    command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
    let output = finish(command.spawn().unwrap());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(HOST), "{said}");
    let name = said.trim().rsplit(' ').next().unwrap().to_owned();
    assert!(said.contains("cannot write to standard output") && said.contains("vmm stop "), "{said}");
    place.says(&format!("kill {name}"));
    assert_eq!(place.says(&format!("wait {name}")), "10\n");
}

#[test]
fn a_start_that_is_killed_leaves_nothing_that_rm_does_not_remove() {
    let place = place();
    // The record that it has begun, and an earlier one that was to make room for it.
    fs::create_dir_all(place.path("state/vmm/web")).unwrap();
    fs::create_dir_all(place.path("state/vmm/.web")).unwrap();
    let all = place.all();
    assert_eq!((all.len(), &all[0]["state"]), (1, &"unstarted".into()));
    place.says("rm web");
    assert_eq!(fs::read_dir(place.path("state/vmm")).unwrap().count(), 0);
}

#[test]
fn records_are_not_kept_where_others_could_change_them() {
    let place = place();
    let folder = place.path("state/vmm");
    fs::create_dir_all(&folder).unwrap();
    for mode in [0o720, 0o702, 0o777] {
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
        let words = ["cannot keep a record in", "belongs to another user, or others may write to it"];
        refused(&place, "run -d --kernel halt", HOST, &words);
        refused(&place, "run -d --name web --kernel halt", HOST, &words);
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    // Only root can give a folder away.
    match std::os::unix::fs::chown(&folder, Some(65534), None) {
        Ok(()) => refused(&place, "run -d --kernel halt", HOST, &["belongs to another user"]),
        Err(error) => {
            eprintln!("SKIP: records_are_not_kept_where_others_could_change_them: of another user: {error}")
        }
    }
}

/// A thread that this one has stopped. It goes on when this is dropped.
struct Stopped(i32);

impl Stopped {
    /// The thread of `process` that is called `name`; an error if this user may stop none.
    fn new(process: rustix::process::Pid, name: &str) -> std::io::Result<Self> {
        let threads = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero()))?;
        let is_called =
            |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|it| it.trim() == name);
        let path = threads.flatten().map(|entry| entry.path()).find(is_called).expect(name);
        let thread: i32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let no_data = std::ptr::null_mut::<libc::c_void>();
        for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
            // SAFETY: neither request touches this process's memory.
            if unsafe { libc::ptrace(request, thread, no_data, no_data) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(Self(thread).await_change())
    }

    /// Until it has stopped, or is gone.
    fn await_change(self) -> Self {
        let mut status = 0;
        // SAFETY: the status is ours.
        unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) };
        self
    }
}

#[test]
fn a_monitor_whose_machine_does_not_end_when_killed_leaves_word_of_its_end() {
    const NAME: &str = "a_monitor_whose_machine_does_not_end_when_killed_leaves_word_of_its_end";
    if !has_kvm(NAME) {
        return;
    }
    let place = place();
    for (options, kept) in [("", true), ("--rm", false)] {
        let name = place.detach("halt", &format!("--console off {options}"));
        let vcpu = match Stopped::new(place.pid(&name), "vcpu0") {
            Ok(vcpu) => vcpu,
            Err(error) => {
                place.says(&format!("kill {name}"));
                return eprintln!("SKIP: {NAME}: no thread of another process can be stopped: {error}");
            }
        };
        let waiting = place.wait_for(&name);
        place.vmm(&format!("kill {name}"));
        // What it leaves as it goes is its status.
        vcpu.await_change();
        assert_eq!(text(&finish(waiting).stdout), "10\n");
        assert_eq!(place.says("list --all").contains(&name), kept);
        if kept {
            assert_eq!(place.says(&format!("wait {name}")), "10\n");
        }
    }
}

#[test]
fn many_start_at_once_each_under_a_name_of_its_own() {
    if !has_kvm("many_start_at_once_each_under_a_name_of_its_own") {
        return;
    }
    let place = place();
    let starting: Vec<_> = (0..20)
        .map(|_| place.command("run -d --kernel halt --console off --mem 32M").spawn().unwrap())
        .collect();
    let outputs = starting.into_iter().map(finish);
    let names: BTreeSet<_> = outputs.map(|output| text(&output.stdout).trim().to_owned()).collect();
    assert_eq!(names.len(), 20, "{names:?}");
    assert_eq!(place.says("list").lines().count(), 21);
    for name in &names {
        place.says(&format!("kill {name}"));
    }
    let codes: String = place.says(&format!("wait {}", names.into_iter().collect::<Vec<_>>().join(" ")));
    assert_eq!(codes, "10\n".repeat(20));
}
