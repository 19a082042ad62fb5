//! A machine is saved: into files that whoever asks has opened, or into some without a name.

use std::os::fd::OwnedFd;
use std::time::Instant;

use super::base::{Base, Below};
use super::folder::Folder;
use super::memory::{Writing, Written};
use super::parts::Parts;
use super::{Error, Header, disks};
use crate::config::{ShareFrom, VmConfig};
use crate::machine::{Handle, Paused, Phase, SavedMachine};
use crate::memory::SavedRam;

/// How a machine is to be saved.
#[derive(Debug, Clone, Copy, Default)]
pub struct Saving {
    /// Memory is compressed.
    pub compress: bool,
    /// The machine stands still from then on.
    pub stay: bool,
}

/// Saves `machine`, which was built as `config` says, in `folder`, which gets its name. It stands still as short as may be, and goes on if
/// it ran.
///
/// # Errors
/// [`Error`]; nothing is left behind.
pub fn create(machine: &Handle, config: &VmConfig, folder: Folder) -> Result<(), Error> {
    save(machine, config, folder.parts(), None, Saving::default())?;
    folder.name()
}

/// Saves `machine`, which was built as `config` says, into the empty files of `parts`, whose contents are on the disk then: all of it, or
/// what is not as in `below`. It stands still as short as may be, and goes on if it ran, unless it is to stay as it was saved. Whether
/// it ran, and stays.
///
/// # Errors
/// [`Error`]; the machine goes on.
pub fn save(
    machine: &Handle,
    config: &VmConfig,
    parts: &Parts,
    below: Option<Below>,
    Saving { compress, stay }: Saving,
) -> Result<bool, Error> {
    check(config)?;
    let below = below.map(|below| below.of_machine(config)).transpose()?;
    let saved = disks::saved(config);
    disks::check(config, parts)?;
    complete_memory(machine)?;
    let begin = |paused: &Paused<'_>, may_last| {
        disks::save(machine, paused, config, parts)?;
        let memory = below.as_ref().map(|(_, memory)| memory.clone());
        Taken::begin(machine, paused, parts, compress, memory, may_last)
    };
    let complete = |taken: Taken| {
        taken.finish(&saved, machine, parts, below.as_ref().map(|(base, _)| base))?;
        parts.all().try_for_each(|part| part.file.sync_all().map_err(part.failed("write")))
    };
    let ((), ran) = match stay {
        false => {
            let (taken, _) = standing_still(machine, false, |paused| begin(paused, true))?;
            (complete(taken)?, false)
        }
        true => standing_still(machine, true, |paused| complete(begin(paused, false)?))?,
    };
    Ok(ran)
}

/// The same into files that have no name, those of `disks` among them, for other processes to go on from.
///
/// # Errors
/// [`Error`]
pub fn fork(machine: &Handle, config: &VmConfig, disks: Vec<OwnedFd>) -> Result<Parts, Error> {
    if let Some(disk) = disks::in_place(config) {
        return Err(Error::InPlace(disk.path.clone()));
    }
    check(config)?;
    let mut parts = Parts::unnamed()?;
    parts.disks = disks::of_files(config, disks);
    disks::check(config, &parts)?;
    complete_memory(machine)?;
    let (taken, _) = standing_still(machine, false, |paused| {
        disks::save(machine, paused, config, &parts)?;
        Taken::begin(machine, paused, &parts, false, None, true)
    })?;
    taken.finish(&disks::saved(config), machine, &parts, None)?;
    parts.seal()?;
    Ok(parts)
}

/// Whether a machine that is built as `config` says can be saved.
fn check(config: &VmConfig) -> Result<(), Error> {
    match config.share.iter().any(|share| matches!(share.from, ShareFrom::VhostUser(_))) {
        true => Err(Error::Unsupported("a shared folder that another process serves")),
        false => Ok(()),
    }
}

/// Waits for the pages of `machine` that would only come when they are touched, while it runs on: the child that writes memory would
/// not get them.
fn complete_memory(machine: &Handle) -> Result<(), Error> {
    machine.memory().complete().map_err(Error::Incomplete)
}

/// Does `work` while `machine` stands still, which goes on afterwards if it ran, unless it is to `stay` where it was when that is done.
/// Whether it ran.
fn standing_still<T>(
    machine: &Handle,
    stay: bool,
    work: impl FnOnce(&Paused<'_>) -> Result<T, Error>,
) -> Result<(T, bool), Error> {
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
    Ok((done?, ran))
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
