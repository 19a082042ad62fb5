//! [`Shares`]: how much memory each connection may keep what it is sent in, so that all of them together are bounded.
//!
//! The first ones get what Linux gives its sockets, those of a crowd less: some 100 MiB for 8192 whose readers all stand still.

/// Connections, and bytes for each.
const CLASSES: [(usize, u32); 3] = [(64, 256 << 10), (448, 64 << 10), (7680, 8 << 10)];

/// A connection's share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(usize);

impl Share {
    /// What it may keep.
    pub fn bytes(self) -> u32 {
        CLASSES.get(self.0).map_or(0, |(_, bytes)| *bytes)
    }
}

/// Those that are taken, by class.
#[derive(Debug, Default)]
pub struct Shares([usize; CLASSES.len()]);

impl Shares {
    /// The largest that is free, if any is.
    pub fn take(&mut self) -> Option<Share> {
        let free = self.0.iter().zip(CLASSES).position(|(taken, (most, _))| *taken < most)?;
        self.0[free] += 1;
        Some(Share(free))
    }

    /// Gives one back.
    pub fn give_back(&mut self, share: Share) {
        if let Some(taken) = self.0.get_mut(share.0) {
            *taken = taken.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vsock::MAX_CONNECTIONS;

    #[test]
    fn there_is_a_share_for_each_connection_and_a_bound_for_all() {
        let mut shares = Shares::default();
        let all: Vec<_> = std::iter::from_fn(|| shares.take()).collect();
        assert_eq!(all.len(), MAX_CONNECTIONS);
        assert!(all.iter().map(|share| u64::from(share.bytes())).sum::<u64>() < 110 << 20);
        assert_eq!((all[0].bytes(), all[all.len() - 1].bytes()), (256 << 10, 8 << 10));
        shares.give_back(all[3]);
        assert_eq!(shares.take(), Some(all[3]));
        assert_eq!(shares.take(), None);
    }
}
