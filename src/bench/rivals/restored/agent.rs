//! This program: a command that the agent in a guest runs, whose machine goes on from a template, or has stood ready in a pool.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use cpio::{Archive, Entry};
use serde_json::Value;

use super::super::command::{prepare, version, words};
use super::super::launch::{Found, Launch, Launcher};
use super::super::program::{MARKER, Root, WAIT, image, write};
use super::super::vmm::{kernel, weighed};
use super::super::{Life, RAM_MIB, Setting};
use super::line;
use super::source::LIMIT;
use crate::measure::Absent;

/// Where the command is in the guest.
const COMMAND: &str = "/bench";
/// What the machine of which a pool has copies is called, and the pool.
const NAME: &str = "held";
const POOL: &str = "pool";
/// Between two looks whether a pool is full.
const AGAIN: Duration = Duration::from_millis(10);

/// A machine for each command, from a template.
pub fn template(setting: &Setting, _: &Root) -> Found {
    found("vmm run --template", Way::Template, setting)
}

/// The same from a pool in which as many stand ready as are called for.
pub fn pool(setting: &Setting, _: &Root) -> Found {
    found("vmm pool take", Way::Pool { ready: 0 }, setting)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Template,
    Pool {
        /// So many stand ready; there is no pool yet if that is none.
        ready: usize,
    },
}

struct Commands {
    name: &'static str,
    way: Way,
    program: PathBuf,
    kernel: PathBuf,
    /// The guest's own, with an agent.
    guest: PathBuf,
    /// The same with the command.
    initramfs: PathBuf,
    /// Names, records and templates of this contender.
    own: PathBuf,
    is_prepared: bool,
}

fn found(name: &'static str, way: Way, setting: &Setting) -> Found {
    let (kernel, there) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let own = setting.scratch.join(name.replace([' ', '-'], ""));
    let guest = setting.agent.clone().ok_or_else(|| {
        "no tuned.cpio in the folder that --guests names (make it: cargo guest bundle --only tuned)"
            .to_owned()
    });
    let there = there.and(guest.clone().map(drop));
    let commands = Commands {
        name,
        way,
        program: setting.vmm.clone(),
        kernel,
        guest: guest.unwrap_or_default(),
        initramfs: own.join("agent.cpio"),
        own,
        is_prepared: false,
    };
    match there {
        Ok(()) => Ok(Box::new(commands)),
        Err(why) => Err(Absent { name: name.to_owned(), command: commands.shown(), why }),
    }
}

impl Commands {
    fn vmm(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(&self.program);
        for (variable, folder) in
            [("XDG_RUNTIME_DIR", "run"), ("XDG_STATE_HOME", "state"), ("XDG_CACHE_HOME", "cache")]
        {
            command.env(variable, self.own.join(folder));
        }
        command.args(arguments);
        command
    }

    fn say<const N: usize>(&self, arguments: [&str; N]) -> Result<String, String> {
        prepare(self.vmm(&words(arguments)))
    }

    /// The machine, as `run` is told.
    fn machine(&self) -> Vec<String> {
        let memory = format!("{RAM_MIB}M");
        let (kernel, initramfs) = (self.kernel.to_string_lossy(), self.initramfs.to_string_lossy());
        let mut machine = words(["--kernel", &kernel, "--initrd", &initramfs, "--mem", &memory]);
        machine.extend(words(["--cmdline", "console=hvc0 quiet panic=-1"]));
        machine
    }

    fn arguments(&self, life: Life) -> Vec<String> {
        let mut arguments = match self.way {
            Way::Template => [words(["run", "--template"]), self.machine(), weighed(life)].concat(),
            Way::Pool { .. } => words(["pool", "take", POOL]),
        };
        arguments.extend(words(["--", COMMAND]));
        arguments.extend((life == Life::Idle).then(|| WAIT.to_owned()));
        arguments
    }

    /// Folders, and an initramfs with the command in it: the kernel unpacks one archive over the other.
    fn prepare(&mut self) -> Result<(), String> {
        if self.is_prepared {
            return Ok(());
        }
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(self.own.join("run"));
        made.map_err(|error| format!("make {}: {error}", self.own.display()))?;
        let mut bytes =
            fs::read(&self.guest).map_err(|error| format!("read {}: {error}", self.guest.display()))?;
        let mut archive = Archive::new();
        let path = COMMAND.trim_start_matches('/');
        let added = archive.add(path, Entry::File { mode: 0o755, data: image()? });
        added.map_err(|error| error.to_string())?;
        archive.write(&mut bytes).map_err(|error| error.to_string())?;
        write(&self.initramfs, &bytes)?;
        match self.way {
            // The first makes the template, one for each life.
            Way::Template => {
                for life in [Life::Once, Life::Idle] {
                    let machine = [words(["run", "--template"]), self.machine(), weighed(life)].concat();
                    prepare(self.vmm(&[machine, words(["--", COMMAND])].concat()))?;
                }
            }
            Way::Pool { .. } => {
                let start = words(["run", "-d", "--vsock", "--name", NAME, "--console", "file=/dev/null"]);
                prepare(self.vmm(&[start, self.machine()].concat()))?;
                self.say(["exec", "--timeout", "60", NAME, "true"])?;
            }
        }
        self.is_prepared = true;
        Ok(())
    }

    /// Waits until `count` stand ready, in a pool of so many.
    fn fill(&mut self, count: usize) -> Result<(), String> {
        let Way::Pool { ready } = self.way else { return Ok(()) };
        if ready != count {
            if ready > 0 {
                self.say(["pool", "stop", POOL])?;
            }
            self.say(["pool", "start", POOL, NAME, "--size", &count.to_string()])?;
            self.way = Way::Pool { ready: count };
        }
        let deadline = Instant::now() + LIMIT;
        loop {
            let pools: Value = serde_json::from_str(&self.say(["pool", "list", "--json"])?)
                .map_err(|error| format!("vmm pool list: {error}"))?;
            if pools[0]["ready"] == pools[0]["size"] {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("the pool is not full: {}", pools[0]));
            }
            std::thread::sleep(AGAIN);
        }
    }
}

impl Launcher for Commands {
    fn name(&self) -> &str {
        self.name
    }

    fn shown(&self) -> String {
        line(&self.program, &self.arguments(Life::Once))
    }

    fn version(&self) -> Option<String> {
        version(&self.program, &["--version"])
    }

    fn launches(&mut self, life: Life, count: usize) -> Result<Vec<Launch>, String> {
        self.prepare()?;
        self.fill(count)?;
        let arguments = self.arguments(life);
        Ok((0..count).map(|_| Launch::of(self.vmm(&arguments))).collect())
    }

    fn marks(&self) -> Vec<&[u8]> {
        vec![MARKER]
    }

    fn runs_a_command(&self) -> bool {
        true
    }

    fn good_status(&self) -> i32 {
        0
    }

    fn limit(&self) -> Duration {
        LIMIT
    }

    /// The machines of a pool are no processes of who takes them.
    fn is_weighed(&self) -> bool {
        self.way == Way::Template
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        // Also of what was begun alone.
        if matches!(self.way, Way::Pool { .. }) && self.own.join("run").exists() {
            let _ = self.say(["pool", "stop", POOL]);
            let _ = self.say(["kill", NAME]);
        }
    }
}
