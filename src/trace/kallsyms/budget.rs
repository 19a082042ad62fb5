//! [`Budget`]: how long a search in a guest's memory may take, and how much it may keep.

use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

/// What a search may take. Shared by all its parts; when it is used up, a [`Space`](super::Space) has no memory any more, so
/// that everything that reads there comes to its end.
pub struct Budget<'a> {
    /// Steps that are left, of about a nanosecond each on an ordinary host. A search in an honest guest takes as many on a slow
    /// one, where the clock alone would end it.
    steps: Cell<u64>,
    deadline: Instant,
    interrupted: &'a dyn Fn() -> bool,
    cut: Cell<Option<Cut>>,
    /// Questions until the clock is looked at again.
    patience: Cell<u32>,
    /// Bytes of symbols that may still be kept.
    bytes: Cell<usize>,
}

/// Why a search ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Its time was over.
    Time,
    /// Somebody wanted it to end.
    Interrupted,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Time => "it took too long",
            Self::Interrupted => "it was interrupted",
        })
    }
}

impl<'a> Budget<'a> {
    /// Bytes that symbols may take, whatever the guest's size: those of a distribution's kernel take a fifth of it.
    const MOST: usize = 64 << 20;
    /// Questions between two looks at the clock. What is done between them takes microseconds.
    const STEP: u32 = 64;

    /// How much longer than on an ordinary host a search may take on a slow one.
    const SLOW: u32 = 12;

    /// What an ordinary host does in `time`, or until `interrupted` says so.
    pub fn new(time: Duration, interrupted: &'a dyn Fn() -> bool) -> Self {
        let now = Instant::now();
        Self {
            steps: Cell::new(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
            deadline: now.checked_add(time.saturating_mul(Self::SLOW)).unwrap_or(now),
            interrupted,
            cut: Cell::default(),
            patience: Cell::default(),
            bytes: Cell::new(Self::MOST),
        }
    }

    /// Why the search ended early, if it did.
    pub fn cut(&self) -> Option<Cut> {
        self.cut.get()
    }

    /// Takes `steps` of the search's time. Whether any is left.
    pub(super) fn goes_on(&self, steps: usize) -> bool {
        let left = self.steps.get().checked_sub(steps as u64);
        self.steps.set(left.unwrap_or(0));
        if left.is_none() && self.cut.get().is_none() {
            self.cut.set(Some(Cut::Time));
        }
        let left = self.patience.get();
        if self.cut.get().is_none() && left == 0 {
            self.patience.set(Self::STEP);
            self.cut.set(match () {
                () if (self.interrupted)() => Some(Cut::Interrupted),
                () if Instant::now() >= self.deadline => Some(Cut::Time),
                () => None,
            });
        }
        self.patience.set(self.patience.get().saturating_sub(1));
        self.cut.get().is_none()
    }

    /// Takes `bytes` from what may be kept; false if so much is not left.
    pub(super) fn keep(&self, bytes: usize) -> bool {
        let left = self.bytes.get().checked_sub(bytes);
        left.inspect(|left| self.bytes.set(*left)).is_some()
    }

    /// What may be kept again: after what was kept is gone.
    pub(super) fn bytes(&self) -> &Cell<usize> {
        &self.bytes
    }
}

impl fmt::Debug for Budget<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget")
            .field("cut", &self.cut)
            .field("steps", &self.steps)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
