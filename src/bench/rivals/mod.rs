//! How each contender is started: one file per kind. All run the same program on the same root file system.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

mod elf;
mod place;

pub use place::{Place, Size};

/// What a run of `vmm bench` has at hand. Made once, by the command line.
#[derive(Debug, Clone)]
pub struct Setting {
    /// This program: the vmm that is measured, and the workload that runs inside.
    pub vmm: PathBuf,
    /// Rivals by path, from `--with NAME=PATH`; those not named are looked for in PATH.
    pub with: BTreeMap<String, PathBuf>,
    /// The small kernel for VMs: an ELF vmlinux with a PVH note.
    pub kernel: Option<PathBuf>,
    /// The same as a bzImage, for monitors that take no other.
    pub bzimage: Option<PathBuf>,
    /// A distribution's kernel, a bzImage, and the initramfs that it needs.
    pub stock: Option<(PathBuf, PathBuf)>,
    /// A folder for what is made on the way; gone when the run is over.
    pub scratch: PathBuf,
    /// Only what is quick and repeats bit for bit: the host's clock counts instructions.
    pub repeatable_clock: bool,
}

impl Setting {
    /// The program `name`: what `--with` says, or what PATH has.
    ///
    /// # Errors
    /// That it is not there, and how to give it.
    pub fn find(&self, name: &str) -> Result<PathBuf, String> {
        if let Some(path) = self.with.get(name) {
            return Ok(path.clone());
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
        found.ok_or_else(|| format!("not installed: no {name} in PATH (give it by --with {name}=FILE)"))
    }

    /// Whether a Linux guest can run here at all. Asked before one is started, which would only end in its time limit.
    ///
    /// # Errors
    /// Why not.
    pub fn linux_guests(&self) -> Result<(), String> {
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
        kvm.map_err(|error| format!("open /dev/kvm: {error}"))?;
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = cpu.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
        if flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
            Ok(())
        } else {
            Err("this host's KVM has no hardware virtualization: it runs no Linux".to_owned())
        }
    }

    /// The small kernel, where a Linux guest can run.
    ///
    /// # Errors
    /// There is none, or it cannot run here.
    pub fn tuned_kernel(&self) -> Result<&Path, String> {
        self.linux_guests()?;
        let hint =
            "no tuned-vmlinux in the folder that --guests names (make it: cargo guest bundle --only tuned)";
        self.kernel.as_deref().ok_or_else(|| hint.to_owned())
    }
}
