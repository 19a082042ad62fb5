//! The caller's terminal in raw mode, given back as it was however the rig ends: by return,
//! panic or signal. Used by `session` when the command gets a terminal.

use rustix::termios::{self, OptionalActions, Termios};
use std::io;
use std::sync::Mutex;

/// The terminal's mode before it was made raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode for as long as this value lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on standard input raw.
    pub fn new() -> io::Result<RawTerminal> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(before);
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(RawTerminal(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its mode back, if it was changed.
pub fn restore() {
    let mut before = BEFORE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(before) = before.take() {
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Rows and columns of the terminal on standard input.
pub fn size() -> io::Result<(u16, u16)> {
    let size = termios::tcgetwinsize(io::stdin())?;
    Ok((size.ws_row, size.ws_col))
}
