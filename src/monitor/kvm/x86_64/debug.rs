//! What a debugger does to a vCPU: KVM_SET_GUEST_DEBUG, and the registers that nobody else asks for.
//!
//! The vCPU must stand still, and its last instruction be finished ([`Vcpu::finish_instruction`]): then any of this is
//! coherent. Source: Documentation/virt/kvm/api.rst, 4.87.

use kvm_bindings::{
    KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_fpu,
    kvm_guest_debug, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::Cap;

use crate::kvm::{Error, Vcpu, Vm, ioctl};

/// What a debug register watches for (SDM vol. 3, 18.2.4: R/W).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// An instruction that is about to run. The length is 1.
    Execute = 0b00,
    /// A write.
    Write = 0b01,
    /// A read or a write.
    ReadWrite = 0b11,
}

/// A debug register's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breakpoint {
    /// Linear address; a multiple of `len`.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub len: u64,
    /// Access.
    pub access: Access,
}

/// What is to bring a vCPU out of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// After each instruction.
    pub step: bool,
    /// While stepping, leave interrupts pending.
    pub block_interrupts: bool,
    /// At INT3.
    pub software: bool,
    /// Up to four.
    pub hardware: Vec<Breakpoint>,
    /// Give the guest the exception that came out but was its own: #BP or #DB.
    pub inject: Option<Exception>,
}

/// The exceptions that debuggers use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exception {
    /// #DB, vector 1.
    Debug,
    /// #BP, vector 3.
    Breakpoint,
}

/// Debug registers that a processor has.
pub const BREAKPOINTS: usize = 4;

impl GuestDebug {
    fn control(&self) -> u32 {
        let flags = [
            (self.step, KVM_GUESTDBG_SINGLESTEP),
            (self.step && self.block_interrupts, KVM_GUESTDBG_BLOCKIRQ),
            (self.software, KVM_GUESTDBG_USE_SW_BP),
            (!self.hardware.is_empty(), KVM_GUESTDBG_USE_HW_BP),
            (self.inject == Some(Exception::Debug), KVM_GUESTDBG_INJECT_DB),
            (self.inject == Some(Exception::Breakpoint), KVM_GUESTDBG_INJECT_BP),
        ];
        let control = flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag);
        if control == 0 { 0 } else { control | KVM_GUESTDBG_ENABLE }
    }

    /// DR7: for each register global enable, R/W and LEN; GE; and the bit that is always one.
    fn dr7(&self) -> u64 {
        let one = |(n, breakpoint): (usize, &Breakpoint)| {
            // LEN is 0 for one byte, 1 for two, 3 for four, 2 for eight.
            let len = match breakpoint.len {
                2 => 1,
                4 => 3,
                8 => 2,
                _ => 0,
            };
            2 << (2 * n) | (breakpoint.access as u64 | len << 2) << (16 + 4 * n)
        };
        self.hardware
            .iter()
            .take(BREAKPOINTS)
            .enumerate()
            .map(one)
            .fold(1 << 9 | 1 << 10, |all, bits| all | bits)
    }
}

impl Vm {
    /// Whether interrupts can be left pending during a step.
    ///
    /// # Errors
    /// This KVM cannot debug guests at all.
    pub fn debugging(&self) -> Result<bool, Error> {
        if !self.fd.check_extension(Cap::SetGuestDebug) {
            return Err(Error::Missing("KVM_CAP_SET_GUEST_DEBUG: single-stepping and breakpoints"));
        }
        let flags = self.fd.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        Ok(u32::try_from(flags).is_ok_and(|flags| flags & KVM_GUESTDBG_BLOCKIRQ != 0))
    }
}

impl Vcpu {
    /// Changes what brings the vCPU out of the guest from now on.
    ///
    /// # Errors
    /// This KVM cannot do it.
    pub fn set_guest_debug(&mut self, debug: &GuestDebug) -> Result<(), Error> {
        let mut raw = kvm_guest_debug { control: debug.control(), ..Default::default() };
        if !debug.hardware.is_empty() {
            for (register, breakpoint) in
                raw.arch.debugreg.iter_mut().zip(debug.hardware.iter().take(BREAKPOINTS))
            {
                *register = breakpoint.address;
            }
            raw.arch.debugreg[7] = debug.dr7();
        }
        ioctl("KVM_SET_GUEST_DEBUG", self.fd.set_guest_debug(&raw))?;
        self.steps = debug.step;
        Ok(())
    }

    /// Sets the general registers.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        ioctl("KVM_SET_REGS", self.fd.set_regs(regs))
    }

    /// Sets segment, control and table registers.
    ///
    /// # Errors
    /// The ioctl failed: the values do not go together.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        ioctl("KVM_SET_SREGS", self.fd.set_sregs(sregs))
    }

    /// x87 and SSE registers.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn fpu(&self) -> Result<kvm_fpu, Error> {
        ioctl("KVM_GET_FPU", self.fd.get_fpu())
    }

    /// Sets the x87 and SSE registers.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error> {
        ioctl("KVM_SET_FPU", self.fd.set_fpu(fpu))
    }

    /// A model-specific register; `None` if KVM does not know it.
    pub fn msr(&self, index: u32) -> Option<u64> {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut msrs = kvm_bindings::Msrs::from_entries(&[entry]).ok()?;
        (self.fd.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice().first().map(|entry| entry.data))?
    }

    /// Sets a model-specific register. False if KVM refuses.
    pub fn set_msr(&self, index: u32, data: u64) -> bool {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = kvm_bindings::Msrs::from_entries(&[entry]);
        msrs.is_ok_and(|msrs| self.fd.set_msrs(&msrs).is_ok_and(|set| set == 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_registers_are_those_of_the_manual() {
        let breakpoint = |address, len, access| Breakpoint { address, len, access };
        let mut debug = GuestDebug::default();
        assert_eq!(debug.control(), 0);
        debug.hardware.push(breakpoint(0x1000, 1, Access::Execute));
        debug.hardware.push(breakpoint(0x2000, 4, Access::Write));
        debug.hardware.push(breakpoint(0x3000, 8, Access::ReadWrite));
        debug.step = true;
        // G0, G1, G2, GE, bit 10; then R/W and LEN: 00 00, 01 11, 11 10.
        assert_eq!(debug.dr7(), 0b10_1010 | 0x600 | 0b1101 << 20 | 0b1011 << 24);
        assert_eq!(debug.control(), KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP);
    }
}
