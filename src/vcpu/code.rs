//! The guest's code where a vCPU stands, for reports and traces.

use vm_memory::{Bytes, GuestAddress};

use crate::kvm::Vcpu;
use crate::memory::GuestRam;

/// Longest x86 instruction (SDM vol. 2, 2.3.11).
pub const MAX: usize = 15;

/// Reads guest memory at a linear address by the guest's own page tables, as far as that goes; returns how far.
pub fn read(vcpu: &Vcpu, ram: &GuestRam, linear: u64, bytes: &mut [u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        let at = linear.wrapping_add(done as u64);
        let in_page = (0x1000 - (at & 0xfff) as usize).min(bytes.len() - done);
        let Some(physical) = vcpu.translate(at) else { break };
        if ram.read_slice(&mut bytes[done..done + in_page], GuestAddress(physical)).is_err() {
            break;
        }
        done += in_page;
    }
    done
}
