//! Breakpoints and steps that KVM does not report.

use super::{linear, registers};
use crate::kvm::exit::Trap;
use crate::kvm::{Error, Vcpu};
use crate::memory::GuestRam;

/// INT3 as the next instruction: a KVM without hardware virtualization, which emulates every instruction, has no emulation
/// of it.
pub fn breakpoint(vcpu: &Vcpu, ram: &GuestRam) -> Option<Trap> {
    const INT3: u8 = 0xcc;
    let pc = registers::next(vcpu).ok()?;
    let mut code = [0];
    let found = linear::read(vcpu, ram, pc, &mut code) == 1 && code[0] == INT3;
    found.then_some(Trap { exception: 3, pc, dr6: 0 })
}

/// A step that has ended at the next instruction.
///
/// # Errors
/// The ioctl that failed.
pub fn stepped(vcpu: &Vcpu) -> Result<Trap, Error> {
    /// DR6: single step (SDM vol. 3, 18.2.3).
    const BS: u64 = 1 << 14;
    Ok(Trap { exception: 1, pc: registers::next(vcpu)?, dr6: BS })
}
