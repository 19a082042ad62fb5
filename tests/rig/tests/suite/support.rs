//! Runs the `rig` program for tests, and says whether its machine can be had here.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use tempfile::TempDir;

/// How a run of `rig` ended.
#[derive(PartialEq, Eq)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub code: i32,
}

impl Output {
    pub fn new(stdout: &str, stderr: &str, code: i32) -> Output {
        Output { stdout: stdout.into(), stderr: stderr.into(), code }
    }

    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = String::from_utf8_lossy(&self.stdout);
        write!(f, "code {}, {text:?}, {:?}", self.code, self.errors())
    }
}

/// A run of `rig` that is to come.
pub struct Rig(pub Command);

/// `rig` with these arguments, in the machine, quiet.
pub fn rig(arguments: &[&str]) -> Rig {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rig"));
    command.env("RIG_WHERE", "rig").env("RIG_QUIET", "1");
    command.args(arguments).stdin(Stdio::null());
    Rig(command)
}

impl Rig {
    pub fn run(mut self) -> Output {
        let output = self.0.output().unwrap();
        Output { stdout: output.stdout, stderr: output.stderr, code: output.status.code().unwrap() }
    }
}

/// Whether the machine can be had; if not, says that the test `name` is skipped, and fails it
/// where nothing may be skipped.
pub fn available(name: &str) -> bool {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        let output = rig(&["--", "true"]).run();
        (output.code != 0).then(|| output.errors())
    });
    let Some(text) = missing else {
        return true;
    };
    let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
    assert!(!ci, "{name}: the rig's machine cannot be had: {text}");
    eprintln!("SKIP: {name}: the rig's machine cannot be had: {text}");
    false
}

/// Runs the test `inside::NAME` of this test program in the machine.
pub fn run_inside(name: &str) {
    if !available(name) {
        return;
    }
    let program = std::env::current_exe().unwrap();
    let test = format!("inside::{name}");
    let program = program.to_str().unwrap();
    let output = rig(&["--", program, "--ignored", "--exact", &test]).run();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.code, 0, "{text}{}", output.errors());
    assert!(text.contains("1 passed"), "{text}");
}

/// A new cache folder that shares only the kernel with the user's. The machine must have run.
pub fn rig_in_cache() -> TempDir {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(&variable("HOME").unwrap()).join(".cache"));
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("vmm/rig");
    std::fs::create_dir_all(&cache).unwrap();
    for entry in std::fs::read_dir(base.join("vmm/rig")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name().to_string_lossy().starts_with("kernel-") {
            std::os::unix::fs::symlink(entry.path(), cache.join(entry.file_name())).unwrap();
        }
    }
    folder
}
