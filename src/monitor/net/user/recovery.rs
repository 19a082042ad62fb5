//! Which acknowledgements are no sign of a loss. What is sent again although it had arrived is acknowledged once more, piece by
//! piece; whoever takes those for a loss sends all again, and so on without an end. So they count only for what was sent after
//! (RFC 6582, 3.2, step 2).

use smoltcp::wire::{TcpPacket, TcpSeqNumber};

use super::ip::Packet;

/// One way of a connection: the one to the guest.
#[derive(Debug, Default)]
pub struct Recovery {
    /// Behind the last byte that was sent.
    end: Option<TcpSeqNumber>,
    /// The same when something was last sent again, as long as not all of that is acknowledged and more.
    recover: Option<TcpSeqNumber>,
    /// What the guest last acknowledged, and its window.
    heard: Option<(TcpSeqNumber, u16)>,
}

impl Recovery {
    /// The guest is sent a packet.
    pub fn sends(&mut self, bytes: &[u8]) {
        let Some(packet) = Packet::parse(bytes) else { return };
        let Ok(tcp) = TcpPacket::new_checked(packet.payload) else { return };
        let len = tcp.payload().len();
        if len == 0 {
            return;
        }
        let start = tcp.seq_number();
        match self.end {
            Some(end) if start < end => self.recover = Some(end),
            _ => self.end = Some(start + len),
        }
    }

    /// Whether the guest's packet says nothing but that something came twice.
    pub fn is_echo(&mut self, bytes: &[u8]) -> bool {
        let Some(packet) = Packet::parse(bytes) else { return false };
        let Ok(tcp) = TcpPacket::new_checked(packet.payload) else { return false };
        let is_plain = tcp.ack() && !tcp.syn() && !tcp.fin() && !tcp.rst() && tcp.payload().is_empty();
        let now = (tcp.ack_number(), tcp.window_len());
        let is_again = self.heard.replace(now) == Some(now);
        if self.recover.is_some_and(|recover| now.0 > recover) {
            self.recover = None;
        }
        is_plain && is_again && self.recover.is_some()
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
        let hears = |recovery: &mut Recovery, ack, window| recovery.is_echo(&packet(7, ack, window, 0));
        (0..3).for_each(|n| recovery.sends(&packet(100 + n * 10, 7, 9, 10)));
        assert!(!hears(&mut recovery, 100, 9) && !hears(&mut recovery, 100, 9), "that may be a loss");
        recovery.sends(&packet(100, 7, 9, 10));
        assert!(!hears(&mut recovery, 130, 9), "the first one is news");
        assert!(hears(&mut recovery, 130, 9) && hears(&mut recovery, 130, 9));
        assert!(!hears(&mut recovery, 130, 8), "another window");
        assert!(!recovery.is_echo(&packet(7, 130, 8, 5)), "it says more");
        recovery.sends(&packet(130, 7, 9, 10));
        assert!(!hears(&mut recovery, 140, 8));
        assert!(!hears(&mut recovery, 140, 8), "what was sent after may be lost again");
    }
}
