//! When the guest is sent something again, which smoltcp's socket does not judge well by itself.
//!
//! Its timer starts with the first segment that is on its way and starts anew only when nothing is, so it runs out in the middle of
//! every long stream; 10 ms may be all that it has, and each time it runs out while there is more to send it doubles. Then all that
//! is on its way goes again. So an open connection's socket has a clock that stands still until [`Recovery::deadline`], and the time
//! that frames wait here for the guest to take them does not count.
//!
//! What is sent again although it had arrived is acknowledged once more, piece by piece; whoever takes those for a loss sends all
//! again, and so on without an end. So they count only for what was sent after (RFC 6582, 3.2, step 2).

use std::time::{Duration, Instant};

use smoltcp::wire::{TcpPacket, TcpSeqNumber};

use super::ip::Packet;

/// How long the guest may say nothing new of what it has taken (RFC 6298, 2.4). It is on this machine: there is no distance to
/// measure, only a vCPU that waits for a processor, and a loss is a packet that the guest itself had no room for, which the
/// acknowledgements of those behind it show sooner.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often that doubles while it goes on saying nothing.
const DOUBLINGS: u32 = 5;

/// One way of a connection: the one to the guest.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Behind the last byte that was sent.
    end: Option<TcpSeqNumber>,
    /// The same when something was last sent again, as long as not all of that is acknowledged and more.
    recover: Option<TcpSeqNumber>,
    /// What the guest last acknowledged, and its window.
    heard: Option<(TcpSeqNumber, u16)>,
    /// Since when it has said nothing new, if there is something on its way to it.
    since: Option<Instant>,
    /// How often it was sent again since.
    again: u32,
    /// How many frames all connections had put into the queue when this one last did.
    queued: u64,
}

/// A packet's segment of TCP.
fn segment(bytes: &[u8]) -> Option<TcpPacket<&[u8]>> {
    TcpPacket::new_checked(Packet::parse(bytes)?.payload).ok()
}

impl Recovery {
    /// The guest is sent a packet.
    pub fn sends(&mut self, bytes: &[u8], now: Instant) {
        let Some(tcp) = segment(bytes) else { return };
        let len = tcp.segment_len();
        if len == 0 {
            return;
        }
        self.since.get_or_insert(now);
        let start = tcp.seq_number();
        if let Some(end) = self.end.filter(|end| start < *end) {
            self.recover = Some(end);
        }
        self.end = Some(self.end.map_or(start + len, |end| end.max(start + len)));
    }

    /// The guest sends a packet. True if it says nothing but that something came twice.
    pub fn hears(&mut self, bytes: &[u8], now: Instant) -> bool {
        let Some(tcp) = segment(bytes).filter(TcpPacket::ack) else { return false };
        let is_plain = tcp.segment_len() == 0 && !tcp.rst();
        let (ack, window) = (tcp.ack_number(), tcp.window_len());
        let before = self.heard.replace((ack, window));
        if before.is_none_or(|(before, _)| ack > before) {
            self.since = self.end.is_some_and(|end| ack < end).then_some(now);
            self.again = 0;
        }
        if self.recover.is_some_and(|recover| ack > recover) {
            self.recover = None;
        }
        is_plain && before == Some((ack, window)) && self.recover.is_some()
    }

    /// When what is on its way is to be sent again.
    pub fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + PATIENCE * (1 << self.again))
    }

    /// That time has come, and the guest has `taken` as many frames of the queue. False if it does not have all yet: then it is
    /// given the time once more.
    pub fn resends(&mut self, now: Instant, taken: u64) -> bool {
        self.since = Some(now);
        if taken < self.queued {
            return false;
        }
        self.again = (self.again + 1).min(DOUBLINGS);
        true
    }

    /// The queue for the guest has had as many frames, the last of them of this connection.
    pub fn queued(&mut self, queued: u64) {
        self.queued = queued;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A packet with TCP.
    fn packet(seq: u32, ack: u32, window: u8, len: usize) -> Vec<u8> {
        let mut bytes =
            vec![0x45, 0, 0, (40 + len) as u8, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2];
        bytes.extend([0, 80, 1, 2]);
        bytes.extend(seq.to_be_bytes());
        bytes.extend(ack.to_be_bytes());
        bytes.extend([0x50, 0x10, window, 0, 0, 0, 0, 0]);
        bytes.resize(40 + len, 0);
        bytes
    }

    #[test]
    fn acknowledgements_of_what_came_twice_are_no_losses() {
        let mut recovery = Recovery::default();
        let now = Instant::now();
        let hears = |recovery: &mut Recovery, ack, window| recovery.hears(&packet(7, ack, window, 0), now);
        (0..3).for_each(|n| recovery.sends(&packet(100 + n * 10, 7, 9, 10), now));
        assert!(!hears(&mut recovery, 100, 9) && !hears(&mut recovery, 100, 9), "that may be a loss");
        recovery.sends(&packet(100, 7, 9, 10), now);
        assert!(!hears(&mut recovery, 130, 9), "the first one is news");
        assert!(hears(&mut recovery, 130, 9) && hears(&mut recovery, 130, 9));
        assert!(!hears(&mut recovery, 130, 8), "another window");
        assert!(!recovery.hears(&packet(7, 130, 8, 5), now), "it says more");
        recovery.sends(&packet(130, 7, 9, 10), now);
        assert!(!hears(&mut recovery, 140, 8));
        assert!(!hears(&mut recovery, 140, 8), "what was sent after may be lost again");
    }
}
