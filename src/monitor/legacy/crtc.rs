//! The cursor and timing registers of a PC's text screen (the CRT controller of MDA, CGA and VGA; ports 0x3d4 and 0x3d5).
//!
//! Kernels that write to the screen at 0xb8000 unasked keep their place on it here, and some stop where they read back another.
//! The registers hold what was written and do nothing else: the screen's memory is RAM, and nobody draws it. There only when
//! asked for.

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};
use crate::state::{StateError, Stateful};

/// Ports: index and data.
pub const SIZE: u64 = 2;

/// Registers of VGA's controller, the one with the most.
const REGISTERS: usize = 0x19;

/// The controller.
#[derive(Debug, Default)]
pub struct Crtc {
    index: u8,
    registers: [u8; REGISTERS],
}

/// What the guest could tell apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    index: u8,
    registers: [u8; REGISTERS],
}

impl Device for Crtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            match at {
                0 => *byte = self.index,
                1 => *byte = self.registers.get(usize::from(self.index)).copied().unwrap_or(0xff),
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        // One wide access sets both: the index, then what it names.
        for (at, byte) in (offset..).zip(data) {
            match at {
                0 => self.index = *byte,
                1 => {
                    if let Some(register) = self.registers.get_mut(usize::from(self.index)) {
                        *register = *byte;
                    }
                }
                _ => {}
            }
        }
        Effect::None
    }
}

impl Stateful for Crtc {
    type State = State;

    fn save(&self) -> State {
        State { index: self.index, registers: self.registers }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        (self.index, self.registers) = (state.index, state.registers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Saved;

    fn read(device: &mut Crtc, offset: u64) -> u8 {
        let mut data = [0xaa];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn the_cursor_is_where_it_was_put_even_after_a_restore() {
        const CURSOR_LOW: u8 = 15;
        let mut device = Crtc::default();
        device.write(0, &[CURSOR_LOW]);
        assert_eq!(read(&mut device, 1), 0, "the screen's first character");
        device.write(0, &[CURSOR_LOW - 1, 3]);
        device.write(0, &[CURSOR_LOW]);
        device.write(1, &[0x50]);
        let mut restored = Crtc::default();
        restored.restore_bytes(&device.save_bytes()).unwrap();
        assert_eq!((read(&mut restored, 0), read(&mut restored, 1)), (CURSOR_LOW, 0x50));
        restored.write(0, &[CURSOR_LOW - 1]);
        assert_eq!(read(&mut restored, 1), 3);
    }

    #[test]
    fn there_are_no_other_registers() {
        let mut device = Crtc::default();
        device.write(0, &[0xff, 1]);
        assert_eq!(read(&mut device, 1), 0xff);
        assert_eq!(device.registers, [0; REGISTERS]);
    }
}
