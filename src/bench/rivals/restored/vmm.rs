//! This program: `vmm restore`, a process for each machine, and `vmm fork`, one command for all.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::super::command::words;
use super::super::launch::{Found as FoundLauncher, Launch, Output};
use super::super::program::{Ending, HOLD, Root};
use super::super::vmm::{cmdline, end, weighed};
use super::super::{Found, Life, RAM_MIB, Setting};
use super::source::Source;
use super::{Guest, Monitor, Restored, launcher, line, rival};
use crate::measure::Absent;

/// Restored: the small kernel with its first program, as a rival of cold boots.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    rival(restored("vmm, restored", setting, Guest::linux(setting, root), Way::Restore))
}

/// The same without Linux.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    let guest = Guest::bare(setting, Ending::DebugExit);
    rival(restored("vmm, restored, no Linux", setting, guest, Way::Restore))
}

/// `vmm restore` of a Linux.
pub fn restore_linux(setting: &Setting, root: &Root) -> FoundLauncher {
    launcher(restored("vmm restore", setting, Guest::linux(setting, root), Way::Restore))
}

/// `vmm restore` without one.
pub fn restore_bare(setting: &Setting, _: &Root) -> FoundLauncher {
    let guest = Guest::bare(setting, Ending::DebugExit);
    launcher(restored("vmm restore, no Linux", setting, guest, Way::Restore))
}

/// `vmm fork` of a Linux.
pub fn fork_linux(setting: &Setting, root: &Root) -> FoundLauncher {
    launcher(restored("vmm fork", setting, Guest::linux(setting, root), Way::Fork))
}

/// `vmm fork` without one.
pub fn fork_bare(setting: &Setting, _: &Root) -> FoundLauncher {
    let guest = Guest::bare(setting, Ending::DebugExit);
    launcher(restored("vmm fork, no Linux", setting, guest, Way::Fork))
}

fn restored(
    name: &'static str,
    setting: &Setting,
    (guest, there): (Guest, Result<(), String>),
    way: Way,
) -> Result<Restored<Vmm>, Absent> {
    let console = if matches!(guest, Guest::Linux { .. }) { "--console" } else { "--serial" };
    let own = setting.scratch.join(name.replace([' ', ','], ""));
    let vmm = Vmm { program: setting.vmm.clone(), own, console, way };
    Restored::found(name, &setting.vmm, vmm, (guest, there), setting)
}

/// Which command goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Restore,
    Fork,
}

struct Vmm {
    program: PathBuf,
    /// What this contender has for itself: names, records, the pipe for what all say.
    own: PathBuf,
    /// The option for where its guest speaks.
    console: &'static str,
    way: Way,
}

impl Vmm {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env("XDG_RUNTIME_DIR", self.own.join("run")).env("XDG_STATE_HOME", self.own.join("state"));
        command
    }

    fn arguments(&self, life: Life, folder: &Path, count: usize) -> Vec<String> {
        let folder = folder.to_string_lossy();
        let mut arguments = match self.way {
            Way::Restore => words(["restore", &folder]),
            Way::Fork => {
                let speak = format!("file={}", self.pipe().display());
                words(["fork", &folder, "--count", &count.to_string(), self.console, &speak])
            }
        };
        arguments.extend(weighed(life));
        arguments
    }

    fn pipe(&self) -> PathBuf {
        self.own.join("said")
    }

    /// A pipe with a name, which is never at its end.
    fn open_pipe(&self) -> Result<OwnedFd, String> {
        let path = self.pipe();
        let failed = |what: &str, error: rustix::io::Errno| format!("{what} {}: {error}", path.display());
        // What others of an earlier sample may still have to say is not for this one.
        let _ = fs::remove_file(&path);
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .map_err(|error| failed("make", error))?;
        rustix::fs::open(&path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| failed("open", error))
    }

    /// Folders of its own, without what earlier samples have left in them.
    fn clear(&self) -> Result<(), String> {
        let _ = fs::remove_dir_all(self.own.join("state"));
        let mut folders = fs::DirBuilder::new();
        let made = folders.recursive(true).mode(0o700).create(self.own.join("run"));
        made.map_err(|error| format!("make {}: {error}", self.own.display()))
    }
}

impl Monitor for Vmm {
    const MEMORY: &'static str = "memory";

    fn save(&self, guest: &Guest, life: Life, folder: &Path) -> Result<(), String> {
        self.clear()?;
        let kernel = guest.kernel(life)?;
        let mut command = self.command();
        command.args(["--kernel", &kernel, "--name", "held", "--mem", &format!("{RAM_MIB}M")]);
        match guest {
            Guest::Bare { .. } => command.args(["--console", "off", "--serial", "stdio", "--debug-exit"]),
            Guest::Linux { initramfs, .. } => {
                let words = cmdline("console=hvc0", 't', &format!("{HOLD}{}", end(life)));
                command.arg("--initrd").arg(initramfs).args(["--cmdline", &words])
            }
        };
        let _source = Source::start(command, guest.held())?;
        // It makes the folder itself.
        fs::remove_dir(folder).map_err(|error| format!("remove {}: {error}", folder.display()))?;
        let mut create = self.command();
        create.args(["snapshot", "create", "--stop", "held"]).arg(folder).stdin(Stdio::null());
        super::super::command::prepare(create).map(drop)
    }

    fn launches(&self, life: Life, folder: &Path, count: usize) -> Result<Vec<Launch>, String> {
        self.clear()?;
        let arguments = self.arguments(life, folder, count);
        let command = || {
            let mut command = self.command();
            command.args(&arguments);
            command
        };
        Ok(match self.way {
            Way::Restore => (0..count).map(|_| Launch::of(command())).collect(),
            Way::Fork => {
                let output = Output::Shared { pipe: self.open_pipe()?, machines: count };
                vec![Launch { output, ..Launch::of(command()) }]
            }
        })
    }

    fn shown(&self, folder: &Path) -> String {
        line(&self.program, &self.arguments(Life::Once, folder, 1))
    }
}
