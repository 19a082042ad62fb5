//! What a monitor and its guest may take of the host, together: CPU time, memory, disk bandwidth and processes (a cgroup, version 2), and
//! the CPUs that they run on (sched_setaffinity(2)).
//!
//! [`Limits::begin`] is called once, while the process has one thread and no guest memory: memory is charged to the cgroup of whoever
//! touches it first. Nothing that the process keeps leads out of its cgroup again, so that a guest that breaks out stays limited. What
//! removes the cgroup is therefore a process outside of it (`caretaker`).

mod caretaker;
mod cgroup;
mod pin;
mod values;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};

use super::Needs;
use crate::config::{Invalid, Size, VmConfig};

pub use pin::{Pin, pin_vcpu};
pub use values::{CpuMax, CpuWeight, IoMax};

/// Limits of one run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Which cgroup to run in: a path from the root of the hierarchy, or from the cgroup that the process was started in. Absent: one of
    /// its own, if something is to be limited.
    pub cgroup: Option<PathBuf>,
    /// Share of CPU time when others want it, too.
    pub cpu_weight: Option<CpuWeight>,
    /// Most CPU time.
    pub cpu_max: Option<CpuMax>,
    /// Most memory: guest RAM that was touched, the monitor's own, page cache of the files that it reads and writes.
    pub memory_max: Option<Size>,
    /// Most disk traffic, by disk.
    pub io_max: Vec<IoMax>,
    /// Most threads and processes.
    pub pids_max: Option<u32>,
    /// On which CPUs.
    pub pin: Option<Pin>,
    /// No other process has a hardware thread of a core meanwhile (Documentation/admin-guide/hw-vuln/core-scheduling.rst).
    pub own_cores: bool,
}

/// What the owner of a run has to say to the process that removes its cgroup.
#[derive(Debug, Clone)]
pub struct Care {
    /// What to say if the kernel killed the run because it reached its memory limit. Called by the process that outlives it.
    pub out_of_memory: fn(Size) -> String,
    /// The run is in the background.
    pub is_detached: bool,
    /// Where it keeps what it says then.
    pub messages: Option<PathBuf>,
}

/// Why limits cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no cgroup file system of version 2.
    #[error("cannot limit the VM: no cgroup2 file system is mounted")]
    NoCgroups,
    /// It has no such controller.
    #[error("cannot limit the VM: {} has no {controller} controller", .cgroup.display())]
    NoController {
        /// Of these limits.
        controller: &'static str,
        /// Where it would have to be.
        cgroup: PathBuf,
        /// It is the root of the hierarchy: the controller is there for nobody.
        is_root: bool,
    },
    /// The path is none of a cgroup below the root.
    #[error("`cgroup={}`: not a path of a cgroup below the root", .0.display())]
    Path(PathBuf),
    /// A file of the hierarchy cannot be used.
    #[error("cannot limit the VM: cannot {what} {}", .path.display())]
    File {
        /// "write to"
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There can be no process that removes the cgroup.
    #[error("cannot limit the VM: cannot start the process that removes its cgroup")]
    Caretaker(#[source] io::Error),
    /// What an I/O limit is for has no disk.
    #[error("`io_max={}`: {why}", .device.display())]
    Disk {
        /// As it was given.
        device: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A CPU to run on is missing, or is not allowed.
    #[error("`pin={pin}`: CPU {cpu} does not exist or is not allowed here; allowed: {allowed}")]
    Cpu {
        /// As it was given.
        pin: String,
        /// Which.
        cpu: u32,
        /// As in the option.
        allowed: String,
    },
    /// The kernel has no core scheduling.
    #[error("`own_cores`: cannot have cores of its own")]
    Cores(#[source] io::Error),
    /// The kernel does not take a set of CPUs.
    #[error("cannot set the CPUs to run on")]
    Affinity(#[source] io::Error),
}

impl Error {
    /// Whether what was asked for is wrong, and not this host.
    pub fn is_bad_argument(&self) -> bool {
        matches!(self, Self::Path(_) | Self::Disk { .. } | Self::Cpu { .. })
    }
}

/// A controller, and what is to be written to a file of it.
struct Setting {
    controller: &'static str,
    file: &'static str,
    value: String,
}

/// A cgroup with limits. What was made for it goes when this is dropped, if it is empty then.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    made: cgroup::Made,
}

impl Group {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// That of this process.
static CGROUP: OnceLock<PathBuf> = OnceLock::new();

/// The cgroup that this process entered, if it did.
pub fn cgroup() -> Option<&'static Path> {
    CGROUP.get().map(PathBuf::as_path)
}

impl Limits {
    /// Checks them against the machine that they are for.
    ///
    /// # Errors
    /// [`Invalid`] names the one that cannot be.
    pub fn check(&self, config: &VmConfig) -> Result<(), Invalid> {
        if let Some(pin) = &self.pin
            && let Some(vcpu) = pin.last_vcpu().filter(|vcpu| *vcpu >= config.cpus.0)
        {
            let what = format!("`pin={pin}`: there is no vCPU {vcpu}; the last is {}", config.cpus.0 - 1);
            return Err(Invalid { what, hint: format!("give it more: `cpus={}`", vcpu + 1) });
        }
        // The main and the control thread, that which logs, and one of the kernel's.
        let least = u64::from(config.cpus.0) + 4;
        if let Some(most) = self.pids_max.filter(|most| u64::from(*most) < least) {
            let what = format!("`pids_max={most}` is too low: {} vCPUs need {least} threads", config.cpus.0);
            let hint = format!("each device needs some, too; try `pids_max={}`", least + 16);
            return Err(Invalid { what, hint });
        }
        let Some(most) = self.memory_max.filter(|most| *most < config.mem.size) else { return Ok(()) };
        let what = format!("`memory_max={most}` is less than `mem={}`", config.mem.size);
        // Explicit huge pages are not charged (hugetlb has its own controller).
        if config.mem.prefault && config.mem.hugepages.is_none() {
            let hint = format!("drop prefault, or raise it: `memory_max={}` and some more", config.mem.size);
            return Err(Invalid { what: format!("{what}, all of which prefault touches"), hint });
        }
        log::info!("{what}: the kernel kills the VM if its guest uses more");
        Ok(())
    }

    /// What they take of the host while the machine runs.
    pub fn needs(&self) -> Needs {
        match self.pin.as_ref().and_then(Pin::last_vcpu) {
            Some(_) => Needs::PINS,
            None => Needs::empty(),
        }
    }

    fn settings(&self) -> Result<Vec<Setting>, Error> {
        let one =
            |controller, file, value: Option<String>| value.map(|value| Setting { controller, file, value });
        let mut settings: Vec<_> = [
            one("cpu", "cpu.weight", self.cpu_weight.map(|weight| weight.to_string())),
            one("cpu", "cpu.max", self.cpu_max.map(|most| most.to_string())),
            one("memory", "memory.max", self.memory_max.map(|most| most.bytes().to_string())),
            one("pids", "pids.max", self.pids_max.map(|most| most.to_string())),
        ]
        .into_iter()
        .flatten()
        .collect();
        for io in &self.io_max {
            settings.extend(one("io", "io.max", Some(io.line()?)));
        }
        Ok(settings)
    }

    /// Makes the cgroup with these limits, if they need one, for processes that others start.
    ///
    /// # Errors
    /// The host cannot do that, or does not let this user.
    pub fn make(&self) -> Result<Option<Group>, Error> {
        let settings = self.settings()?;
        if self.cgroup.is_none() && settings.is_empty() {
            return Ok(None);
        }
        let hierarchy = cgroup::Hierarchy::find()?;
        let path = hierarchy.target(self.cgroup.as_deref())?;
        let controllers: BTreeSet<_> = settings.iter().map(|setting| setting.controller).collect();
        let made = hierarchy.make(&path, &controllers)?;
        for Setting { file, value, .. } in &settings {
            cgroup::write(&path.join(file), value)?;
        }
        Ok(Some(Group { path, made }))
    }

    /// The process, which has one thread, is limited from now on.
    ///
    /// # Errors
    /// The host cannot do that, or does not let this user.
    pub fn begin(&self, care: &Care) -> Result<(), Error> {
        if let Some(Group { path, made }) = self.make()? {
            if !made.is_empty() {
                caretaker::start(&made, self.memory_max, care).map_err(Error::Caretaker)?;
            }
            made.keep();
            cgroup::join(&path)?;
            // There is one.
            let _ = CGROUP.set(path);
        }
        if self.own_cores {
            // That of all threads that this one starts, and of no other process.
            create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ThreadGroup)
                .map_err(|error| Error::Cores(error.into()))?;
        }
        // A cgroup may have CPUs of its own, so it comes first.
        self.pin.as_ref().map_or(Ok(()), Pin::begin)
    }

    /// For a process that starts others with these limits: it leaves the cgroup that is to be the parent of theirs, which may have no
    /// process of its own.
    ///
    /// # Errors
    /// As for [`Limits::begin`].
    pub fn make_way(&self) -> Result<(), Error> {
        if self.settings()?.is_empty() {
            return Ok(());
        }
        let hierarchy = cgroup::Hierarchy::find()?;
        let cgroup = hierarchy.target(self.cgroup.as_deref())?;
        hierarchy.make_way(&cgroup)
    }
}
