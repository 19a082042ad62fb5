//! [`family`]: snapshots with what each of them lies over, as far as that is still there.

use std::collections::BTreeMap;
use std::fs::{self, canonicalize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::base::HIGHEST;
use super::{Error, Header, MAGIC, Parts, Snapshot, file};

/// A snapshot among others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relative {
    /// Its folder, as an absolute path without links.
    pub folder: PathBuf,
    /// Bytes on the disk, without those of its base.
    pub bytes: u64,
    /// When it was made.
    pub made: SystemTime,
    /// What it lies over.
    pub base: Option<(PathBuf, Tie)>,
    /// Why it cannot be read, if that is so.
    pub damage: Option<String>,
}

/// What has become of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tie {
    /// It is as it was.
    Whole,
    /// Nothing is there.
    Gone,
    /// Something else is there, or part of it.
    Changed,
    /// Too many lie over each other.
    TooHigh,
}

/// Those in `places`, which are snapshots or folders of them, and what they lie over, wherever that is: by folder. Memory is not read.
///
/// # Errors
/// A place cannot be read.
pub fn family(places: &[PathBuf]) -> Result<Vec<Relative>, Error> {
    let mut all = BTreeMap::new();
    for place in places {
        let place = canonicalize(place).map_err(file("find", place))?;
        if is_snapshot(&place) {
            add(&mut all, &place);
            continue;
        }
        for entry in fs::read_dir(&place).map_err(file("read", &place))?.flatten() {
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            // What a link leads to is listed where it is.
            if !is_hidden && entry.file_type().is_ok_and(|kind| kind.is_dir()) && is_snapshot(&entry.path()) {
                add(&mut all, &entry.path());
            }
        }
    }
    let folders: Vec<PathBuf> = all.keys().cloned().collect();
    for folder in folders {
        // The next sees it: of a circle, one alone.
        if too_high(&all, &folder)
            && let Some((_, tie)) = all.get_mut(&folder).and_then(|(relative, _)| relative.base.as_mut())
        {
            *tie = Tie::TooHigh;
        }
    }
    Ok(all.into_values().map(|(relative, _)| relative).collect())
}

/// Those of `all` that lie over the one in `folder`, directly or not: those that would be lost with it.
pub fn above<'a>(all: &'a [Relative], folder: &Path) -> Vec<&'a Relative> {
    let mut found: Vec<&Relative> = Vec::new();
    let mut below = vec![folder];
    while let Some(base) = below.pop() {
        for relative in all.iter().filter(|relative| relative.over() == Some(base)) {
            // Files of others can say that they lie over each other in a circle.
            if !found.contains(&relative) && relative.folder != folder {
                found.push(relative);
                below.push(&relative.folder);
            }
        }
    }
    found
}

impl Relative {
    /// What it lies over and needs: its base, if that is whole.
    pub fn over(&self) -> Option<&Path> {
        self.base.as_ref().filter(|(_, tie)| *tie == Tie::Whole).map(|(folder, _)| folder.as_path())
    }
}

/// By folder, with what those that lie over it compare.
type Found = BTreeMap<PathBuf, (Relative, Option<Header>)>;

/// Whether `folder` has a machine's state, however damaged the rest is.
fn is_snapshot(folder: &Path) -> bool {
    let state = Parts::state(folder).and_then(|state| state.read(MAGIC.len() as u64));
    state.is_ok_and(|bytes| bytes == MAGIC)
}

fn look(folder: &Path) -> (Relative, Option<Header>) {
    let read = Parts::open(folder).and_then(Snapshot::read);
    let metadata = |name: &str| fs::metadata(folder.join(name));
    let made = metadata("state").and_then(|state| state.modified()).unwrap_or(UNIX_EPOCH);
    let files = fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|file| file.metadata().ok());
    let bytes = files.map(|file| file.blocks() * 512).sum();
    let damage = read.as_ref().err().map(|error| crate::error_chain(error));
    (Relative { folder: folder.to_owned(), bytes, made, base: None, damage }, read.ok().map(|it| it.header))
}

/// Adds the one in `folder` and all below it.
fn add(all: &mut Found, folder: &Path) {
    let mut next = Some(folder.to_owned());
    while let Some(folder) = next.take().filter(|folder| !all.contains_key(folder)) {
        let (mut relative, header) = look(&folder);
        if let Some((header, base)) = header.as_ref().and_then(|header| Some((header, header.base.as_ref()?)))
        {
            let path = base.path(&folder).unwrap_or_else(|_| folder.clone());
            let path = canonicalize(&path).unwrap_or(path);
            let below = if is_snapshot(&path) { Some(look(&path).1) } else { None };
            let tie = match below {
                None => Tie::Gone,
                Some(Some(below)) if base.is_over(header.size, &below) => Tie::Whole,
                Some(_) => Tie::Changed,
            };
            if tie == Tie::Whole {
                next = Some(path.clone());
            }
            relative.base = Some((path, tie));
        }
        all.insert(folder, (relative, header));
    }
}

fn too_high(all: &Found, folder: &Path) -> bool {
    let over = |folder: &PathBuf| Some(all.get(folder)?.0.over()?.to_owned());
    std::iter::successors(Some(folder.to_owned()), over).nth(HIGHEST + 1).is_some()
}
