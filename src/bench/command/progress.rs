//! How far the measurement is: one line on a terminal, rewritten; elsewhere one line a suite.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Before this share is done, nothing can be said of the time that is left.
const ENOUGH: f64 = 0.02;

/// The progress of one suite.
pub struct Progress {
    /// "boot (1 of 3)", and where if not here.
    what: String,
    start: Instant,
    terminal: bool,
}

impl Progress {
    /// Begins with `what`.
    pub fn new(what: String) -> Self {
        let terminal = std::io::stderr().is_terminal();
        if !terminal {
            say(&format!("vmm bench: {what}\n"));
        }
        Self { what, start: Instant::now(), terminal }
    }

    /// `share` (0 to 1) is done, and `detail` is at hand.
    pub fn show(&self, share: f64, detail: &str) {
        if !self.terminal {
            return;
        }
        let left = match remaining(self.start.elapsed(), share) {
            Some(left) => format!(", {} left", coarse(left)),
            None => String::new(),
        };
        let percent = share.clamp(0.0, 1.0) * 100.0;
        let detail: String = detail.chars().filter(|c| !c.is_control()).take(40).collect();
        say(&format!("\r\x1b[K{}  {percent:.0}%{left}  {detail}", self.what));
    }

    /// Nobody can tell how far it is, but that it goes on.
    pub fn wait(&self, detail: &str) {
        if self.terminal {
            let detail: String = detail.chars().filter(|c| !c.is_control()).take(60).collect();
            say(&format!("\r\x1b[K{}  for {}  {detail}", self.what, coarse(self.start.elapsed())));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal {
            say("\r\x1b[K");
        }
    }
}

fn say(text: &str) {
    // If stderr is gone there is nobody to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn remaining(elapsed: Duration, share: f64) -> Option<Duration> {
    if !(ENOUGH..=1.0).contains(&share) {
        return None;
    }
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * (1.0 - share) / share).ok()
}

fn coarse(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..90 => format!("{seconds} s"),
        seconds => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_from_the_share_done() {
        let minute = Duration::from_secs(60);
        assert_eq!(remaining(minute, 0.25), Some(3 * minute));
        assert_eq!(remaining(minute, 1.0), Some(Duration::ZERO));
        assert_eq!(remaining(minute, 0.0), None);
        assert_eq!(remaining(minute, f64::NAN), None);
        assert_eq!((coarse(minute), coarse(3 * minute)), ("60 s".to_owned(), "3 min 00 s".to_owned()));
    }
}
