//! [`Firmware`]: what starts at the reset vector, where a machine is to start there.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::host_path;

/// Firmware: `built-in`, or the path of a ROM's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Firmware {
    /// The monitor's own.
    BuiltIn,
    /// A file.
    File(PathBuf),
}

impl Firmware {
    /// How [`Firmware::BuiltIn`] is written. A file of that name has a path, too: `./built-in`.
    pub const BUILT_IN: &'static str = "built-in";
}

impl From<&OsStr> for Firmware {
    fn from(text: &OsStr) -> Self {
        if text == Self::BUILT_IN { Self::BuiltIn } else { Self::File(text.into()) }
    }
}

impl fmt::Display for Firmware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str(Self::BUILT_IN),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl Serialize for Firmware {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::BuiltIn => serializer.serialize_str(Self::BUILT_IN),
            Self::File(path) => host_path::serialize(path, serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Firmware {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        host_path::deserialize_text(deserializer).map(|text| text.as_os_str().into())
    }
}
