//! A port with which a guest ends the run with a status of its own: what QEMU calls isa-debug-exit.
//!
//! One port, [`layout::DEBUG_EXIT`](crate::memory::layout::DEBUG_EXIT) unless configured otherwise; for tests and
//! small guests. There only when asked for.

use crate::bus::{Device, Effect};
use crate::state::Stateless;

/// Ports that it takes.
pub const SIZE: u64 = 4;

/// The port.
#[derive(Debug, Default)]
pub struct DebugExit;

impl Device for DebugExit {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    /// A write of V ends the run with exit code (V << 1) | 1, of which a process shows the low 8 bits: never 0, so
    /// that a guest cannot be taken for one that powered off.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match data {
            [value, ..] if offset == 0 => Effect::Exit(value << 1 | 1),
            _ => Effect::None,
        }
    }
}

impl Stateless for DebugExit {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_odd_and_comes_from_the_low_byte() {
        let mut device = DebugExit;
        for (data, code) in [(&[0u8][..], 1), (&[1], 3), (&[0x7f, 9, 9, 9], 0xff), (&[0x80], 1)] {
            assert_eq!(device.write(0, data), Effect::Exit(code), "{data:?}");
        }
        assert_eq!(device.write(1, &[1]), Effect::None);
    }
}
