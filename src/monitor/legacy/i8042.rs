//! What is left of the i8042 keyboard controller: its reset line, which kernels without ACPI, or told `reboot=k`, pull.
//!
//! Five ports at [`layout::I8042`](crate::memory::layout::I8042). There is no keyboard: the FADT says so, and a kernel
//! that looks all the same finds an output buffer that never empties, takes it for a missing device and goes on at once.

use crate::bus::{Device, Effect};
use crate::state::Stateless;

/// Offset of the status (read) and command (write) register.
const COMMAND: u64 = 4;
/// Command: pulse output line 0, which is the processor's reset.
const PULSE_RESET: u8 = 0xfe;
/// Status: output buffer full; input buffer empty, so that nobody waits before the reset command.
const STATUS: u8 = 0x01;

/// The reset line.
#[derive(Debug, Default)]
pub struct I8042;

impl Device for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == COMMAND {
            data[0] = STATUS;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if offset == COMMAND && data.first() == Some(&PULSE_RESET) { Effect::Reset } else { Effect::None }
    }
}

impl Stateless for I8042 {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_and_looks_absent() {
        let mut device = I8042;
        assert_eq!(device.write(COMMAND, &[PULSE_RESET]), Effect::Reset);
        assert_eq!(device.write(COMMAND, &[0xaa]), Effect::None);
        assert_eq!(device.write(0, &[PULSE_RESET]), Effect::None, "the data port");
        let mut status = [0xff];
        device.read(COMMAND, &mut status);
        assert_eq!(status[0] & 0b11, 0b01, "kernels wait for bit 1 to clear before the reset command");
    }
}
