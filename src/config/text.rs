//! The text forms of configuration values: sizes, `key=value,flag` lists, places.
//!
//! A list is turned into a JSON object and goes through the same serde tree as a file, so that both forms
//! have the same keys, defaults and errors.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};

use super::{Console, Cpus, Disk, Memory, Port, Where};

/// A text that does not say what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(String);

impl ParseError {
    /// An error that says `message`.
    pub(super) fn new(message: String) -> Self {
        Self(message)
    }
}

fn fail<T>(message: impl fmt::Display) -> Result<T, ParseError> {
    Err(ParseError(message.to_string()))
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
            Some(None) => fail(format_args!("{text:?} is more than 64 bits hold")),
            None => fail(format_args!("{text:?} is not a size; write it like 512M or 2G")),
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

/// A switch: true and false, or the texts `on` and `off`.
pub fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Bool(on) => Ok(on),
        Value::String(s) if s == "on" => Ok(true),
        Value::String(s) if s == "off" => Ok(false),
        other => Err(de::Error::custom(format_args!("{other} is neither on nor off"))),
    }
}

/// Turns `VALUE,key=value,flag` into an object; a first item without `=` is the value of `first`.
fn object(text: &str, first: &str) -> Result<Value, ParseError> {
    let mut map = Map::new();
    for (i, item) in text.split(',').enumerate() {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, Value::from(value)),
            None if i == 0 => (first, Value::from(item)),
            None => (item, Value::from(true)),
        };
        if key.is_empty() || value == "" {
            return fail(format_args!("{text:?}: expected {first}=...[,key=value][,flag]"));
        }
        if map.insert(key.to_owned(), value).is_some() {
            return fail(format_args!("{text:?}: {key} is there twice"));
        }
    }
    Ok(Value::Object(map))
}

/// Reads a list of pairs through the type's own serde implementation.
macro_rules! from_pairs {
    ($type:ty, $first:literal) => {
        impl FromStr for $type {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                <$type>::deserialize(object(text, $first)?).map_err(|e| ParseError(e.to_string()))
            }
        }
    };
}
from_pairs!(Memory, "size");
from_pairs!(Disk, "path");

impl FromStr for Where {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(match (text, text.split_once('=')) {
            ("stdio", _) => Self::Stdio,
            ("pty", _) => Self::Pty,
            ("off", _) => Self::Off,
            (_, Some(("file", path))) if !path.is_empty() => Self::File(path.into()),
            (_, Some(("socket", path))) if !path.is_empty() => Self::Socket(path.into()),
            _ => return fail(format_args!("{text:?} is not one of stdio, pty, file=PATH, socket=PATH, off")),
        })
    }
}

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Pty => f.write_str("pty"),
            Self::Off => f.write_str("off"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

impl Serialize for Where {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Where {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl FromStr for Console {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.parse().map(|place| Self(Some(place)))
    }
}

impl FromStr for Port {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text.split_once('=') {
            Some((name, to)) => Ok(Self { name: name.to_owned(), to: to.parse()? }),
            None => fail(format_args!("{text:?} is not NAME=WHERE")),
        }
    }
}

impl FromStr for Cpus {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.parse().map(Self).or_else(|_| fail(format_args!("{text:?} is not a number of CPUs")))
    }
}

/// Lets a part be written in JSON as its command line text or as its object.
pub fn text_or_object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = ParseError> + de::DeserializeOwned,
{
    match Value::deserialize(deserializer)? {
        Value::String(text) => text.parse().map_err(de::Error::custom),
        value => T::deserialize(value).map_err(de::Error::custom),
    }
}

/// [`text_or_object`] for each item of a list.
pub fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = ParseError> + de::DeserializeOwned,
{
    Vec::<Value>::deserialize(deserializer)?
        .into_iter()
        .map(|value| text_or_object(value).map_err(de::Error::custom))
        .collect()
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
        assert_eq!(memory.backing, Backing::Anonymous);
        let disk: Disk = "path=/a b,readonly,block-size=4096,format=raw".parse().unwrap();
        let json = r#"{"mem": "1G,hugepages=2M,prefault,backing=anonymous", "cpus": 2, "serial": "file=/x",
            "disk": ["path=/a b,readonly,block-size=4096,format=raw",
                {"path": "/a b", "readonly": true, "block-size": 4096, "format": "raw"}],
            "port": ["log=file=/l"], "console": "pty"}"#;
        let config: VmConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.mem, memory);
        assert_eq!(config.disk, [disk.clone(), disk]);
        assert_eq!(config.port[0].to, Where::File("/l".into()));
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn errors_name_the_key() {
        for (text, word) in [
            ("path=a,raedonly", "raedonly"),
            ("a,format=qcow2", "qcow2"),
            ("path=a,path=b", "twice"),
            ("a,readonly=yes", "yes"),
        ] {
            let error = text.parse::<Disk>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!("readonly=on".parse::<Disk>().is_err(), "a disk needs a path");
        assert!("file=".parse::<Where>().is_err());
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
