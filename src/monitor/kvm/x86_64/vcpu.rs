//! The registers of a vCPU, and its clock.

use std::io;

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs};
use kvm_ioctls::SyncReg;

use super::regs::{self, Entry};
use crate::kvm::exit::Exit;
use crate::kvm::{Error, Vcpu, ioctl};

impl Vcpu {
    /// Has the vCPU begin as `entry` says. It must be as it was created, at the reset vector.
    ///
    /// # Errors
    /// An ioctl failed, or KVM refused one of the MSRs.
    pub fn enter_at(&self, entry: &Entry) -> Result<(), Error> {
        self.set_msrs(entry.msrs)?;
        if self.id() != 0 {
            return Ok(());
        }
        let mut sregs = ioctl("KVM_GET_SREGS", self.fd.get_sregs())?;
        regs::set_system(&mut sregs, entry);
        ioctl("KVM_SET_SREGS", self.fd.set_sregs(&sregs))?;
        ioctl("KVM_SET_REGS", self.fd.set_regs(&regs::general(entry)))
    }

    pub(super) fn set_msrs(&self, values: &[(u32, u64)]) -> Result<(), Error> {
        let entries: Vec<_> =
            values.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let msrs = kvm_bindings::Msrs::from_entries(&entries).map_err(|_| Error::Missing("room for MSRs"))?;
        let set = ioctl("KVM_SET_MSRS", self.fd.set_msrs(&msrs))?;
        match entries.get(set) {
            None => Ok(()),
            Some(refused) => {
                let source = io::Error::other(format!("MSR {:#x} was refused", refused.index));
                Err(Error::Ioctl { ioctl: "KVM_SET_MSRS", source })
            }
        }
    }

    /// Has KVM see this vCPU's local APIC. KVM's map of APICs is made anew as a vCPU is created, a moment before that one
    /// is in it; a guest that starts the last vCPU without having written to its own APIC's registers (as after firmware,
    /// which has) would not reach it. For the last vCPU, after its creation.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn join_apic_map(&self) -> Result<(), Error> {
        let state = ioctl("KVM_GET_LAPIC", self.fd.get_lapic())?;
        ioctl("KVM_SET_LAPIC", self.fd.set_lapic(&state))
    }

    /// Has each KVM_RUN leave the general registers in the kvm_run page (KVM_CAP_SYNC_REGS), or no longer. False if this
    /// KVM cannot.
    pub fn keep_registers(&mut self, on: bool) -> bool {
        if on && self.keeps_registers {
            self.fd.set_sync_valid_reg(SyncReg::Register);
        } else {
            self.fd.clear_sync_valid_reg(SyncReg::Register);
        }
        self.keeps_registers
    }

    /// Whether KVM_RUN leaves the general registers in the kvm_run page.
    pub fn is_keeping_registers(&mut self) -> bool {
        self.fd.get_kvm_run().kvm_valid_regs & SyncReg::Register as u64 != 0
    }

    /// [`Vcpu::run`], and the guest's general registers after it: RIP is that of the instruction that exited, where that is
    /// not finished yet. Zeros, or stale, without [`Vcpu::keep_registers`].
    ///
    /// # Errors
    /// As for `run`.
    pub fn run_observed(&mut self) -> Result<(kvm_regs, Exit<'_>), Error> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        let exit = self.run()?;
        // SAFETY: the page lives as long as `self`; the register area is apart from what `exit` refers to (the exit union
        // and the PIO page), KVM writes it only inside KVM_RUN, and any bytes are valid in it.
        let regs = unsafe { (*run).s.regs.regs };
        Ok((regs, exit))
    }

    /// Frequency of the guest's time-stamp counter in kHz, which is the host's; `None` where KVM does not know it.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz != 0)
    }

    /// Tells the guest's clock that the machine stood still, so that no watchdog takes the pause for a lockup.
    pub fn announce_pause(&self) {
        // Refused where the guest has not set a kvmclock up: then it has no such watchdog check either.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// General registers.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn regs(&self) -> Result<kvm_regs, Error> {
        ioctl("KVM_GET_REGS", self.fd.get_regs())
    }

    /// Segment, control and table registers.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn sregs(&self) -> Result<kvm_sregs, Error> {
        ioctl("KVM_GET_SREGS", self.fd.get_sregs())
    }

    /// Guest physical address of a linear address, by the guest's own page tables; `None` if it is not mapped.
    pub fn translate(&self, linear: u64) -> Option<u64> {
        self.fd.translate_gva(linear).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
    }
}
