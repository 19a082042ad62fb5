//! The guest's memory at linear addresses, by its own page tables: the code that reports and traces show, and what a debugger
//! reads and writes.

use vm_memory::{Bytes, GuestAddress};

use crate::kvm::Vcpu;
use crate::memory::GuestRam;

/// Longest x86 instruction (SDM vol. 2, 2.3.11).
pub const MAX_INSTRUCTION: usize = 15;

/// Parts of `len` bytes at `linear` that lie in one page each, as far as pages are mapped: physical address, and which bytes.
fn parts(
    vcpu: &Vcpu,
    linear: u64,
    len: usize,
) -> impl Iterator<Item = (GuestAddress, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = linear.wrapping_add(done as u64);
        let count = (0x1000 - (at & 0xfff) as usize).min(len - done);
        if count == 0 {
            return None;
        }
        let physical = vcpu.translate(at)?;
        done += count;
        Some((GuestAddress(physical), done - count..done))
    })
}

/// Reads as far as there is RAM; returns how far.
pub fn read(vcpu: &Vcpu, ram: &GuestRam, linear: u64, bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for (physical, part) in parts(vcpu, linear, bytes.len()) {
        let end = part.end;
        if ram.read_slice(&mut bytes[part], physical).is_err() {
            break;
        }
        done = end;
    }
    done
}

/// Writes as far as there is RAM, also where the guest itself may only read; returns how far.
pub fn write(vcpu: &Vcpu, ram: &GuestRam, linear: u64, bytes: &[u8]) -> usize {
    let mut done = 0;
    for (physical, part) in parts(vcpu, linear, bytes.len()) {
        let end = part.end;
        if ram.write_slice(&bytes[part], physical).is_err() {
            break;
        }
        done = end;
    }
    done
}
