//! The engines above the runtimes: podman, docker, containerd's ctr. Their images are made of the same root file system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::command::{found, prepare, shown, version, words};
use super::program::{INIT, Root, WAIT};
use super::{Found, Life, Rival, Setting};
use crate::bench::measure::Absent;

/// The name of the image, and the prefix of what is named beside it.
const IMAGE: &str = "vmm-bench";

/// An engine, its image in place.
struct Engine {
    name: &'static str,
    program: PathBuf,
    /// Before the word `run`.
    options: Vec<String>,
    /// Between `run` and the image.
    run: Vec<String>,
    /// The image, or the root file system in its place; with a name for each container if it wants one.
    image: String,
    named: bool,
    /// What removes its containers, where it knows of no others.
    tidy: Option<Vec<String>>,
    /// What removes the image.
    undo: Option<Vec<String>>,
    /// A file system of its own.
    mounted: Option<PathBuf>,
    count: usize,
}

/// podman, with a store of its own in memory, which also works where the scratch folder is on a file system that overlays
/// cannot have. The limits are those that it is given here: it asks for more than a container's root may have.
pub fn podman(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "podman");
    let store = setting.scratch.join("podman");
    let place = |name: &str| store.join(name).to_string_lossy().into_owned();
    let mut options =
        words(["--root", &place("root"), "--runroot", &place("run"), "--tmpdir", &place("tmp")]);
    options.extend(words(["--cgroup-manager", "cgroupfs", "--events-backend", "none"]));
    let mut run = words(["--rm", "--network", "none", "--cgroups", "disabled", "--log-driver", "none"]);
    run.extend(words(["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000"]));
    let engine = Engine::new("podman", program, options, run);
    let make = |engine: &mut Engine| {
        there?;
        fs::create_dir_all(&store).map_err(|error| format!("make {}: {error}", store.display()))?;
        if rustix::process::geteuid().is_root() {
            mount("tmpfs", &store, "tmpfs", MountFlags::empty(), None)
                .map_err(|error| format!("mount a tmpfs on {}: {error}", store.display()))?;
            engine.mounted = Some(store.clone());
        }
        engine.import(root, &words(["import", "--quiet", "-", IMAGE]))?;
        engine.tidy = Some(words(["rm", "--all", "--force"]));
        Ok(())
    };
    engine.made(make)
}

/// docker, if its daemon answers.
pub fn docker(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "docker");
    let run = words(["--rm", "--network", "none", "--log-driver", "none", "--read-only"]);
    let engine = Engine::new("docker", program, Vec::new(), run);
    engine.made(|engine| {
        there?;
        engine.answers(&["version", "--format", "{{.Server.Version}}"])?;
        engine.undo = Some(words(["rmi", "--force", IMAGE]));
        engine.import(root, &words(["import", "-", IMAGE]))
    })
}

/// containerd by its own client, which takes the root file system as a folder.
pub fn ctr(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "ctr");
    let mut engine = Engine::new("ctr", program, Vec::new(), words(["--rm", "--read-only", "--rootfs"]));
    engine.image = root.folder.to_string_lossy().into_owned();
    engine.named = true;
    engine.made(|engine| {
        there?;
        engine.answers(&["version"])
    })
}

impl Engine {
    fn new(name: &'static str, program: PathBuf, options: Vec<String>, run: Vec<String>) -> Self {
        let image = IMAGE.to_owned();
        Self {
            name,
            program,
            options,
            run,
            image,
            named: false,
            tidy: None,
            undo: None,
            mounted: None,
            count: 0,
        }
    }

    fn made(mut self, make: impl FnOnce(&mut Self) -> Result<(), String>) -> Found {
        match make(&mut self) {
            Ok(()) => Ok(Box::new(self)),
            Err(why) => Err(Absent { name: self.name.to_owned(), command: self.shown(), why }),
        }
    }

    fn with_options(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.options);
        command
    }

    /// Asks the daemon, before anything is made.
    fn answers(&self, arguments: &[&str]) -> Result<(), String> {
        let mut command = self.with_options();
        command.args(arguments);
        prepare(command).map(drop)
    }

    fn remove(&self, arguments: Option<&[String]>) {
        let Some(arguments) = arguments else { return };
        let mut command = self.with_options();
        command.args(arguments);
        if let Err(why) = prepare(command) {
            log::warn!("something of {} is left: {why}", self.name);
        }
    }

    /// Makes the image of a tar archive of the root file system.
    fn import(&self, root: &Root, arguments: &[String]) -> Result<(), String> {
        let failed = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&root.folder).args(["-c", "."]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut tar = tar.spawn().map_err(|error| failed("start tar", error))?;
        let archive = tar.stdout.take().ok_or("no pipe")?;
        let output = self.with_options().args(arguments).stdin(archive).output();
        let packed = tar.wait().map_err(|error| failed("wait for tar", error))?;
        let output = output.map_err(|error| failed(&format!("start {}", self.program.display()), error))?;
        if packed.success() && output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(format!("make an image by {} import: {}: {said}", self.name, output.status))
    }

    fn arguments(&self, life: Life, name: &str) -> Vec<String> {
        let mut arguments = self.options.clone();
        arguments.push("run".to_owned());
        if life == Life::Idle {
            arguments.push("--detach".to_owned());
        }
        arguments.extend(self.run.iter().cloned());
        arguments.push(self.image.clone());
        if self.named {
            arguments.push(name.to_owned());
        }
        arguments.push(INIT.to_owned());
        if life == Life::Idle {
            arguments.push(WAIT.to_owned());
        }
        arguments
    }
}

impl Rival for Engine {
    fn name(&self) -> &str {
        self.name
    }

    fn shown(&self) -> String {
        shown(self.program.as_os_str(), &self.arguments(Life::Once, "ID"))
    }

    fn version(&self) -> Option<String> {
        version(&self.program, &["--version"])
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        self.count += 1;
        let name = format!("{IMAGE}-{}-{}", std::process::id(), self.count);
        let mut command = Command::new(&self.program);
        command.args(self.arguments(life, &name));
        Ok(command)
    }

    fn detaches(&self) -> bool {
        true
    }

    fn tidy(&mut self) {
        self.remove(self.tidy.as_deref());
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(60)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.tidy();
        self.remove(self.undo.as_deref());
        if let Some(mounted) = &self.mounted {
            unmount_all(mounted);
        }
    }
}

/// Unmounts `folder` and whatever an engine has mounted below it.
fn unmount_all(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|at| Path::new(at).starts_with(folder));
    for at in below.collect::<Vec<_>>().into_iter().rev() {
        if let Err(error) = unmount(at, UnmountFlags::DETACH) {
            log::warn!("{at} is still mounted: {error}");
        }
    }
}
