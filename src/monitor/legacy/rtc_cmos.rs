//! The PC's clock with its 128 bytes of battery-backed memory (MC146818; ports 0x70 and 0x71).
//!
//! There with `--firmware` and `--rtc`: firmware reads sizes and processors from the memory as QEMU writes them there, and some wait
//! for the clock. The clock is the host's, UTC, and cannot be set; there are no alarms and no interrupt. Kernels have better
//! clocks and are told by the FADT that there is none here.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};
use crate::memory::layout;
use crate::state::{StateError, Stateful};

/// Ports: index and data.
pub const SIZE: u64 = 2;

/// Bytes of memory; the index port's upper bit masks NMIs, of which there are none.
const BYTES: usize = 128;
/// Status B: 24 hours; binary-coded decimals.
const STATUS_B: (usize, u8) = (0x0b, 0b10);
/// Status D: the battery is good.
const STATUS_D: (usize, u8) = (0x0d, 0x80);
const CENTURY: usize = 0x32;
/// The processors, less one (QEMU's and Bochs' place).
const CPUS: usize = 0x5f;

/// Clock and memory.
#[derive(Debug)]
pub struct RtcCmos {
    index: u8,
    memory: [u8; BYTES],
}

/// What the guest could tell apart, but for the time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    index: u8,
    memory: Vec<u8>,
}

impl RtcCmos {
    /// Of a machine with so many bytes of RAM and processors.
    pub fn new(ram: u64, cpus: u32) -> Self {
        let mut memory = [0; BYTES];
        let mut put = |at: usize, value: u64, bytes: usize| {
            memory[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        let low = ram.min(layout::HOLE.start);
        let kib_above_1m = (low.saturating_sub(1 << 20) >> 10).min(0xffff);
        put(0x15, 640, 2);
        put(0x17, kib_above_1m, 2);
        put(0x30, kib_above_1m, 2);
        put(0x34, (low.saturating_sub(16 << 20) >> 16).min(0xffff), 2);
        put(0x5b, (ram - low) >> 16, 3);
        put(CPUS, u64::from(cpus.saturating_sub(1)), 1);
        put(STATUS_B.0, STATUS_B.1.into(), 1);
        put(STATUS_D.0, STATUS_D.1.into(), 1);
        Self { index: 0, memory }
    }

    fn value(&self) -> u8 {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let index = usize::from(self.index);
        clock(index, seconds).unwrap_or_else(|| self.memory.get(index).copied().unwrap_or(0xff))
    }
}

/// What the clock's register `index` reads so many seconds after 1970 began; none if it is memory.
fn clock(index: usize, seconds: u64) -> Option<u8> {
    let (days, time) = (seconds / 86400, seconds % 86400);
    // Days since 1 March of year 0, in eras of 400 years: leap days come last then.
    let (era, day) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
    let year_of_era = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let value = match index {
        0 => time % 60,
        2 => time / 60 % 60,
        4 => time / 3600,
        6 => (days + 4) % 7 + 1,
        7 => day_of_year - (153 * from_march + 2) / 5 + 1,
        8 => month,
        9 => year % 100,
        CENTURY => year / 100 % 100,
        _ => return None,
    };
    Some((value / 10 * 16 + value % 10) as u8)
}

impl Device for RtcCmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match data {
            [byte] if offset == 1 => *byte = self.value(),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        for (at, byte) in (offset..).zip(data) {
            match (at, self.memory.get_mut(usize::from(self.index))) {
                (0, _) => self.index = byte & 0x7f,
                (1, Some(memory)) if ![STATUS_B.0, STATUS_D.0].contains(&usize::from(self.index)) => {
                    *memory = *byte
                }
                _ => {}
            }
        }
        Effect::None
    }
}

impl Stateful for RtcCmos {
    type State = State;

    fn save(&self) -> State {
        State { index: self.index, memory: self.memory.to_vec() }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let invalid = |what: &str| StateError::Invalid(format!("CMOS {what}"));
        let memory = state.memory.try_into().map_err(|_| invalid("size"))?;
        if usize::from(state.index) >= BYTES {
            return Err(invalid("index"));
        }
        (self.index, self.memory) = (state.index, memory);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut RtcCmos, index: u8) -> u8 {
        device.write(0, &[index]);
        let mut byte = [0xff];
        device.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn the_date_is_right() {
        for (seconds, date) in [
            (0, [0x70, 0x19, 0x01, 0x01, 0x00, 0x00, 0x00, 0x05]),
            (951_827_696, [0x00, 0x20, 0x02, 0x29, 0x12, 0x34, 0x56, 0x03]),
            (1_798_761_599, [0x26, 0x20, 0x12, 0x31, 0x23, 0x59, 0x59, 0x05]),
            (4_102_444_800, [0x00, 0x21, 0x01, 0x01, 0x00, 0x00, 0x00, 0x06]),
        ] {
            let registers = [9, CENTURY, 8, 7, 4, 2, 0, 6];
            assert_eq!(registers.map(|index| clock(index, seconds).unwrap()), date, "{seconds}");
        }
    }

    #[test]
    fn sizes_and_processors_stand_in_memory() {
        let mut device = RtcCmos::new(5 << 30, 3);
        let mut word = |at: u8| u16::from(read(&mut device, at)) | u16::from(read(&mut device, at + 1)) << 8;
        assert_eq!((word(0x15), word(0x30), word(0x34)), (640, 0xffff, 0xbf00));
        assert_eq!((word(0x5b), read(&mut device, 0x5f)), ((2 << 14) as u16, 2));
        device.write(0, &[0x8f, 0x55]);
        assert_eq!(read(&mut device, 0x0f), 0x55, "both ports with one write, and NMIs masked");
        let state = device.save();
        let mut other = RtcCmos::new(2 << 20, 1);
        other.restore(state.clone()).unwrap();
        assert_eq!(other.save(), state);
        assert!(other.restore(State { index: 0x80, ..state.clone() }).is_err());
        assert!(other.restore(State { memory: vec![0; 127], ..state }).is_err());
    }
}
