//! A vCPU's registers as traces and reports have them.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::kvm::{Error, Vcpu};
use crate::recorder::registers::{NAMES, SYSTEM_NAMES};

/// In the order of [`NAMES`].
pub fn general(regs: &kvm_regs) -> [u64; NAMES.len()] {
    [
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rbx,
        regs.rsp,
        regs.rbp,
        regs.rsi,
        regs.rdi,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rip,
        regs.rflags,
    ]
}

/// In the order of [`SYSTEM_NAMES`].
pub fn system(sregs: &kvm_sregs) -> [u64; SYSTEM_NAMES.len()] {
    [sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer]
}

/// The mode that code runs in: 16, 32 or 64 bits.
pub fn bits(sregs: &kvm_sregs) -> u8 {
    match (sregs.cs.l, sregs.cs.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    }
}

/// Linear address of the code at `rip`.
pub fn code(sregs: &kvm_sregs, rip: u64) -> u64 {
    sregs.cs.base.wrapping_add(rip)
}

/// Linear address of the next instruction.
///
/// # Errors
/// The ioctl that failed.
pub fn next(vcpu: &Vcpu) -> Result<u64, Error> {
    Ok(code(&vcpu.sregs()?, vcpu.regs()?.rip))
}
