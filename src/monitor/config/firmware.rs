//! [`Firmware`]: what starts at the reset vector, where a machine is to start there.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

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

impl FromStr for Firmware {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == Self::BUILT_IN { Self::BuiltIn } else { Self::File(text.into()) })
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
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Firmware {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Ok(firmware) = String::deserialize(deserializer)?.parse();
        Ok(firmware)
    }
}
