//! A short byte string in place: there is no allocator.

use crate::{Error, Result};
use core::fmt;

/// At most `N` bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Text<N> {
    /// Nothing.
    pub const EMPTY: Self = Self { bytes: [0; N], len: 0 };

    /// As much of `bytes` as has room: for what is only shown or compared.
    pub fn clipped(bytes: &[u8]) -> Self {
        let mut text = Self::EMPTY;
        let _ = text.push(&bytes[..bytes.len().min(N)]);
        text
    }

    /// All of `bytes`: for names and options, of which a part would be another one.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn whole(bytes: &[u8]) -> Result<Self> {
        let mut text = Self::EMPTY;
        text.push(bytes)?;
        Ok(text)
    }

    /// Appends all of `bytes`, or nothing.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let room = self.bytes.get_mut(self.len..).and_then(|rest| rest.get_mut(..bytes.len()));
        room.ok_or(Error::TooLarge("a name or an option line"))?.copy_from_slice(bytes);
        self.len += bytes.len();
        Ok(())
    }

    /// Appends `bytes`, with a space before them if there is something already.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn push_word(&mut self, bytes: &[u8]) -> Result<()> {
        if !self.is_empty() && !bytes.is_empty() {
            self.push(b" ")?;
        }
        self.push(bytes)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Self::EMPTY
    }
}

/// For a console: what is not printable ASCII shows as a question mark, so that no disk sends escape sequences.
impl<const N: usize> fmt::Display for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Shown(self.bytes()).fmt(f)
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes, shown as [`Text`] is.
pub struct Shown<'a>(pub &'a [u8]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| {
            fmt::Write::write_char(f, if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '?' })
        })
    }
}
