//! Where a test's commands run, and how they are judged.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

pub const BAD_ARGUMENT: i32 = 2;
pub const HOST: i32 = 4;
pub const GUEST_CRASH: i32 = 6;
pub const KILLED: i32 = 10;
/// The sandbox has refused a call of the monitor's.
pub const REFUSED: i32 = 16;
/// A command in a guest was not run.
pub const NOT_RUN: i32 = 125;
pub const GUEST_PANIC: i32 = 14;

/// No command takes longer than this, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A directory with everything that a test's commands see, the runtime directory included.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::set_permissions(dir.path().join("run"), fs::Permissions::from_mode(0o700)).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// The program with `arguments`, split at blanks, in this place.
    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(crate::PROGRAM);
        command.args(arguments.split_whitespace());
        self.set_up(&mut command);
        command
    }

    /// Gives all that is here, a copy of the program and a node of KVM to another user than root, and makes that user's commands. None,
    /// with words why, where `test` cannot do that.
    pub fn give_to_nobody(&self, test: &str) -> Option<impl Fn(&str) -> Command + '_> {
        const NOBODY: u32 = 65534;
        // A node and a program of its own: those that there are may be closed to it.
        let device = fs::metadata("/dev/kvm").unwrap().rdev();
        let node = mknodat(CWD, self.path("kvm"), FileType::CharacterDevice, Mode::from(0o666), device);
        fs::copy(crate::PROGRAM, self.path("vmm")).unwrap();
        let all = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut all = all.chain([self.path("")]);
        if node.is_err() || !all.all(|path| chown(path, Some(NOBODY), Some(NOBODY)).is_ok()) {
            eprintln!("SKIP: {test}: needs root, to be another user");
            return None;
        }
        if File::options().read(true).write(true).open(self.path("kvm")).is_err() {
            eprintln!("SKIP: {test}: needs a file system that has devices for temporary files");
            return None;
        }
        Some(move |arguments: &str| {
            let mut command = Command::new(self.path("vmm"));
            command.args(arguments.split_whitespace());
            self.set_up(&mut command);
            command.env("VMM_KVM", self.path("kvm")).uid(NOBODY).gid(NOBODY);
            command
        })
    }

    pub fn set_up(&self, command: &mut Command) {
        command.current_dir(self.dir.path()).env("XDG_RUNTIME_DIR", self.path("run"));
        command.env("XDG_STATE_HOME", self.path("state")).env("XDG_CACHE_HOME", self.path("cache"));
        command.env_remove("RUST_LOG").env_remove("VMM_KVM");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    pub fn vmm(&self, arguments: &str) -> Output {
        finish(self.command(arguments).spawn().unwrap())
    }

    /// What a command says that succeeds.
    #[track_caller]
    pub fn done(&self, arguments: &str) -> String {
        let output = self.vmm(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// What is said of a command that fails with `code`.
    #[track_caller]
    pub fn fails(&self, arguments: &str, code: i32) -> String {
        let output = self.vmm(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments}: {}", text(&output.stdout));
        text(&output.stderr)
    }

    /// Starts a guest that stands still, called `name`, and waits until its vCPU runs.
    pub fn start(&self, name: &str, arguments: &str) -> Running {
        let command = self.command(&format!("--kernel halt --console off --name {name} {arguments}"));
        let running = Running::new(command);
        self.await_running(name);
        running
    }

    pub fn await_running(&self, name: &str) {
        until(name, || self.status(name)["state"] == "running");
    }

    /// What `vmm status` says of `name`; null if there is none.
    pub fn status(&self, name: &str) -> Value {
        serde_json::from_slice(&self.vmm(&format!("status {name} --json")).stdout).unwrap_or_default()
    }

    /// Every file, with its kind, mode, size, time of change and content. Not the directory of control sockets, which stays; what
    /// is in it.
    pub fn contents(&self) -> BTreeMap<PathBuf, String> {
        let mut all = BTreeMap::new();
        let mut dirs = vec![self.dir.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                let kind = meta.file_type();
                let content = if kind.is_file() && meta.len() < 1 << 20 {
                    fs::read(&path).unwrap_or_default()
                } else {
                    Vec::new()
                };
                let socket = kind.is_socket();
                let facts = (meta.mode(), meta.len(), meta.mtime(), meta.mtime_nsec(), socket, content);
                if kind.is_dir() {
                    dirs.push(path.clone());
                    // A socket that came and went leaves its mark on the directory's time; nothing else may.
                    if path != self.path("run/vmm") {
                        all.insert(path, format!("{:o}", meta.mode()));
                    }
                } else {
                    all.insert(path, format!("{facts:?}"));
                }
            }
        }
        all
    }
}

/// A command that runs while the test goes on, and is killed when the test is over.
pub struct Running(Option<Child>);

impl Running {
    pub fn new(mut command: Command) -> Self {
        Self(Some(command.spawn().unwrap()))
    }

    pub fn pid(&self) -> i32 {
        self.0.as_ref().unwrap().id() as i32
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// The process, for what it is asked while it runs.
    pub fn child(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }

    pub fn finish(mut self) -> Output {
        finish(self.0.take().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until `what` is there.
#[track_caller]
pub fn until(what: &str, there: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < deadline, "{what} does not come");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for the end, within reason.
#[track_caller]
pub fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status,
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                panic!("vmm hangs");
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// The same, and what it said.
pub fn finish(mut child: Child) -> Output {
    let pipes = [
        child.stdout.take().map(|p| Box::new(p) as Box<dyn Read + Send>),
        child.stderr.take().map(|p| Box::new(p) as Box<dyn Read + Send>),
    ];
    let readers = pipes.map(|pipe| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            bytes
        })
    });
    let status = wait(&mut child);
    let [stdout, stderr] = readers.map(|reader| reader.join().unwrap());
    Output { status, stdout, stderr }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One row of the table: runs `command` and checks that it fails as a failure should. `words` must be in the error.
#[track_caller]
pub fn refused_command(place: &Place, mut command: Command, code: i32, words: &[&str]) {
    let before = place.contents();
    let output = finish(command.spawn().unwrap());
    let stderr = text(&output.stderr);
    let case = format!("{command:?}\n{stderr}");
    assert_eq!(output.status.code(), Some(code), "{case}");
    assert!(output.stdout.is_empty(), "{case}{}", text(&output.stdout));
    let lines: Vec<_> = stderr.lines().collect();
    let [error, hint] = lines[..] else { panic!("not one error and one hint: {case}") };
    assert!(error.starts_with("vmm: error: ") && hint.starts_with("hint: "), "{case}");
    for word in words {
        assert!(error.contains(word), "no {word:?} in: {case}");
    }
    assert!(!stderr.contains("panicked at") && !stderr.contains("src/"), "{case}");
    let after = place.contents();
    assert!(before == after, "something was created or changed by {case}\n{before:#?}\n{after:#?}");
}

#[track_caller]
pub fn refused(place: &Place, arguments: &str, code: i32, words: &[&str]) {
    refused_command(place, place.command(arguments), code, words);
}

/// There is a KVM to run guests on. Says so where not.
pub fn has_kvm(test: &str) -> bool {
    let open = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &open {
        eprintln!("SKIP: {test}: needs /dev/kvm: {error}");
    }
    open.is_ok()
}

/// The values of the lines of /proc/PID/task/TID/status that begin with these `words`, of each thread, with its name.
pub fn threads(pid: i32, words: &[&str]) -> Vec<(String, Vec<String>)> {
    let task = |task: fs::DirEntry| {
        // One that is gone by now has none.
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let value = |word: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(word)).unwrap_or_default();
            line.trim().to_owned()
        };
        Some((value("Name:"), words.iter().map(|word| value(word)).collect()))
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter_map(|entry| task(entry.unwrap())).collect()
}
