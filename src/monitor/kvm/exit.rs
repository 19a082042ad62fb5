//! Our own [`Exit`]: what KVM_RUN returned for, read from the shared kvm_run page.
//!
//! kvm-ioctls' own type merges the elements of a `rep ins` or `rep outs` into one slice without their size; here
//! the element size stays, so that a device sees each element as the guest's instruction moved it.
//! Source: Documentation/virt/kvm/api.rst, section 5.

use kvm_bindings as kb;

use super::x86_64;
use crate::hyperv::Synic;

pub use super::x86_64::exit::Trap;

/// Why KVM cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stuck {
    /// KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state.
    FailEntry {
        /// Hardware's reason: VM-instruction error or exit code.
        reason: u64,
        /// Host CPU.
        cpu: u32,
    },
    /// KVM_EXIT_INTERNAL_ERROR: KVM gave up. Suberror 1 is an instruction that it could not emulate.
    InternalError {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// The instruction's bytes, where KVM gave them, and how many of them count.
        instruction: Option<([u8; 15], usize)>,
    },
    /// An exit that nothing here asks for, by its number.
    Unexpected(u32),
}

/// Why a vCPU came back from the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// IN or INS: fill `data`, which holds one element of `size` bytes or more of them.
    PioIn {
        /// Port.
        port: u16,
        /// Bytes of an element: 1, 2 or 4.
        size: usize,
        /// All elements.
        data: &'a mut [u8],
    },
    /// OUT or OUTS.
    PioOut {
        /// Port.
        port: u16,
        /// Bytes of an element: 1, 2 or 4.
        size: usize,
        /// All elements.
        data: &'a [u8],
    },
    /// A read of an address with no memory slot: fill `data` (1 to 8 bytes).
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// What the guest will read.
        data: &'a mut [u8],
    },
    /// A write to an address with no memory slot.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// HLT, which only comes here without in-kernel interrupt controllers.
    Halt,
    /// Triple fault.
    Shutdown,
    /// The guest asked for this by a paravirtual call; the number is KVM_SYSTEM_EVENT_*.
    SystemEvent(u32),
    /// RDMSR of a register that the guest may not use (KVM_X86_SET_MSR_FILTER).
    MsrRead {
        /// Its number.
        number: u32,
        /// Not 0: the guest gets #GP.
        refused: &'a mut u8,
    },
    /// WRMSR to one.
    MsrWrite {
        /// Its number.
        number: u32,
        /// What was to be written.
        value: u64,
        /// Not 0: the guest gets #GP.
        refused: &'a mut u8,
    },
    /// A guest that knows Hyper-V's interface set its interrupt controller up: its message and event pages, for one.
    Synic {
        /// Whose.
        vcpu: u32,
        /// The MSR that it wrote.
        msr: u32,
        /// What all of them hold now.
        synic: Synic,
    },
    /// A hypercall of Hyper-V's that KVM does not answer.
    Hypercall {
        /// Its code and kind (TLFS, Hypercall Interface).
        input: u64,
        /// The two parameters: values, or guest physical addresses.
        parameters: [u64; 2],
        /// The status that the guest gets.
        status: &'a mut u64,
    },
    /// A breakpoint or single step that was asked for.
    Debug(Trap),
    /// End of interrupt for a vector of a split interrupt controller.
    IoApicEoi(u8),
    /// A signal, or a request to leave: look at the gate.
    Kicked,
    /// The run cannot go on.
    Stuck(Stuck),
}

/// Reads the exit of `vcpu` out of kvm_run.
///
/// # Safety
/// `run` must be the start of a whole kvm_run mapping, of KVM_GET_VCPU_MMAP_SIZE bytes, which KVM_RUN has just
/// filled, with nothing else referring to it for the returned lifetime.
pub(super) unsafe fn decode(run: &mut kb::kvm_run, vcpu: u32) -> Exit<'_> {
    let start: *mut u8 = (&raw mut *run).cast();
    let exit = &mut run.__bindgen_anon_1;
    // SAFETY: each arm reads the member of the union that KVM fills for this exit reason; all of them are plain
    // integers, for which any bytes are valid. The mapping is as the caller promises.
    unsafe {
        match run.exit_reason {
            kb::KVM_EXIT_MMIO => {
                let mmio = &mut exit.mmio;
                let len = (mmio.len as usize).min(mmio.data.len());
                let data = &mut mmio.data[..len];
                match mmio.is_write {
                    0 => Exit::MmioRead { address: mmio.phys_addr, data },
                    _ => Exit::MmioWrite { address: mmio.phys_addr, data },
                }
            }
            kb::KVM_EXIT_HLT => Exit::Halt,
            kb::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            kb::KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent(exit.system_event.type_),
            kb::KVM_EXIT_FAIL_ENTRY => Exit::Stuck(Stuck::FailEntry {
                reason: exit.fail_entry.hardware_entry_failure_reason,
                cpu: exit.fail_entry.cpu,
            }),
            kb::KVM_EXIT_INTERNAL_ERROR => {
                let failure = exit.emulation_failure;
                let has_bytes = failure.suberror == kb::KVM_INTERNAL_ERROR_EMULATION
                    && failure.ndata >= 1
                    && failure.flags & u64::from(kb::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES)
                        != 0;
                let bytes = failure.__bindgen_anon_1.__bindgen_anon_1;
                let instruction = has_bytes.then(|| (bytes.insn_bytes, usize::from(bytes.insn_size).min(15)));
                Exit::Stuck(Stuck::InternalError { suberror: failure.suberror, instruction })
            }
            kb::KVM_EXIT_INTR => Exit::Kicked,
            other => x86_64::exit::decode(other, start, exit, vcpu),
        }
    }
}
