//! A snapshot is made: a folder under another name, which gets its own once all is on the disk; or files without a name.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::base::{Base, HIGHEST};
use super::memory::{Writing, Written};
use super::parts::{Part, Parts};
use super::{Error, Header, Snapshot, disks, file};
use crate::config::{Size, VmConfig};
use crate::disk;
use crate::machine::{self, Handle, Paused, Phase, SavedMachine};
use crate::memory::{self, SavedRam};
use crate::output;

/// How a machine is to be saved.
#[derive(Debug, Clone, Copy, Default)]
pub struct Saving<'a> {
    /// Memory that is as in this snapshot is left to that.
    pub base: Option<&'a Path>,
    /// Memory is compressed.
    pub compress: bool,
    /// The machine stands still from then on.
    pub stay: bool,
}

/// Saves `machine`, which was built as `config` says, into the new `folder`. It stands still as short as may be, and goes on if it ran,
/// unless it is to stay as it was saved.
///
/// # Errors
/// [`Error`]; nothing is left behind.
pub fn create(
    machine: &Handle,
    config: &VmConfig,
    folder: &Path,
    Saving { base, compress, stay }: Saving<'_>,
) -> Result<(), Error> {
    let base = base.map(|base| Below::open(base, folder, config)).transpose()?;
    let new = NewFolder::begin(folder)?;
    let parts = Parts::create(&new.hidden)?;
    let (hidden, saved) = (new.hidden.clone(), disks::saved(config));
    complete_memory(machine)?;
    let begin = |paused: &Paused<'_>, may_last| {
        let disks = disks::save(machine, paused, config, |name, _| Part::create(hidden.join(name)))?;
        let memory = base.as_ref().map(|base| base.memory.clone());
        Ok((Taken::begin(machine, paused, &parts, compress, memory, may_last)?, disks))
    };
    let complete = |(taken, disks): (Taken, Vec<Part>)| {
        taken.finish(&saved, machine, &parts, base.as_ref().map(|base| &base.base))?;
        for part in [&parts.config, &parts.state, &parts.memory].into_iter().chain(&disks) {
            part.file.sync_all().map_err(part.failed("write"))?;
        }
        new.name()
    };
    match stay {
        false => complete(standing_still(machine, false, |paused| begin(paused, true))?),
        true => standing_still(machine, true, |paused| complete(begin(paused, false)?)),
    }
}

/// The same into files that have no name, for other processes to go on from.
///
/// # Errors
/// [`Error`]
pub fn fork(machine: &Handle, config: &VmConfig) -> Result<Parts, Error> {
    if let Some(disk) = disks::in_place(config) {
        return Err(Error::InPlace(disk.path.clone()));
    }
    let mut parts = Parts::unnamed()?;
    complete_memory(machine)?;
    let (taken, disks) = standing_still(machine, false, |paused| {
        let disks = disks::save(machine, paused, config, |_, path| unnamed_disk(path))?;
        Ok((Taken::begin(machine, paused, &parts, false, None, true)?, disks))
    })?;
    parts.disks = disks;
    taken.finish(&disks::saved(config), machine, &parts, None)?;
    parts.seal()?;
    Ok(parts)
}

/// Waits for the pages of `machine` that would only come when they are touched, while it runs on: the child that writes memory would
/// not get them.
fn complete_memory(machine: &Handle) -> Result<(), Error> {
    machine.memory().complete().map_err(Error::Incomplete)
}

fn unnamed_disk(path: &Path) -> Result<Part, Error> {
    let file = disk::unnamed().map_err(file("copy disk", path))?;
    Ok(Part { path: path.to_owned(), file })
}

/// What a new snapshot is to lie over.
struct Below {
    base: Base,
    memory: SavedRam,
}

impl Below {
    fn open(base: &Path, folder: &Path, config: &VmConfig) -> Result<Self, Error> {
        let snapshot = Snapshot::open(base)?;
        if snapshot.height() == HIGHEST {
            return Err(Error::High);
        }
        let described = Base::of(folder, base, &snapshot)?;
        let (saved, size) = (Size::from_bytes(snapshot.header.size), config.mem.size);
        if saved != size {
            let error = memory::Error::OtherSize { saved, size };
            return Err(Box::new(machine::Error::from(error)).into());
        }
        Ok(Self { base: described, memory: snapshot.into_ram() })
    }
}

/// Does `work` while `machine` stands still, which goes on afterwards if it ran, unless it is to `stay` where it was when that is done.
fn standing_still<T>(
    machine: &Handle,
    stay: bool,
    work: impl FnOnce(&Paused<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let (ran, since) = (machine.phase() == Phase::Running, Instant::now());
    let paused = machine.pause()?;
    let done = match machine.has_other_devices() {
        true => Err(Error::Unsupported("devices that came or went while it ran")),
        false => work(&paused),
    };
    drop(paused);
    if ran && !(stay && done.is_ok()) {
        // It has ended meanwhile, or somebody else resumed it.
        let _ = machine.resume();
        log::info!("it stood still for {:.1?}", since.elapsed());
    }
    done
}

/// A machine at one moment.
struct Taken {
    state: SavedMachine,
    is_packed: bool,
    memory: Writing,
}

impl Taken {
    /// Takes the state of `machine`, and begins to write its memory, which `may_last` beyond the pause.
    fn begin(
        machine: &Handle,
        paused: &Paused<'_>,
        parts: &Parts,
        is_packed: bool,
        base: Option<SavedRam>,
        may_last: bool,
    ) -> Result<Self, Error> {
        let state = machine.save(paused).map_err(Box::new)?;
        let memory = Writing::begin(machine.memory(), &parts.memory.file, is_packed, base, may_last);
        Ok(Self { state, is_packed, memory: memory.map_err(parts.memory.failed("write"))? })
    }

    /// Completes `parts`, which lie over `base` if there is one.
    fn finish(
        self,
        config: &VmConfig,
        machine: &Handle,
        parts: &Parts,
        base: Option<&Base>,
    ) -> Result<(), Error> {
        let text =
            serde_json::to_vec_pretty(config).map_err(|error| parts.config.failed("write")(error.into()))?;
        parts.config.write(&[&text])?;
        let Written { sum, runs } = self.memory.finish().map_err(parts.memory.failed("write"))?;
        let state = self.state.encode();
        let (config, size) = (crc32fast::hash(&text), machine.memory().size());
        let header = Header {
            config,
            state: crc32fast::hash(&state),
            memory: sum,
            size,
            is_packed: self.is_packed,
            base: base.map(|base| base.with(runs)),
        };
        header.write(&parts.state, &state)
    }
}

/// A folder that has its name when it is complete, and is gone otherwise.
struct NewFolder<'a> {
    folder: &'a Path,
    parent: &'a Path,
    hidden: PathBuf,
}

impl<'a> NewFolder<'a> {
    fn begin(folder: &'a Path) -> Result<Self, Error> {
        let (parent, hidden) = output::hidden(folder).ok_or_else(|| {
            file("name", folder)(io::Error::new(io::ErrorKind::InvalidInput, "it is not a folder's name"))
        })?;
        output::folder(&hidden).map_err(file("make", &hidden))?;
        Ok(Self { folder, parent, hidden })
    }

    /// All that is in it is on the disk.
    fn name(self) -> Result<(), Error> {
        let synced = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all());
        synced(&self.hidden).map_err(file("write", &self.hidden))?;
        let renamed = renameat_with(CWD, &self.hidden, CWD, self.folder, RenameFlags::NOREPLACE);
        renamed.map_err(|error| file("make", self.folder)(error.into()))?;
        synced(self.parent).map_err(|error| {
            let _ = fs::remove_dir_all(self.folder);
            file("write", self.parent)(error)
        })
    }
}

impl Drop for NewFolder<'_> {
    fn drop(&mut self) {
        // What has failed says more than that this does, too; one that has its name is not here any more.
        let _ = fs::remove_dir_all(&self.hidden);
    }
}
