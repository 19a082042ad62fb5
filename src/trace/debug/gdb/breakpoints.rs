//! What gdb wants the guest to stop at: INT3 in its memory, and the four debug registers.

use vm_memory::{Bytes, GuestAddress};

use vmm_monitor::kvm::debug::{Access, BREAKPOINTS, Breakpoint};
use vmm_monitor::memory::GuestRam;

/// INT3.
const INT3: u8 = 0xcc;
/// Breakpoints in memory at most: more is not a person's doing.
const MAX_SOFTWARE: usize = 4096;

/// A breakpoint in memory.
#[derive(Debug, Clone, Copy)]
struct Software {
    linear: u64,
    physical: GuestAddress,
    original: u8,
}

/// All that are set.
#[derive(Debug, Default)]
pub struct Breakpoints {
    software: Vec<Software>,
    hardware: Vec<Breakpoint>,
}

impl Breakpoints {
    /// Puts INT3 at `linear`, which lies at `physical`. False if that cannot be.
    pub fn add_software(&mut self, ram: &GuestRam, linear: u64, physical: u64) -> bool {
        if self.software_at(linear) {
            return true;
        }
        let physical = GuestAddress(physical);
        let Ok(original) = ram.read_obj(physical) else { return false };
        if self.software.len() >= MAX_SOFTWARE || ram.write_obj(INT3, physical).is_err() {
            return false;
        }
        self.software.push(Software { linear, physical, original });
        true
    }

    /// Restores what was at `linear`, unless the guest has written something else there meanwhile.
    pub fn remove_software(&mut self, ram: &GuestRam, linear: u64) {
        if let Some(at) = self.software.iter().position(|breakpoint| breakpoint.linear == linear) {
            restore(ram, &self.software.swap_remove(at));
        }
    }

    /// Whether one is at `linear`.
    pub fn software_at(&self, linear: u64) -> bool {
        self.software.iter().any(|breakpoint| breakpoint.linear == linear)
    }

    /// Any in memory?
    pub fn any_software(&self) -> bool {
        !self.software.is_empty()
    }

    /// Puts back into `bytes`, read at `linear`, what breakpoints hide.
    pub fn unhide(&self, linear: u64, bytes: &mut [u8]) {
        for breakpoint in &self.software {
            let offset = usize::try_from(breakpoint.linear.wrapping_sub(linear)).unwrap_or(usize::MAX);
            if let Some(byte) = bytes.get_mut(offset) {
                *byte = breakpoint.original;
            }
        }
    }

    /// `bytes` have been written at `linear`: breakpoints there come back, over the new bytes.
    pub fn written(&mut self, ram: &GuestRam, linear: u64, bytes: &[u8]) {
        for breakpoint in &mut self.software {
            let offset = usize::try_from(breakpoint.linear.wrapping_sub(linear)).unwrap_or(usize::MAX);
            if let Some(byte) = bytes.get(offset) {
                breakpoint.original = *byte;
                // It was there when the breakpoint was set.
                let _ = ram.write_obj(INT3, breakpoint.physical);
            }
        }
    }

    /// Takes a debug register for it. False if there is none left, or none can watch so many bytes there.
    pub fn add_hardware(&mut self, breakpoint: Breakpoint) -> bool {
        let Breakpoint { address, len, access } = breakpoint;
        let fits = matches!(len, 1 | 2 | 4 | 8) && address.is_multiple_of(len);
        if !fits || (access == Access::Execute && len != 1) {
            return false;
        }
        if !self.hardware.contains(&breakpoint) {
            if self.hardware.len() >= BREAKPOINTS {
                return false;
            }
            self.hardware.push(breakpoint);
        }
        true
    }

    /// Gives its debug register back.
    pub fn remove_hardware(&mut self, breakpoint: Breakpoint) {
        self.hardware.retain(|known| *known != breakpoint);
    }

    /// What the debug registers hold, in order.
    pub fn hardware(&self) -> &[Breakpoint] {
        &self.hardware
    }

    /// Takes all away.
    pub fn clear(&mut self, ram: &GuestRam) {
        self.software.drain(..).for_each(|breakpoint| restore(ram, &breakpoint));
        self.hardware.clear();
    }

    /// The memory that they were in is gone.
    pub fn forget_software(&mut self) {
        self.software.clear();
    }
}

fn restore(ram: &GuestRam, breakpoint: &Software) {
    if ram.read_obj::<u8>(breakpoint.physical).is_ok_and(|byte| byte == INT3) {
        let _ = ram.write_obj(breakpoint.original, breakpoint.physical);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_reads_as_if_there_were_no_breakpoints_and_is_restored() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        ram.write_slice(&[1, 2, 3, 4], GuestAddress(0x10)).unwrap();
        let mut breakpoints = Breakpoints::default();
        // Mapped elsewhere, so that addresses differ.
        assert!(breakpoints.add_software(&ram, 0x8011, 0x11) && breakpoints.add_software(&ram, 0x8011, 0x11));
        assert!(!breakpoints.add_software(&ram, 0x9000, 0x1000), "no RAM there");
        let mut bytes = [0; 4];
        let read = |bytes: &mut [u8; 4]| ram.read_slice(bytes, GuestAddress(0x10)).unwrap();
        read(&mut bytes);
        assert_eq!(bytes, [1, 0xcc, 3, 4]);
        breakpoints.unhide(0x8010, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4]);
        ram.write_slice(&[9, 9], GuestAddress(0x11)).unwrap();
        breakpoints.written(&ram, 0x8011, &[9, 9]);
        read(&mut bytes);
        assert_eq!(bytes, [1, 0xcc, 9, 4]);
        breakpoints.remove_software(&ram, 0x8011);
        read(&mut bytes);
        assert_eq!(bytes, [1, 9, 9, 4]);
        // What the guest wrote itself stays.
        assert!(breakpoints.add_software(&ram, 0x8010, 0x10));
        ram.write_obj(7u8, GuestAddress(0x10)).unwrap();
        breakpoints.clear(&ram);
        read(&mut bytes);
        assert_eq!(bytes, [7, 9, 9, 4]);
    }

    #[test]
    fn there_are_four_debug_registers() {
        let mut breakpoints = Breakpoints::default();
        let watch = |address, len| Breakpoint { address, len, access: Access::Write };
        assert!(!breakpoints.add_hardware(watch(0x1001, 2)) && !breakpoints.add_hardware(watch(0x1000, 16)));
        assert!((0..4).all(|n| breakpoints.add_hardware(watch(n * 8, 8))));
        assert!(breakpoints.add_hardware(watch(0, 8)), "known already");
        assert!(!breakpoints.add_hardware(watch(0x100, 1)));
        breakpoints.remove_hardware(watch(0, 8));
        assert!(breakpoints.add_hardware(watch(0x100, 1)));
    }
}
