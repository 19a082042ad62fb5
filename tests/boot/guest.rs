//! A guest under test: `vmm` as a child process, and what it prints.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Nothing here takes longer, on an emulated machine with two processors, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// Where the bundle of `cargo guest bundle` is.
pub fn bundle(name: &str) -> PathBuf {
    let folder = std::env::var_os("VMM_TEST_GUESTS").map_or_else(
        || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("target/guests"),
        PathBuf::from,
    );
    folder.join(name)
}

/// A copy of the bundle's disk `name` in `folder`, for a guest to write to.
pub fn copy_of_disk(name: &str, folder: &Path) -> PathBuf {
    let copy = folder.join("disk");
    let copied = Command::new("cp").arg("--sparse=always").arg(bundle(name)).arg(&copy).status();
    assert!(copied.unwrap().success(), "no {name} to copy: cargo guest bundle --out target/guests makes it");
    copy
}

/// Whether Linux guests can run here. Says so if not, and fails if they must.
pub fn available(test: &str) -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let hardware = info.split_whitespace().any(|word| word == "svm" || word == "vmx");
    let missing = if !hardware || !Path::new("/dev/kvm").exists() {
        "a KVM that runs Linux (no vmx or svm): run it through `cargo rig`"
    } else if !bundle("tuned-vmlinux").exists() {
        "the guests: cargo guest bundle --out target/guests"
    } else {
        return true;
    };
    assert!(std::env::var_os("VMM_REQUIRE_LINUX_GUESTS").is_none(), "{test}: this machine lacks {missing}");
    eprintln!("SKIP: {test}: this machine lacks {missing}");
    false
}

/// A way to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    Stock,
    TunedBzImage,
    TunedLinux64,
    TunedPvh,
}

impl Kernel {
    pub fn file(self) -> PathBuf {
        bundle(match self {
            Self::Stock => "stock-bzImage",
            Self::TunedBzImage => "tuned-bzImage",
            Self::TunedLinux64 | Self::TunedPvh => "tuned-vmlinux",
        })
    }

    pub fn initramfs(self) -> PathBuf {
        bundle(if self == Self::Stock { "stock.cpio" } else { "tuned.cpio" })
    }

    fn protocol(self) -> &'static str {
        match self {
            Self::TunedLinux64 => "linux64",
            Self::TunedPvh => "pvh",
            Self::Stock | Self::TunedBzImage => "auto",
        }
    }
}

#[derive(Default)]
struct Printed {
    text: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

/// A child process whose standard output is read all the time, and a folder of its own.
pub struct Guest {
    child: Child,
    printed: Arc<Printed>,
    reader: Option<JoinHandle<()>>,
    runtime: PathBuf,
    /// That, if it is its own.
    _dir: Option<tempfile::TempDir>,
    /// How long it may take to what is waited for.
    pub patience: Duration,
}

/// How a guest ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub text: String,
}

/// `vmm` with `kernel`, its initramfs, and a command line that runs `script` in a shell. It takes more arguments.
pub fn vmm(kernel: Kernel, script: &str) -> Command {
    let mut command = bare(kernel, &format!("console=hvc0 quiet panic=-1 vmm.run=\"{script}\""));
    command.arg("--initrd").arg(kernel.initramfs());
    command
}

/// `vmm` with `kernel` and `cmdline`.
pub fn bare(kernel: Kernel, cmdline: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("--kernel").arg(kernel.file()).args(["--boot", kernel.protocol()]);
    command.args(["--cmdline", &ticking(cmdline)]);
    command.stdin(Stdio::null());
    command
}

/// `cmdline` for a Linux that keeps its tick when idle where QEMU emulates AMD-V, which now and then takes an interrupt between
/// STI and HLT (tests/micro.rs counts it): what it woke then runs with the next tick, and else for nobody knows how long not.
pub fn ticking(cmdline: &str) -> String {
    let emulated = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG");
    format!("{}{cmdline}", if emulated { "nohz=off " } else { "" })
}

impl Guest {
    pub fn start(command: Command) -> Self {
        let mut guest = Self::start_unread(command);
        guest.read();
        guest
    }

    /// Like [`Guest::start`], with a runtime directory that it shares with others.
    pub fn start_in(command: Command, runtime: &Path) -> Self {
        let mut guest = Self::spawn(command, Some(runtime));
        guest.read();
        guest
    }

    /// Like [`Guest::start`], but nobody reads yet.
    pub fn start_unread(command: Command) -> Self {
        Self::spawn(command, None)
    }

    fn spawn(mut command: Command, runtime: Option<&Path>) -> Self {
        let dir = runtime.is_none().then(|| tempfile::tempdir().unwrap());
        let runtime = dir.as_ref().map_or(runtime, |dir| Some(dir.path())).expect("one of them").to_owned();
        command.env("XDG_RUNTIME_DIR", &runtime).stdout(Stdio::piped());
        let child = command.spawn().unwrap();
        Self { child, printed: Arc::default(), reader: None, runtime, _dir: dir, patience: PATIENCE }
    }

    pub fn read(&mut self) {
        let mut stdout = self.child.stdout.take().expect("read once");
        let printed = self.printed.clone();
        self.reader = Some(thread::spawn(move || {
            let mut buf = [0; 65536];
            loop {
                let len = stdout.read(&mut buf).unwrap_or(0);
                let mut text = printed.text.lock().unwrap();
                text.0.extend_from_slice(&buf[..len]);
                text.1 = len == 0;
                printed.more.notify_all();
                if len == 0 {
                    return;
                }
            }
        }));
    }

    /// What the guest's console takes, where `command` had it piped.
    pub fn stdin(&mut self) -> &mut ChildStdin {
        self.child.stdin.as_mut().expect("piped")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.printed.text.lock().unwrap().0).into_owned()
    }

    /// Waits until the guest has printed `what` for the `times`th time.
    pub fn wait_for(&self, what: &str, times: usize) {
        let deadline = Instant::now() + self.patience;
        let mut text = self.printed.text.lock().unwrap();
        while String::from_utf8_lossy(&text.0).matches(what).count() < times {
            let now = Instant::now();
            if now >= deadline || text.1 {
                let state = if text.1 { "it has ended".to_owned() } else { self.state() };
                panic!("no {what:?} in:\n{}\n{state}", String::from_utf8_lossy(&text.0));
            }
            text = self.printed.more.wait_timeout(text, deadline - now).unwrap().0;
        }
    }

    /// Where the sockets of its monitor are.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Another `vmm` command about this guest.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.args(arguments).env("XDG_RUNTIME_DIR", &self.runtime);
        command
    }

    /// The same, to its end: exit code and standard output.
    pub fn control(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.command(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: kill takes numbers only, and the child has not been waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }

    /// What the guest's exits are, what its vCPUs wait for, and what the monitor's threads do: name, state and times, where they
    /// wait in the kernel; now and a second later.
    pub fn state(&self) -> String {
        let mut told = format!("what it does:\n{}", self.control(&["top", "--once"]).1);
        let list: serde_json::Value =
            serde_json::from_str(&self.control(&["list", "--json"]).1).unwrap_or_default();
        for _ in 0..2 {
            let machines = list.as_array().into_iter().flatten();
            let name =
                machines.filter(|machine| machine["pid"] == self.pid()).find_map(|it| it["name"].as_str());
            told += &self.control(&["status", name.unwrap_or_default(), "--vcpus"]).1;
        }
        for _ in 0..2 {
            for task in
                std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten()
            {
                for file in ["comm", "stat", "syscall", "stack"] {
                    told += &std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
                }
            }
            thread::sleep(Duration::from_secs(1));
        }
        told
    }

    /// Waits for the end of the process.
    pub fn finish(mut self) -> Ended {
        let deadline = Instant::now() + self.patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let (text, state) = (self.text(), self.state());
                let _ = self.child.kill();
                panic!("it does not end; printed so far:\n{text}\n{state}");
            }
            thread::sleep(Duration::from_millis(10));
        };
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        Ended { code: status.code(), text: self.text() }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// What the guest printed between the lines `BEGIN` and `END`, of a run that ended well.
    pub fn body(&self) -> Vec<&str> {
        assert_eq!(self.code, Some(0), "{}", self.text);
        let lines = self.text.lines().map(|line| line.trim_end_matches('\r'));
        lines.skip_while(|line| *line != "BEGIN").skip(1).take_while(|line| *line != "END").collect()
    }
}

/// Runs `script` in `kernel` with `arguments`, to the end.
pub fn run(kernel: Kernel, arguments: &[&str], script: &str) -> Ended {
    let mut command = vmm(kernel, script);
    command.args(arguments);
    Guest::start(command).finish()
}
