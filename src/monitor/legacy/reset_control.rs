//! The reset control register of a PC's chipset, port 0xcf9: what kernels told `reboot=pci` write to.
//!
//! One byte (Intel ICH9 data sheet, 13.7.5). It lies inside PCI's configuration address port, which takes 4
//! bytes at 0xcf8 only.

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};
use crate::state::{StateError, Stateful};

/// Bit 2, RST_CPU: the machine resets as it goes from 0 to 1. Bits 1 and 3 say how hard, which is all the
/// same here.
const RST_CPU: u8 = 1 << 2;
/// SYS_RST, RST_CPU and FULL_RST; the other bits are reserved and read as 0.
const WRITABLE: u8 = 0b1110;

/// The register.
#[derive(Debug, Default)]
pub struct ResetControl(u8);

/// What the guest could tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The register as it was last written.
    pub value: u8,
}

impl Device for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = self.0;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        let before = std::mem::replace(&mut self.0, data[0] & WRITABLE);
        if !before & self.0 & RST_CPU != 0 { Effect::Reset } else { Effect::None }
    }
}

impl Stateful for ResetControl {
    type State = State;

    fn save(&self) -> State {
        State { value: self.0 }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if state.value & !WRITABLE != 0 {
            return Err(StateError::Invalid(format!("reset control {:#x}", state.value)));
        }
        self.0 = state.value;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Saved;

    #[test]
    fn the_rising_edge_of_rst_cpu_resets() {
        // As Linux writes it: the kind of reset first, then the edge.
        for writes in [&[0x02u8, 0x0e][..], &[0x02, 0x06], &[0x04], &[0x06, 0x02, 0x06]] {
            let mut device = ResetControl::default();
            let (last, first) = writes.split_last().unwrap();
            first.iter().filter(|value| *value & RST_CPU == 0).for_each(|value| {
                assert_eq!(device.write(0, &[*value]), Effect::None, "{writes:x?}");
            });
            assert_eq!(device.write(0, &[*last]), Effect::Reset, "{writes:x?}");
        }
    }

    #[test]
    fn what_was_written_reads_back_even_after_a_restore() {
        let mut device = ResetControl::default();
        device.write(0, &[0xfb]);
        let mut restored = ResetControl::default();
        restored.restore_bytes(&device.save_bytes()).unwrap();
        for device in [&mut device, &mut restored] {
            let mut data = [0xff];
            device.read(0, &mut data);
            assert_eq!(data, [0x0a]);
            assert_eq!(device.write(0, &[0x06]), Effect::Reset);
            assert_eq!(device.write(0, &[0x06]), Effect::None, "no edge");
        }
        assert!(restored.restore_bytes(&[1, 0xff]).is_err());
    }
}
