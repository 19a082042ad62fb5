//! Warnings about what the guest does wrong, rate-limited: a guest must not be able to fill the host's log.
//!
//! Used through [`guest_warn!`](crate::guest_warn) by everything that answers the guest. One limit for the whole
//! monitor, because one guest is behind all of them.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::printable::Printable;

/// Messages let through in each [`PERIOD`].
const BURST: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

struct Limit {
    since: Option<Instant>,
    said: u32,
    swallowed: u64,
}

impl Limit {
    const fn new() -> Self {
        Self { since: None, said: 0, swallowed: 0 }
    }

    /// Whether a message may go out at `now`, and how many were swallowed before it in the last period.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let mut swallowed = 0;
        if self.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            swallowed = self.swallowed;
            *self = Self { since: Some(now), said: 0, swallowed: 0 };
        }
        if self.said < BURST {
            self.said += 1;
            Some(swallowed)
        } else {
            self.swallowed += 1;
            None
        }
    }
}

static LIMIT: Mutex<Limit> = Mutex::new(Limit::new());

/// Logs `message` about the guest, unless it has had its share. Use [`guest_warn!`](crate::guest_warn).
pub fn warn(message: fmt::Arguments<'_>) {
    if !log::log_enabled!(log::Level::Warn) {
        return;
    }
    // Names of ports, errors that quote: what comes from the guest does not act on the host's terminal.
    let message = Printable(message);
    let admitted = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
    match admitted {
        None => {}
        Some(0) => log::warn!("guest: {message}"),
        Some(n) => log::warn!("guest: {message} ({n} earlier messages like this were left out)"),
    }
}

/// Logs what the guest did wrong, with the arguments of `format!`.
#[macro_export]
macro_rules! guest_warn {
    ($($arg:tt)*) => { $crate::guest_log::warn(format_args!($($arg)*)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_a_burst_through_then_counts() {
        let mut limit = Limit::new();
        let start = Instant::now();
        let admitted = (0..100).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(admitted as u32, BURST);
        assert_eq!(limit.admit(start + PERIOD), Some(80));
        assert_eq!(limit.admit(start + PERIOD), Some(0));
    }
}
