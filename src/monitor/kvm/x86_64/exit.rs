//! The exits that x86-64 alone has.

use kvm_bindings as kb;

use crate::hyperv::Synic;
use crate::kvm::exit::{Exit, Stuck};

/// A breakpoint that was hit, or a step that is done: the exception that would have told the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trap {
    /// 1 is #DB, 3 is #BP.
    pub exception: u32,
    /// Linear address of the next instruction; for #BP of the INT3.
    pub pc: u64,
    /// DR6 as the processor set it: which debug registers, whether a step.
    pub dr6: u64,
}

/// Reads what `run` holds of an exit for `reason`, if it is one of this architecture's.
///
/// # Safety
/// `start` is that of a whole kvm_run mapping, and `run` its union, as for `kvm::exit::decode`.
#[inline]
pub(in crate::kvm) unsafe fn decode(
    reason: u32,
    start: *mut u8,
    run: &mut kb::kvm_run__bindgen_ty_1,
    vcpu: u32,
) -> Exit<'_> {
    // SAFETY: each arm reads the member of the union that KVM fills for this exit reason; all of them are plain
    // integers, for which any bytes are valid. The PIO data lies where the kernel says, inside the mapping.
    unsafe {
        match reason {
            kb::KVM_EXIT_IO => {
                let io = run.io;
                let size = usize::from(io.size).max(1);
                let data = std::slice::from_raw_parts_mut(
                    start.add(io.data_offset as usize),
                    size * io.count as usize,
                );
                match u32::from(io.direction) {
                    kb::KVM_EXIT_IO_IN => Exit::PioIn { port: io.port, size, data },
                    _ => Exit::PioOut { port: io.port, size, data },
                }
            }
            kb::KVM_EXIT_DEBUG => {
                let debug = run.debug.arch;
                Exit::Debug(Trap { exception: debug.exception, pc: debug.pc, dr6: debug.dr6 })
            }
            kb::KVM_EXIT_X86_RDMSR => Exit::MsrRead { number: run.msr.index, refused: &mut run.msr.error },
            kb::KVM_EXIT_X86_WRMSR => {
                let msr = &mut run.msr;
                Exit::MsrWrite { number: msr.index, value: msr.data, refused: &mut msr.error }
            }
            kb::KVM_EXIT_HYPERV => match (run.hyperv.type_, &mut run.hyperv.u) {
                (kb::KVM_EXIT_HYPERV_SYNIC, set) => {
                    let set = set.synic;
                    let synic = Synic { control: set.control, events: set.evt_page, messages: set.msg_page };
                    Exit::Synic { vcpu, msr: set.msr, synic }
                }
                (kb::KVM_EXIT_HYPERV_HCALL, call) => {
                    let call = &mut call.hcall;
                    Exit::Hypercall { input: call.input, parameters: call.params, status: &mut call.result }
                }
                _ => Exit::Stuck(Stuck::Unexpected(kb::KVM_EXIT_HYPERV)),
            },
            kb::KVM_EXIT_IOAPIC_EOI => Exit::IoApicEoi(run.eoi.vector),
            other => Exit::Stuck(Stuck::Unexpected(other)),
        }
    }
}
