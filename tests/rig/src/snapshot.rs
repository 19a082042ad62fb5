//! Machines saved when they are ready for a request, and started from there: half a second
//! instead of a boot. Used by `session`; the cache folder holds one saved machine per shape,
//! kernel, first process and QEMU.
//!
//! The memory is a sparse file beside QEMU's state, which leaves it out (`x-ignore-shared`).

use crate::boot_files::{self, BootFiles};
use crate::machine::{Console, Machine, Shape, Start, file_device};
use crate::packages::QEMU;
use crate::qmp::Qmp;
use anyhow::{Context, Result, bail};
use rig_init::Frame;
use rustix::fs::SeekFrom;
use serde_json::json;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the machine that is to be saved may take to boot.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// Saved machines that the cache keeps, the most recently used ones.
const KEPT: usize = 6;

/// A saved machine, open: removing it from the cache does not hurt.
#[derive(Debug)]
pub struct Snapshot {
    folder: PathBuf,
    state: File,
    memory: File,
}

impl Snapshot {
    /// The saved machine of this shape, if there is one.
    pub fn find(shape: Shape, files: &BootFiles) -> Result<Option<Snapshot>> {
        let folder = folder(shape, files)?;
        let open = |name| File::open(folder.join(name));
        let (Ok(state), Ok(memory)) = (open("state"), open("memory")) else {
            return Ok(None);
        };
        let now = fs::FileTimes::new().set_modified(std::time::SystemTime::now());
        let _ = File::open(&folder).and_then(|folder| folder.set_times(now));
        Ok(Some(Snapshot { folder, state, memory }))
    }

    /// Boots a machine of this shape and saves it, unless another rig did so meanwhile.
    pub fn make(shape: Shape, files: &BootFiles, console: &Console) -> Result<Snapshot> {
        let _lock = boot_files::lock(&files.cache)?;
        if let Some(snapshot) = Snapshot::find(shape, files)? {
            return Ok(snapshot);
        }
        let fresh = boot_files::fresh_folder(&files.cache)?;
        let state = File::create(fresh.join("state"))?;
        let mut machine = Machine::start(shape, files, Start::BootToSave, console)?;
        machine.control.set_read_timeout(Some(BOOT_PATIENCE))?;
        loop {
            match Frame::read(&mut machine.control).context("the booting machine")? {
                Frame::Ready => break,
                Frame::Note(text) => crate::options::warn(format!("machine: {text}")),
                other => bail!("the machine said {other:?} before it was ready"),
            }
        }
        let mut qmp = Qmp::new(machine.qmp.try_clone()?)?;
        qmp.execute("stop", json!({}))?;
        leave_memory_out(&mut qmp)?;
        let uri = format!("exec:cat >{}", path_of(&state));
        qmp.execute("migrate", json!({ "uri": uri }))?;
        qmp.finish_migration()?;
        save_memory(&machine.memory, &File::create(fresh.join("memory"))?)?;
        drop(machine);
        fs::rename(&fresh, folder(shape, files)?)?;
        discard_old(&files.cache);
        Snapshot::find(shape, files)?.context("the machine that was just saved is not there")
    }

    /// A machine that goes on from the saved one, with the file server plugged in, and QEMU's control of it.
    pub fn start(&self, shape: Shape, files: &BootFiles, console: &Console) -> Result<(Machine, Qmp)> {
        let machine = Machine::start(shape, files, Start::Restore, console)?;
        // While QEMU starts: it looks at the memory only when the machine runs.
        load_memory(&self.memory, &machine.memory)?;
        let mut qmp = Qmp::new(machine.qmp.try_clone()?)?;
        leave_memory_out(&mut qmp)?;
        let uri = format!("exec:cat <{}", path_of(&self.state));
        qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
        qmp.finish_migration()?;
        qmp.execute("device_add", file_device())?;
        qmp.execute("cont", json!({}))?;
        Ok((machine, qmp))
    }

    /// Removes the saved machine from the cache.
    pub fn discard(self) {
        let _ = fs::remove_dir_all(self.folder);
    }
}

/// A path to an open file that QEMU's child can use, free of characters special to a shell.
fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn leave_memory_out(qmp: &mut Qmp) -> Result<()> {
    let capability = json!({ "capability": "x-ignore-shared", "state": true });
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
    Ok(())
}

/// The folder for a saved machine; its name stands for everything that its state depends on.
fn folder(shape: Shape, files: &BootFiles) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    files.identity().hash(&mut hasher);
    shape.arguments().hash(&mut hasher);
    shape.command_line().hash(&mut hasher);
    let qemu = fs::metadata(QEMU).with_context(|| format!("read {QEMU}"))?;
    (qemu.size(), qemu.mtime()).hash(&mut hasher);
    // The emulated machine's time stamp counter has the pace of the host's.
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processors.lines().find(|line| line.starts_with("model name"));
    model.hash(&mut hasher);
    Ok(files.cache.join(format!("snapshot-{:016x}", hasher.finish())))
}

/// Removes the saved machines that were not used for the longest time.
fn discard_old(cache: &Path) {
    let mut snapshots: Vec<_> = fs::read_dir(cache)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("snapshot-"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    snapshots.sort();
    for (_, path) in snapshots.iter().rev().skip(KEPT) {
        let _ = fs::remove_dir_all(path);
    }
}

/// Calls `on_data` with each extent of `file` that is not a hole, in pieces.
fn for_each_piece(file: &File, mut on_data: impl FnMut(u64, &[u8]) -> std::io::Result<()>) -> Result<()> {
    let size = file.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..length], at)?;
            on_data(at, &buffer[..length])?;
            at += length as u64;
        }
    }
    Ok(())
}

/// Writes the pages of `memory` that are not zero to the empty file `to`.
fn save_memory(memory: &File, to: &File) -> Result<()> {
    const PAGE: usize = 4096;
    to.set_len(memory.metadata()?.len())?;
    for_each_piece(memory, |at, bytes| {
        let used = |page: &&[u8]| page.iter().any(|&byte| byte != 0);
        let pages: Vec<_> = bytes.chunks(PAGE).collect();
        let mut index = 0;
        for run in pages.chunk_by(|a, b| used(a) == used(b)) {
            if used(&run[0]) {
                let start = index * PAGE;
                let end = (start + run.len() * PAGE).min(bytes.len());
                to.write_all_at(&bytes[start..end], at + start as u64)?;
            }
            index += run.len();
        }
        Ok(())
    })
}

/// Copies saved memory into the new, empty memory `to`.
fn load_memory(from: &File, to: &File) -> Result<()> {
    for_each_piece(from, |at, bytes| to.write_all_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_byte_for_byte_and_stays_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let create = |name| {
            File::options().read(true).write(true).create_new(true).open(folder.path().join(name)).unwrap()
        };
        let size = 64 << 20;
        let (first, saved, second) = (create("first"), create("saved"), create("second"));
        for file in [&first, &second] {
            file.set_len(size).unwrap();
        }
        for (at, byte) in [(0, 1), (4095, 2), (3 << 20, 3), (size - 1, 4)] {
            first.write_all_at(&[byte], at).unwrap();
        }
        first.write_all_at(&[0; 1 << 20], 8 << 20).unwrap();
        save_memory(&first, &saved).unwrap();
        load_memory(&saved, &second).unwrap();
        let content = |name| fs::read(folder.path().join(name)).unwrap();
        assert!(content("first") == content("second"));
        assert!(saved.metadata().unwrap().blocks() * 512 < 1 << 20);
    }
}
