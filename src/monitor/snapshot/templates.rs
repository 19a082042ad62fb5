//! [`Templates`]: a folder of snapshots that runs make and use by themselves, each of a machine whose guest has just booted, by the
//! name of its [`Key`].
//!
//! One that is there is whole, and never changed: it is made under another name, and a run that uses it has its files open or
//! mapped, so that it may be replaced or removed at any time. Whoever makes one holds its lock.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{
    CWD, FlockOperation, RenameFlags, Timespec, Timestamps, UTIME_NOW, flock, renameat_with, utimensat,
};

use super::key::Held;
use super::{Error, Folder, Key, Saved, Snapshot, create, file, files};
use crate::config::VmConfig;
use crate::error_chain;
use crate::machine::Handle;
use crate::output;

/// Templates that are kept, and the bytes on the disk of all: those that were used last. The newest is, however large.
const MOST: usize = 16;
const MOST_BYTES: u64 = 8 << 30;
/// What a template has beside a snapshot's files.
pub(super) const KEY: &str = "key.json";
/// What is made, in a folder of its own, and what is being removed.
const MAKING: &str = ".making";
const GOING: &str = ".going";

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Templates {
    folder: PathBuf,
}

/// One of them.
#[derive(Debug)]
pub struct Template {
    /// The snapshot; its name has 16 hexadecimal digits.
    pub saved: Saved,
    /// When a run used it last.
    pub used: SystemTime,
}

/// What there is for a machine that is to go on from a template.
#[derive(Debug)]
pub enum Found {
    /// It.
    Template(Box<Snapshot>),
    /// None, and whoever has this makes it.
    Nothing(Box<New>),
}

/// A template that is to be made. Nobody else makes it while this lives.
#[derive(Debug)]
pub struct New {
    templates: Templates,
    key: Key,
    config: VmConfig,
    /// Where it is made, and the lock on that.
    making: PathBuf,
    _lock: File,
    /// What the machine began with, once it has.
    held: Option<Held>,
}

impl Templates {
    /// Those in `folder`, which is made where it is not there yet.
    ///
    /// # Errors
    /// It cannot be made, or others than this user may write to it.
    pub fn at(folder: PathBuf) -> io::Result<Self> {
        output::own_folder(&folder)?;
        Ok(Self { folder })
    }

    /// What there is for the machine that `config` describes. One that is stale, or is to be `anew`, is nothing. Where another
    /// process makes it just now, that is waited for.
    ///
    /// # Errors
    /// The machine can have none ([`Key::of`]); the folder cannot be written to.
    pub fn find(&self, config: &VmConfig, anew: bool) -> Result<Found, Error> {
        let mut config = config.clone();
        config.make_absolute();
        let key = Key::of(&config)?;
        if !anew && let Some(template) = self.whole(&key) {
            return Ok(Found::Template(Box::new(template)));
        }
        let making = self.folder.join(format!("{MAKING}.{}", key.name()));
        let lock = lock(&making).map_err(file("lock", &making))?;
        let (templates, key) = (self.clone(), Key::settled(&config)?);
        let new = New { templates, key, config, making, _lock: lock, held: None };
        new.clear().map_err(file("clear", &new.making))?;
        // Another may have made it meanwhile.
        match self.whole(&new.key) {
            Some(template) if !anew => Ok(Found::Template(Box::new(template))),
            _ => Ok(Found::Nothing(Box::new(new))),
        }
    }

    /// The one of `key`, if it is there and is not stale.
    fn whole(&self, key: &Key) -> Option<Snapshot> {
        let name = key.name();
        let folder = self.folder.join(&name);
        let read = fs::read(folder.join(KEY)).ok()?;
        let stale = |why: &str| log::info!("template {name} is stale, and will be made anew: {why}");
        match serde_json::from_slice::<Key>(&read) {
            Ok(found) if found == *key => {}
            Ok(found) => {
                stale(&format!("{} changed", key.changes(&found).join(", ")));
                return None;
            }
            Err(error) => {
                stale(&error.to_string());
                return None;
            }
        }
        match Snapshot::open(&folder) {
            Ok(template) => {
                // For who removes the one that was used least recently; of no consequence where it fails.
                let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
                let now = Timestamps { last_access: now, last_modification: now };
                let _ = utimensat(CWD, &folder, &now, rustix::fs::AtFlags::empty());
                log::info!("template {name}: the guest goes on from there");
                Some(template)
            }
            Err(error) => {
                stale(&error_chain(&error));
                None
            }
        }
    }

    /// All of them, those first that were used last.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> io::Result<Vec<Template>> {
        let used = |saved: &Saved| {
            let folder = self.folder.join(&saved.name);
            fs::metadata(folder.join(KEY)).and_then(|_| fs::metadata(folder)?.modified()).ok()
        };
        let all = super::list(&self.folder)?.into_iter();
        let mut all: Vec<_> = all.filter_map(|saved| Some(Template { used: used(&saved)?, saved })).collect();
        all.sort_by_key(|template| Reverse(template.used));
        Ok(all)
    }

    /// Removes the one called `name`. False if there is none.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, name: &str) -> io::Result<bool> {
        let folder = self.folder.join(name);
        if name.is_empty() || name.starts_with('.') || name.contains('/') || !folder.join(KEY).is_file() {
            return Ok(false);
        }
        // Nobody finds half of it.
        let going = self.folder.join(format!("{GOING}.{name}.{}", std::process::id()));
        match fs::rename(&folder, &going) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            renamed => renamed?,
        }
        fs::remove_dir_all(&going).map(|()| true)
    }

    /// Removes what is too much, and what a killed process has left half made.
    fn trim(&self) -> io::Result<()> {
        let mut bytes = 0;
        for (index, template) in self.list()?.into_iter().enumerate() {
            bytes += template.saved.bytes;
            if index > 0 && (index >= MOST || bytes > MOST_BYTES) {
                log::info!("template {}: removed, as it was used least recently", template.saved.name);
                self.remove(&template.saved.name)?;
            }
        }
        for entry in fs::read_dir(&self.folder)?.flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            let begins = |with| name.to_str().is_some_and(|name| name.starts_with(with));
            let is_locked = || {
                let open = File::open(&path)?;
                io::Result::Ok(flock(&open, FlockOperation::NonBlockingLockExclusive).is_err())
            };
            if begins(GOING) || begins(MAKING) && !is_locked().unwrap_or(true) {
                // Who removes it may be at that.
                let _ = fs::remove_dir_all(&path);
            }
        }
        Ok(())
    }
}

impl New {
    /// Where it and this user's other templates are.
    pub fn folder(&self) -> &Path {
        &self.templates.folder
    }

    /// A machine has opened what it begins with: none of that may change from now on.
    ///
    /// # Errors
    /// It has changed before. There is to be no template, then.
    pub fn begins(&mut self) -> Result<(), Error> {
        self.held = Some(Held::of(&self.config, &self.key)?);
        Ok(())
    }

    /// Saves `machine`, whose guest is ready, and lets it go on. From then on it is there for all.
    ///
    /// # Errors
    /// It cannot be saved; what it began with has changed meanwhile. There is none then.
    pub fn save(self, machine: &Handle) -> Result<(), Error> {
        if let Some(held) = &self.held {
            held.check(&self.key)?;
        }
        let made = self.making.join("template");
        create(machine, &self.config, Folder::begin(&made, &files(&self.config))?)?;
        let key = made.join(KEY);
        let written = || {
            let mut file = output::create(&key)?;
            file.write_all(&serde_json::to_vec(&self.key)?)?;
            file.sync_all()?;
            File::open(&made)?.sync_all()
        };
        written().map_err(file("write", &key))?;
        let place = self.templates.folder.join(self.key.name());
        // A stale one is where the new one was, and goes with it.
        let placed = renameat_with(CWD, &made, CWD, &place, RenameFlags::NOREPLACE)
            .or_else(|_| renameat_with(CWD, &made, CWD, &place, RenameFlags::EXCHANGE));
        placed.map_err(|error| file("make", &place)(error.into()))?;
        log::info!("template {}: made", self.key.name());
        if let Err(error) = self.templates.trim() {
            log::warn!("{}: remove what is too much: {error}", self.templates.folder.display());
        }
        Ok(())
    }

    /// Removes what a killed process has left there.
    fn clear(&self) -> io::Result<()> {
        fs::read_dir(&self.making)?.try_for_each(|entry| fs::remove_dir_all(entry?.path()))
    }
}

impl Drop for New {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.making);
    }
}

/// Makes the folder at `path`, and locks it. Who waits for the lock may find it on a folder that is gone.
fn lock(path: &Path) -> io::Result<File> {
    loop {
        match output::folder(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let open = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            open => open?,
        };
        if flock(&open, FlockOperation::NonBlockingLockExclusive).is_err() {
            log::info!("another run makes the template: waiting for that");
            flock(&open, FlockOperation::LockExclusive)?;
        }
        let ours = open.metadata()?;
        if fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
            return Ok(open);
        }
    }
}
