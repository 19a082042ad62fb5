//! The options that limit what a monitor and its guest take of the host together.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;
use vmm_command::{Code, Failure};
use vmm_monitor::config::Size;
use vmm_monitor::sandbox::Limits;
use vmm_monitor::sandbox::limits::{Care, CpuMax, CpuWeight, IoMax, Pin};

use super::flags::with_flags;
use super::options::os_text;

/// Limits of a run. They belong to it and not to the machine: neither a configuration file nor a snapshot has them.
#[derive(Debug, Clone, Default, Args)]
#[group(skip)]
pub struct Options {
    /// Run the monitor and its guest in this cgroup (version 2): /PATH from the root of the hierarchy, or a name below the caller's own
    /// [default: one of its own there, if something is limited]. One that exists is used as it is, plus the limits given here, and
    /// stays; else it is made, and removed at the end
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Share of CPU time when others want it, too: 1 to 10000, where others have 100
    #[arg(long, value_name = "N")]
    cpu_weight: Option<CpuWeight>,
    /// Most CPU time of all threads together: a number of CPUs (1.5), or QUOTA/PERIOD in microseconds
    #[arg(long, value_name = "CPUS")]
    cpu_max: Option<CpuMax>,
    /// Most memory, of guest and monitor together; the kernel kills the VM if it needs more
    #[arg(long, value_name = "SIZE")]
    memory_max: Option<Size>,
    /// Most traffic of the disk that FILE is, or lies on: FILE,rbps=SIZE,wbps=SIZE,riops=N,wiops=N, any of them, a second; repeatable
    #[arg(long, value_name = "FILE,rbps=SIZE", value_parser = os_text::<IoMax, _>())]
    io_max: Vec<IoMax>,
    /// Most threads and processes of the monitor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pids_max: Option<u32>,
    /// CPUs of the host to run on: 2-3 for all threads, 0:2,1:3 for vCPU 0 on CPU 2 and vCPU 1 on CPU 3
    #[arg(long, value_name = "CPUS")]
    pin: Option<Pin>,
    /// Share no core with others: while a thread of this run has one of a core's hardware threads (SMT), nobody else has another (Linux
    /// 5.14)
    #[arg(long)]
    own_cores: bool,
}

impl Options {
    /// As the monitor has them.
    pub fn limits(&self) -> Limits {
        let Self { cgroup, cpu_weight, cpu_max, memory_max, io_max, pids_max, pin, own_cores } = self.clone();
        Limits { cgroup, cpu_weight, cpu_max, memory_max, io_max, pids_max, pin, own_cores }
    }

    /// For the process of a command that starts others with these options: makes way for their cgroups.
    ///
    /// # Errors
    /// They cannot have any.
    pub fn make_way(&self) -> Result<(), Failure> {
        Ok(self.limits().make_way()?)
    }
}

/// For the process that outlives a run.
pub fn care(is_detached: bool, messages: Option<PathBuf>) -> Care {
    Care { out_of_memory, is_detached, messages }
}

fn out_of_memory(most: Size) -> String {
    let error =
        anyhow!("the host's kernel killed the VM: guest and monitor needed more than `memory_max={most}`");
    let hint = "raise it, or give the guest less: `mem=SIZE`";
    let (error, hint) = Failure::new(Code::Host, error).hint(Some(hint)).words(with_flags);
    format!("vmm: error: {error}\nhint: {}\n", hint.unwrap_or_default())
}
