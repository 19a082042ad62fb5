//! GRUB's variables: what grubenv and `set` say, and putting them into text.

use crate::Result;
use crate::text::Text;

/// The most variables that are taken from one environment block.
const MAX_LOADED: usize = 64;

/// Variables and their values. One for which there is no room stays unset.
#[derive(Debug, Clone, Copy)]
pub struct Variables {
    /// NAME=VALUE, each ended by a line feed.
    lines: Text<4096>,
}

impl Variables {
    /// Nothing is set.
    pub const NONE: Self = Self { lines: Text::EMPTY };

    fn all(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.lines.bytes().split(|byte| *byte == b'\n').filter_map(split)
    }

    /// The value: nothing if it is not set.
    pub fn get(&self, name: &[u8]) -> &[u8] {
        self.all().find(|(known, _)| *known == name).map_or(&[], |(_, value)| value)
    }

    /// Sets a variable; an empty value is as good as none.
    pub fn set(&mut self, name: &[u8], value: &[u8]) {
        let mut lines = Text::EMPTY;
        let mut line = |name: &[u8], value: &[u8]| -> Result<()> {
            let mut line = Text::<2048>::whole(name)?;
            [b"=", value, b"\n"].into_iter().try_for_each(|part| line.push(part))?;
            lines.push(line.bytes())
        };
        for (known, value) in self.all().filter(|(known, _)| *known != name) {
            let _ = line(known, value);
        }
        if !name.is_empty() && !value.is_empty() && !value.contains(&b'\n') {
            let _ = line(name, value);
        }
        self.lines = lines;
    }

    /// Does what a word NAME=VALUE says; nothing if it is none.
    pub fn assign(&mut self, word: &[u8]) {
        if let Some((name, value)) = split(word)
            && !name.is_empty()
            && name.iter().all(is_name)
        {
            self.set(name, value);
        }
    }

    /// Takes grubenv's content over: lines NAME=VALUE, a backslash before each backslash, `#` to the end of
    /// the block.
    ///
    /// `next_entry`, what GRUB would boot only once, cannot be crossed out on a disk that is only read: so,
    /// never.
    pub fn load(&mut self, environment: &[u8]) {
        let lines = environment.split(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#"));
        for (name, value) in lines.filter_map(split).take(MAX_LOADED) {
            let (mut plain, mut escaped) = (Text::<1024>::EMPTY, false);
            for byte in value {
                escaped = *byte == b'\\' && !escaped;
                if !escaped {
                    let _ = plain.push(&[*byte]);
                }
            }
            if name != b"next_entry" {
                self.set(name, plain.bytes());
            }
        }
    }

    /// `text` with the variables put in.
    ///
    /// # Errors
    /// It is too long.
    pub fn expand<const N: usize>(&self, text: &[u8]) -> Result<Text<N>> {
        let (mut expanded, mut rest) = (Text::EMPTY, text);
        while let Some((byte, after)) = rest.split_first() {
            rest = after;
            match byte {
                b'$' => {
                    let (name, length) = name(after);
                    // A dollar alone is one.
                    expanded.push(if length == 0 { b"$" } else { self.get(name) })?;
                    rest = after.get(length..).unwrap_or_default();
                }
                byte => expanded.push(&[*byte])?,
            }
        }
        Ok(expanded)
    }
}

/// The name at the start of what follows a dollar, with or without braces, and how many bytes that takes.
pub fn name(text: &[u8]) -> (&[u8], usize) {
    let braced = text.first() == Some(&b'{');
    let rest = text.get(usize::from(braced)..).unwrap_or_default();
    let end = rest.iter().position(|byte| !is_name(byte)).unwrap_or(rest.len());
    let closed = braced && rest.get(end) == Some(&b'}');
    (rest.get(..end).unwrap_or_default(), usize::from(braced) + end + usize::from(closed))
}

fn is_name(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_?".contains(byte)
}

fn split(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = line.iter().position(|byte| *byte == b'=')?;
    Some((line.get(..at)?, line.get(at + 1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_set_replaced_and_put_in() {
        let mut variables = Variables::NONE;
        variables
            .load(b"# GRUB Environment Block\nkernelopts=root=/dev/x ro a\\\\b\nnext_entry=1\nempty=\n####");
        variables.assign(b"default=1>2");
        variables.assign(b"default=0");
        variables.assign(b"root=UUID=x-y=z");
        variables.assign(b"no assignment=x");
        let expand = |text: &[u8]| variables.expand::<64>(text).unwrap().to_string();
        assert_eq!(expand(b"$kernelopts ${default}$nothing$ {x}"), "root=/dev/x ro a\\b 0$ {x}");
        assert_eq!((variables.get(b"next_entry"), variables.get(b"root")), (&b""[..], &b"UUID=x-y=z"[..]));
        assert!(variables.expand::<8>(b"$kernelopts").is_err());
        // What does not fit stays unset, and the others as they are.
        variables.set(b"long", &[b'x'; 5000]);
        assert_eq!((variables.get(b"long"), variables.get(b"default")), (&b""[..], &b"0"[..]));
    }
}
