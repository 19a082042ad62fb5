//! How each contender is started: one file per kind. All run the same program on the same root file system.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

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
}

/// Where a workload runs: the same program, with the same arguments, natively, in a container, in a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// As a process.
    Native,
    /// In namespaces of our own.
    Container,
    /// In a Linux guest of vmm.
    Vm,
}

impl Place {
    /// The command that runs `vmm bench-work ARGUMENTS` there, its output on standard output. `cpus` and `memory_mib` size the
    /// VM; `disk` is what the workload finds at /dev/vda or, outside of a VM, gets as the path itself.
    ///
    /// # Errors
    /// Why it cannot run there.
    pub fn command(self, setting: &Setting, arguments: &[&str], size: Size) -> Result<Command, String> {
        let _ = (setting, arguments, size);
        Err(format!("{self:?}: not there yet"))
    }
}

/// The size of a VM.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub mib: u64,
}
