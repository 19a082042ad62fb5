//! Machines in files: a folder with the configuration, the state and the memory of one at rest.
//!
//! `config.json` is what [`VmConfig`] is elsewhere; `state` a header and [`SavedMachine`]; `memory` guest RAM from address 0 on, its
//! regions end to end, zeroes as holes. A folder has its name only once all in it is on the disk, and is never changed after that:
//! machines map `memory` privately. What is in it is as untrusted as any other input.

mod create;
mod memory;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::machine::{self, Origin, PauseError, SavedMachine};

pub use create::create;

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
    folder: PathBuf,
    header: Header,
    state: Vec<u8>,
    memory: File,
}

impl Snapshot {
    /// Opens the one in `folder`. Its memory is not read.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let config = folder.join("config.json");
        let text = read(&config, MAX_CONFIG)?;
        let damaged = |path: &Path, what: String| Error::Damaged { path: path.to_owned(), what };
        let config = serde_json::from_slice(&text).map_err(|error| damaged(&config, error.to_string()))?;
        let path = folder.join("state");
        let bytes = read(&path, MAX_STATE)?;
        let rest =
            bytes.strip_prefix(&MAGIC).ok_or_else(|| damaged(&path, "not a machine's state".to_owned()))?;
        let (version, rest) =
            rest.split_first_chunk().ok_or_else(|| damaged(&path, "cut short".to_owned()))?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(Error::Version { path, found: version });
        }
        let (header, state): (Header, _) =
            postcard::take_from_bytes(rest).map_err(|error| damaged(&path, error.to_string()))?;
        if crc32fast::hash(state) != header.state {
            return Err(damaged(&path, "its checksum is wrong".to_owned()));
        }
        if crc32fast::hash(&text) != header.config {
            return Err(damaged(&folder.join("config.json"), "its checksum is wrong".to_owned()));
        }
        let state = state.to_vec();
        let path = folder.join("memory");
        let memory = File::open(&path).map_err(file("open", &path))?;
        let size = memory.metadata().map_err(file("look at", &path))?.len();
        if size != header.size {
            return Err(damaged(&path, format!("{size} bytes, and {} were saved", header.size)));
        }
        Ok(Self { config, folder: folder.to_owned(), header, state, memory })
    }

    /// The machine's state.
    ///
    /// # Errors
    /// It is none.
    fn machine(&self) -> Result<SavedMachine, Error> {
        postcard::from_bytes(&self.state)
            .map_err(|error| Error::Damaged { path: self.folder.join("state"), what: error.to_string() })
    }

    /// Its state and memory, for a machine to go on from.
    ///
    /// # Errors
    /// The state is none.
    pub fn into_origin(self) -> Result<Origin, Error> {
        Ok(Origin::Saved { machine: Box::new(self.machine()?), memory: self.memory })
    }

    /// Reads the memory.
    ///
    /// # Errors
    /// It is not what was saved.
    pub fn verify(&self) -> Result<(), Error> {
        let path = self.folder.join("memory");
        match memory::checksum(&self.memory).map_err(file("read", &path))? {
            found if found == self.header.memory => Ok(()),
            _ => Err(Error::Damaged { path, what: "its checksum is wrong".to_owned() }),
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
            Self::Pause(_) | Self::Machine(_) => None,
        }
    }
}

/// At most `most` bytes of the file at `path`.
fn read(path: &Path, most: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let opened = File::open(path).map_err(file("open", path))?;
    opened.take(most).read_to_end(&mut bytes).map_err(file("read", path))?;
    Ok(bytes)
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}
