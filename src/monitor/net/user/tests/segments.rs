//! Which segments the guest is sent, and which again: it is a few lines here, and says when it has heard what.

use smoltcp::wire::{EthernetFrame, Ipv4Packet, TcpPacket};

use super::*;

/// A guest's end of one connection.
struct End {
    guest: Guest,
    port: u16,
    server: TcpStream,
    /// The next byte that it expects, and the first that never came.
    acknowledged: u32,
    seen: u32,
    /// Bytes that came again.
    again: usize,
}

impl End {
    fn connect() -> Self {
        let (listener, port) = listener();
        let mut guest = Guest::allowed("127.0.0.1");
        guest.stack.input(&syn(GATEWAY, port));
        guest.until("a connection", |guest| !guest.card.received.is_empty());
        let start = segment(&guest.card.received.pop_front().unwrap()).0.wrapping_add(1);
        let server = listener.accept().unwrap().0;
        server.set_nonblocking(true).unwrap();
        let mut end = Self { guest, port, server, acknowledged: start, seen: start, again: 0 };
        end.acknowledge(start);
        end
    }

    fn acknowledge(&mut self, to: u32) {
        let mut bytes = vec![0x9c, 0x40];
        bytes.extend(self.port.to_be_bytes());
        bytes.extend(2u32.to_be_bytes());
        bytes.extend(to.to_be_bytes());
        bytes.extend([0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
        self.acknowledged = to;
        self.guest.stack.input(&packet(GATEWAY, 6, &bytes));
        self.guest.stack.settle();
    }

    /// The host writes what it can, and the guest hears what has come.
    fn hear(&mut self) {
        while self.server.write(&[0; 1 << 16]).is_ok() {}
        self.hear_only();
    }

    /// Hears for ten seconds, and acknowledges half of what it has not yet each time.
    fn hear_by_halves(&mut self) {
        for _ in 0..200 {
            self.hear();
            let half = self.seen.wrapping_sub(self.acknowledged) / 2;
            self.acknowledge(self.acknowledged.wrapping_add(half));
            self.guest.wait(Duration::from_millis(50));
        }
    }

    fn hear_only(&mut self) {
        while let Some(frame) = self.guest.stack.output() {
            let (start, len) = segment(&frame.bytes);
            let known = self.seen.wrapping_sub(start);
            assert!(known.cast_signed() >= 0, "nothing is left out");
            self.again += len.min(known as usize);
            self.seen = self.seen.max(start.wrapping_add(len as u32));
        }
    }
}

/// Where a segment starts, and how many bytes it has.
fn segment(frame: &[u8]) -> (u32, usize) {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
    let segment = TcpPacket::new_checked(packet.payload()).unwrap();
    (segment.seq_number().0.cast_unsigned(), segment.payload().len())
}

#[test]
fn a_stream_that_is_never_acknowledged_whole_is_sent_once() {
    let mut end = End::connect();
    end.hear_by_halves();
    end.hear();
    assert_eq!(end.again, 0, "bytes came again");
}

#[test]
fn a_guest_that_is_slow_for_a_moment_is_sent_nothing_twice() {
    let mut end = End::connect();
    for _ in 0..50 {
        end.hear();
        end.acknowledge(end.seen);
    }
    end.hear();
    end.guest.wait(Duration::from_millis(900));
    end.hear_only();
    assert_eq!(end.again, 0, "bytes came again");
}

#[test]
fn what_is_lost_comes_again_soon_however_long_the_stream_was() {
    let mut end = End::connect();
    end.hear_by_halves();
    // What is on its way now never arrives.
    end.hear();
    let (lost, before) = (end.seen.wrapping_sub(end.acknowledged) as usize, end.again);
    assert!(lost > 1000, "{lost} bytes");
    end.guest.wait(Duration::from_millis(1100));
    end.hear_only();
    assert_eq!(end.again - before, lost, "all of it, once");
    // And once more, for nobody answers.
    end.guest.wait(Duration::from_millis(2100));
    end.hear_only();
    assert_eq!(end.again - before, 2 * lost);
}

#[test]
fn what_the_guest_has_not_taken_is_not_sent_again() {
    let mut end = End::connect();
    while end.server.write(&[0; 1 << 16]).is_ok() {}
    end.guest.until("frames", |guest| guest.stack.turn() | !guest.stack.context.frames.is_empty());
    for _ in 0..20 {
        end.guest.wait(Duration::from_secs(1));
    }
    end.hear_only();
    assert_eq!(end.again, 0, "bytes came again");
}

#[test]
fn the_last_bytes_and_the_end_are_one_segment() {
    let mut end = End::connect();
    end.server.write_all(b"answer").unwrap();
    end.server.shutdown(Shutdown::Write).unwrap();
    let mut frames = Vec::new();
    end.guest.until("the end", |guest| {
        frames.extend(std::iter::from_fn(|| guest.stack.output()));
        !frames.is_empty()
    });
    let [frame] = &frames[..] else { panic!("{} frames", frames.len()) };
    let (ethernet, headers, flags, fin) = (14, 40, 47, 1);
    assert_eq!(&frame.bytes[ethernet + headers..], b"answer");
    assert_eq!(frame.bytes[flags] & fin, fin);
}
