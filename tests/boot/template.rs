//! `vmm run --template` with Linux: the command of each run finds the machine as it was when its guest was ready, and alone in it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::guest::{Kernel, available, bare};

/// Where templates are kept, and the sockets of the machines.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A run from a template, of our kernel with `options`, that is there for `command`, if there is one.
    fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut run = bare(Kernel::TunedPvh, "console=hvc0 quiet panic=-1");
        run.arg("--initrd")
            .arg(Kernel::TunedPvh.initramfs())
            .args(["--template", "--mem", "128M"])
            .args(options);
        if !command.is_empty() {
            run.arg("--").args(command);
        }
        self.set_up(&mut run);
        run
    }

    fn set_up(&self, command: &mut Command) {
        command.env("XDG_CACHE_HOME", self.path("cache")).env("XDG_RUNTIME_DIR", self.dir.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    /// To its end.
    fn output(&self, options: &[&str], command: &[&str]) -> Output {
        self.run(options, command).output().unwrap()
    }

    /// What it writes, of a run that ends well.
    #[track_caller]
    fn told(&self, options: &[&str], script: &str) -> String {
        let output = self.output(options, &["sh", "-c", script]);
        assert_eq!(output.status.code(), Some(0), "{script}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn vmm(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.args(arguments).stdin(Stdio::null());
        self.set_up(&mut command);
        command.output().unwrap()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The next line of a child that goes on.
fn line(child: &mut Child) -> String {
    let mut text = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut text).unwrap();
    text
}

#[test]
fn the_first_run_and_those_from_its_template_do_the_same_each_as_a_machine_of_its_own() {
    if !available("the_first_run_and_those_from_its_template_do_the_same_each_as_a_machine_of_its_own") {
        return;
    }
    let place = Place::new();
    let script = "cat /run/vmm/generation; head -c 16 /dev/urandom | od -An -tx1; \
                  cat /proc/sys/kernel/random/uuid; echo mine >>/tmp/file; wc -l </tmp/file; date +%s; \
                  echo to stderr >&2; exit 3";
    let mut unique = BTreeSet::new();
    for turn in 0..3 {
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let output = place.output(&["-v"], &["sh", "-c", script]);
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), said(&output));
        assert_eq!(output.status.code(), Some(3), "{turn}: {stderr}");
        assert!(stderr.contains("to stderr\n"), "{stderr}");
        assert_eq!(stderr.contains("goes on from there"), turn > 0, "{stderr}");
        let lines: Vec<_> = stdout.lines().collect();
        let [generation, random, uuid, count, clock] = lines[..] else { panic!("{stdout}") };
        assert_eq!(count, "1", "what the others wrote is theirs");
        assert!(
            (before.saturating_sub(1)..=after + 1).contains(&clock.parse().unwrap()),
            "{before} {clock} {after}"
        );
        let new = [generation, random, uuid].map(|what| unique.insert(what.to_owned()));
        assert_eq!(new, [true; 3], "{turn}: {stdout}");
    }
    // What a command says of itself, streams and names.
    for (command, code) in [(&["/nowhere"][..], 127), (&["/etc"], 126), (&["sh", "-c", "kill -9 $$"], 137)] {
        assert_eq!(place.output(&[], command).status.code(), Some(code), "{command:?}");
    }
    let names = ["--hostname", "other", "--machine-id", "-e", "NAME=a b", "-w", "/tmp"];
    let told = place.told(&names, "hostname; cat /etc/machine-id; echo $NAME; pwd");
    let lines: Vec<_> = told.lines().collect();
    assert!(matches!(lines[..], ["other", id, "a b", "/tmp"] if id.len() == 32), "{told}");
    assert!(place.told(&["-t"], "tty; stty size").contains("/dev/pts/"));

    let mut cat =
        place.run(&["-i"], &["sh", "-c", "wc -c; echo done"]).stdin(Stdio::piped()).spawn().unwrap();
    let data = vec![b'x'; 1 << 20];
    cat.stdin.take().unwrap().write_all(&data).unwrap();
    let output = cat.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"1048576\ndone\n"[..]),
        "{}",
        said(&output)
    );

    let trap = "trap 'echo heard; exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let mut waits = place.run(&[], &["sh", "-c", trap]).stdin(Stdio::null()).spawn().unwrap();
    assert_eq!(line(&mut waits), "up\n");
    // SAFETY: kill takes numbers only, and the child has not been waited for.
    unsafe { libc::kill(waits.id() as libc::pid_t, libc::SIGTERM) };
    let mut rest = String::new();
    waits.stdout.as_mut().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), waits.wait().unwrap().code()), ("heard\n", Some(9)));

    // A guest that ends takes its command along.
    let output = place.output(&[], &["sh", "-c", "poweroff -f; sleep 60"]);
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    assert!(said(&output).contains("powered off before the command had ended"), "{}", said(&output));
}

#[test]
fn a_guest_without_an_agent_says_by_its_init_that_it_is_ready() {
    if !available("a_guest_without_an_agent_says_by_its_init_that_it_is_ready") {
        return;
    }
    let place = Place::new();
    let run = |log: &str| {
        let cmdline = "console=hvc0 quiet panic=-1 vmm.ready=0x80 vmm.run=\"echo up-$((6 * 7))\"";
        let mut command = bare(Kernel::TunedPvh, cmdline);
        command.arg("--initrd").arg(Kernel::TunedPvh.initramfs());
        command.args(["--template", "--boot-marks", "--mem", "128M", "-v"]);
        place.set_up(&mut command);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(said(&output).contains(log), "{log}: {}", said(&output));
        stdout.into_owned()
    };
    // The mark comes when the command is about to: by the time that the guest is saved it may have spoken.
    assert!(run(": made").contains("up-42"));
    let _ = run("the guest goes on from there");
}

#[test]
fn a_template_has_its_disk_anew_each_time_and_its_image_is_left_alone() {
    if !available("a_template_has_its_disk_anew_each_time_and_its_image_is_left_alone") {
        return;
    }
    let place = Place::new();
    fs::write(place.path("disk"), vec![b'a'; 1 << 20]).unwrap();
    let disk = format!("path={}", place.path("disk").display());
    let options = ["--disk", &disk, "--net", "user", "--rng", "--transport", "pci", "--cpus", "2", "-v"];
    let script = "head -c 4 /dev/vda; printf other | dd of=/dev/vda conv=notrunc 2>/dev/null; sync; \
                  head -c 5 /dev/vda; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; \
                  ping -c 1 -W 10 10.0.2.2 >/dev/null; nproc";
    // Two first ones at once: one boots.
    let [one, two] = [(); 2].map(|()| place.run(&options, &["sh", "-c", script]).spawn().unwrap());
    let outputs = [one, two].map(|child| child.wait_with_output().unwrap());
    for output in &outputs {
        assert_eq!(String::from_utf8_lossy(&output.stdout), "aaaaother2\n", "{}", said(output));
    }
    let restored = outputs.iter().filter(|output| said(output).contains("goes on from there")).count();
    assert_eq!(restored, 1, "{}{}", said(&outputs[0]), said(&outputs[1]));
    assert_eq!(fs::read(place.path("disk")).unwrap(), vec![b'a'; 1 << 20]);
    fs::write(place.path("disk"), vec![b'b'; 1 << 20]).unwrap();
    let output = place.output(&options, &["sh", "-c", script]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "bbbbother2\n", "{}", said(&output));
    assert!(
        said(&output).contains("is stale") && said(&output).contains("disk changed"),
        "{}",
        said(&output)
    );
}

#[test]
fn a_machine_in_the_background_begins_from_its_template_too() {
    if !available("a_machine_in_the_background_begins_from_its_template_too") {
        return;
    }
    let place = Place::new();
    let start = |name: &str| {
        let mut run = place.run(&["-d", "--rm", "--vsock", "--name", name], &[]);
        let output = run.env("XDG_STATE_HOME", place.path("state")).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    };
    let exec = |name: &str, script: &str| {
        let output = place.vmm(&["exec", "--timeout", "240", name, "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    start("one");
    exec("one", "true");
    while place.vmm(&["template", "list", "--json"]).stdout.len() < 10 {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    start("two");
    // Told by its agent that it is a copy, while it runs on.
    let generation =
        exec("two", "until [ -s /run/vmm/generation ]; do sleep 0.1; done; cat /run/vmm/generation");
    assert_eq!(generation.trim_end().len(), 32);
    exec("one", "echo mine >/tmp/mine");
    exec("two", "[ ! -e /tmp/mine ]");
    let output = place.vmm(&["kill", "one", "two"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
}
