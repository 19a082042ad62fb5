//! Rate limits: a [`Gate`] for each way, and the timer that wakes the device when a closed one opens.
//!
//! What finds its gate closed is not dropped: the guest's frames stay in their queue, and those for the guest in the link.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::bucket::Bucket;
use crate::config::NetLimits;
use crate::timer::Timer;

/// One way of a device, all of its queues together.
#[derive(Debug, Default)]
pub struct Gate {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
    /// Somebody found it closed; when it is worth coming again. Stays until the timer has run out: another queue may pass
    /// meanwhile, and who waits must not be forgotten.
    opens: Option<Instant>,
}

impl Gate {
    fn new(limits: &NetLimits, now: Instant) -> Self {
        let bytes = limits.bw.map(|rate| Bucket::new(rate.each_second.bytes(), rate.burst().bytes(), now));
        let frames = limits.pps.map(|rate| Bucket::new(rate.each_second, rate.burst(), now));
        Self { bytes, frames, opens: None }
    }

    /// Whether a frame may pass now. If not, the timer is to be set.
    pub fn admits(&mut self) -> bool {
        let mut buckets = self.bytes.iter_mut().chain(&mut self.frames).peekable();
        // A device without limits pays no look at the clock.
        if buckets.peek().is_none() {
            return true;
        }
        let now = Instant::now();
        let waits = buckets.filter_map(|bucket| (!bucket.admits(now)).then(|| bucket.wait()));
        // What no clock reaches is a year away.
        let wait = waits.max().map(|wait| wait.min(Duration::from_secs(365 * 24 * 3600)));
        let opens = wait.map(|wait| now + wait);
        self.opens = self.opens.into_iter().chain(opens).min();
        opens.is_none()
    }

    /// A frame of `len` bytes passes.
    pub fn take(&mut self, len: usize) {
        if let Some(bytes) = &mut self.bytes {
            bytes.take(len as u64);
        }
        if let Some(frames) = &mut self.frames {
            frames.take(1);
        }
    }
}

/// A device's limits.
#[derive(Debug, Default)]
pub struct Limiter {
    /// Frames for the guest.
    pub receive: Gate,
    /// Frames of the guest.
    pub transmit: Gate,
    /// Readable when a gate opens. Only where there are limits.
    timer: Option<Timer>,
    /// What it is set to.
    alarm: Option<Instant>,
}

impl Limiter {
    /// A limiter for `limits`, each of which holds each way by itself.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(limits: &NetLimits) -> io::Result<Self> {
        if *limits == NetLimits::default() {
            return Ok(Self::default());
        }
        let now = Instant::now();
        let timer = Some(Timer::new()?);
        Ok(Self { receive: Gate::new(limits, now), transmit: Gate::new(limits, now), timer, alarm: None })
    }

    /// What to wait on.
    pub fn timer(&self) -> Option<BorrowedFd<'_>> {
        self.timer.as_ref().map(AsFd::as_fd)
    }

    /// After a turn: sets the timer for the gate that opens first, if one is waited for.
    pub fn set_timer(&mut self) {
        let Some(timer) = &self.timer else { return };
        let alarm = self.receive.opens.into_iter().chain(self.transmit.opens).min();
        if alarm == self.alarm {
            return;
        }
        self.alarm = alarm;
        timer.set(alarm.map(|alarm| alarm.saturating_duration_since(Instant::now())));
    }

    /// The timer has run out: every way may be tried again.
    pub fn take_alarm(&mut self) {
        if let Some(timer) = &self.timer {
            timer.set(None);
        }
        (self.receive.opens, self.transmit.opens, self.alarm) = (None, None, None);
    }
}
