//! Machines in files: the configuration, the state and the memory of one at one moment, in a folder, or in files without names for
//! those that go on from it at once.
//!
//! `config.json` is what [`VmConfig`] is elsewhere; `disk0` and so on are disks that the guest may write to; `state` a header and [`SavedMachine`]; `memory` guest RAM from address 0 on, its
//! regions end to end, zeroes as holes. A folder has its name only once all in it is on the disk, and is never changed after that:
//! machines map `memory` privately. What is in it is as untrusted as any other input.

mod child;
mod create;
mod disks;
mod memory;
mod parts;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::machine::{self, Origin, PauseError, SavedMachine};
use parts::Part;

pub use child::{child, network_of_one};
pub use create::{create, fork};
pub use parts::Parts;

/// The first bytes of `state`.
const MAGIC: [u8; 8] = *b"VMMSTATE";
/// Of what follows them.
const VERSION: u32 = 1;
/// More than any configuration, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// More than any machine's state: 255 vCPUs and their XSAVE areas.
const MAX_STATE: u64 = 64 << 20;

/// Why a snapshot could not be made, or is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be written or read.
    #[error("{what} {}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On which.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The configuration has what a snapshot cannot hold.
    #[error("a snapshot cannot hold {0}")]
    Unsupported(&'static str),
    /// Files without names are the machine's state and memory alone.
    #[error("copies of a machine cannot have disks that the guest may write to")]
    Disks,
    /// The machine does not come to rest.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its state cannot be told.
    #[error(transparent)]
    Machine(#[from] Box<machine::Error>),
    /// A file is not what a snapshot has there.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How it shows.
        what: String,
    },
    /// It was made by another version.
    #[error("{}: version {found}, and this vmm reads version {VERSION}", path.display())]
    Version {
        /// Of what.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

/// What precedes the state.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Header {
    /// CRC-32 of the configuration's file.
    config: u32,
    /// CRC-32 of the state.
    state: u32,
    /// CRC-32 of the memory's data, block by block.
    memory: u32,
    /// Bytes of the memory.
    size: u64,
}

/// One that was opened.
#[derive(Debug)]
pub struct Snapshot {
    /// The machine's configuration.
    pub config: VmConfig,
    parts: Parts,
    header: Header,
    state: Vec<u8>,
}

impl Snapshot {
    /// Opens the one in `folder`. Its memory is not read.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let mut snapshot = Self::read(Parts::open(folder)?)?;
        disks::locate(&mut snapshot.config, folder)?;
        Ok(snapshot)
    }

    /// That of `parts`. Its memory is not read.
    ///
    /// # Errors
    /// They are none, or not all of it.
    pub fn of(parts: Parts) -> Result<Self, Error> {
        let mut snapshot = Self::read(parts)?;
        if disks::are_in_folder(&mut snapshot.config) {
            return Err(Error::Disks);
        }
        Ok(snapshot)
    }

    fn read(parts: Parts) -> Result<Self, Error> {
        let text = parts.config.read(MAX_CONFIG)?;
        let damaged =
            |part: &Part, what: &str| Error::Damaged { path: part.path.clone(), what: what.to_owned() };
        let config =
            serde_json::from_slice(&text).map_err(|error| damaged(&parts.config, &error.to_string()))?;
        let state = &parts.state;
        let bytes = state.read(MAX_STATE)?;
        let rest = bytes.strip_prefix(&MAGIC).ok_or_else(|| damaged(state, "not a machine's state"))?;
        let (version, rest) = rest.split_first_chunk().ok_or_else(|| damaged(state, "cut short"))?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(Error::Version { path: state.path.clone(), found: version });
        }
        let (header, saved): (Header, _) =
            postcard::take_from_bytes(rest).map_err(|error| damaged(state, &error.to_string()))?;
        let wrong = "its checksum is wrong";
        if crc32fast::hash(saved) != header.state {
            return Err(damaged(state, wrong));
        }
        if crc32fast::hash(&text) != header.config {
            return Err(damaged(&parts.config, wrong));
        }
        let size = parts.memory.file.metadata().map_err(parts.memory.failed("look at"))?.len();
        if size != header.size {
            return Err(damaged(&parts.memory, &format!("{size} bytes, and {} were saved", header.size)));
        }
        let state = saved.to_vec();
        Ok(Self { config, parts, header, state })
    }

    /// The machine's state.
    ///
    /// # Errors
    /// It is none.
    fn machine(&self) -> Result<SavedMachine, Error> {
        postcard::from_bytes(&self.state)
            .map_err(|error| Error::Damaged { path: self.parts.state.path.clone(), what: error.to_string() })
    }

    /// Its files.
    pub fn into_parts(self) -> Parts {
        self.parts
    }

    /// Its state and memory, for a machine to go on from.
    ///
    /// # Errors
    /// The state is none.
    pub fn into_origin(self) -> Result<Origin, Error> {
        Ok(Origin::Saved { machine: Box::new(self.machine()?), memory: self.parts.memory.file })
    }

    /// Reads the memory.
    ///
    /// # Errors
    /// It is not what was saved.
    pub fn verify(&self) -> Result<(), Error> {
        let Part { path, file } = &self.parts.memory;
        match memory::checksum(file).map_err(self.parts.memory.failed("read"))? {
            found if found == self.header.memory => Ok(()),
            _ => Err(Error::Damaged { path: path.clone(), what: "its checksum is wrong".to_owned() }),
        }
    }
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Damaged { .. } => Some("save the machine again: vmm snapshot create NAME FOLDER"),
            Self::Version { .. } => Some("restore it with the vmm that saved it"),
            Self::File { what: "open" | "read", .. } => {
                Some("name a folder that vmm snapshot create has made")
            }
            Self::File { .. } => Some("name a new folder, where you may write and there is room: df, ls -ld"),
            Self::Unsupported(_) => {
                Some("start the machine without it: docs/snapshot.md has what can be saved")
            }
            Self::Disks => {
                Some("save it, and restore that as often as you like: vmm snapshot create, vmm restore")
            }
            Self::Pause(_) | Self::Machine(_) => None,
        }
    }
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use proptest::prelude::*;

    use super::*;

    /// A snapshot whose checksums are right, whatever its state is.
    fn of(state: &[u8]) -> Result<Snapshot, Error> {
        let text = serde_json::to_vec(&VmConfig::default()).unwrap();
        let (config, checksum) = (crc32fast::hash(&text), crc32fast::hash(state));
        let header = postcard::to_stdvec(&Header { config, state: checksum, memory: 0, size: 0 }).unwrap();
        let file = |parts: &[&[u8]]| {
            let mut file = tempfile::tempfile().unwrap();
            parts.iter().for_each(|part| file.write_all(part).unwrap());
            OwnedFd::from(file)
        };
        let state = file(&[&MAGIC, &VERSION.to_le_bytes(), &header, state]);
        Snapshot::of(Parts::from([file(&[&text]), state, file(&[])]))
    }

    proptest! {
        #[test]
        fn a_state_that_is_none_is_refused_whatever_it_says(state in prop::collection::vec(any::<u8>(), 0..2000)) {
            let snapshot = of(&state).unwrap();
            let refused = matches!(snapshot.into_origin(), Err(Error::Damaged { .. }));
            prop_assert!(refused, "lengths in it promise more than there is");
        }
    }
}
