//! The text forms of configuration values: sizes, `key=value,flag` lists, places.
//!
//! A list is turned into a JSON object and goes through the same serde tree as a file, so that both forms
//! have the same keys, defaults and errors.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};

use super::{CharTarget, Console, Cpus, Disk, Memory, Net, NetTarget, OutputFile, Port, Vsock, host_path};

/// A text that does not say what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct ParseError {
    what: String,
    hint: Option<String>,
}

impl ParseError {
    /// An error that says `what`.
    pub(super) fn new(what: String) -> Self {
        Self { what, hint: None }
    }

    /// The same with what to write instead.
    pub(crate) fn hinted(what: String, hint: &str) -> Self {
        Self { what, hint: Some(hint.to_owned()) }
    }

    /// What to write instead, where that can be told.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// For a reader of files, which has no place for a hint of its own.
    pub(super) fn in_file<E: de::Error>(self) -> E {
        match &self.hint {
            Some(hint) => E::custom(format_args!("{self} ({hint})")),
            None => E::custom(self),
        }
    }
}

fn fail<T>(message: impl fmt::Display) -> Result<T, ParseError> {
    Err(ParseError::new(message.to_string()))
}

/// A number of bytes, written `4096`, `512M`, `2G`, `1T` (binary units).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

    /// `mib` MiB.
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// `bytes` bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let body = text.strip_suffix("iB").or(text.strip_suffix('B')).unwrap_or(text);
        let unit = body.chars().last().map(|c| c.to_ascii_uppercase());
        let shift = Self::UNITS.iter().find(|(c, _)| Some(*c) == unit).map(|(_, shift)| *shift);
        let digits = if shift.is_some() { &body[..body.len() - 1] } else { body };
        let number = digits.parse::<u64>().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()));
        match number.map(|n| n.checked_mul(1 << shift.unwrap_or(0))) {
            Some(Some(bytes)) => Ok(Self(bytes)),
            Some(None) => fail(format_args!("{text:?} does not fit into 64 bits")),
            None => fail(format_args!("{text:?} is not a size; write one like 512M or 2G")),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = Self::UNITS.iter().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match unit {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Number(n) => {
                n.as_u64().map(Self).ok_or_else(|| de::Error::custom("a size is a whole number"))
            }
            Value::String(s) => s.parse().map_err(de::Error::custom),
            other => Err(de::Error::custom(format_args!("{other} is not a size"))),
        }
    }
}

/// An I/O port: a number, or a text of one, hexadecimal after `0x`.
///
/// # Errors
/// It is no number below 65536.
pub fn port_number(text: &str) -> Result<u16, ParseError> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.or_else(|_| fail(format_args!("{text:?} is not an I/O port: a number up to 65535, or 0x...")))
}

/// An I/O port that may be absent.
pub fn optional_port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::String(text) => port_number(&text).map(Some).map_err(de::Error::custom),
        other => port_number(&other.to_string()).map(Some).map_err(de::Error::custom),
    }
}

/// A whole number that may be absent, or a text of one.
pub fn optional_number<'de, D: Deserializer<'de>, T: FromStr>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    let text = match Value::deserialize(deserializer)? {
        Value::Null => return Ok(None),
        Value::String(text) => text,
        other => other.to_string(),
    };
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|_| digits);
    number.map(Some).ok_or_else(|| de::Error::custom(format_args!("{text:?} is not a number that fits here")))
}

/// A switch: true and false, or the texts `on` and `off`.
pub fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Bool(on) => Ok(on),
        Value::String(s) if s == "on" => Ok(true),
        Value::String(s) if s == "off" => Ok(false),
        other => {
            Err(de::Error::custom(format_args!("{other} is neither true nor false, \"on\" nor \"off\"")))
        }
    }
}

/// The items of a text `VALUE,key=value,flag`. A comma that belongs to an item is written twice, as QEMU has it.
pub(crate) fn items(text: &OsStr) -> Vec<Vec<u8>> {
    let mut items = vec![Vec::new()];
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (byte, items.last_mut()) {
            (b',', _) if bytes.next_if_eq(&b',').is_none() => items.push(Vec::new()),
            (_, Some(item)) => item.push(byte),
            (_, None) => {}
        }
    }
    items
}

/// A value as it is written in a list: its commas twice.
pub(super) fn escaped(value: &[u8]) -> Vec<u8> {
    value.iter().flat_map(|byte| std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 })).collect()
}

fn shown(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// Key and value of an item; the first `=` parts them.
fn pair(item: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = item.iter().position(|byte| *byte == b'=')?;
    Some((&item[..at], &item[at + 1..]))
}

/// Turns `VALUE,key=value,flag` into an object; a first item without `=` is the value of `first`, but for the `word` that is a flag
/// there, too. Without a `first` no other may be there: then the object is empty, and what it is for says what it needs. The keys in
/// `lists` have lists of values, and may come several times.
fn object(text: &OsStr, first: &str, word: &str, lists: &[&str]) -> Result<Value, ParseError> {
    let value = |bytes: &[u8]| match str::from_utf8(bytes) {
        Ok(text) => Value::from(text),
        Err(_) => Value::from(bytes),
    };
    let mut map = Map::new();
    let items = items(text);
    for (i, item) in items.iter().enumerate() {
        let (key, value) = match pair(item) {
            Some((key, [])) if !key.is_empty() => {
                return fail(format_args!("{text:?}: {}= is empty", shown(key)));
            }
            Some((key, text)) => (shown(key), value(text)),
            None if i == 0 && item != word.as_bytes() && first.is_empty() => {
                return Ok(Value::Object(Map::new()));
            }
            None if i == 0 && item != word.as_bytes() => (first.into(), value(item)),
            None => (shown(item), Value::from(true)),
        };
        if key.is_empty() || value == "" {
            return fail(match item.is_empty() {
                true if items.len() == 1 => {
                    format!("{text:?} is empty: expected {}[,key=value][,flag]", first.to_uppercase())
                }
                true => format!("{text:?}: there is nothing before or after one of the commas"),
                false => format!("{text:?}: {:?} has no key before the =", shown(item)),
            });
        }
        if lists.contains(&&*key) {
            let list = map.entry(key.clone().into_owned()).or_insert_with(|| Value::Array(Vec::new()));
            list.as_array_mut().into_iter().for_each(|list| list.push(value.clone()));
            continue;
        }
        if map.insert(key.clone().into_owned(), value).is_some() {
            return fail(format_args!("{text:?}: duplicate key {key}"));
        }
    }
    Ok(Value::Object(map))
}

/// Why `text` could not be read, if it is that a path was taken apart at its comma or `=`: how to write it.
fn path_hint(text: &OsStr, first: &str, error: &str) -> Option<String> {
    let unknown = |key: &[u8]| error.contains(&format!("unknown field `{}`", shown(key)));
    let items = items(text);
    let at = items.iter().position(|item| unknown(pair(item).map_or(item, |(key, _)| key)))?;
    if at == 0 {
        let whole = escaped(&items[0]);
        return Some(format!("give a path that has a '=' its key: {first}={}", shown(&whole)));
    }
    let before: Vec<_> = items[..at].iter().map(|item| escaped(item)).collect();
    let (before, rest) = (before.join(&b','), escaped(&items[at]));
    Some(format!("write a comma that belongs to a path twice: {},,{}", shown(&before), shown(&rest)))
}

/// What a network device may begin with whose first word has a letter more or less than that, or another, or two that changed places.
fn near_hint(text: &OsStr) -> Option<String> {
    let items = items(text);
    let first = items.first().map(|item| shown(pair(item).map_or(item, |(key, _)| key)))?;
    let word = NetTarget::WORDS.into_iter().find(|word| strsim::osa_distance(&first, word) == 1)?;
    Some(format!("did you mean {word}{}?", if word == "user" { "" } else { "=..." }))
}

/// Reads a list of pairs (see [`object`]) through the type's own serde implementation.
pub(super) fn pairs<T: de::DeserializeOwned>(
    text: &OsStr,
    first: &str,
    word: &str,
    lists: &[&str],
) -> Result<T, ParseError> {
    T::deserialize(object(text, first, word, lists)?).map_err(|error| {
        let what = error.to_string();
        let hint = match first {
            "path" => path_hint(text, first, &what),
            "" => near_hint(text),
            _ => None,
        };
        ParseError { what, hint }
    })
}

/// Has a type be read by [`pairs`].
macro_rules! from_pairs {
    ($type:ty, $first:literal) => {
        from_pairs!($type, $first, "", []);
    };
    ($type:ty, $first:literal, $word:literal, $lists:expr) => {
        impl TryFrom<&OsStr> for $type {
            type Error = ParseError;
            fn try_from(text: &OsStr) -> Result<Self, ParseError> {
                pairs(text, $first, $word, &$lists)
            }
        }
        from_text!($type);
    };
}
/// Reads a text through the type's reading of what the command line gives, which may not be UTF-8.
macro_rules! from_text {
    ($type:ty) => {
        impl FromStr for $type {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                OsStr::new(text).try_into()
            }
        }
    };
}
from_pairs!(Memory, "size");
from_pairs!(Disk, "path");
from_pairs!(Vsock, "path");
from_pairs!(Net, "", "user", ["allow", "dns", "publish"]);
from_text!(CharTarget);
from_text!(Console);
from_text!(Port);
from_text!(OutputFile);

impl TryFrom<&OsStr> for CharTarget {
    type Error = ParseError;
    fn try_from(text: &OsStr) -> Result<Self, ParseError> {
        const FORMS: &str = "expected stdio, pty, file=PATH[,max=SIZE], socket=PATH or off";
        let items = items(text);
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        // How many items belong to it.
        let mut last = 1;
        let place = match (items[0].as_slice(), pair(&items[0])) {
            (b"stdio", _) => Self::Stdio,
            (b"pty", _) => Self::Pty,
            (b"off", _) => Self::Off,
            (_, Some((b"file", file))) if !file.is_empty() => {
                let max = items.get(1).and_then(|item| item.strip_prefix(b"max="));
                last = if max.is_some() { 2 } else { 1 };
                Self::File(OutputFile::of(text, file, max, OutputFile::LEAST)?)
            }
            (_, Some((b"socket", socket))) if !socket.is_empty() => Self::Socket(path(socket)),
            _ => return fail(format_args!("{text:?}: {FORMS}")),
        };
        match items.get(last) {
            None => Ok(place),
            Some(item) => {
                let whole = escaped(&items.join(&b','));
                let hint = format!("write a comma that belongs to a path twice: {}", shown(&whole));
                let what = format!("{text:?}: nothing can follow the place, but {:?} does", shown(item));
                Err(ParseError { what, hint: Some(hint) })
            }
        }
    }
}

impl CharTarget {
    /// What [`CharTarget::try_from`] reads it from.
    fn text(&self) -> Vec<u8> {
        let with = |key: &[u8], path: &PathBuf| [key, &escaped(path.as_os_str().as_bytes())].concat();
        match self {
            Self::Stdio => b"stdio".into(),
            Self::Pty => b"pty".into(),
            Self::Off => b"off".into(),
            Self::File(file) => [b"file=".as_slice(), &file.text()].concat(),
            Self::Socket(path) => with(b"socket=", path),
        }
    }
}

impl fmt::Display for CharTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.text()))
    }
}

/// A path as it is, and perhaps `,max=SIZE` behind it.
impl TryFrom<&OsStr> for OutputFile {
    type Error = ParseError;
    fn try_from(text: &OsStr) -> Result<Self, ParseError> {
        Self::with_least(text, Self::LEAST)
    }
}

impl OutputFile {
    /// The file that `text` names, whose limit is `least` or more.
    ///
    /// # Errors
    /// It names none, or the limit is no size, or less.
    pub fn with_least(text: &OsStr, least: Size) -> Result<Self, ParseError> {
        const MAX: &[u8] = b",max=";
        let bytes = text.as_bytes();
        let at = bytes.windows(MAX.len()).rposition(|window| window == MAX);
        let (path, max) = at.map_or((bytes, None), |at| (&bytes[..at], Some(&bytes[at + MAX.len()..])));
        Self::of(text, path, max, least)
    }

    /// `text` names `path`, and its limit, which is `least` or more.
    fn of(text: &OsStr, path: &[u8], max: Option<&[u8]>, least: Size) -> Result<Self, ParseError> {
        if path.is_empty() {
            return fail(format_args!("{text:?}: expected PATH[,max=SIZE]"));
        }
        let path = PathBuf::from(OsStr::from_bytes(path));
        match max.map(|max| shown(max).parse::<Size>()).transpose()? {
            Some(max) if max < least => {
                fail(format_args!("{text:?}: max={max} is too little; at least max={least}"))
            }
            max => Ok(Self { path, max }),
        }
    }

    /// What it is read from.
    fn text(&self) -> Vec<u8> {
        let max = self.max.map(|max| format!(",max={max}")).unwrap_or_default();
        [escaped(self.path.as_os_str().as_bytes()), max.into_bytes()].concat()
    }
}

impl From<PathBuf> for OutputFile {
    fn from(path: PathBuf) -> Self {
        Self { path, max: None }
    }
}

impl fmt::Display for OutputFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.text()))
    }
}

impl Serialize for CharTarget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        host_path::serialize_bytes(&self.text(), serializer)
    }
}

/// By itself, and not behind `file=`: a comma is written once, as it is read.
impl Serialize for OutputFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let max = self.max.map(|max| format!(",max={max}")).unwrap_or_default();
        host_path::serialize_bytes(&[self.path.as_os_str().as_bytes(), max.as_bytes()].concat(), serializer)
    }
}

impl<'de> Deserialize<'de> for OutputFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = host_path::deserialize_text(deserializer)?;
        text.as_os_str().try_into().map_err(ParseError::in_file)
    }
}

impl<'de> Deserialize<'de> for CharTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = host_path::deserialize_text(deserializer)?;
        text.as_os_str().try_into().map_err(ParseError::in_file)
    }
}

impl TryFrom<&OsStr> for Console {
    type Error = ParseError;
    fn try_from(text: &OsStr) -> Result<Self, ParseError> {
        text.try_into().map(|place| Self(Some(place)))
    }
}

impl TryFrom<&OsStr> for Port {
    type Error = ParseError;
    fn try_from(text: &OsStr) -> Result<Self, ParseError> {
        match pair(text.as_bytes()) {
            Some((name, to)) => match str::from_utf8(name) {
                Ok(name) => Ok(Self { name: name.to_owned(), to: OsStr::from_bytes(to).try_into()? }),
                Err(_) => fail(format_args!("{text:?}: the port's name is not UTF-8")),
            },
            None => fail(format_args!("{text:?}: expected NAME=WHERE, for example log=file=PATH")),
        }
    }
}

impl FromStr for Cpus {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.parse().map(Self).or_else(|_| fail(format_args!("{text:?} is not a number of CPUs")))
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => text.parse().map_err(de::Error::custom),
            other => other.to_string().parse().map_err(de::Error::custom),
        }
    }
}

/// Memory: its size as a number of bytes, or [`text_or_object`].
pub fn memory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Memory, D::Error> {
    match Value::deserialize(deserializer)? {
        size @ Value::Number(_) => {
            let size = Size::deserialize(size).map_err(de::Error::custom)?;
            Ok(Memory { size, ..Memory::default() })
        }
        // Has no path, so no text that is not UTF-8.
        bytes @ Value::Array(_) => {
            Err(de::Error::custom(format_args!("{bytes} is neither a text nor an object")))
        }
        value => text_or_object(value).map_err(de::Error::custom),
    }
}

/// Lets a part be written in JSON as its command line text or as its object.
pub fn text_or_object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: for<'a> TryFrom<&'a OsStr, Error = ParseError> + de::DeserializeOwned,
{
    match Value::deserialize(deserializer)? {
        value @ (Value::String(_) | Value::Array(_)) => {
            let text = host_path::from_value(value).map_err(de::Error::custom)?;
            text.as_os_str().try_into().map_err(ParseError::in_file)
        }
        value @ Value::Object(_) => T::deserialize(value).map_err(de::Error::custom),
        other => Err(de::Error::custom(format_args!("{other} is neither a text nor an object"))),
    }
}

/// [`text_or_object`] for each item of a list.
pub fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: for<'a> TryFrom<&'a OsStr, Error = ParseError> + de::DeserializeOwned,
{
    Vec::<Value>::deserialize(deserializer)?
        .into_iter()
        .map(|value| text_or_object(value).map_err(de::Error::custom))
        .collect()
}

/// The same of a part that may be absent.
pub fn optional<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: for<'a> TryFrom<&'a OsStr, Error = ParseError> + de::DeserializeOwned,
{
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        value => text_or_object(value).map(Some).map_err(de::Error::custom),
    }
}

/// Texts, or one of them.
pub fn list_of_texts<'de, D: Deserializer<'de>, T: de::DeserializeOwned>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    let list = match Value::deserialize(deserializer)? {
        Value::Array(list) => list,
        one => vec![one],
    };
    list.into_iter().map(|value| T::deserialize(value).map_err(de::Error::custom)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Backing, HugePages, VmConfig};
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("4096", 4096), ("512M", 512 << 20), ("2g", 2 << 30), ("1TiB", 1 << 40), ("8KB", 8192)]
        {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes, "{text}");
        }
        for text in ["", "M", "-1", "+1", "1.5G", "1X", "99999999999T", "0x10"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(3 << 30).to_string(), "3G");
        assert_eq!(Size(1000).to_string(), "1000");
    }

    #[test]
    fn lists_and_files_fill_the_same_tree() {
        let memory: Memory = "1G,hugepages=2M,prefault,backing=anonymous".parse().unwrap();
        assert_eq!((memory.hugepages, memory.prefault), (Some(HugePages::TwoMiB), true));
        assert_eq!(memory.backing, Some(Backing::Anonymous));
        let disk: Disk = "path=/a b,readonly,block-size=4096,format=raw".parse().unwrap();
        let json = r#"{"mem": "1G,hugepages=2M,prefault,backing=anonymous", "cpus": 2, "serial": "file=/x",
            "disk": ["path=/a b,readonly,block-size=4096,format=raw",
                {"path": "/a b", "readonly": true, "block-size": 4096, "format": "raw"}],
            "port": ["log=file=/l"], "console": "pty"}"#;
        let config: VmConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.mem, memory);
        assert_eq!(config.disk, [disk.clone(), disk]);
        assert_eq!(config.port[0].to, CharTarget::File("/l".parse().unwrap()));
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn a_path_may_have_any_character() {
        let os = |bytes: &'static [u8]| OsStr::from_bytes(bytes);
        let path = |bytes: &'static [u8]| PathBuf::from(os(bytes));
        for (text, wanted) in [
            (&b"path=a,,b.img"[..], &b"a,b.img"[..]),
            (b"a,,b.img", b"a,b.img"),
            (b"path=a=b.img", b"a=b.img"),
            (b"path=,,,,a", b",,a"),
            (b"path=\xff\xfe,,.img", b"\xff\xfe,.img"),
        ] {
            let disk: Disk = OsStr::from_bytes(&[text, b",readonly"].concat()).try_into().unwrap();
            assert_eq!((disk.path, disk.readonly), (path(wanted), true), "{text:?}");
        }
        for (text, wanted) in [
            (&b"file=a,,b"[..], CharTarget::File(path(b"a,b").into())),
            (b"file=a=b", CharTarget::File(path(b"a=b").into())),
            (b"socket=\xff", CharTarget::Socket(path(b"\xff"))),
        ] {
            let place: CharTarget = os(text).try_into().unwrap();
            assert_eq!(place, wanted);
            assert_eq!(place.text(), text, "it reads back");
        }
        let port: Port = os(b"log=file=\xff,,").try_into().unwrap();
        assert_eq!((port.name.as_str(), port.to), ("log", CharTarget::File(path(b"\xff,").into())));
        for (text, hint) in [
            ("path=a,b.img", "path=a,,b.img"),
            ("a,b.img,readonly", "a,,b.img"),
            ("path=a,,b,c", "path=a,,b,,c"),
            ("a=b.img", "path=a=b.img"),
            ("path=a,b=c", "path=a,,b=c"),
        ] {
            let error = text.parse::<Disk>().unwrap_err();
            assert!(error.hint().unwrap().ends_with(&format!(": {hint}")), "{text}: {error:?}");
        }
        let error = "file=a,b".parse::<CharTarget>().unwrap_err();
        assert!(error.hint().unwrap().ends_with(": file=a,,b"), "{error:?}");
    }

    #[test]
    fn paths_that_are_not_utf_8_survive_json() {
        let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        let mut config = VmConfig { kernel: Some(path(b"k\xff")), ..VmConfig::default() };
        config.disk = vec![OsStr::from_bytes(b"path=d\xff,,").try_into().unwrap()];
        config.serial = CharTarget::File(path(b"s\xff,").into());
        config.console = Console(Some(CharTarget::Socket(path(b"c\xff"))));
        config.firmware = Some(OsStr::from_bytes(b"f\xff").into());
        config.option_rom = vec![path(b"o\xff"), "plain".into()];
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config, "{json}");
        assert!(json.contains(r#""kernel":[107,255]"#) && json.contains(r#""plain""#), "{json}");
    }

    #[test]
    fn json_is_answered_in_the_users_terms() {
        let read = |json: &str| serde_json::from_str::<VmConfig>(json);
        let config =
            read(r#"{"mem": 536870912, "cpus": "2", "rng": "on", "pit": true, "debug_exit": "0xf4"}"#)
                .unwrap();
        let (size, cpus) = (config.mem.size.bytes(), config.cpus.0);
        assert_eq!((size, cpus, config.rng, config.debug_exit), (512 << 20, 2, true, Some(0xf4)));
        for (json, said) in [
            (r#"{"mem": -1}"#, "a size is a whole number"),
            (r#"{"mem": [64]}"#, "[64] is neither a text nor an object"),
            (r#"{"mem": true}"#, "true is neither a text nor an object"),
            (r#"{"cpus": 1.5}"#, "\"1.5\" is not a number of CPUs"),
            (r#"{"debug_exit": 65536}"#, "not an I/O port"),
            (r#"{"disk": [7]}"#, "7 is neither a text nor an object"),
            (r#"{"serial": 7}"#, "7 is not a text"),
            (r#"{"disk": ["a,b"]}"#, "a,,b"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(said), "{json}: {error}");
            for name in ["u32", "u16", "struct", "PathBuf"] {
                assert!(!error.contains(name), "{json}: {error}");
            }
        }
        let error = read(r#"{"mem": 64}"#).unwrap().validate().unwrap_err();
        assert!(error.hint.contains("64M"), "{error:?}");
    }

    #[test]
    fn errors_name_the_key() {
        for (text, word) in [
            ("path=a,raedonly", "raedonly"),
            ("a,format=qcow2", "qcow2"),
            ("path=a,path=b", "duplicate"),
            ("a,readonly=yes", "yes"),
        ] {
            let error = text.parse::<Disk>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!("readonly=on".parse::<Disk>().is_err(), "a disk needs a path");
        for wrong in ["file=", "file=,max=1M", "file=a,max=", "file=a,max=lots", "file=a,max=1K"] {
            assert!(wrong.parse::<CharTarget>().is_err(), "{wrong}");
        }
        let capped: CharTarget = "file=a,,b,max=64K".parse().unwrap();
        assert_eq!(capped.to_string(), "file=a,,b,max=64K");
        let CharTarget::File(file) = capped else { panic!("{capped:?}") };
        assert_eq!((file.path, file.max), ("a,b".into(), Some(Size(64 << 10))));
    }

    #[test]
    fn impossible_values_are_refused() {
        let config = |json: &str| serde_json::from_str::<VmConfig>(json).unwrap().validate();
        assert_eq!(config("{}"), Ok(()));
        for json in [
            r#"{"mem": "0"}"#,
            r#"{"mem": "1M"}"#,
            r#"{"mem": "999T"}"#,
            r#"{"mem": "128M,hugepages=1G"}"#,
            r#"{"cpus": 0}"#,
            r#"{"name": "../x"}"#,
            r#"{"console": "stdio", "serial": "stdio"}"#,
            r#"{"port": ["a=off", "a=pty"]}"#,
        ] {
            assert!(config(json).is_err(), "{json}");
        }
        assert_eq!(config(r#"{"serial": "stdio"}"#), Ok(()), "the console gives way");
    }
}
