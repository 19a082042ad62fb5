//! [`Plug`]: a device that comes while the machine runs.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use serde::{Deserialize, Serialize};

use super::text::ParseError;
use super::{Disk, Net, NetTarget, VmConfig};

/// A device to be added: `disk=FILE...` or `net=user...`, with what follows as in the settings of these names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plug {
    /// A disk.
    Disk(Disk),
    /// A network device.
    Net(Net),
}

impl Plug {
    /// `config` with this device as well.
    pub fn added_to(&self, config: &VmConfig) -> VmConfig {
        let mut config = config.clone();
        match self {
            Self::Disk(disk) => config.disk.push(disk.clone()),
            Self::Net(net) => config.net.push(net.clone()),
        }
        config
    }

    /// Has its paths not depend on the working directory of whoever named them: for another process.
    ///
    /// # Errors
    /// There is none.
    pub fn make_absolute(&mut self) -> std::io::Result<()> {
        let paths = match self {
            Self::Disk(disk) => disk.paths().collect(),
            Self::Net(Net { to: NetTarget::Socket(path) | NetTarget::VhostUser(path), .. }) => vec![path],
            Self::Net(_) => Vec::new(),
        };
        for path in paths {
            *path = std::path::absolute(&*path)?;
        }
        Ok(())
    }
}

impl TryFrom<&OsStr> for Plug {
    type Error = ParseError;

    fn try_from(text: &OsStr) -> Result<Self, ParseError> {
        let bytes = text.as_bytes();
        let rest = |kind: &[u8]| bytes.strip_prefix(kind).map(OsStr::from_bytes);
        if let Some(disk) = rest(b"disk=") {
            return disk.try_into().map(Self::Disk);
        }
        if let Some(net) = rest(b"net=") {
            return net.try_into().map(Self::Net);
        }
        let what = format!("{:?} is neither a disk nor a network device", text.to_string_lossy());
        Err(ParseError::hinted(what, "write disk=FILE or net=user, with what else `disk=` and `net=` take"))
    }
}

/// As it is written, without its options.
impl fmt::Display for Plug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(disk) => {
                write!(f, "disk={}{}", disk.path.display(), if disk.readonly { ",readonly" } else { "" })?;
                disk.overlay.iter().try_for_each(|overlay| write!(f, ",{overlay}"))
            }
            Self::Net(net) => write!(f, "net={}", net.to),
        }
    }
}
