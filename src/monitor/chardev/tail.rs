//! [`Tail`]: the end of a stream, for the report of a guest that dies.

use std::collections::VecDeque;

/// Bytes that are kept: a kernel's panic with its registers and call trace.
const SIZE: usize = 8 << 10;

/// The last [`SIZE`] bytes.
#[derive(Debug, Default)]
pub struct Tail(VecDeque<u8>);

impl Tail {
    /// Takes what was written.
    pub fn push(&mut self, data: &[u8]) {
        let data = &data[data.len().saturating_sub(SIZE)..];
        let beyond = (self.0.len() + data.len()).saturating_sub(SIZE);
        self.0.drain(..beyond);
        self.0.extend(data);
    }

    /// All that is kept, oldest first.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_what_was_written_stays_whatever_the_pieces() {
        let stream: Vec<u8> = (0..3 * SIZE as u32 + 7).map(|i| (i % 251) as u8).collect();
        for piece in [1, 1000, SIZE, SIZE + 1, stream.len()] {
            let mut tail = Tail::default();
            stream.chunks(piece).for_each(|piece| tail.push(piece));
            assert!(tail.bytes() == stream[stream.len() - SIZE..], "pieces of {piece}");
        }
        let mut tail = Tail::default();
        tail.push(b"short");
        assert_eq!(tail.bytes(), b"short");
    }
}
