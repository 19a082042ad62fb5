//! [`Base`]: the snapshot that has what another left out, because it was the same there.

use std::ffi::OsString;
use std::fs::canonicalize;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::memory::{MOST_RUNS, flatten};
use super::parts::{NAMES, Parts};
use super::{Error, Header, Snapshot, file};
use crate::config::{Size, VmConfig};
use crate::machine;
use crate::memory::{self, Layer, SavedRam};

/// Snapshots that lie over each other: each is a file that stays open.
pub const HIGHEST: usize = 16;
// Each stretch is a mapping, and cuts one below it in two; a process can have 65530 (vm.max_map_count).
const _: () = assert!(2 * HIGHEST * MOST_RUNS < 65_530);
/// What runs are made of, in bytes.
const PAGE: u64 = 4096;

/// See the module's text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Base {
    /// Its folder: a name if it is beside the other's, else an absolute path.
    folder: Vec<u8>,
    /// The checksums of its state and memory.
    was: (u32, u32),
    /// What of the memory is not as there: ascending, in bytes.
    runs: Vec<Range<u64>>,
}

/// What a new snapshot is to lie over: its files, opened by whoever asks for the new one.
#[derive(Debug)]
pub struct Below {
    /// How its folder is found from the new one: a name if it is beside that, else an absolute path.
    place: PathBuf,
    /// Its files, and those of what it lies over, from the top down.
    layers: Vec<Parts>,
}

impl Below {
    /// The snapshot in `base`, for a new one that will be `folder`.
    ///
    /// # Errors
    /// It is none; one of the folders cannot be found.
    pub fn open(base: &Path, folder: &Path) -> Result<Self, Error> {
        let mut next = Some(Snapshot::open(base)?);
        let found = |path: &Path| canonicalize(path).map_err(file("find", path));
        let base = found(base)?;
        let beside = match std::path::absolute(folder).map_err(file("find", folder))?.parent() {
            Some(parent) => base.parent() == Some(&found(parent)?),
            None => false,
        };
        let place = base.file_name().filter(|_| beside).unwrap_or(base.as_os_str()).into();
        let layers = std::iter::from_fn(|| {
            let Snapshot { parts, base, .. } = next.take()?;
            next = base.map(|(_, below)| *below);
            Some(parts)
        });
        Ok(Self { place, layers: layers.collect() })
    }

    /// How its folder is found.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Its files for another process.
    pub fn into_descriptors(self) -> Vec<OwnedFd> {
        self.layers.into_iter().flat_map(Parts::into_descriptors).collect()
    }

    /// The one whose descriptors these are.
    ///
    /// # Errors
    /// They are no whole number of snapshots.
    pub fn of_descriptors(place: PathBuf, descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut descriptors = descriptors.into_iter().peekable();
        let layers = std::iter::from_fn(|| {
            descriptors.peek()?;
            let these: Vec<_> = descriptors.by_ref().take(NAMES.len()).collect();
            Some(Parts::of_descriptors(these, |name| place.join(name)))
        });
        Ok(Self { layers: layers.collect::<Result<_, _>>()?, place })
    }

    /// What a snapshot of the machine that `config` describes has over it, and its memory.
    ///
    /// # Errors
    /// It is none, or another machine's; too many lie over each other.
    pub(super) fn of_machine(self, config: &VmConfig) -> Result<(Base, SavedRam), Error> {
        let Self { place, layers } = self;
        let snapshot = Snapshot::of_layers(&mut layers.into_iter(), 0)?;
        if snapshot.height() == HIGHEST {
            return Err(Error::High);
        }
        let (saved, size) = (Size::from_bytes(snapshot.header.size), config.mem.size);
        if saved != size {
            let error = memory::Error::OtherSize { saved, size };
            return Err(Box::new(machine::Error::from(error)).into());
        }
        let was = (snapshot.header.state, snapshot.header.memory);
        let base = Base { folder: place.into_os_string().into_vec(), was, runs: Vec::new() };
        Ok((base, snapshot.into_ram()))
    }
}

impl Base {
    /// The same of one whose memory differs in `runs`.
    pub fn with(&self, runs: Vec<Range<u64>>) -> Self {
        Self { runs, ..self.clone() }
    }

    /// Where it is for the snapshot in `folder`.
    pub(super) fn path(&self, folder: &Path) -> Result<PathBuf, Error> {
        let folder = canonicalize(folder).map_err(file("find", folder))?;
        let name = PathBuf::from(OsString::from_vec(self.folder.clone()));
        Ok(folder.parent().unwrap_or(&folder).join(name))
    }

    /// Whether `below` is what it was when a snapshot of `size` bytes of memory was saved over it.
    pub(super) fn is_over(&self, size: u64, below: &Header) -> bool {
        (below.state, below.memory, below.size) == (self.was.0, self.was.1, size)
    }

    fn is_possible(&self, size: u64) -> bool {
        let mut end = 0;
        let fits = |run: &Range<u64>| {
            let after = std::mem::replace(&mut end, run.end);
            run.start.is_multiple_of(PAGE)
                && run.end.is_multiple_of(PAGE)
                && after <= run.start
                && run.start < run.end
                && run.end <= size
        };
        self.runs.len() <= MOST_RUNS && self.runs.iter().all(fits)
    }
}

impl Snapshot {
    /// Opens the one in `folder`, over which there are `above` others.
    pub(super) fn open_above(folder: &Path, above: usize) -> Result<Self, Error> {
        Self::read(Parts::open(folder)?)?.over(above, |base, above| {
            let path = base.path(folder)?;
            let below = Self::open_above(&path, above).map_err(|error| match error {
                Error::File { .. } => Error::Base { path: path.clone(), source: Box::new(error) },
                error => error,
            })?;
            Ok((path, below))
        })
    }

    /// The same of open files, from the top down.
    fn of_layers(layers: &mut impl Iterator<Item = Parts>, above: usize) -> Result<Self, Error> {
        let missing = || file("open", Path::new("the base"))(ErrorKind::NotFound.into());
        Self::read(layers.next().ok_or_else(missing)?)?
            .over(above, |_, above| Ok((PathBuf::from("below it"), Self::of_layers(layers, above)?)))
    }

    /// This one, over which there are `above` others, with what it lies over, if it does: what `find` finds, and where.
    fn over(
        mut self,
        above: usize,
        find: impl FnOnce(&Base, usize) -> Result<(PathBuf, Self), Error>,
    ) -> Result<Self, Error> {
        let Some(base) = &self.header.base else { return Ok(self) };
        let state = &self.parts.state;
        if above == HIGHEST {
            return Err(state.damaged(&format!("more than {HIGHEST} snapshots lie over each other")));
        }
        if !base.is_possible(self.header.size) {
            return Err(state.damaged("its memory is in impossible places"));
        }
        let (path, below) = find(base, above + 1)?;
        if !base.is_over(self.header.size, &below.header) {
            return Err(state.damaged(&format!("its base, {}, is not what it was", path.display())));
        }
        self.base = Some((path, Box::new(below)));
        Ok(self)
    }

    /// How many snapshots lie over each other with this one.
    pub(super) fn height(&self) -> usize {
        self.base.as_ref().map_or(1, |(_, base)| base.height() + 1)
    }

    /// Its memory.
    pub(super) fn into_ram(self) -> SavedRam {
        let (file, layers) = (self.ram, Vec::new());
        let (Some((_, base)), Some(Base { runs, .. })) = (self.base, self.header.base) else {
            return SavedRam { bottom: file, layers };
        };
        let mut ram = base.into_ram();
        ram.layers.push(Layer { file, runs });
        ram
    }

    /// The same in files without names that need no others.
    pub(super) fn flattened(mut self) -> Result<Parts, Error> {
        let mut parts = Parts::unnamed()?;
        parts.config.write(&[&self.parts.config.read(super::MAX_CONFIG)?])?;
        let (header, state) = (self.header.clone(), self.state.clone());
        parts.disks = std::mem::take(&mut self.parts.disks);
        let memory = &parts.memory;
        let below = self.parts.memory.path.clone();
        let flat = flatten(&self.into_ram(), header.size, &memory.file);
        let sum = flat.map_err(|error| match error.kind() {
            ErrorKind::InvalidData => Error::Damaged { path: below, what: error.to_string() },
            _ => memory.failed("write")(error),
        })?;
        let header = Header { memory: sum, base: None, is_packed: false, ..header };
        header.write(&parts.state, &state)?;
        parts.seal()?;
        Ok(parts)
    }
}
