//! Frames as events of the recorder: who sends what to whom, read from a frame's first bytes.

use std::sync::Arc;

use crate::recorder::frame::{ARP, Frame, ICMP, ICMPV6, IPV4, IPV6, TCP, UDP};
use crate::recorder::{Event, Recorder, clock};

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

/// What the recorder keeps of a frame that begins with `first`.
fn event(from_guest: bool, len: usize, first: &[u8]) -> Event {
    let mut frame = Frame { from_guest, len: u32::try_from(len).unwrap_or(u32::MAX), ..Frame::default() };
    // As far as the frame goes: what is missing stays 0.
    let _ = describe(first, &mut frame);
    Event::frame(clock::ticks(), frame)
}

fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + len)?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// IEEE 802.3, 802.1Q; RFC 791, 8200, 826, 9293, 768, 792, 4443.
fn describe(bytes: &[u8], frame: &mut Frame) -> Option<()> {
    const VLAN: u16 = 0x8100;
    let short = |bytes, at| number(bytes, at, 2).map(|number| number as u16);
    frame.destination = number(bytes, 0, 6)?;
    frame.source = number(bytes, 6, 6)?;
    let (mut kind, mut at) = (short(bytes, 12)?, 14);
    if kind == VLAN {
        (kind, at) = (short(bytes, 16)?, 18);
    }
    frame.kind = kind;
    let packet = bytes.get(at..)?;
    let payload = match kind {
        ARP => {
            (frame.source, frame.destination) = (number(packet, 14, 4)?, number(packet, 24, 4)?);
            frame.detail = *packet.get(7)?;
            return Some(());
        }
        IPV4 => {
            (frame.source, frame.destination) = (number(packet, 12, 4)?, number(packet, 16, 4)?);
            frame.protocol = *packet.get(9)?;
            // What begins in another fragment is not here.
            if short(packet, 6)? & 0x1fff != 0 {
                return None;
            }
            packet.get(4 * usize::from(packet.first()? & 15)..)?
        }
        IPV6 => {
            (frame.source, frame.destination) = (number(packet, 16, 8)?, number(packet, 32, 8)?);
            frame.protocol = *packet.get(6)?;
            packet.get(40..)?
        }
        _ => return None,
    };
    match frame.protocol {
        TCP | UDP => {
            (frame.source_port, frame.destination_port) = (short(payload, 0)?, short(payload, 2)?);
            if frame.protocol == TCP {
                frame.detail = *payload.get(13)?;
            }
        }
        ICMP | ICMPV6 => frame.detail = *payload.first()?,
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
            let seen = event(true, 1514, &all).as_frame();
            let wanted = Frame {
                from_guest: true,
                len: 1514,
                kind: IPV4,
                source: 0x0a00_020f,
                destination: 0x0a00_0202,
                protocol: TCP,
                source_port: 0xc000,
                destination_port: 80,
                detail: 0x12,
            };
            assert_eq!(seen, wanted);
            // Cut anywhere, what is there is told.
            let short = event(false, 14, &all[..14 + tag.len()]).as_frame();
            let (source, destination) = (0x0200_0000_0002, 0x0200_0000_0001);
            assert_eq!(short, Frame { len: 14, kind: IPV4, source, destination, ..Frame::default() });
        }
        packet[7] = 9;
        let fragment = event(true, 60, &[&addresses[..], &[8, 0], &packet].concat()).as_frame();
        assert_eq!(
            (fragment.protocol, fragment.source_port, fragment.detail),
            (TCP, 0, 0),
            "no ports in a later fragment"
        );
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
