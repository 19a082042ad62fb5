//! Paths of the host in JSON: a string, or where a path is not UTF-8 the array of its bytes. So that what is printed can be
//! read back, whatever a file is called.
//!
//! `#[serde(with = ...)]` for a path, [`optional`] and [`list`]; also the texts that have a path in them.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

/// A path as a word of a shell's command: in quotes if it needs them.
pub fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:=@%,".contains(c);
    if text.chars().all(plain) && !text.is_empty() {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A path's, or a text's, bytes as they stand in JSON.
struct Form<'a>(&'a [u8]);

impl Serialize for Form<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match str::from_utf8(self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => self.0.serialize(serializer),
        }
    }
}

/// Writes a text that may not be UTF-8.
///
/// # Errors
/// The serializer's.
pub fn serialize_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    Form(bytes).serialize(serializer)
}

/// What [`serialize_bytes`] wrote.
///
/// # Errors
/// It is neither a string nor an array of bytes.
pub fn deserialize_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<OsString, D::Error> {
    from_value(Value::deserialize(deserializer)?).map_err(de::Error::custom)
}

/// The same of a value that was read.
pub(super) fn from_value(value: Value) -> Result<OsString, String> {
    match value {
        Value::String(text) => Ok(text.into()),
        Value::Array(bytes) => {
            let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok());
            let bytes: Option<Vec<_>> = bytes.iter().map(byte).collect();
            bytes.map(OsString::from_vec).ok_or_else(|| "expected a text or its bytes".to_owned())
        }
        other => Err(format!("{other} is not a text")),
    }
}

/// Writes a path.
///
/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serialize_bytes(path.as_os_str().as_bytes(), serializer)
}

/// Reads a path.
///
/// # Errors
/// It is neither a string nor an array of bytes.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    deserialize_text(deserializer).map(PathBuf::from)
}

/// A path that may be absent. The field needs `default`, too.
pub mod optional {
    use super::*;

    /// Writes it: null if it is absent.
    ///
    /// # Errors
    /// The serializer's.
    #[allow(clippy::ref_option, reason = "serde gives the field")]
    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_ref().map(|path| Form(path.as_os_str().as_bytes())).serialize(serializer)
    }

    /// Reads it.
    ///
    /// # Errors
    /// As for a path.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Null => Ok(None),
            value => from_value(value).map(|text| Some(text.into())).map_err(de::Error::custom),
        }
    }
}

/// Several paths.
pub mod list {
    use super::*;

    /// Writes them.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(paths.iter().map(|path| Form(path.as_os_str().as_bytes())))
    }

    /// Reads them.
    ///
    /// # Errors
    /// One is no path.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
        let values = Vec::<Value>::deserialize(deserializer)?.into_iter();
        values.map(|value| from_value(value).map(PathBuf::from).map_err(de::Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_a_command() {
        for (path, word) in [
            ("/a/b-1.img", "/a/b-1.img"),
            ("my disk", "'my disk'"),
            ("a'b", "'a'\\''b'"),
            ("$x", "'$x'"),
            ("", "''"),
        ] {
            assert_eq!(quoted(Path::new(path)), word);
        }
    }
}
