//! The port at which a guest's kernel says that it panicked: QEMU's pvpanic, on the ISA bus
//! (docs/specs/pvpanic.rst there).
//!
//! One byte at [`layout::PVPANIC`](crate::memory::layout::PVPANIC): a read tells which events are understood,
//! a write that they have come about. A guest finds it by ACPI (QEMU0001, `boot::tables::acpi`) and needs a
//! driver for it: pvpanic_mmio in Linux.

use crate::bus::{Device, Effect};
use crate::state::Stateless;

/// The kernel panicked, and nobody in the guest will do anything about it.
pub const PANICKED: u8 = 1 << 0;
/// It panicked, and goes on in a crash kernel, which saves a dump and then reboots.
pub const CRASH_LOADED: u8 = 1 << 1;

/// The port.
#[derive(Debug, Default)]
pub struct PvPanic;

impl Device for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = PANICKED | CRASH_LOADED;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        if data[0] & PANICKED != 0 {
            return Effect::Panic;
        }
        if data[0] & CRASH_LOADED != 0 {
            log::info!("the guest's kernel panicked and goes on in its crash kernel");
        }
        Effect::None
    }
}

impl Stateless for PvPanic {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_without_a_crash_kernel_is_one_and_other_events_are_not() {
        let mut device = PvPanic;
        let mut data = [0xff];
        device.read(0, &mut data);
        assert_eq!(data, [3]);
        assert_eq!(device.write(0, &[PANICKED]), Effect::Panic);
        for value in [0, CRASH_LOADED, 0xfc] {
            assert_eq!(device.write(0, &[value]), Effect::None, "{value:#x}");
        }
    }
}
