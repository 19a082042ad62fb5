//! [`Budget`]: how long a search in a guest's memory may take, and how much it may keep.

use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

/// What a search may take. Shared by all its parts; when it is used up, a [`Space`](super::Space) has no memory any more, so
/// that everything that reads there comes to its end.
pub struct Budget<'a> {
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

    /// `time` from now on, or until `interrupted` says so.
    pub fn new(time: Duration, interrupted: &'a dyn Fn() -> bool) -> Self {
        let now = Instant::now();
        Self {
            deadline: now.checked_add(time).unwrap_or(now),
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

    /// Whether there is time left.
    pub(super) fn goes_on(&self) -> bool {
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
        f.debug_struct("Budget").field("cut", &self.cut).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
