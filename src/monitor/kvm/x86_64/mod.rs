//! What KVM has for x86-64 alone: CPUID, MSRs, registers, the PC's interrupt controllers and timer.

pub(super) mod cpu_model;
pub mod cpuid;
pub mod debug;
pub(super) mod hyperv;
pub mod regs;
pub(super) mod testdev;
