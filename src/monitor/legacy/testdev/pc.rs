//! The device that kvm-unit-tests drives: what QEMU calls pc-testdev, for tests of KVM itself. There only when asked for.
//!
//! Three parts, each a device on a bus: [`Ports`] (a register to read back, and a port that makes the host forget a page),
//! [`IrqLines`] (a port per I/O APIC pin, whose level it sets), and [`IoRam`] (memory that is not RAM: each access exits).

use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::memory::testdev::unmap_briefly;
use crate::state::{StateError, Stateful};
use crate::vm::Vm;

/// Ports of [`Ports`], from [`layout::TEST_PORTS`](crate::memory::layout::TEST_PORTS).
pub const PORTS: u64 = 12;
/// Ports of [`IrqLines`], from [`layout::TEST_IRQS`](crate::memory::layout::TEST_IRQS): one per pin of the I/O APIC.
pub const LINES: u64 = 24;
/// Bytes of [`IoRam`], at [`layout::TEST_MEMORY`](crate::memory::layout::TEST_MEMORY).
pub const MEMORY: u64 = 0x1_0000;

/// Offset of the port that takes a page's address.
const FLUSH: u64 = 4;
/// Offset of the register's second place, for accesses by bytes.
const BYTES: u64 = 8;

/// A register of 4 bytes at offsets 0 and 8. A 4-byte write of a guest physical address at offset 4 makes KVM unmap that
/// page, so that the guest's next access to it is a fault that KVM must handle.
pub struct Ports {
    register: [u8; 4],
    ram: Arc<GuestRam>,
}

impl Ports {
    /// The pages are those of `ram`.
    pub fn new(ram: Arc<GuestRam>) -> Self {
        Self { register: [0; 4], ram }
    }

    fn byte(&mut self, at: u64) -> Option<&mut u8> {
        if (FLUSH..BYTES).contains(&at) { None } else { self.register.get_mut((at % FLUSH) as usize) }
    }
}

impl Device for Ports {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.byte(at).map_or(0, |register| *register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let (FLUSH, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            let address = u64::from(u32::from_le_bytes(address));
            if let Err(error) = unmap_briefly(&self.ram, address) {
                guest_warn!("the test device cannot unmap the page at {address:#x}: {error}");
            }
            return Effect::None;
        }
        for (at, from) in (offset..).zip(data) {
            if let Some(byte) = self.byte(at) {
                *byte = *from;
            }
        }
        Effect::None
    }
}

impl Stateful for Ports {
    type State = [u8; 4];

    fn save(&self) -> [u8; 4] {
        self.register
    }

    fn restore(&mut self, state: [u8; 4]) -> Result<(), StateError> {
        self.register = state;
        Ok(())
    }
}

/// A port per interrupt line: what is written, zero or not, is the line's level.
pub struct IrqLines {
    /// A bit per line.
    high: u32,
    /// Weak, because the VM must not outlive the machine in a device that somebody still holds.
    vm: Weak<dyn Vm>,
}

/// What the guest could tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lines {
    /// A bit per line that is high.
    pub high: u32,
}

impl IrqLines {
    /// The lines are those of `vm`, all low.
    pub fn new(vm: Weak<dyn Vm>) -> Self {
        Self { high: 0, vm }
    }
}

impl Device for IrqLines {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let high = data.iter().any(|byte| *byte != 0);
        let gsi = offset as u32;
        self.high = self.high & !(1 << gsi) | u32::from(high) << gsi;
        let set = self.vm.upgrade().map_or(Ok(()), |vm| vm.set_irq_level(gsi, high));
        if let Err(error) = set {
            guest_warn!("the test device cannot set interrupt line {gsi}: {error}");
        }
        Effect::None
    }
}

impl Stateful for IrqLines {
    type State = Lines;

    fn save(&self) -> Lines {
        Lines { high: self.high }
    }

    /// The interrupt controllers' own state has the levels.
    fn restore(&mut self, state: Lines) -> Result<(), StateError> {
        if state.high >> LINES != 0 {
            return Err(StateError::Invalid(format!("interrupt lines {:#x}", state.high)));
        }
        self.high = state.high;
        Ok(())
    }
}

/// Memory that the monitor answers for, byte by byte.
pub struct IoRam(Vec<u8>);

impl Default for IoRam {
    fn default() -> Self {
        Self(vec![0; MEMORY as usize])
    }
}

impl Device for IoRam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = self.0.get(at).copied().unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        for (at, from) in (offset as usize..).zip(data) {
            if let Some(byte) = self.0.get_mut(at) {
                *byte = *from;
            }
        }
        Effect::None
    }
}

impl Stateful for IoRam {
    type State = Vec<u8>;

    fn save(&self) -> Vec<u8> {
        self.0.clone()
    }

    fn restore(&mut self, state: Vec<u8>) -> Result<(), StateError> {
        if state.len() as u64 != MEMORY {
            return Err(StateError::Invalid(format!("{} bytes of test memory", state.len())));
        }
        self.0 = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Saved;
    use crate::vm::fake::FakeVm;

    fn ram() -> Arc<GuestRam> {
        crate::memory::Memory::new(&"2M".parse().unwrap()).unwrap().ram().clone()
    }

    #[test]
    fn the_register_reads_back_in_both_its_places() {
        let mut ports = Ports::new(ram());
        ports.write(0, &[1, 2, 3, 4]);
        ports.write(9, &[9]);
        let mut data = [0; 4];
        ports.read(0, &mut data);
        assert_eq!(data, [1, 9, 3, 4]);
        let mut word = [0; 2];
        ports.read(10, &mut word);
        assert_eq!(word, [3, 4]);
        let mut restored = Ports::new(ram());
        restored.restore_bytes(&ports.save_bytes()).unwrap();
        assert_eq!(restored.register, ports.register);
    }

    #[test]
    fn a_flushed_page_keeps_its_content_and_any_address_may_be_given() {
        use vm_memory::{Bytes, GuestAddress};
        let ram = ram();
        let mut ports = Ports::new(ram.clone());
        ram.write_obj(0x1234_5678u32, GuestAddress(0x3000)).unwrap();
        for address in [0x3004u32, 0, 0x1f_ffff, 0x20_0000, 0xff00_0000, u32::MAX] {
            ports.write(4, &address.to_le_bytes());
        }
        assert_eq!(ram.read_obj::<u32>(GuestAddress(0x3000)).unwrap(), 0x1234_5678);
        assert_eq!(ports.register, [0; 4]);
    }

    #[test]
    fn lines_have_levels() {
        let vm = Arc::new(FakeVm::default());
        let weak: Weak<FakeVm> = Arc::downgrade(&vm);
        let mut lines = IrqLines::new(weak);
        lines.write(5, &[1]);
        lines.write(23, &[1, 0, 0, 0]);
        lines.write(5, &[0]);
        assert_eq!(vm.levels(), [(5, true), (23, true), (5, false)]);
        assert_eq!(lines.save().high, 1 << 23);
        assert!(lines.restore(Lines { high: 1 << 24 }).is_err());
    }

    #[test]
    fn memory_keeps_what_is_written() {
        let mut memory = IoRam::default();
        memory.write(MEMORY - 2, &[7, 8]);
        let mut data = [0; 2];
        memory.read(MEMORY - 2, &mut data);
        assert_eq!(data, [7, 8]);
        assert!(memory.restore(vec![0]).is_err());
    }
}
