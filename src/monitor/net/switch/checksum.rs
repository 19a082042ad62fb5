//! What a sender has left to the other side (virtio 1.3, 5.1.6): checksums, which are completed for a guest that takes none such.

/// VIRTIO_NET_HDR_F_NEEDS_CSUM.
pub const NEEDED: u8 = 1;

use super::super::HEADER;
use super::segments::{CHECKSUM, TCP, TCPV4, TCPV6};

/// What another port's header may say of a frame of `len` bytes: a checksum that lies in the frame, and that it is TCP, uncut.
/// Everything else is 0. `None` if it says more: nobody sends that.
pub fn checked(header: [u8; HEADER], len: usize) -> Option<[u8; HEADER]> {
    let mut fine = [0; HEADER];
    if header[0] & NEEDED != 0 {
        let (start, offset) = place(&header);
        if start + offset + 2 > len {
            return None;
        }
        fine[0] = NEEDED;
        fine[6..10].copy_from_slice(&header[6..10]);
    }
    if header[1] != 0 {
        let (start, offset) = place(&header);
        let is_tcp = matches!(header[1], TCPV4 | TCPV6) && fine[0] == NEEDED && offset == CHECKSUM;
        if !is_tcp || header[4..6] == [0, 0] || start + TCP > len {
            return None;
        }
        let headers = usize::from(u16::from_le_bytes([header[2], header[3]])).clamp(start + TCP, len);
        fine[1] = header[1];
        fine[2..4].copy_from_slice(&(headers.min(u16::MAX.into()) as u16).to_le_bytes());
        fine[4..6].copy_from_slice(&header[4..6]);
    }
    Some(fine)
}

/// Where it begins, and where from there the sum belongs.
fn place(header: &[u8; HEADER]) -> (usize, usize) {
    let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    (word(6), word(8))
}

/// Completes the checksum of `frame` that `header`, which is [`checked`], asks for.
pub fn complete(header: &[u8; HEADER], frame: &mut [u8]) {
    let (start, offset) = place(header);
    fill(frame, start, offset);
}

/// Puts the checksum of what is behind `start` to `offset` from there, where the sum over a pseudo-header stands.
pub fn fill(frame: &mut [u8], start: usize, offset: usize) {
    let Some(covered) = frame.get(start..) else { return };
    // To UDP, 0 means that there is none; to others it is the same.
    let sum = match of(covered) {
        0 => 0xffff,
        sum => sum,
    };
    if let Some(field) = frame.get_mut(start + offset..start + offset + 2) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

/// The checksum of `bytes` (RFC 1071).
pub fn of(bytes: &[u8]) -> u16 {
    let (words, odd) = bytes.as_chunks::<2>();
    let sum = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum::<u64>();
    !fold(sum + odd.first().map_or(0, |byte| u64::from(*byte) << 8))
}

/// A sum of words as one word.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(flags: u8, kind: u8, start: u16, offset: u16) -> [u8; HEADER] {
        let ([a, b], [c, d]) = (start.to_le_bytes(), offset.to_le_bytes());
        [flags, kind, 9, 9, 9, 9, a, b, c, d, 9, 9]
    }

    #[test]
    fn a_header_says_where_a_checksum_is_or_nothing() {
        assert_eq!(checked(header(0xfe, 0, 5, 5), 20), Some([0; HEADER]));
        assert_eq!(checked(header(1, 0, 14, 4), 20), Some([1, 0, 0, 0, 0, 0, 14, 0, 4, 0, 0, 0]));
        for (wrong, len) in
            [(header(1, 0, 14, 4), 19), (header(1, 0, u16::MAX, u16::MAX), 65000), (header(1, 3, 14, 4), 60)]
        {
            assert_eq!(checked(wrong, len), None);
        }
        // Uncut TCP: without a checksum, of no size, congestion marks, UDP, without a header of TCP.
        let uncut = header(1, TCPV6, 54, 16);
        assert_eq!(checked(uncut, 9000), Some([1, TCPV6, 9, 9, 9, 9, 54, 0, 16, 0, 0, 0]));
        assert_eq!(checked(uncut, 74).unwrap()[2..4], [74, 0]);
        let sizeless = [1, TCPV6, 9, 9, 0, 0, 54, 0, 16, 0, 9, 9];
        for (wrong, len) in [
            (header(0, TCPV6, 54, 16), 9000),
            (sizeless, 9000),
            (header(1, TCPV4 | 0x80, 54, 16), 9000),
            (header(1, 5, 54, 16), 9000),
            (header(1, TCPV6, 54, 6), 9000),
            (uncut, 73),
        ] {
            assert_eq!(checked(wrong, len), None, "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn a_completed_sum_comes_out_even(bytes in prop::collection::vec(any::<u8>(), 20..200), start in 0usize..9) {
            let start = 2 * start;
            let (mut frame, header) = (bytes, header(1, 0, start as u16, 2));
            complete(&header, &mut frame);
            let padded = frame[start..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
            let mut sum: u32 = padded.sum();
            // The field held something of a pseudo-header, which the sum takes in.
            sum = (sum & 0xffff) + (sum >> 16);
            sum = (sum & 0xffff) + (sum >> 16);
            let field = u32::from(frame[start + 2]) << 8 | u32::from(frame[start + 3]);
            prop_assert!(field != 0 && sum <= 0xffff);
        }
    }

    #[test]
    fn the_sum_is_that_of_the_known_segment() {
        // RFC 1071, 3: 0001 f203 f4f5 f6f7 sum up to ddf2; with a field of 0 in front, the sum's complement stands there.
        let mut frame = [0, 0, 0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7];
        complete(&header(1, 0, 0, 0), &mut frame);
        assert_eq!(frame[..2], [0x22, 0x0d]);
    }
}
