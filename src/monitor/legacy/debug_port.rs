//! The port that firmware says things at, character by character: 0x402 of QEMU and Bochs.
//!
//! There only with `--firmware`. Each line goes to the log (`-v` shows it), rate-limited like all that a guest says.

use std::time::{Duration, Instant};

use crate::bus::{Device, Effect};
use crate::state::Stateless;

/// What the port reads as: somebody listens.
const READBACK: u8 = 0xe9;
/// A longer line is logged in parts.
const LINE: usize = 200;
/// Lines that are logged in each [`PERIOD`]: SeaBIOS says about a hundred.
const BURST: u32 = 500;
const PERIOD: Duration = Duration::from_secs(10);

/// The port.
#[derive(Debug)]
pub struct DebugPort {
    line: String,
    since: Instant,
    said: u32,
}

impl Default for DebugPort {
    fn default() -> Self {
        Self { line: String::new(), since: Instant::now(), said: 0 }
    }
}

impl DebugPort {
    fn end_line(&mut self) {
        if self.since.elapsed() >= PERIOD {
            (self.since, self.said) = (Instant::now(), 0);
        }
        self.said = self.said.saturating_add(1);
        if self.said <= BURST && !self.line.trim().is_empty() {
            log::info!("firmware: {}", self.line.trim_end());
        }
        self.line.clear();
    }
}

impl Device for DebugPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(READBACK);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        for byte in data {
            match byte {
                b'\n' => self.end_line(),
                b' '..=b'~' => self.line.push(char::from(*byte)),
                _ => {}
            }
            if self.line.len() >= LINE {
                self.end_line();
            }
        }
        Effect::None
    }
}

/// What is on its way to the log is not the guest's to see.
impl Stateless for DebugPort {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded() {
        let mut device = DebugPort::default();
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [READBACK]);
        for _ in 0..10_000 {
            assert_eq!(device.write(0, b"x"), Effect::None);
        }
        assert!(device.line.len() < LINE);
        device.write(0, b"\x1b\n");
        assert_eq!(device.line, "");
    }
}
