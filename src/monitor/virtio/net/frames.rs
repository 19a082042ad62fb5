//! Frames as events of the recorder: who sends what to whom, read from a frame's first bytes.

use std::sync::Arc;

use crate::recorder::{Event, Kind, Recorder, clock, frame};

/// Bytes of a frame that are looked at: Ethernet's header with a tag, IPv6's, and TCP's up to its flags.
pub const LOOKED_AT: usize = 18 + 40 + 14;

/// Frames that a turn of the device moved, while somebody wants to know.
#[derive(Debug, Default)]
pub struct Frames {
    recorder: Arc<Recorder>,
    noted: Vec<Event>,
}

impl Frames {
    /// Tells `recorder`.
    pub fn new(recorder: Arc<Recorder>) -> Self {
        Self { recorder, noted: Vec::new() }
    }

    /// Notes a frame of `len` bytes whose first ones `read` puts into what it is given; it returns how many there are. One branch
    /// while nobody wants to know.
    #[inline]
    pub fn note(&mut self, from_guest: bool, len: usize, read: impl FnOnce(&mut [u8]) -> usize) {
        if self.recorder.is_on() {
            let mut first = [0; LOOKED_AT];
            let known = read(&mut first).min(first.len());
            self.noted.push(event(from_guest, len, &first[..known]));
        }
    }

    /// What was noted since the last time.
    pub fn take(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.noted)
    }
}

/// What the recorder keeps of a frame that begins with `first`: see [`Kind::Frame`].
fn event(from_guest: bool, len: usize, first: &[u8]) -> Event {
    let direction = if from_guest { frame::FROM_GUEST } else { 0 };
    let address = len as u64 & frame::LENGTH | direction;
    let mut event = Event { time: clock::ticks(), kind: Kind::Frame as u8, address, ..Event::default() };
    // As far as the frame goes: what is missing stays 0.
    let _ = describe(first, &mut event);
    event
}

fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + len)?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// IEEE 802.3, 802.1Q; RFC 791, 8200, 826, 9293, 768, 792, 4443.
fn describe(frame: &[u8], event: &mut Event) -> Option<()> {
    const VLAN: u64 = 0x8100;
    event.value = number(frame, 0, 6)?;
    event.rip = number(frame, 6, 6)?;
    let (mut kind, mut at) = (number(frame, 12, 2)?, 14);
    if kind == VLAN {
        (kind, at) = (number(frame, 16, 2)?, 18);
    }
    event.guest = kind << 32;
    let packet = frame.get(at..)?;
    let (protocol, payload) = match kind {
        frame::ARP => {
            (event.rip, event.value) = (number(packet, 14, 4)?, number(packet, 24, 4)?);
            event.size = number(packet, 7, 1)? as u8;
            return Some(());
        }
        frame::IPV4 => {
            (event.rip, event.value) = (number(packet, 12, 4)?, number(packet, 16, 4)?);
            event.count = number(packet, 9, 1)? as u8;
            // What begins in another fragment is not here.
            if number(packet, 6, 2)? & 0x1fff != 0 {
                return None;
            }
            (event.count, packet.get(4 * (number(packet, 0, 1)? & 15) as usize..)?)
        }
        frame::IPV6 => {
            (event.rip, event.value) = (number(packet, 16, 8)?, number(packet, 32, 8)?);
            event.count = number(packet, 6, 1)? as u8;
            (event.count, packet.get(40..)?)
        }
        _ => return None,
    };
    match protocol {
        frame::TCP | frame::UDP => {
            event.guest |= number(payload, 0, 4)?;
            if protocol == frame::TCP {
                event.size = number(payload, 13, 1)? as u8;
            }
        }
        frame::ICMP | frame::ICMPV6 => event.size = number(payload, 0, 1)? as u8,
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_segment_of_tcp_is_described_with_and_without_a_tag() {
        let mut packet =
            vec![0x46, 0, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2, 1, 1, 1, 1];
        packet.extend([0xc0, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12]);
        let addresses = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in [&[][..], &[0x81, 0, 0, 7]] {
            let all = [&addresses[..], tag, &[8, 0], &packet].concat();
            let seen = event(true, 1514, &all);
            assert_eq!((seen.rip, seen.value), (0x0a00_020f, 0x0a00_0202));
            assert_eq!((seen.guest, seen.count, seen.size), (0x0800 << 32 | 0xc000_0050, 6, 0x12));
            assert_eq!(seen.address, 1514 | frame::FROM_GUEST);
            // Cut anywhere, what is there is told.
            let short = event(false, 14, &all[..14 + tag.len()]);
            assert_eq!((short.guest, short.rip, short.address), (0x0800 << 32, 0x0200_0000_0002, 14));
        }
        packet[7] = 9;
        let fragment = event(true, 60, &[&addresses[..], &[8, 0], &packet].concat());
        assert_eq!((fragment.guest, fragment.size), (0x0800 << 32, 0), "a later fragment has no ports");
    }

    #[test]
    fn nothing_is_noted_while_nobody_wants_to_know() {
        let recorder = Arc::<Recorder>::default();
        let mut frames = Frames::new(recorder.clone());
        frames.note(true, 60, |_| unreachable!());
        recorder.set_on(true);
        frames.note(true, 60, |_| 0);
        assert_eq!((frames.take().len(), frames.take().len()), (1, 0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_described(
            start in prop::sample::select(vec![vec![8, 0], vec![8, 6], vec![0x86, 0xdd], vec![0x81, 0, 0, 0, 8, 0]]),
            rest in prop::collection::vec(any::<u8>(), 0..60), len in any::<usize>(),
        ) {
            event(false, len, &[&[0; 12][..], &start, &rest].concat());
            event(false, len, &rest);
        }
    }
}
