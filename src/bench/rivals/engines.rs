//! The engines above the runtimes: podman, docker, containerd's ctr. Their images are made of the same root file system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::command::{found, prepare, words};
use super::container::{Container, Maker, remove};
use super::program::{INIT, Root, WAIT};
use super::{Found, Life, Setting};

/// The name of the image.
const IMAGE: &str = "vmm-bench";

/// An engine, its image in place.
struct Engine {
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
    Container::made("podman", program, Engine::new(options, run), |engine, program| {
        there?;
        fs::create_dir_all(&store).map_err(|error| format!("make {}: {error}", store.display()))?;
        if rustix::process::geteuid().is_root() {
            mount("tmpfs", &store, "tmpfs", MountFlags::empty(), None)
                .map_err(|error| format!("mount a tmpfs on {}: {error}", store.display()))?;
            engine.mounted = Some(store.clone());
        }
        engine.import(program, root, &words(["import", "--quiet", "-", IMAGE]))?;
        engine.tidy = Some(words(["rm", "--all", "--force"]));
        Ok(())
    })
}

/// docker, if its daemon answers.
pub fn docker(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "docker");
    let run = words(["--rm", "--network", "none", "--log-driver", "none", "--read-only"]);
    Container::made("docker", program, Engine::new(Vec::new(), run), |engine, program| {
        there?;
        answers(program, &["version", "--format", "{{.Server.Version}}"])?;
        engine.undo = Some(words(["rmi", "--force", IMAGE]));
        engine.import(program, root, &words(["import", "-", IMAGE]))
    })
}

/// containerd by its own client, which takes the root file system as a folder.
pub fn ctr(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "ctr");
    let mut engine = Engine::new(Vec::new(), words(["--rm", "--read-only", "--rootfs"]));
    engine.image = root.folder.to_string_lossy().into_owned();
    engine.named = true;
    Container::made("ctr", program, engine, |_, program| {
        there?;
        answers(program, &["version"])
    })
}

/// Asks the daemon, before anything is made.
fn answers(program: &Path, arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new(program);
    command.args(arguments);
    prepare(command).map(drop)
}

impl Engine {
    fn new(options: Vec<String>, run: Vec<String>) -> Self {
        let image = IMAGE.to_owned();
        Self { options, run, image, named: false, tidy: None, undo: None, mounted: None }
    }

    fn with_options(&self, arguments: &[String]) -> Vec<String> {
        [&self.options, arguments].concat()
    }

    /// Makes the image of a tar archive of the root file system.
    fn import(&self, program: &Path, root: &Root, arguments: &[String]) -> Result<(), String> {
        let failed = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&root.folder).args(["-c", "."]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut tar = tar.spawn().map_err(|error| failed("start tar", error))?;
        let archive = tar.stdout.take().ok_or("no pipe")?;
        let output = Command::new(program).args(self.with_options(arguments)).stdin(archive).output();
        let packed = tar.wait().map_err(|error| failed("wait for tar", error))?;
        let output = output.map_err(|error| failed(&format!("start {}", program.display()), error))?;
        if packed.success() && output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(format!("make an image by {} import: {}: {said}", program.display(), output.status))
    }
}

impl Maker for Engine {
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

    fn tidy(&self) -> Vec<Vec<String>> {
        self.tidy.iter().map(|arguments| self.with_options(arguments)).collect()
    }

    fn undo(&self, program: &Path) {
        if let Some(arguments) = &self.undo {
            remove(program, &self.with_options(arguments));
        }
        if let Some(mounted) = &self.mounted {
            unmount_all(mounted);
        }
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(60)
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
