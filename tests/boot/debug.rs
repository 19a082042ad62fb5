//! Linux, stepped and under gdb. Breakpoints are not tried: emulated machines have none that work.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Pid;

use crate::guest::{Guest, Kernel, available, bare, vmm};

#[test]
fn the_first_instructions_of_linux_lead_to_long_mode() {
    if !available("single steps") {
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(["trace", "--step", "--count", "60", "--"]);
    command.args(bare(Kernel::TunedPvh, "console=hvc0").get_args()).args([
        "--mem",
        "256M",
        "--console",
        "off",
    ]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(told.lines().count(), 60, "{told}");
    let mut modes: Vec<_> = told.lines().map(|line| line.split('|').nth(1).unwrap().trim()).collect();
    modes.dedup();
    assert_eq!(modes, ["protected 32", "compat 32", "long 64"], "{told}");
    assert!(told.lines().next().unwrap().contains("pvh_start_xen "), "symbols, where they run: {told}");
    for change in ["cr4=0x20+PAE", "efer=0x100+LME", "+PG efer=0x500+LMA", "gs.base=0x"] {
        assert!(told.contains(change), "{change}: {told}");
    }
}

/// gdb, told a line at a time.
struct Gdb {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Gdb {
    fn start(kernel: &Path) -> Self {
        let mut command = Command::new("gdb");
        command.args([
            "-q",
            "-nx",
            "-iex",
            "set pagination off",
            "-iex",
            "set confirm off",
            "-ex",
            "set prompt",
        ]);
        command.arg(kernel).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("gdb is there: make tools");
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// What it prints up to the first line that contains `word`, with that.
    #[track_caller]
    fn until(&mut self, word: &str) -> String {
        let mut said = String::new();
        while !said.lines().next_back().is_some_and(|line| line.contains(word)) {
            assert_ne!(self.output.read_line(&mut said).unwrap(), 0, "gdb ended without {word:?}: {said}");
        }
        said
    }

    /// What it answers.
    #[track_caller]
    fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.say("echo that was all\\n");
        self.until("that was all")
    }

    #[track_caller]
    fn interrupt(&mut self) {
        let gdb = Pid::from_child(&self.child);
        rustix::process::kill_process(gdb, rustix::process::Signal::INT).unwrap();
        self.until("received signal SIGINT");
    }
}

#[test]
fn gdb_interrupts_looks_steps_and_leaves() {
    if !available("gdb") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gdb");
    let mut command = vmm(Kernel::TunedPvh, "echo up; read line; echo heard $line");
    command.args(["--mem", "256M", "--cpus", "2"]).stdin(Stdio::piped());
    command.arg("--gdb").arg(format!("unix:{}", socket.display()));
    let mut guest = Guest::start(command);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "no socket");
        thread::sleep(Duration::from_millis(20));
    }
    let mut gdb = Gdb::start(&Kernel::TunedPvh.file());
    gdb.ask(&format!("target remote {}", socket.display()));
    let at = gdb.ask("x/i $pc");
    assert!(at.contains("=> 0x1000500:"), "{at}");
    gdb.say("continue");
    guest.wait_for("up", 1);
    gdb.interrupt();
    // It waits for a line, and may still be at something else, or be at something again.
    let deadline = Instant::now() + guest.patience;
    let idle = loop {
        let threads = gdb.ask("thread apply all bt");
        if threads.matches(" in default_idle_call ()").count() == 2 {
            break threads;
        }
        assert!(Instant::now() < deadline, "never idle: {threads}");
        gdb.say("continue");
        gdb.until("Continuing.");
        thread::sleep(Duration::from_millis(100));
        gdb.interrupt();
    };
    for words in ["(vcpu0: halted)", "(vcpu1: halted)", "#0  0xffffffff8", " in do_idle ()"] {
        assert!(idle.contains(words), "{words}: {idle}");
    }
    for (line, answer) in [
        ("p $cr0", "= [ PE MP ET NE WP AM PG ]"),
        ("p $efer", "= [ SCE LME LMA NXE ]"),
        ("p $gs_base != 0", "= 1"),
        ("x/s (char*)&linux_banner", "Linux version 6."),
        ("stepi", "0xffffffff8"),
        ("stepi", "0xffffffff8"),
        ("x/i $pc", "=> 0xffffffff8"),
        ("thread 2", "Switching to thread 2"),
        ("bt 1", "#0  0xffffffff8"),
        ("detach", "detached"),
    ] {
        let said = gdb.ask(line);
        assert!(said.contains(answer), "{line}: {said}");
    }
    gdb.say("quit");
    assert!(gdb.child.wait().unwrap().success());
    guest.stdin().write_all(b"all well\n").unwrap();
    let ended = guest.finish();
    assert!(ended.code == Some(0) && ended.text.contains("heard all well"), "it runs on: {}", ended.text);
    assert!(!socket.exists(), "the socket is gone");
}
