//! Port 0x80 as a stopwatch: what a guest writes there is logged with the time since the monitor started.
//!
//! There only when asked for. Firmware and test guests mark their progress with it; the guest cannot read it back, so
//! there is no guest-visible state. One mark says that the guest is ready.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::bus::{Device, Effect};
use crate::state::Stateless;

/// Marks that are kept and logged. Linux without paravirtual I/O delay writes to this port thousands of times.
pub const MAX_MARKS: usize = 1024;
/// The mark of a guest that is ready for what it is there for. Firecracker's boot timer takes the same.
pub const READY: u32 = 123;

/// Whether the guest has said that it is [`READY`].
#[derive(Debug, Default)]
pub struct Ready {
    said: Mutex<bool>,
    changed: Condvar,
}

impl Ready {
    fn say(&self) {
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for it, `limit` at most.
    pub fn wait(&self, limit: Duration) -> bool {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(said, limit, |said| !*said);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// What was written: 1, 2 or 4 bytes.
    pub value: u32,
    /// When, since the monitor started.
    pub at: Duration,
}

/// The port.
#[derive(Debug)]
pub struct BootMarks {
    start: Instant,
    ready: Arc<Ready>,
    marks: Vec<Mark>,
    dropped: u64,
}

impl BootMarks {
    /// `start` is when the monitor started. `ready` hears of that mark.
    pub fn new(start: Instant, ready: Arc<Ready>) -> Self {
        Self { start, ready, marks: Vec::new(), dropped: 0 }
    }

    /// The first [`MAX_MARKS`] marks, oldest first.
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// How many came after those.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

impl Device for BootMarks {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        let at = self.start.elapsed();
        let value = data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        if value == READY {
            self.ready.say();
        }
        if self.marks.len() == MAX_MARKS {
            if self.dropped == 0 {
                log::warn!("boot marks: more than {MAX_MARKS}; the rest are only counted");
            }
            self.dropped = self.dropped.saturating_add(1);
            return Effect::None;
        }
        log::info!("boot mark {value:#04x} at {:.3} ms", at.as_secs_f64() * 1e3);
        self.marks.push(Mark { value, at });
        Effect::None
    }
}

impl Stateless for BootMarks {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_in_order_and_bounded() {
        let ready = Arc::<Ready>::default();
        let mut device = BootMarks::new(Instant::now(), ready.clone());
        assert_eq!(device.write(0, &[0x10]), Effect::None);
        device.write(0, &[0x34, 0x12]);
        assert_eq!(device.marks().iter().map(|m| m.value).collect::<Vec<_>>(), [0x10, 0x1234]);
        assert!(device.marks()[0].at <= device.marks()[1].at);
        for _ in 0..2 * MAX_MARKS {
            device.write(0, &[1]);
        }
        assert_eq!((device.marks().len(), device.dropped()), (MAX_MARKS, MAX_MARKS as u64 + 2));
        assert!(!ready.wait(Duration::ZERO));
        device.write(0, &[READY as u8]);
        assert!(ready.wait(Duration::ZERO), "however many came before");
    }
}
