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

use std::arch::x86_64::__cpuid_count;

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
    /// CPUID.1:ECX (SDM vol. 3, 26.6), and CPUID Fn8000_0001_ECX (APM vol. 2, 15.4).
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    __cpuid_count(1, 0).ecx & VMX != 0 || __cpuid_count(0x8000_0001, 0).ecx & SVM != 0
}
