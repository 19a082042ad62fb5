//! Connections over a line that has none: a port of a virtio console, which carries bytes and tells of no beginning and no end that
//! could be relied on. What one client left half sent, or half read, is still on its way when the next one comes.
//!
//! A connection begins with a mark and a token of the client's choice, which the agent repeats; so both know from where on the bytes
//! are this connection's. A mark is a byte that no data has ([`put`] writes another in its place), so that it is found wherever it
//! comes. The agent ends a connection by a mark with the token [`END`].

/// The port's name, /dev/virtio-ports/NAME in the guest.
pub const NAME: &str = "vmm.agent";

/// What tells one connection from those before.
pub type Token = [u8; 8];

/// No connection's.
pub const END: Token = [0; 8];

const MARK: u8 = 0xff;
/// What follows is a byte with a meaning, that many less.
const ESCAPE: u8 = 0xfe;

/// Appends a mark with `token`.
pub fn put_mark(token: Token, out: &mut Vec<u8>) {
    out.push(MARK);
    put(&token, out);
}

/// Appends `bytes` as data.
pub fn put(bytes: &[u8], out: &mut Vec<u8>) {
    for byte in bytes {
        match *byte {
            byte @ (ESCAPE | MARK) => out.extend_from_slice(&[ESCAPE, byte - ESCAPE]),
            byte => out.push(byte),
        }
    }
}

/// Finds marks and data in bytes as they come.
#[derive(Debug, Default)]
pub struct Reader {
    state: State,
    /// An escape has come, and what it stands for has not.
    escaped: bool,
}

#[derive(Debug, Default)]
enum State {
    /// Before the first mark, or after what cannot be: nothing counts.
    #[default]
    Lost,
    Token(Token, usize),
    Data,
}

impl Reader {
    /// Reads `bytes`, up to the end of a mark if there is one, and appends what is data to `data`. How many it has read, and the mark's
    /// token.
    pub fn read(&mut self, bytes: &[u8], data: &mut Vec<u8>) -> (usize, Option<Token>) {
        for (at, byte) in bytes.iter().copied().enumerate() {
            let byte = match (byte, self.escaped) {
                (MARK, _) => {
                    (self.state, self.escaped) = (State::Token(END, 0), false);
                    continue;
                }
                (ESCAPE, false) => {
                    self.escaped = true;
                    continue;
                }
                (byte @ (0 | 1), true) => {
                    self.escaped = false;
                    byte + ESCAPE
                }
                (_, true) => {
                    (self.state, self.escaped) = (State::Lost, false);
                    continue;
                }
                (byte, false) => byte,
            };
            match &mut self.state {
                State::Lost => {}
                State::Data => data.push(byte),
                State::Token(token, count) => {
                    if let Some(place) = token.get_mut(*count) {
                        *place = byte;
                    }
                    *count += 1;
                    if *count == token.len() {
                        let token = *token;
                        self.state = State::Data;
                        return (at + 1, Some(token));
                    }
                }
            }
        }
        (bytes.len(), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The connections in `bytes`, read in pieces: tokens with their data.
    fn connections(bytes: &[u8], piece: usize) -> Vec<(Token, Vec<u8>)> {
        let (mut reader, mut found, mut lost) =
            (Reader::default(), Vec::<(Token, Vec<u8>)>::new(), Vec::new());
        for mut bytes in bytes.chunks(piece) {
            while !bytes.is_empty() {
                let data = found.last_mut().map_or(&mut lost, |(_, data)| data);
                let (count, token) = reader.read(bytes, data);
                assert!((1..=bytes.len()).contains(&count));
                bytes = &bytes[count..];
                found.extend(token.map(|token| (token, Vec::new())));
            }
        }
        assert!(lost.is_empty(), "nothing counts before the first mark");
        found
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![any::<u8>(), 0xfc..=0xffu8, 0..3u8], 0..60)
    }

    proptest! {
        #[test]
        fn a_connection_is_found_whatever_was_cut_short_before_it(
            before in bytes(),
            one in bytes(),
            two in bytes(),
            cut in 0usize..100,
            tokens in any::<[Token; 2]>(),
            piece in 1usize..40,
        ) {
            let (mut first, mut last) = (Vec::new(), Vec::new());
            put_mark(tokens[0], &mut first);
            put(&one, &mut first);
            first.truncate(cut);
            put_mark(tokens[1], &mut last);
            put(&two, &mut last);
            let found = connections(&[before, first, last].concat(), piece);
            prop_assert_eq!(found.last(), Some(&(tokens[1], two)));
        }

        #[test]
        fn no_bytes_make_more_data_than_they_are(noise in bytes(), piece in 1usize..40) {
            let data: usize = connections(&noise, piece).iter().map(|(_, data)| data.len()).sum();
            prop_assert!(data <= noise.len());
        }
    }
}
