//! Output that nobody is there to take yet: the latest of it, bounded.

use std::collections::VecDeque;

/// Keeps the last [`Backlog::LIMIT`] bytes; older ones make room, and are counted.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Backlog {
    /// Bytes kept.
    pub const LIMIT: usize = 64 << 10;

    /// Adds output at the end.
    pub fn push(&mut self, data: &[u8]) {
        let kept = &data[data.len().saturating_sub(Self::LIMIT)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(Self::LIMIT);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
        self.dropped += (excess + data.len() - kept.len()) as u64;
    }

    /// Nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Hands the bytes to `write` until it takes no more; it returns how many it took. True if none are left.
    pub fn flush(&mut self, mut write: impl FnMut(&[u8]) -> usize) -> bool {
        if self.dropped > 0 {
            log::info!("{} bytes of older output are gone: nobody was connected", self.dropped);
            self.dropped = 0;
        }
        while !self.bytes.is_empty() {
            let taken = write(self.bytes.as_slices().0);
            if taken == 0 {
                return false;
            }
            self.bytes.drain(..taken);
        }
        self.bytes = VecDeque::new();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_end_and_hands_it_over_in_pieces() {
        let mut backlog = Backlog::default();
        let all: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        for piece in all.chunks(7777) {
            backlog.push(piece);
        }
        assert_eq!(backlog.dropped, (all.len() - Backlog::LIMIT) as u64);
        let (mut got, mut calls) = (Vec::<u8>::new(), 0);
        while !backlog.flush(|data| {
            calls += 1;
            let take = if calls % 3 == 0 { 0 } else { data.len().min(1000) };
            got.extend(&data[..take]);
            take
        }) {}
        assert!(got == all[all.len() - Backlog::LIMIT..]);
        backlog.push(&all);
        assert_eq!(backlog.bytes.len(), Backlog::LIMIT);
    }
}
