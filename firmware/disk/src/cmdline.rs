//! The command line that a kernel gets: its entry's options, and what the monitor was told.

use crate::text::Text;
use crate::{Error, Result};

/// The longest one, with room for its NUL in a page.
pub const MAX: usize = 4095;

/// An entry's options, then what was `given`, but for the root, which is the entry's to say if it does. What
/// follows `--` is for init, and stays behind all that is for the kernel.
///
/// # Errors
/// It is longer than `max`, or than [`MAX`].
pub fn join(entry: &[u8], given: &[u8], max: usize) -> Result<Text<MAX>> {
    let mut line = Text::EMPTY;
    let has_root = kernels(entry).any(|word| word.starts_with(b"root="));
    let root = |word: &[u8]| word.starts_with(b"root=") || word == b"ro" || word == b"rw";
    kernels(entry).try_for_each(|word| line.push_word(word))?;
    kernels(given).filter(|word| !has_root || !root(word)).try_for_each(|word| line.push_word(word))?;
    let mut separator = Some(&b"--"[..]);
    for word in inits(entry).chain(inits(given)) {
        separator.take().into_iter().chain([word]).try_for_each(|word| line.push_word(word))?;
    }
    if line.bytes().len() > max { Err(Error::TooLarge("the command line")) } else { Ok(line) }
}

/// The words as the kernel splits them: at blanks outside of double quotes.
fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut quoted = false;
    let split = line.split(move |byte| {
        quoted ^= *byte == b'"';
        byte.is_ascii_whitespace() && !quoted
    });
    split.filter(|word| !word.is_empty())
}

/// Those before `--`.
fn kernels(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    words(line).take_while(|word| *word != b"--")
}

/// Those behind it.
fn inits(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    words(line).skip_while(|word| *word != b"--").skip(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_says_the_root_and_what_is_for_init_stays_behind() {
        for (entry, given, joined) in [
            ("root=UUID=x ro  quiet", "root=/dev/vda rw console=ttyS0", "root=UUID=x ro quiet console=ttyS0"),
            ("quiet", "root=/dev/vda rw a", "quiet root=/dev/vda rw a"),
            ("a=\"b root=c\"", "root=/dev/vda", "a=\"b root=c\" root=/dev/vda"),
            ("root=x -- single \"a b\"", "console=ttyS0", "root=x console=ttyS0 -- single \"a b\""),
            ("a -- b", "c -- root=d", "a c -- b root=d"),
            ("a --", "b", "a b"),
            ("", "", ""),
        ] {
            let line = join(entry.as_bytes(), given.as_bytes(), 2047).unwrap();
            assert_eq!(line.to_string(), joined);
        }
        assert!(join(b"abc", b"def", 6).is_err());
        assert!(join(&[b'x'; 4000], &[b'y'; 100], usize::MAX).is_err());
    }
}
