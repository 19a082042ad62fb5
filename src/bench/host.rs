//! What must be known of a host to judge its figures.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Facts about the host, read before anything is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// "AMD EPYC 7B13".
    pub cpu: String,
    /// Logical CPUs that this process may use.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// "Linux" and the kernel's release.
    pub kernel: String,
    /// cpufreq governor of CPU 0, if there is one.
    pub governor: Option<String>,
    /// What the processor says of being in a virtual machine: the hypervisor flag.
    pub in_vm: bool,
    /// The modules behind /dev/kvm, "kvm_amd" and so on; empty where it is not there.
    pub kvm: Vec<String>,
    /// Whether KVM has hardware to build on (a vmx or svm flag).
    pub hardware_virtualization: bool,
    /// Load average over a minute, before.
    pub load: f64,
    /// This run's clock is not the wall clock but counts instructions, 1 ns each.
    pub repeatable_clock: bool,
    /// Seconds since 1970.
    pub time: u64,
    /// Version of vmm.
    pub vmm: String,
}

impl Host {
    /// This host, now.
    pub fn look(repeatable_clock: bool) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |key: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let flags = field("flags").unwrap_or_default();
        let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
        // Those that are built in stand there too, other than in /proc/modules.
        let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
        let names = modules.filter_map(|module| module.file_name().into_string().ok());
        let mut kvm: Vec<String> = names.filter(|name| name.starts_with("kvm")).collect();
        kvm.sort();
        if !Path::new("/dev/kvm").exists() {
            kvm.clear();
        }
        let meminfo = read("/proc/meminfo");
        let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib: u64 = total.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0);
        let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").trim().to_owned();
        let load = read("/proc/loadavg").split(' ').next().and_then(|text| text.parse().ok());
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            cpu: field("model name").unwrap_or_else(|| "unknown".to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory: kib << 10,
            kernel: format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
            governor: (!governor.is_empty()).then_some(governor),
            in_vm: has("hypervisor"),
            kvm,
            hardware_virtualization: has("vmx") || has("svm"),
            load: load.unwrap_or(0.0),
            repeatable_clock,
            time: since.map_or(0, |since| since.as_secs()),
            vmm: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}
