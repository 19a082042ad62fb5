//! A vCPU descriptor: run it, kick it out, read and set its registers.
//!
//! Leaving the guest on request takes two steps that together cannot miss: the signal interrupts KVM_RUN, and its
//! handler sets `immediate_exit`, so that a signal which arrives just before KVM_RUN makes that return at once.

use std::cell::Cell;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Once;
use std::thread::JoinHandle;

use kvm_bindings::{kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuFd};
use vmm_sys_util::signal::{self, Killable};

use super::exit::{self, Exit};
use super::regs::{self, Entry};
use super::{Counters, Error, ioctl};

thread_local! {
    /// The kvm_run page of the vCPU that this thread runs, for the signal handler.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that brings a vCPU out of the guest. Real-time, so that no library uses it.
fn kick_signal() -> i32 {
    signal::SIGRTMIN()
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: `bind` set the pointer to a mapping that lives until `unbind` on this same thread clears it, and
        // this handler runs on this thread. The byte is shared with the kernel, hence volatile.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

/// A virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    id: u32,
    /// KVM_CAP_SYNC_REGS is there.
    keeps_registers: bool,
    pub(super) steps: bool,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, id: u32, keeps_registers: bool) -> Self {
        static HANDLER: Once = Once::new();
        // Before there is a thread that could be kicked: without a handler the signal ends the process.
        HANDLER.call_once(|| {
            // Fails only for a signal number out of range.
            let _ = signal::register_signal_handler(kick_signal(), on_kick);
        });
        Self { fd, id, keeps_registers, steps: false }
    }

    /// Its number; also its APIC identifier.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Sets the registers for `entry`.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn enter_at(&self, entry: Entry) -> Result<(), Error> {
        let Some(general) = regs::general(entry) else { return Ok(()) };
        let mut sregs = ioctl("KVM_GET_SREGS", self.fd.get_sregs())?;
        regs::set_system(&mut sregs, entry);
        ioctl("KVM_SET_SREGS", self.fd.set_sregs(&sregs))?;
        ioctl("KVM_SET_REGS", self.fd.set_regs(&general))
    }

    /// Sets the MSRs that a firmware would have set. For every vCPU.
    ///
    /// # Errors
    /// The ioctl failed, or KVM refused one of them.
    pub fn set_boot_msrs(&self) -> Result<(), Error> {
        let entries: Vec<_> = regs::BOOT_MSRS
            .iter()
            .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
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

    /// Makes this thread the one that runs the vCPU, and the one to [`kick`].
    pub fn bind(&mut self) {
        RUN.set(self.fd.get_kvm_run());
    }

    /// Enters the guest until something needs the monitor.
    ///
    /// # Errors
    /// KVM_RUN failed other than by a signal.
    pub fn run(&mut self) -> Result<Exit<'_>, Error> {
        match self.fd.run() {
            // SAFETY: the page was filled just now, kvm-ioctls mapped all of it, and the borrow of `self` keeps
            // everybody else off.
            Ok(_) => Ok(unsafe { exit::decode(self.fd.get_kvm_run(), self.id) }),
            Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => {
                self.fd.set_kvm_immediate_exit(0);
                Ok(Exit::Kicked)
            }
            Err(e) => ioctl("KVM_RUN", Err(e)),
        }
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

    /// Enters the guest and returns the raw exit reason (KVM_EXIT_*), with nothing around the system call: what a
    /// monitor's own share of an exit is measured against. PIO and MMIO are answered with what lies in kvm_run.
    ///
    /// # Errors
    /// KVM_RUN failed, also by a signal.
    pub fn run_bare(&mut self) -> Result<u32, Error> {
        // _IO(KVMIO, 0x80), KVM's API, 4.10.
        const KVM_RUN: libc::c_ulong = 0xae80;
        // SAFETY: the ioctl takes no argument; what it writes is kvm_run, which `self` lends to nobody now.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) } < 0 {
            return Err(Error::Ioctl { ioctl: "KVM_RUN", source: io::Error::last_os_error() });
        }
        Ok(self.fd.get_kvm_run().exit_reason)
    }

    /// Frequency of the guest's time-stamp counter in kHz, which is the host's; `None` where KVM does not know it.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz != 0)
    }

    /// Lets KVM finish the instruction whose PIO or MMIO was handled last, without running another. Before that the
    /// registers are those of the unfinished instruction. An instruction that reads and writes, or a string, exits again on
    /// the way: that exit is to be handled, and this to be called again until there is none.
    ///
    /// # Errors
    /// KVM_RUN failed other than by immediate_exit.
    pub fn finish_instruction(&mut self) -> Result<Option<Exit<'_>>, Error> {
        self.fd.set_kvm_immediate_exit(1);
        let run: *mut kvm_run = self.fd.get_kvm_run();
        let exit = self.run()?;
        // SAFETY: the page lives as long as `self`; the byte is apart from what `exit` refers to, and is shared with the
        // kernel, hence volatile.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 0) };
        Ok((exit != Exit::Kicked).then_some(exit))
    }

    /// Whether it comes back after each instruction ([`Vcpu::set_guest_debug`]).
    pub fn is_stepping(&self) -> bool {
        self.steps
    }

    /// Tells the guest's clock that the machine stood still, so that no watchdog takes the pause for a lockup.
    pub fn announce_pause(&self) {
        // Refused where the guest has not set a kvmclock up: then it has no such watchdog check either.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// KVM's counters of this vCPU.
    ///
    /// # Errors
    /// This KVM has none (before Linux 5.14), or the host is out of descriptors.
    pub fn counters(&self) -> io::Result<Counters> {
        Counters::of(&self.fd)
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

    /// Whether it runs, is halted or waits for SIPI.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn mp_state(&self) -> Result<kvm_mp_state, Error> {
        ioctl("KVM_GET_MP_STATE", self.fd.get_mp_state())
    }

    /// Guest physical address of a linear address, by the guest's own page tables; `None` if it is not mapped.
    pub fn translate(&self, linear: u64) -> Option<u64> {
        self.fd.translate_gva(linear).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        if RUN.get() == run {
            RUN.set(ptr::null_mut());
        }
    }
}

/// Makes the thread that bound a vCPU come back from KVM_RUN, now or at its next call. From any thread.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // Fails only for a thread that has ended.
    let _ = thread.kill(kick_signal());
}
