//! A snapshot is made: a folder under another name, which gets its own once all is on the disk; or files without a name.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::memory::Writing;
use super::parts::{Part, Parts};
use super::{Error, Header, MAGIC, VERSION, disks, file};
use crate::config::VmConfig;
use crate::machine::{Handle, Paused, Phase, SavedMachine};
use crate::output;

/// Saves `machine`, which was built as `config` says, into the new `folder`. It stands still as short as may be, and goes on
/// if it ran; one that is to `stay` as it was saved stands still from then on.
///
/// # Errors
/// [`Error`]; nothing is left behind.
pub fn create(machine: &Handle, config: &VmConfig, folder: &Path, stay: bool) -> Result<(), Error> {
    supported(config)?;
    let new = NewFolder::begin(folder)?;
    let parts = Parts::create(&new.hidden)?;
    let (hidden, saved) = (new.hidden.clone(), disks::saved(config));
    let begin = |paused: &Paused<'_>, may_last| {
        let disks = disks::save(machine, paused, config, &hidden)?;
        Ok((Taken::begin(machine, paused, &parts, may_last)?, disks))
    };
    let complete = |(taken, disks): (Taken, Vec<Part>)| {
        taken.finish(&saved, machine, &parts)?;
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
    supported(config)?;
    if config.disk.iter().any(|disk| !disk.readonly) {
        return Err(Error::Disks);
    }
    let parts = Parts::unnamed()?;
    let taken = standing_still(machine, false, |paused| Taken::begin(machine, paused, &parts, true))?;
    taken.finish(config, machine, &parts)?;
    parts.seal()?;
    Ok(parts)
}

/// What has a life of its own outside.
fn supported(config: &VmConfig) -> Result<(), Error> {
    let what = match config {
        _ if config.firmware.is_some() => "a machine with firmware",
        _ if config.net.iter().any(|net| net.is_served_elsewhere()) => {
            "a network that others serve (vhost, vhost-user)"
        }
        _ if config.vsock.iter().any(|vsock| vsock.vhost) => "sockets that the host's kernel serves (vhost)",
        _ if config.mem.hugepages.is_some() => "huge pages",
        _ => return Ok(()),
    };
    Err(Error::Unsupported(what))
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
    memory: Writing,
}

impl Taken {
    /// Takes the state of `machine`, and begins to write its memory, which `may_last` beyond the pause.
    fn begin(machine: &Handle, paused: &Paused<'_>, parts: &Parts, may_last: bool) -> Result<Self, Error> {
        let state = machine.save(paused).map_err(Box::new)?;
        let memory = Writing::begin(machine.memory(), &parts.memory.file, may_last);
        Ok(Self { state, memory: memory.map_err(parts.memory.failed("write"))? })
    }

    /// Completes `parts`.
    fn finish(self, config: &VmConfig, machine: &Handle, parts: &Parts) -> Result<(), Error> {
        let encoded = |error: postcard::Error| parts.state.failed("write")(io::Error::other(error));
        let text =
            serde_json::to_vec_pretty(config).map_err(|error| parts.config.failed("write")(error.into()))?;
        write(&parts.config, &[&text])?;
        let memory = self.memory.finish().map_err(parts.memory.failed("write"))?;
        let state = postcard::to_stdvec(&self.state).map_err(encoded)?;
        let (config, size) = (crc32fast::hash(&text), machine.memory().size());
        let header = Header { config, state: crc32fast::hash(&state), memory, size };
        let header = postcard::to_stdvec(&header).map_err(encoded)?;
        write(&parts.state, &[&MAGIC, &VERSION.to_le_bytes(), &header, &state])
    }
}

fn write(part: &Part, bytes: &[&[u8]]) -> Result<(), Error> {
    let mut file = &part.file;
    bytes.iter().try_for_each(|bytes| file.write_all(bytes)).map_err(part.failed("write"))
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
