//! What KVM has for x86-64 alone: registers, CPUID, MSRs, the PC's interrupt controllers and timer, exits.

mod cpu_model;
pub mod cpuid;
pub mod debug;
pub mod exit;
mod hyperv;
mod look;
mod processor;
pub mod regs;
mod routes;
mod state;
mod testdev;
mod vcpu;
mod vm;

use kvm_ioctls::Cap;

pub use look::VcpuState;
pub use processor::{Processor, Signature};
pub(super) use routes::Route;
pub use state::{SavedClocks, SavedVcpu, SavedVm, StateList};
pub(super) use vm::Arch;
pub use vm::Controllers;

/// What a machine of this architecture cannot be built without, beside what all need.
pub(super) const NEEDED: [(Cap, &str); 1] = [(Cap::ExtCpuid, "KVM_CAP_EXT_CPUID")];

/// Whether this processor has VT-x or AMD-V to offer. A KVM without it emulates guest instructions and stops at
/// those that its emulator lacks.
pub fn host_has_hardware_virtualization() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}
