//! A vCPU descriptor: run it, kick it out. Its registers are the architecture's.
//!
//! Leaving the guest on request takes two steps that together cannot miss: the signal interrupts KVM_RUN, and its
//! handler sets `immediate_exit`, so that a signal which arrives just before KVM_RUN makes that return at once.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Once;
use std::thread::JoinHandle;

use kvm_bindings::{KVMIO, kvm_mp_state, kvm_pre_fault_memory, kvm_run};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;
use vmm_sys_util::signal::{self, Killable};

use super::exit::{self, Exit};
use super::{Counters, Error, ioctl};

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

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
    pub(super) keeps_registers: bool,
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

    /// Has KVM map the guest-physical `addresses`, whole pages, as if the guest had read each: it then finds them without an exit. What
    /// it writes to is copied as ever.
    ///
    /// # Errors
    /// This KVM cannot (before Linux 6.11, or without nested paging), or the host lacks memory; some of it may be mapped.
    pub fn map_ahead(&self, addresses: Range<u64>) -> io::Result<()> {
        let size = addresses.end.saturating_sub(addresses.start);
        let mut left = kvm_pre_fault_memory { gpa: addresses.start, size, ..Default::default() };
        while left.size > 0 {
            // SAFETY: the ioctl reads and writes the structure that it is given, and maps what the guest may see anyway.
            if unsafe { ioctl_with_mut_ref(&self.fd, KVM_PRE_FAULT_MEMORY(), &mut left) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Has KVM do what it leaves for the first KVM_RUN, above all a kernel thread for the VM (since Linux 6.14), and enters no
    /// guest.
    pub fn warm_up(&mut self) {
        // Whatever fails, fails again when it is to run.
        let _ = self.finish_instruction();
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

    /// Enters the guest and returns the raw exit reason (KVM_EXIT_*), with nothing around the system call: what a
    /// monitor's own share of an exit is measured against. PIO and MMIO are answered with what lies in kvm_run.
    ///
    /// # Errors
    /// KVM_RUN failed, also by a signal.
    pub fn run_bare(&mut self) -> Result<u32, Error> {
        // _IO(KVMIO, 0x80), KVM's API, 4.10.
        const KVM_RUN: libc::Ioctl = 0xae80;
        // SAFETY: the ioctl takes no argument; what it writes is kvm_run, which `self` lends to nobody now.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) } < 0 {
            return Err(Error::Ioctl { ioctl: "KVM_RUN", source: io::Error::last_os_error() });
        }
        Ok(self.fd.get_kvm_run().exit_reason)
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

    /// KVM's counters of this vCPU.
    ///
    /// # Errors
    /// This KVM has none (before Linux 5.14), or the host is out of descriptors.
    pub fn counters(&self) -> io::Result<Counters> {
        Counters::of(&self.fd)
    }

    /// Whether it runs, is halted or waits for SIPI.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn mp_state(&self) -> Result<kvm_mp_state, Error> {
        ioctl("KVM_GET_MP_STATE", self.fd.get_mp_state())
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
