//! A ring of events between one writer and one reader, without locks and without `unsafe`: each word is an atomic.

use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::event::Event;

/// See the module's text.
#[derive(Debug)]
pub struct Ring {
    words: Box<[AtomicU64]>,
    /// Events written so far. Only the writer changes it.
    written: AtomicU64,
    /// Events taken so far. Only the reader changes it.
    taken: AtomicU64,
    /// Events lost so far. Only the writer changes it.
    dropped: AtomicU64,
    /// Of those, told to the reader. Only the reader changes it.
    told: AtomicU64,
}

impl Ring {
    /// Events that fit: 1.5 MiB of them.
    pub const EVENTS: usize = 1 << 15;

    pub fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            // Zeroed by the kernel, page by page as they are first touched: a thread that begins to write does not stop for it.
            words: <[AtomicU64]>::new_box_zeroed_with_elems(Self::EVENTS * Event::WORDS)
                .expect("1.5 MiB of memory"),
            written: zero(),
            taken: zero(),
            dropped: zero(),
            told: zero(),
        }
    }

    /// The words of slot `number`, which counts on over the ring's end.
    fn slot(&self, number: u64) -> &[AtomicU64] {
        let at = (number % Self::EVENTS as u64) as usize * Event::WORDS;
        &self.words[at..at + Event::WORDS]
    }

    /// The writer's part.
    #[inline]
    pub fn put(&self, event: Event) {
        let written = self.written.load(Ordering::Relaxed);
        if written - self.taken.load(Ordering::Acquire) >= Self::EVENTS as u64 {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut words = [0u64; Event::WORDS];
        words.as_mut_bytes().copy_from_slice(event.as_bytes());
        for (slot, word) in self.slot(written).iter().zip(words) {
            slot.store(word, Ordering::Relaxed);
        }
        // The words before the count that makes them the reader's.
        self.written.store(written + 1, Ordering::Release);
    }

    /// The reader's part: adds all that there is to `events`; returns how many were lost since the last call.
    pub fn take(&self, events: &mut Vec<Event>) -> u64 {
        let (taken, written) = (self.taken.load(Ordering::Relaxed), self.written.load(Ordering::Acquire));
        for number in taken..written {
            let mut words = [0u64; Event::WORDS];
            for (word, slot) in words.iter_mut().zip(self.slot(number)) {
                *word = slot.load(Ordering::Relaxed);
            }
            events.extend(Event::read_from_bytes(words.as_bytes()));
        }
        // The words are read before the count that makes the slots the writer's again.
        self.taken.store(written, Ordering::Release);
        let dropped = self.dropped.load(Ordering::Relaxed);
        dropped - self.told.swap(dropped, Ordering::Relaxed)
    }
}
