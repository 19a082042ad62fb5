//! Machines that go on from a snapshot: one file per monitor. The snapshot is made before the first sample, of a guest that has
//! started and waits (`hold`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

mod agent;
mod client;
mod cloud_hypervisor;
mod firecracker;
pub mod hold;
mod qemu;
mod source;
mod vmm;

pub use vmm::{bare_metal, linux};

use super::command::{shown, version};
use super::launch::{Found as FoundLauncher, Launch, Launcher};
use super::program::{self, BARE_HELD, BARE_MARKER, Ending, HELD, MARKER, ON, Root};
use super::{Found, Life, Rival, Setting, oci};
use crate::measure::Absent;

/// What the guest without Linux has written to before it is saved.
const TOUCHED_MIB: u32 = 24;

/// All that bring up many at once, by the command that runs in them or without one.
pub fn all(setting: &Setting, root: &Root) -> Vec<FoundLauncher> {
    let makers: [fn(&Setting, &Root) -> FoundLauncher; 14] = [
        |setting, root| super::launch::each(oci::many_by_crun(setting, root)),
        |setting, root| super::launch::each(oci::many_by_runc(setting, root)),
        vmm::restore_linux,
        vmm::fork_linux,
        agent::template,
        agent::pool,
        firecracker::linux,
        cloud_hypervisor::linux,
        qemu::linux,
        vmm::restore_bare,
        vmm::fork_bare,
        firecracker::bare_metal,
        cloud_hypervisor::bare_metal,
        qemu::bare_metal,
    ];
    makers.into_iter().map(|make| make(setting, root)).collect()
}

/// A monitor that saves machines and goes on with them.
trait Monitor: 'static {
    /// The file with the guest's memory, in the folder of a snapshot.
    const MEMORY: &'static str;

    /// Starts the guest, waits until it is held, and saves it in `folder`, which is there and empty. The one that was saved is gone
    /// then.
    fn save(&self, guest: &Guest, life: Life, folder: &Path) -> Result<(), String>;

    /// What brings up `count` machines at once from `folder`.
    fn launches(&self, life: Life, folder: &Path, count: usize) -> Result<Vec<Launch>, String>;

    /// What is called, as it is shown: the command, and what is asked of it.
    fn shown(&self, folder: &Path) -> String;
}

/// What runs in the machine.
#[derive(Debug, Clone)]
enum Guest {
    /// No Linux: it has written to its memory, speaks and ends.
    Bare { folder: PathBuf, ending: Ending },
    /// The small kernel with its first program, which becomes a command when it goes on.
    Linux { kernel: PathBuf, initramfs: PathBuf },
}

impl Guest {
    fn bare(setting: &Setting, ending: Ending) -> (Self, Result<(), String>) {
        (Self::Bare { folder: setting.scratch.clone(), ending }, setting.kvm())
    }

    fn linux(setting: &Setting, root: &Root) -> (Self, Result<(), String>) {
        let (kernel, there) = super::vmm::kernel(setting.tuned_kernel(), "tuned-vmlinux");
        (Self::Linux { kernel, initramfs: root.initramfs.clone() }, there)
    }

    /// The kernel's file, made where it is ours.
    fn kernel(&self, life: Life) -> Result<String, String> {
        let path = match self {
            Self::Linux { kernel, .. } => kernel.clone(),
            Self::Bare { folder, ending } => {
                let path = folder.join(ending.file(life, "held"));
                program::write(&path, &program::bare_metal_held(life, *ending, TOUCHED_MIB)?)?;
                path
            }
        };
        Ok(path.to_string_lossy().into_owned())
    }

    /// What it says when it can be saved.
    fn held(&self) -> &'static [u8] {
        match self {
            Self::Bare { .. } => &[BARE_HELD],
            Self::Linux { .. } => HELD,
        }
    }

    /// What it says when it goes on, and when its command begins, if it runs one.
    fn marks(&self) -> Vec<&'static [u8]> {
        match self {
            Self::Bare { .. } => vec![&[BARE_MARKER]],
            Self::Linux { .. } => vec![ON, MARKER],
        }
    }

    /// The exit status of its monitor.
    fn good_status(&self) -> i32 {
        // What a guest that writes n to the debug-exit port asks for is 2n + 1.
        i32::from(matches!(self, Self::Bare { ending: Ending::DebugExit, .. }))
    }
}

/// One that goes on from a snapshot for each life.
struct Restored<M> {
    name: &'static str,
    program: PathBuf,
    monitor: M,
    guest: Guest,
    scratch: PathBuf,
    made: Vec<Life>,
}

impl<M: Monitor> Restored<M> {
    /// It takes part if `check` says so.
    fn found(
        name: &'static str,
        program: &Path,
        monitor: M,
        (guest, check): (Guest, Result<(), String>),
        setting: &Setting,
    ) -> Result<Self, Absent> {
        let (program, scratch) = (program.to_owned(), setting.scratch.clone());
        let this = Self { name, program, monitor, guest, scratch, made: Vec::new() };
        match check {
            Ok(()) => Ok(this),
            Err(why) => Err(Absent { name: name.to_owned(), command: Launcher::shown(&this), why }),
        }
    }

    fn folder(&self, life: Life) -> PathBuf {
        self.scratch.join(format!("{}-{life:?}.snap", self.name.replace([' ', ','], "")))
    }
}

impl<M: Monitor> Launcher for Restored<M> {
    fn name(&self) -> &str {
        self.name
    }

    fn shown(&self) -> String {
        self.monitor.shown(&self.folder(Life::Once))
    }

    fn version(&self) -> Option<String> {
        version(&self.program, &["--version"])
    }

    fn launches(&mut self, life: Life, count: usize) -> Result<Vec<Launch>, String> {
        let folder = self.folder(life);
        if !self.made.contains(&life) {
            std::fs::create_dir(&folder).map_err(|error| format!("make {}: {error}", folder.display()))?;
            self.monitor.save(&self.guest, life, &folder).map_err(|why| format!("save a machine: {why}"))?;
            hold::release_in(&folder.join(M::MEMORY))?;
            self.made.push(life);
        }
        self.monitor.launches(life, &folder, count)
    }

    fn marks(&self) -> Vec<&[u8]> {
        self.guest.marks()
    }

    fn runs_a_command(&self) -> bool {
        matches!(self.guest, Guest::Linux { .. })
    }

    fn good_status(&self) -> i32 {
        self.guest.good_status()
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(60)
    }
}

/// Where one is started at a time, and its process is all that there is to start.
impl<M: Monitor> Rival for Restored<M> {
    fn name(&self) -> &str {
        self.name
    }

    fn shown(&self) -> String {
        Launcher::shown(self)
    }

    fn version(&self) -> Option<String> {
        Launcher::version(self)
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        let launch = self.launches(life, 1)?.pop().ok_or("nothing is started")?;
        Ok(launch.command)
    }

    fn marker(&self) -> &[u8] {
        self.guest.marks().last().copied().unwrap_or_default()
    }

    fn good_status(&self) -> i32 {
        self.guest.good_status()
    }

    fn guest_ram(&self) -> bool {
        true
    }

    fn limit(&self) -> Duration {
        Launcher::limit(self)
    }
}

fn launcher<M: Monitor>(found: Result<Restored<M>, Absent>) -> FoundLauncher {
    found.map(|restored| Box::new(restored) as Box<dyn Launcher>)
}

fn rival<M: Monitor>(found: Result<Restored<M>, Absent>) -> Found {
    found.map(|restored| Box::new(restored) as Box<dyn Rival>)
}

/// A command as it is shown: `program` with `arguments`.
fn line(program: &Path, arguments: &[String]) -> String {
    shown(program.as_os_str(), arguments)
}
