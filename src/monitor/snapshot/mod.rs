//! Machines in files: the configuration, the state and the memory of one at one moment, in a folder, or in files without names for
//! those that go on from it at once.
//!
//! `config.json` is what [`VmConfig`] is elsewhere; `disk0` and so on are disks that the guest may write to; `state` a header and [`SavedMachine`]; `memory` guest RAM from address 0 on, its
//! regions end to end, zeroes as holes, or the same compressed ([`Packed`]). A folder has its name only once all in it is on the disk, and is never changed after that:
//! machines map `memory` privately. What is in it is as untrusted as any other input.

mod base;
mod child;
mod create;
mod disks;
mod family;
mod folder;
mod key;
mod memory;
mod parts;
mod shelf;
mod templates;
mod working_set;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::error_chain;
use crate::machine::{self, DecodeError, Origin, PauseError, SavedMachine};
use crate::memory::packed::Packed;
use crate::memory::working_set::WorkingSet;
use crate::memory::{RamFile, Way};
use crate::state::StateError;
use base::Base;
use parts::Part;

pub use base::Below;
pub use child::{child, network_of_one};
pub use create::{Saving, create, fork, save};
pub use disks::unnamed as unnamed_disks;
pub use family::{Relative, Tie, above, family};
pub use folder::Folder;
pub use key::Key;
pub use parts::Parts;
pub use shelf::{Saved, list, remove};
pub use templates::{Found, New, Template, Templates};
pub use working_set::Unrecorded;

/// The first bytes of `state`.
const MAGIC: [u8; 8] = *b"VMMSTATE";
/// Of what follows them.
const VERSION: u32 = 3;
/// How damage shows.
const WRONG_SUM: &str = "its checksum is wrong";
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
    /// A new one would be too high.
    #[error("{} snapshots lie over each other", base::HIGHEST)]
    High,
    /// Two machines would write to it.
    #[error("disk {} is written to in place, and each copy needs its own", .0.display())]
    InPlace(PathBuf),
    /// A template would not be of the machine that was booted.
    #[error("{0} changed while the guest booted")]
    Changed(String),
    /// Pages of the machine that have not come yet cannot be read.
    #[error("memory that the machine has not touched yet cannot be read")]
    Incomplete(#[source] io::Error),
    /// The machine does not come to rest.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its state cannot be told.
    #[error(transparent)]
    Machine(#[from] Box<machine::Error>),
    /// What it lies over cannot be read.
    #[error("its base {} cannot be read", path.display())]
    Base {
        /// The folder of that.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// A file is not what a snapshot has there.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How it shows.
        what: String,
    },
    /// What was to be removed is something else.
    #[error("{} is no snapshot: {what}", path.display())]
    NoSnapshot {
        /// Which.
        path: PathBuf,
        /// How it shows.
        what: String,
    },
    /// A part of it was made by another version.
    #[error("{}: {what}", path.display())]
    Newer {
        /// Of what.
        path: PathBuf,
        /// Which part, and which version.
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
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Header {
    /// CRC-32 of the configuration's file.
    config: u32,
    /// CRC-32 of the state.
    state: u32,
    /// CRC-32 of the memory's data, block by block.
    memory: u32,
    /// Bytes of the memory.
    size: u64,
    /// Its file is [`Packed`].
    is_packed: bool,
    /// What has the memory that is not in this one.
    base: Option<Base>,
}

impl Header {
    /// Writes all of the empty `file`: this, and the `state`.
    fn write(&self, file: &Part, state: &[u8]) -> Result<(), Error> {
        let header =
            postcard::to_stdvec(self).map_err(|error| file.failed("write")(io::Error::other(error)))?;
        file.write(&[&MAGIC, &VERSION.to_le_bytes(), &crc32fast::hash(&header).to_le_bytes(), &header, state])
    }

    /// The header in the `bytes` of `file`, and the state, whose checksum is right.
    fn read<'a>(file: &Part, bytes: &'a [u8]) -> Result<(Self, &'a [u8]), Error> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or_else(|| file.damaged("not a machine's state"))?;
        let cut = || file.damaged("cut short");
        let (version, rest) = rest.split_first_chunk().ok_or_else(cut)?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(Error::Version { path: file.path.clone(), found: version });
        }
        let (sum, rest) = rest.split_first_chunk().ok_or_else(cut)?;
        let (header, state): (Self, _) =
            postcard::take_from_bytes(rest).map_err(|error| file.damaged(&error.to_string()))?;
        let is_whole = crc32fast::hash(&rest[..rest.len() - state.len()]) == u32::from_le_bytes(*sum);
        match is_whole && crc32fast::hash(state) == header.state {
            true => Ok((header, state)),
            false => Err(file.damaged(WRONG_SUM)),
        }
    }
}

/// One that was opened.
#[derive(Debug)]
pub struct Snapshot {
    /// The machine's configuration.
    pub config: VmConfig,
    parts: Parts,
    ram: RamFile,
    header: Header,
    state: Vec<u8>,
    /// What it lies over, and where that is.
    base: Option<(PathBuf, Box<Snapshot>)>,
    way: Way,
    working_set: Option<WorkingSet>,
    unrecorded: Option<PathBuf>,
}

impl Snapshot {
    /// Opens the one in `folder`. Its memory is not read.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let mut snapshot = Self::open_above(folder, 0)?;
        disks::locate(&mut snapshot.config, folder)?;
        snapshot.working_set = working_set::read(folder, &snapshot.header);
        if snapshot.working_set.is_none() {
            snapshot.unrecorded = Some(folder.to_owned());
        }
        Ok(snapshot)
    }

    /// The same for processes that will have its files and not the folder.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open_for_copies(folder: &Path) -> Result<Self, Error> {
        let mut snapshot = Self::open_above(folder, 0)?;
        let names = disks::names(&snapshot.config).into_iter();
        snapshot.parts.disks = names.map(|name| Part::open(folder.join(name))).collect::<Result<_, _>>()?;
        disks::locate(&mut snapshot.config, folder)?;
        Ok(snapshot)
    }

    /// That of `parts`. Its memory is not read.
    ///
    /// # Errors
    /// They are none, or not all of it.
    pub fn of(parts: Parts) -> Result<Self, Error> {
        let mut snapshot = Self::read(parts)?;
        if snapshot.header.base.is_some() {
            return Err(snapshot.parts.state.damaged("its base is nowhere"));
        }
        if disks::names(&snapshot.config).len() != snapshot.parts.disks.len() {
            return Err(snapshot.parts.config.damaged("it has more disks, or fewer"));
        }
        disks::locate_parts(&mut snapshot.config, &snapshot.parts.disks);
        Ok(snapshot)
    }

    fn read(parts: Parts) -> Result<Self, Error> {
        let text = parts.config.read(MAX_CONFIG)?;
        let config =
            serde_json::from_slice(&text).map_err(|error| parts.config.damaged(&error.to_string()))?;
        let bytes = parts.state.read(MAX_STATE)?;
        let (header, saved) = Header::read(&parts.state, &bytes)?;
        if crc32fast::hash(&text) != header.config {
            return Err(parts.config.damaged(WRONG_SUM));
        }
        let ram = parts.ram(&header)?;
        let state = saved.to_vec();
        let (base, way) = (None, Way::default());
        Ok(Self { config, parts, ram, header, state, base, way, working_set: None, unrecorded: None })
    }

    /// The machine's state.
    ///
    /// # Errors
    /// It is none.
    fn machine(&self) -> Result<SavedMachine, Error> {
        SavedMachine::decode(&self.state).map_err(|error| match error {
            DecodeError::Part { source: StateError::Version { .. }, .. } => {
                Error::Newer { path: self.parts.state.path.clone(), what: error_chain(&error) }
            }
            _ => self.parts.state.damaged(&error_chain(&error)),
        })
    }

    /// The folder that it is based on, if it is.
    pub fn base(&self) -> Option<&Path> {
        self.base.as_ref().map(|(path, _)| path.as_path())
    }

    /// Its memory is to reach a machine by `way`.
    pub fn go_by(&mut self, way: Way) {
        self.way = way;
    }

    /// Whether its memory is mapped into the machine that `config` describes. Only then is it of use to know which pages that needs first.
    fn is_mapped(&self, config: &VmConfig) -> bool {
        let is_plain = |snapshot: &Self| !snapshot.header.is_packed;
        let mut all =
            std::iter::successors(Some(self), |snapshot| snapshot.base.as_ref().map(|(_, base)| &**base));
        match self.way.of(config) {
            Way::Map => true,
            Way::Auto => all.all(is_plain),
            Way::Copy | Way::Lazy => false,
        }
    }

    /// Where the pages that its machine, which `config` describes, needs first are to be written down, if they are not known.
    pub fn unrecorded(&mut self, config: &VmConfig) -> Option<Unrecorded> {
        let folder = self.unrecorded.take().filter(|_| self.is_mapped(config))?;
        Unrecorded::of(&folder, &self.header)
    }

    /// Its files, for processes to go on from, which share their memory: none that would need other files.
    ///
    /// # Errors
    /// The host is out of memory.
    pub fn into_parts(self) -> Result<Parts, Error> {
        let is_whole = self.base.is_none() && !self.header.is_packed;
        if is_whole { Ok(self.parts) } else { self.flattened() }
    }

    /// Its state and memory, for the machine that `config` describes to go on from.
    ///
    /// # Errors
    /// The state is none.
    pub fn into_origin(mut self, config: &VmConfig) -> Result<Origin, Error> {
        let (machine, is_mapped, way) = (Box::new(self.machine()?), self.is_mapped(config), self.way);
        let working_set = self.working_set.take().filter(|_| is_mapped);
        Ok(Origin::Saved { machine, memory: self.into_ram(), way, working_set })
    }

    /// Reads the memory.
    ///
    /// # Errors
    /// It is not what was saved.
    pub fn verify(&self) -> Result<(), Error> {
        self.base.as_ref().map_or(Ok(()), |(_, base)| base.verify())?;
        let memory = &self.parts.memory;
        match memory::checksum(&self.ram).map_err(|error| memory.unreadable(error))? {
            found if found == self.header.memory => Ok(()),
            _ => Err(memory.damaged(WRONG_SUM)),
        }
    }
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Base { .. } => {
                Some("put the base back where it was when this was saved: vmm snapshot list")
            }
            Self::Damaged { .. } => Some("save the machine again: vmm snapshot create NAME FOLDER"),
            Self::NoSnapshot { .. } => Some("look at it first: ls -la FOLDER; vmm snapshot list"),
            Self::Version { .. } | Self::Newer { .. } => Some("restore it with the vmm that saved it"),
            Self::File { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("see whose it is: ls -ld FOLDER")
            }
            Self::File { what: "remove", source, .. } if source.kind() != io::ErrorKind::NotFound => {
                Some("see whose it is: ls -ld FOLDER")
            }
            Self::File { what: "open" | "read" | "find" | "remove", .. } => {
                Some("name a folder that vmm snapshot create has made")
            }
            Self::File { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                Some("name a new folder, or remove that one: vmm snapshot rm FOLDER")
            }
            Self::File { source, .. } if source.raw_os_error() == Some(libc::ENAMETOOLONG) => {
                Some("choose a name of fewer than 240 bytes: while it is made, it has a longer one")
            }
            Self::File { .. } => Some("name a new folder, where you may write and there is room: df, ls -ld"),
            Self::Unsupported(_) => {
                Some("start the machine without it: docs/snapshot.md has what can be saved")
            }
            Self::InPlace(_) => Some(
                "give the disk an overlay at its start, `disk.overlay`; or save the machine, and fork that: vmm snapshot create",
            ),
            Self::High => Some("save it whole: without a base"),
            Self::Changed(_) => Some("start it once more when nobody writes to its files"),
            Self::Machine(error) => match &**error {
                machine::Error::Restore(error) => error.hint(),
                _ => None,
            },
            Self::Pause(_) | Self::Incomplete(_) => None,
        }
    }
}

impl Parts {
    /// The memory that `header` tells of.
    fn ram(&self, header: &Header) -> Result<RamFile, Error> {
        let (memory, size) = (&self.memory, header.size);
        let file = memory.file.try_clone().map_err(memory.failed("open"))?;
        if header.is_packed {
            let packed = Packed::open(file, size).map_err(|error| memory.unreadable(error))?;
            return Ok(RamFile::packed(packed, &memory.path));
        }
        match file.metadata().map_err(memory.failed("look at"))?.len() {
            len if len == size => Ok(RamFile::plain(file, &memory.path)),
            len => Err(memory.damaged(&format!("{len} bytes, and {size} were saved"))),
        }
    }
}

impl Part {
    /// What reading its contents has met.
    fn unreadable(&self, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::InvalidData => self.damaged(&error.to_string()),
            _ => self.failed("read")(error),
        }
    }
}

/// The names of the files that a snapshot of the machine that `config` describes has.
pub fn files(config: &VmConfig) -> Vec<PathBuf> {
    parts::NAMES.into_iter().map(PathBuf::from).chain(disks::copies(config)).collect()
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A snapshot whose checksums are right, whatever its state is.
    fn of(state: &[u8]) -> Result<Snapshot, Error> {
        let text = serde_json::to_vec(&VmConfig::default()).unwrap();
        let (config, checksum) = (crc32fast::hash(&text), crc32fast::hash(state));
        let header = Header { config, state: checksum, memory: 0, size: 0, is_packed: false, base: None };
        let parts = Parts::unnamed().unwrap();
        parts.config.write(&[&text]).unwrap();
        header.write(&parts.state, state).unwrap();
        Snapshot::of(parts)
    }

    proptest! {
        #[test]
        fn a_state_that_is_none_is_refused_whatever_it_says(state in prop::collection::vec(any::<u8>(), 0..2000)) {
            let snapshot = of(&state).unwrap();
            let refused = matches!(snapshot.into_origin(&VmConfig::default()), Err(Error::Damaged { .. } | Error::Newer { .. }));
            prop_assert!(refused, "lengths in it promise more than there is");
        }
    }
}
