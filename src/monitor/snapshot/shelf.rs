//! Snapshots that lie in one folder: what there is, and the end of one.

use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::{Error, MAGIC, Parts, Snapshot, file, templates, working_set};
use crate::config::VmConfig;
use crate::output;

/// One that is there.
#[derive(Debug)]
pub struct Saved {
    /// Its folder's name.
    pub name: String,
    /// The machine that was saved.
    pub config: VmConfig,
    /// On the disk.
    pub bytes: u64,
    /// When it was made.
    pub made: SystemTime,
}

impl Saved {
    /// The one at `folder`, if it is whole.
    pub(super) fn look(folder: &Path) -> Option<Self> {
        let name = folder.file_name()?.to_string_lossy().into_owned();
        if name.starts_with('.') {
            return None;
        }
        let config = Snapshot::open(folder).ok()?.config;
        let made = fs::metadata(folder.join("state")).ok()?.modified().ok()?;
        let files = fs::read_dir(folder).ok()?.flatten().filter_map(|file| file.metadata().ok());
        let bytes = files.map(|file| std::os::unix::fs::MetadataExt::blocks(&file) * 512).sum();
        Some(Self { name, config, bytes, made })
    }
}

/// Those in `folder` that are whole, by name.
///
/// # Errors
/// It cannot be read.
pub fn list(folder: &Path) -> io::Result<Vec<Saved>> {
    let mut all: Vec<_> =
        fs::read_dir(folder)?.flatten().filter_map(|entry| Saved::look(&entry.path())).collect();
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(all)
}

/// Removes the one in `folder`, also a damaged one: a folder that has a machine's state, and nothing but what a snapshot has.
///
/// # Errors
/// It is none, or cannot be removed.
pub fn remove(folder: &Path) -> Result<(), Error> {
    let other = |what: String| Error::NoSnapshot { path: folder.to_owned(), what };
    let failed = || file("remove", folder);
    if fs::symlink_metadata(folder).map_err(failed())?.is_symlink() {
        return Err(other("it is a symbolic link".to_owned()));
    }
    let state = Parts::state(folder)?;
    if !state.read(MAGIC.len() as u64)?.starts_with(&MAGIC) {
        return Err(other("it has no machine's state".to_owned()));
    }
    for entry in fs::read_dir(folder).map_err(failed())? {
        let name = entry.map_err(failed())?.file_name();
        let is_part = name.to_str().is_some_and(|name| {
            let disk = name.strip_prefix("disk").is_some_and(|number| number.parse::<u32>().is_ok());
            let is_fixed = ["config.json", "state", "memory", templates::KEY].contains(&name);
            disk || is_fixed || working_set::is_named(name)
        });
        if !is_part {
            return Err(other(format!("it has {}, too", name.display())));
        }
    }
    // Nobody finds half of it.
    let (_, hidden) = output::hidden(folder).ok_or_else(|| other("it is not a folder's name".to_owned()))?;
    fs::rename(folder, &hidden).map_err(failed())?;
    fs::remove_dir_all(&hidden).map_err(file("remove", &hidden))
}
