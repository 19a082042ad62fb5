//! How each contender is started: one file per kind. All run the same program on the same root file system.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

mod alioth;
mod bwrap;
mod cloud_hypervisor;
pub mod command;
mod container;
pub mod copy;
mod engines;
mod firecracker;
mod fixed;
mod helper;
pub mod idle;
mod kvmtool;
pub mod launch;
mod oci;
mod place;
mod process;
pub mod program;
pub mod qemu;
pub mod restored;
mod vmm;
pub mod weight;

pub use helper::Helper;
pub use place::{Place, Size};

use super::measure::Absent;
use program::Root;

/// Where distributions keep virtiofsd.
const HELPERS: [&str; 2] = ["/usr/libexec", "/usr/lib/qemu"];

/// Memory of each VM that is compared.
pub const RAM_MIB: u64 = 128;

/// What the program does once it has spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It ends, and with it whatever it ran in.
    Once,
    /// It sleeps until it is killed.
    Idle,
}

/// A way to start the program. What it needs beside the command is made when it is made, and taken down when it is dropped.
pub trait Rival {
    /// Short and unique: "crun".
    fn name(&self) -> &str;
    /// The exact command, or what is done in place of one.
    fn shown(&self) -> String;
    /// The version that it tells of itself.
    fn version(&self) -> Option<String> {
        None
    }
    /// What starts it this time.
    ///
    /// # Errors
    /// What could not be prepared.
    fn command(&mut self, life: Life) -> Result<Command, String>;
    /// What is on standard output when the program has spoken.
    fn marker(&self) -> &[u8] {
        program::MARKER
    }
    /// The exit status of a run that went well.
    fn good_status(&self) -> i32 {
        0
    }
    /// Whether the command of an idle instance ends as soon as the instance runs.
    fn detaches(&self) -> bool {
        false
    }
    /// Whether it is a VM, with a mapping of [`RAM_MIB`] that is its guest's RAM.
    fn guest_ram(&self) -> bool {
        false
    }
    /// Removes what idle instances that were killed have left.
    fn tidy(&mut self) {}
    /// A run that takes longer has failed.
    fn limit(&self) -> Duration {
        Duration::from_secs(30)
    }
}

/// One that can be started, or why not.
pub type Found = Result<Box<dyn Rival>, Absent>;

/// Makes one of them.
type Maker = fn(&Setting, &Root) -> Found;

/// All that start the program: processes, containers, engines, virtual machines.
pub fn all(setting: &Setting, root: &Root) -> Vec<Found> {
    // With whether it takes part where the clock counts instructions, and each start takes minutes.
    let makers: [(Maker, bool); 20] = [
        (process::spawn, true),
        (process::container, true),
        (bwrap::bwrap, false),
        (oci::crun, false),
        (oci::runc, false),
        (engines::podman, false),
        (engines::docker, false),
        (engines::ctr, false),
        (vmm::tuned, true),
        (restored::linux, false),
        (vmm::stock, false),
        (qemu::linux, true),
        (firecracker::firecracker, false),
        (cloud_hypervisor::cloud_hypervisor, false),
        (kvmtool::kvmtool, false),
        (alioth::linux, false),
        (vmm::bare_metal, false),
        (restored::bare_metal, false),
        (alioth::bare_metal, false),
        (qemu::bare_metal, false),
    ];
    let part = makers.into_iter().filter(|(_, quick)| *quick || !setting.repeatable_clock);
    part.map(|(make, _)| make(setting, root)).collect()
}

/// Those whose idle instances are weighed.
pub fn idle(setting: &Setting, root: &Root) -> Vec<Found> {
    let mut makers: Vec<Maker> = vec![
        process::spawn,
        process::container,
        oci::crun,
        engines::podman,
        vmm::tuned,
        restored::linux,
        qemu::linux,
        firecracker::firecracker,
        cloud_hypervisor::cloud_hypervisor,
        kvmtool::kvmtool,
        alioth::linux,
    ];
    if setting.linux_guests().is_err() {
        // Where no Linux runs, at least the monitors are weighed.
        makers.extend([vmm::bare_metal as Maker, restored::bare_metal, alioth::bare_metal, qemu::bare_metal]);
    }
    makers.into_iter().map(|make| make(setting, root)).collect()
}

/// What a run of `vmm bench` has at hand. Made once, by the command line.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The vmm that is measured: a copy, as its rivals are.
    pub vmm: PathBuf,
    /// This program: the workload that runs inside.
    pub own: PathBuf,
    /// Rivals by path, from `--with NAME=PATH`; those not named are looked for in PATH.
    pub with: BTreeMap<String, PathBuf>,
    /// The small kernel for VMs: an ELF vmlinux with a PVH note.
    pub kernel: Option<PathBuf>,
    /// The same as a bzImage, for monitors that take no other.
    pub bzimage: Option<PathBuf>,
    /// A distribution's kernel, a bzImage, and the initramfs that it needs.
    pub stock: Option<(PathBuf, PathBuf)>,
    /// The initramfs of a guest with an agent.
    pub agent: Option<PathBuf>,
    /// A folder for what is made on the way; gone when the run is over.
    pub scratch: PathBuf,
    /// The most idle instances that are weighed at a time.
    pub instances: usize,
    /// Only what is quick and repeats bit for bit: the host's clock counts instructions.
    pub repeatable_clock: bool,
}

impl Setting {
    /// This run's copy of the program `name`: of what `--with` says, or of what PATH has.
    ///
    /// # Errors
    /// That it is not there, and how to give it; or that it cannot be copied.
    pub fn find(&self, name: &str) -> Result<PathBuf, String> {
        copy::copied(name, &self.original(name)?, &self.scratch)
    }

    fn original(&self, name: &str) -> Result<PathBuf, String> {
        if let Some(path) = self.with.get(name) {
            return Ok(path.clone());
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain(HELPERS.map(PathBuf::from));
        let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
        found.ok_or_else(|| format!("not installed: no {name} in PATH (give it by --with {name}=FILE)"))
    }

    /// Whether KVM opens.
    ///
    /// # Errors
    /// Why not.
    pub fn kvm(&self) -> Result<(), String> {
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
        kvm.map(drop).map_err(|error| format!("open /dev/kvm: {error}"))
    }

    /// Whether a Linux guest can run here at all. Asked before one is started, which would only end in its time limit.
    ///
    /// # Errors
    /// Why not.
    pub fn linux_guests(&self) -> Result<(), String> {
        self.kvm()?;
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
        self.guest(self.kernel.as_deref(), "tuned-vmlinux", "tuned")
    }

    /// The same as a bzImage.
    ///
    /// # Errors
    /// There is none, or it cannot run here.
    pub fn tuned_bzimage(&self) -> Result<&Path, String> {
        self.guest(self.bzimage.as_deref(), "tuned-bzImage", "tuned")
    }

    /// A distribution's kernel, where a Linux guest can run.
    ///
    /// # Errors
    /// There is none, or it cannot run here.
    pub fn stock_kernel(&self) -> Result<&Path, String> {
        self.guest(self.stock.as_ref().map(|(kernel, _)| kernel.as_path()), "stock-bzImage", "stock")
    }

    fn guest<'a>(&self, kernel: Option<&'a Path>, file: &str, kind: &str) -> Result<&'a Path, String> {
        self.linux_guests()?;
        kernel.ok_or_else(|| {
            format!("no {file} in the folder that --guests names (make it: cargo guest bundle --only {kind})")
        })
    }
}
