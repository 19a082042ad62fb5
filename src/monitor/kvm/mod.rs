//! The only module that issues KVM ioctls: system, VM and vCPU descriptors, exits; and in `x86_64` what that architecture has
//! alone, registers, CPUID, MSRs and debugging among it.
//!
//! Used by `boot` (the type of its entry), `vcpu` (the run loop) and `machine` (assembly). Knows no device.

pub mod exit;
mod stats;
mod vcpu;
mod vm;
mod x86_64;

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_ioctls::Cap;

pub use stats::Counters;
pub use vcpu::{Vcpu, kick};
pub use vm::Vm;
pub use x86_64::{Controllers, Processor, SavedClocks, SavedVcpu, SavedVm, Signature, StateList, VcpuState};
pub use x86_64::{cpuid, debug, host_has_hardware_virtualization, regs};

/// Why the hypervisor could not be used. The texts name the ioctl, because that is what its documentation
/// (Documentation/virt/kvm/api.rst) is sorted by.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device node could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The device node.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The device node is not KVM's, or speaks another version.
    #[error("{} speaks KVM API version {version}, expected 12", path.display())]
    Version {
        /// The device node.
        path: PathBuf,
        /// What it answered.
        version: i32,
    },
    /// The host's KVM is too old, or built without this.
    #[error("the host's KVM lacks {0}")]
    Missing(&'static str),
    /// The configuration asks for a feature that KVM does not have to give.
    #[error("`cpu={cpu}`: this host's processor or its KVM lacks {name}")]
    CpuFeature {
        /// The feature's name.
        name: String,
        /// The whole wish.
        cpu: String,
    },
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Which.
        ioctl: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Open { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Some(
                    "load KVM: sudo modprobe -a kvm_intel kvm_amd; virtualization must be enabled in the BIOS setup, or, in a VM, \
                     nested virtualization on its host",
                ),
                io::ErrorKind::PermissionDenied => {
                    Some("join the group that owns it: sudo usermod -aG kvm $USER, then log in again")
                }
                _ => None,
            },
            Self::Version { .. } => Some("VMM_KVM, if set, must name the KVM device: unset VMM_KVM"),
            Self::Missing(_) => Some("run a host kernel of version 5.10 or later (uname -r shows it)"),
            Self::CpuFeature { .. } => {
                Some("drop the feature or take a lower model; `cpu=host` gives all that the host has")
            }
            Self::Ioctl { source, .. } if source.raw_os_error() == Some(libc::EBUSY) => Some(
                "another hypervisor may hold the processor's virtualization: lsmod | grep -E 'vbox|vmmon'",
            ),
            Self::Ioctl { ioctl: "KVM_SET_USER_MEMORY_REGION", .. } => {
                Some("the host's KVM does not take that much guest memory: try less, `mem=1G`")
            }
            Self::Ioctl { .. } => None,
        }
    }
}

/// Turns a kvm-ioctls result into ours.
fn ioctl<T>(ioctl: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, Error> {
    result.map_err(|e| Error::Ioctl { ioctl, source: io::Error::from_raw_os_error(e.errno()) })
}

/// An open KVM device. A clone is the same one.
#[derive(Debug, Clone)]
pub struct Kvm {
    fd: Arc<kvm_ioctls::Kvm>,
}

impl Kvm {
    /// What a machine cannot be built without.
    const NEEDED: [(Cap, &'static str); 5] = [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    ];

    /// Opens the device node, `/dev/kvm` as a rule.
    ///
    /// # Errors
    /// It is not there, may not be opened, or is not a KVM that machines can run on.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| failed(e.into()))?;
        let fd = kvm_ioctls::Kvm::new_with_path(name)
            .map_err(|e| failed(io::Error::from_raw_os_error(e.errno())))?;
        let version = fd.get_api_version();
        if version != 12 {
            return Err(Error::Version { path: path.to_owned(), version });
        }
        match Self::NEEDED.iter().chain(&x86_64::NEEDED).find(|(cap, _)| !fd.check_extension(*cap)) {
            Some((_, name)) => Err(Error::Missing(name)),
            None => Ok(Self { fd: Arc::new(fd) }),
        }
    }

    /// The most vCPUs that a VM may have.
    pub fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }

    /// A VM with its memory slots mapped and these of its interrupt controllers in the kernel, and no vCPU yet.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn create_vm(&self, memory: &crate::memory::Memory, controllers: Controllers) -> Result<Vm, Error> {
        Vm::new(self, memory, controllers)
    }
}
