//! Makes text from a guest, a peer or a file safe to show on a terminal, in a log line or on a page.
//!
//! Such text can move the cursor, rename the window, turn the rest of a line around or hide. Whoever takes it in or shows it
//! passes it through here, after demangling: [`text`] for a name or a sentence, [`lines`] for what may have several,
//! [`value`] for JSON that was read, [`json`] for JSON that is written.

use std::borrow::Cow;
use std::fmt::{self, Write};

use serde_json::Value;

/// Whether `c` acts on a terminal or on the text around it in place of being shown: C0, DEL and C1 controls; marks, embeddings,
/// overrides and isolates of the bidirectional algorithm (UAX #9); separators of lines and paragraphs; the byte order mark,
/// annotations and tags, which nobody sees.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}'
                | '\u{200b}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

fn escaped(text: &str, acts: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&acts) {
        return text.into();
    }
    let mut clean = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if !acts(c) {
            clean.push(c);
        } else if c.is_ascii() {
            clean.extend(c.escape_default());
        } else {
            clean.extend(c.escape_unicode());
        }
    }
    clean.into()
}

/// `text` with what acts written out: `\n`, `\u{1b}`, `\u{202e}`.
pub fn text(text: &str) -> Cow<'_, str> {
    escaped(text, acts)
}

/// The same, but line feeds stay.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && acts(c))
}

/// Anything that can be written, as [`text`] has it.
#[derive(Debug, Clone, Copy)]
pub struct Printable<T>(pub T);

impl<T: fmt::Display> fmt::Display for Printable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);
        impl Write for Escaping<'_, '_> {
            fn write_str(&mut self, part: &str) -> fmt::Result {
                self.0.write_str(&text(part))
            }
        }
        write!(Escaping(f), "{}", self.0)
    }
}

/// All strings of a JSON value that was read, keys included, as [`text`] has them.
pub fn value(value: Value) -> Value {
    match value {
        Value::String(string) => Value::String(match text(&string) {
            Cow::Borrowed(_) => string,
            Cow::Owned(clean) => clean,
        }),
        Value::Array(items) => Value::Array(items.into_iter().map(self::value).collect()),
        Value::Object(members) => Value::Object(
            members.into_iter().map(|(key, item)| (text(&key).into_owned(), self::value(item))).collect(),
        ),
        other => other,
    }
}

/// JSON that means the same, and in which nothing acts: a program reads what was there, a terminal shows `\u202e`.
pub fn json(json: String) -> String {
    let inside = |c: char| acts(c) && !c.is_ascii_whitespace();
    if !json.chars().any(inside) {
        return json;
    }
    let mut clean = String::with_capacity(json.len() + 8);
    for c in json.chars() {
        if inside(c) {
            // Outside of strings there is none of them.
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| _ = write!(clean, "\\u{unit:04x}"));
        } else {
            clean.push(c);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_is_written_out_and_the_rest_stays() {
        for (raw, clean) in [
            ("plain, grün, 日本, \\n", "plain, grün, 日本, \\n"),
            ("\x1b]0;title\x07", "\\u{1b}]0;title\\u{7}"),
            ("a\nb\tc\r\0\x7f", "a\\nb\\tc\\r\\u{0}\\u{7f}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("\u{202e}evil\u{2066}\u{200f}\u{61c}", "\\u{202e}evil\\u{2066}\\u{200f}\\u{61c}"),
            ("\u{2028}\u{feff}\u{e0041}", "\\u{2028}\\u{feff}\\u{e0041}"),
        ] {
            assert_eq!(text(raw), clean);
            assert_eq!(Printable(raw).to_string(), clean);
            assert_eq!(lines(&format!("{raw}\n")).trim_end(), clean.replace("a\\nb", "a\nb"));
        }
    }

    #[test]
    fn json_keeps_its_meaning_and_values_are_clean() {
        let evil = Value::from(vec!["\u{85}\u{202e}\u{e0041}x"]);
        let written = json(evil.to_string());
        assert!(written.is_ascii(), "{written}");
        assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), evil);
        let read = value(serde_json::json!({"a\u{1b}": ["\u{202e}", 1, null]}));
        assert_eq!(read.to_string(), r#"{"a\\u{1b}":["\\u{202e}",1,null]}"#);
    }
}
