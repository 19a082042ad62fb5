//! The escape sequence of a terminal: Ctrl-A and one more key.
//!
//! A pure state machine between the keys that a person types and the bytes that the guest gets. Fed by the
//! terminal's thread; knows nothing of terminals.

/// What a person asked the monitor for, past the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Escape {
    /// Ctrl-A x: end the VM at once.
    Quit,
    /// Ctrl-A p: press the power button.
    PowerButton,
}

/// The key that starts an escape sequence: Ctrl-A.
const CTRL_A: u8 = 0x01;

/// What Ctrl-A h shows.
pub const HELP: &str = "\r\n\
    Ctrl-A h  this help\r\n\
    Ctrl-A x  kill the virtual machine\r\n\
    Ctrl-A p  press its power button\r\n\
    Ctrl-A a  send Ctrl-A to the guest (Ctrl-A Ctrl-A too)\r\n";

/// What one key turns into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A byte for the guest.
    Byte(u8),
    /// Part of a sequence that is not complete, or one that means nothing.
    Nothing,
    /// Show [`HELP`].
    Help,
    /// For the monitor.
    Escape(Escape),
}

/// Looks for escape sequences, however the input is cut into pieces.
#[derive(Debug, Default)]
pub struct Scanner {
    /// Ctrl-A was the last key.
    armed: bool,
}

impl Scanner {
    /// Takes the next key.
    pub fn feed(&mut self, key: u8) -> Key {
        if !std::mem::take(&mut self.armed) {
            self.armed = key == CTRL_A;
            return if self.armed { Key::Nothing } else { Key::Byte(key) };
        }
        match key {
            b'x' | b'X' => Key::Escape(Escape::Quit),
            b'p' | b'P' => Key::Escape(Escape::PowerButton),
            b'h' | b'H' | b'?' => Key::Help,
            b'a' | b'A' | CTRL_A => Key::Byte(CTRL_A),
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(keys: &[u8]) -> (Vec<u8>, Vec<Key>) {
        let (mut scanner, mut bytes, mut rest) = (Scanner::default(), Vec::new(), Vec::new());
        for key in keys {
            match scanner.feed(*key) {
                Key::Byte(byte) => bytes.push(byte),
                Key::Nothing => (),
                other => rest.push(other),
            }
        }
        (bytes, rest)
    }

    #[test]
    fn only_sequences_are_taken_out() {
        assert_eq!(feed(b"x\x02h"), (b"x\x02h".to_vec(), vec![]));
        assert_eq!(feed(b"a\x01xb"), (b"ab".to_vec(), vec![Key::Escape(Escape::Quit)]));
        assert_eq!(feed(b"\x01hx"), (b"x".to_vec(), vec![Key::Help]));
        assert_eq!(feed(b"\x01p"), (vec![], vec![Key::Escape(Escape::PowerButton)]));
    }

    #[test]
    fn ctrl_a_itself_gets_through_and_does_not_arm_again() {
        assert_eq!(feed(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(feed(b"\x01ax"), (b"\x01x".to_vec(), vec![]));
        assert_eq!(feed(b"\x01zx"), (b"x".to_vec(), vec![]), "an unknown sequence is swallowed");
    }
}
