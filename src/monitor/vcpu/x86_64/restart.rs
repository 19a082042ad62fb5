//! Decides whether a triple fault was deliberate: the last way in which kernels reset a PC, and Linux's with
//! `reboot=triple`.
//!
//! The run loop asks when a vCPU went into shutdown. What tells is what kernels do just before, as far as it
//! is still to be seen: kvm-amd resets a vCPU that went into shutdown before it tells of it, so that its
//! tables are gone there.

use vm_memory::{Bytes, GuestAddress};

use crate::kvm::Vcpu;
use crate::memory::{GuestRam, layout};

/// What is known of the shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Evidence {
    /// Limits of the IDT and the GDT. Without an IDT any exception is a triple fault. Linux takes the GDT
    /// away as well on the way into another kernel (kexec): what faults there is a crash.
    idt_limit: u16,
    gdt_limit: u16,
    /// The words at [`layout::RESET_FLAG`] and behind it, where they were ours at the start: Linux writes to
    /// the first how the firmware is to start, before it tries any way to reset. Who clears memory writes to
    /// both.
    flag: Option<[u16; 2]>,
}

const COLD: u16 = 0;
const WARM: u16 = 0x1234;

fn was_meant(evidence: Evidence) -> bool {
    let no_handlers = evidence.idt_limit == 0 && evidence.gdt_limit != 0;
    no_handlers || matches!(evidence.flag, Some([COLD | WARM, layout::RESET_FLAG_UNTOUCHED]))
}

/// Whether the guest's `vcpu`, which went into shutdown, was to reset the machine by that. `flag`: nobody but
/// the guest's kernel writes to [`layout::RESET_FLAG`], as a BIOS would.
pub fn is_meant(vcpu: &Vcpu, ram: &GuestRam, flag: bool) -> bool {
    let Ok(sregs) = vcpu.sregs() else { return false };
    let words = || ram.read_obj(GuestAddress(layout::RESET_FLAG)).ok();
    let flag = if flag { words() } else { None };
    was_meant(Evidence { idt_limit: sregs.idt.limit, gdt_limit: sregs.gdt.limit, flag })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kernels_do_before_a_reset_tells_it_from_a_crash() {
        const OURS: Option<[u16; 2]> = flag(layout::RESET_FLAG_UNTOUCHED);
        const fn flag(word: u16) -> Option<[u16; 2]> {
            Some([word, layout::RESET_FLAG_UNTOUCHED])
        }
        for (idt_limit, gdt_limit, flag, meant) in [
            (0xfff, 0x7f, OURS, false),
            // As a vCPU starts, and as kvm-amd leaves it.
            (0xffff, 0xffff, OURS, false),
            (0xffff, 0xffff, None, false),
            (0xffff, 0xffff, flag(COLD), true),
            (0xffff, 0xffff, flag(WARM), true),
            (0xffff, 0xffff, flag(0x55aa), false),
            (0xffff, 0xffff, Some([0, 0]), false),
            (0, 0x7f, OURS, true),
            (0, 0x7f, None, true),
            (0, 0, OURS, false),
        ] {
            assert_eq!(
                was_meant(Evidence { idt_limit, gdt_limit, flag }),
                meant,
                "{idt_limit:#x} {gdt_limit:#x} {flag:x?}"
            );
        }
    }
}
