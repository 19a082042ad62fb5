//! [`Folder`]: a host folder's files, as a FUSE server's operations. Knows no wire format and no device.
//!
//! The guest's kernel decides who may do what there (`default_permissions`), by the owners and modes that it is shown. What the host denies
//! this process on a file of its own, such as writing to one of mode 0444, the guest's root may do all the same.
//!
//! Here is what files are and belong to; `entries` makes, moves and removes them, `files` is about those that are open, `attributes` about
//! extended attributes, `locking` about locks, `changed` about what somebody else does there.

mod attributes;
mod changed;
mod entries;
mod files;
mod locking;

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, chmodat,
    ftruncate, openat, readlinkat, utimensat,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::acl::{Acl, Which};
use super::handles::{self, Handles};
use super::kept::Kept;
use super::locks::Locks;
use super::nodes::{self, Nodes, find, stat};
use super::owners::Owners;

pub use locking::SavedLocks;

/// How a folder is shared.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Nothing in it changes, not even for a moment.
    pub read_only: bool,
    /// Whom the guest sees its files belong to.
    pub owners: Owners,
    /// Owners, modes and kinds that the guest gives its files and the host's cannot have are kept beside them.
    pub keeps: bool,
    /// The guest's locks on files are the host's, too.
    pub shares_locks: bool,
    /// Descriptors that may be open for the guest at a time.
    pub descriptors: usize,
}

/// A node as the guest is told of it.
#[derive(Debug)]
pub(in crate::share) struct Found {
    pub(in crate::share) number: u64,
    pub(in crate::share) stat: Statx,
}

/// What a file is made with.
#[derive(Debug, Clone, Copy)]
pub(in crate::share) struct New {
    pub(in crate::share) mode: u32,
    /// What of it a file does not get, unless its folder has a list that says what it begins with.
    pub(in crate::share) umask: u32,
    /// The guest's user and group who make it.
    pub(in crate::share) by: (u32, u32),
}

/// What of a file is set; what is none stays.
#[derive(Debug, Default)]
pub(in crate::share) struct Changes {
    pub(in crate::share) mode: Option<u32>,
    pub(in crate::share) uid: Option<u32>,
    pub(in crate::share) gid: Option<u32>,
    pub(in crate::share) size: Option<u64>,
    pub(in crate::share) times: Option<Timestamps>,
    /// The bits go by which the file would run as its owner or group, whatever else becomes of it. A new owner takes them, too.
    pub(in crate::share) drops_set_ids: bool,
}

/// Neither of the times of a file.
pub(in crate::share) const NO_TIMES: Timestamps = {
    let omitted = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    Timestamps { last_access: omitted, last_modification: omitted }
};
/// The moment of the call.
pub(in crate::share) const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };

/// The bits of a mode that a guest sets: of a file none by which it would run as its owner, who is somebody else there than here.
const FILE_BITS: u32 = 0o1777;
const FOLDER_BITS: u32 = 0o3777;
/// S_ISUID
const RUNS_AS_OWNER: u32 = 0o4000;
/// What of open(2)'s flags is the guest's to choose. The rest is done by its kernel, or says where a file is.
const OPEN_FLAGS: OFlags =
    OFlags::RDWR.union(OFlags::WRONLY).union(OFlags::APPEND).union(OFlags::TRUNC).union(OFlags::SYNC);

/// How a folder's descriptor is opened.
const AS_FOLDER: OFlags = OFlags::DIRECTORY;

/// [`Folder`] without what the host has of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    nodes: nodes::Saved,
    handles: handles::Saved,
}

/// See the module's text.
#[derive(Debug)]
pub struct Folder {
    nodes: Nodes,
    handles: Handles,
    locks: Locks,
    terms: Terms,
    /// /proc/self/fd: where a descriptor that names a file is opened.
    descriptors: Arc<OwnedFd>,
}

impl Folder {
    /// The folder that `root` names, and all below it.
    ///
    /// # Errors
    /// There is no /proc; the host does not say what `root` is. EOPNOTSUPP: nothing can be kept there.
    pub fn new(root: OwnedFd, terms: Terms) -> Result<Self, Errno> {
        if terms.keeps && Kept::read(&by_number(&root)) == Err(Errno::OPNOTSUPP) {
            return Err(Errno::OPNOTSUPP);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            nodes: Nodes::new(root, terms.descriptors / 2)?,
            handles: Handles::new(terms.descriptors / 2),
            locks: Locks::default(),
            terms,
            descriptors: openat(CWD, "/proc/self/fd", flags, Mode::empty())?.into(),
        })
    }

    /// How it is shared.
    pub(in crate::share) fn terms(&self) -> &Terms {
        &self.terms
    }

    pub(in crate::share) fn lookup(&mut self, folder: u64, name: &CStr) -> Result<Found, Errno> {
        let at = self.nodes.path(folder)?;
        let path = self.as_owner(&at, 0o100, || find(&at, name))?;
        self.tell(folder, name, path)
    }

    fn tell(&mut self, folder: u64, name: &CStr, path: OwnedFd) -> Result<Found, Errno> {
        let stat = stat(&path)?;
        let seen = self.seen(&path, stat);
        let number = self.nodes.found(Some((folder, name)), path, &stat)?;
        Ok(Found { number, stat: seen })
    }

    /// The file `path`, which is `stat` on the host, as the guest sees it.
    fn seen(&self, path: &OwnedFd, stat: Statx) -> Statx {
        let mut seen = stat;
        (seen.stx_uid, seen.stx_gid) = self.terms.owners.shown(&stat);
        if self.terms.keeps
            && may_keep(&stat)
            && let Ok(Some(kept)) = Kept::read(&by_number(path))
        {
            kept.apply(&mut seen);
        }
        seen
    }

    /// Has the guest see the file `path`, which is `stat` on the host, as `kept`.
    fn keep(&self, path: &OwnedFd, stat: &Statx, kept: &Kept) -> Result<(), Errno> {
        if !may_keep(stat) {
            // Nothing can be kept of a link, whose owner hardly anybody asks for, nor of what the host has put here beside files and folders.
            return match FileType::from_raw_mode(stat.stx_mode.into()) {
                FileType::Symlink => Ok(()),
                _ => self.set_mode(path, kept.mode & FILE_BITS),
            };
        }
        let here = FileType::from_raw_mode(stat.stx_mode.into());
        // Never in this process's own way.
        let mode = kept.mode & 0o777 | if here == FileType::Directory { 0o700 } else { 0o600 };
        if u32::from(stat.stx_mode) & 0o7777 != mode {
            self.set_mode(path, mode)?;
        }
        let is_plain = (kept.uid, kept.gid) == self.terms.owners.shown(stat);
        match is_plain && kept.mode == mode && kept.kind == here {
            true => Kept::remove(&by_number(path)),
            false => kept.write(&by_number(path)),
        }
    }

    /// The guest begins anew: what it knew and had open is nothing to it.
    pub(in crate::share) fn clear(&mut self) {
        self.nodes.clear();
        self.handles.clear();
        self.locks.clear();
    }

    pub(in crate::share) fn save(&self) -> Saved {
        Saved { nodes: self.nodes.save(), handles: self.handles.save() }
    }

    /// Takes over what the guest knew and had open.
    ///
    /// # Errors
    /// No guest can have had that.
    pub(in crate::share) fn restore(&mut self, saved: Saved) -> Result<(), String> {
        self.nodes.restore(saved.nodes)?;
        self.handles.restore(saved.handles, OPEN_FLAGS | AS_FOLDER)
    }

    pub(in crate::share) fn forget(&mut self, number: u64, lookups: u64) {
        self.nodes.forget(number, lookups);
    }

    /// Of the node, by what is open of it if `handle` is given.
    pub(in crate::share) fn stat(&mut self, number: u64, handle: Option<u64>) -> Result<Statx, Errno> {
        match handle.and_then(|handle| self.handle(handle, number).ok()) {
            Some(file) => Ok(self.seen(&file, stat(&file)?)),
            None => {
                let path = self.nodes.path(number)?;
                Ok(self.seen(&path, stat(&path)?))
            }
        }
    }

    pub(in crate::share) fn change(
        &mut self,
        number: u64,
        handle: Option<u64>,
        changes: &Changes,
    ) -> Result<Statx, Errno> {
        self.may_change()?;
        let open = handle.map(|handle| self.handle(handle, number)).transpose()?;
        let path = match &open {
            Some(file) => file.clone(),
            None => self.nodes.path(number)?,
        };
        let before = stat(&path)?;
        self.set_owner_and_mode(&path, &before, changes)?;
        if let Some(size) = changes.size {
            match &open {
                Some(file) => ftruncate(file, size)?,
                None => {
                    regular(&before)?;
                    let file = self.open_path(&path, OFlags::WRONLY)?;
                    ftruncate(file, size)?;
                }
            }
        }
        if let Some(times) = &changes.times {
            utimensat(&path, c"", times, AtFlags::EMPTY_PATH)?;
        }
        Ok(self.seen(&path, stat(&path)?))
    }

    fn set_owner_and_mode(&self, path: &OwnedFd, before: &Statx, changes: &Changes) -> Result<(), Errno> {
        let has_owner = changes.uid.is_some() || changes.gid.is_some();
        let drops = (has_owner || changes.drops_set_ids) && !is_folder(before);
        if changes.mode.is_none() && !has_owner && !drops {
            return Ok(());
        }
        let kept = Kept::of(&self.seen(path, *before));
        let mode = match changes.mode {
            Some(mode) => mode & 0o7777,
            None if drops => without_set_ids(kept.mode),
            None => kept.mode,
        };
        if self.terms.keeps {
            if changes.mode.is_some()
                && may_keep(before)
                && let Some(acl) = Acl::read(&by_number(path), Which::Access)?
            {
                acl.with_mode(mode).write(&by_number(path), Which::Access)?;
            }
            let (uid, gid) = (changes.uid.unwrap_or(kept.uid), changes.gid.unwrap_or(kept.gid));
            let wanted = Kept { uid, gid, mode, ..kept };
            return if wanted == kept { Ok(()) } else { self.keep(path, before, &wanted) };
        }
        self.terms.owners.give(before, changes.uid, changes.gid)?;
        match changes.mode {
            None if mode == kept.mode => Ok(()),
            _ => self.set_mode(path, mode & if is_folder(before) { FOLDER_BITS } else { FILE_BITS }),
        }
    }

    /// A file's data is changed by a user of the guest's, where nothing says whether that one may set such bits.
    fn changed_by(&self, file: &OwnedFd, (user, group): (u32, u32)) -> Result<(), Errno> {
        let here = stat(file)?;
        let seen = self.seen(file, here);
        let mode = u32::from(seen.stx_mode) & 0o7777;
        match user {
            0 => Ok(()),
            // Linux lets the second of them stay where it says something else, for members of the group.
            _ if mode & 0o2000 != 0 && seen.stx_gid != group => {
                let changes = Changes { mode: Some(mode & !0o6000), ..Changes::default() };
                self.set_owner_and_mode(file, &here, &changes)
            }
            _ => self.drop_set_ids(file),
        }
    }

    /// As whoever writes to a file does who may not set such bits of it.
    fn drop_set_ids(&self, path: &OwnedFd) -> Result<(), Errno> {
        self.set_owner_and_mode(path, &stat(path)?, &Changes { drops_set_ids: true, ..Changes::default() })
    }

    pub(in crate::share) fn read_link(&mut self, number: u64) -> Result<Vec<u8>, Errno> {
        let path = self.nodes.path(number)?;
        Ok(readlinkat(&*path, c"", Vec::new())?.into_bytes())
    }

    /// Does `act` in or to the file `path`. What the host denies, it allows if the file is this process's own and its mode is all that is
    /// in the way: the guest's kernel has decided already. `bits` are what the mode must have.
    fn as_owner<T>(&self, path: &OwnedFd, bits: u32, act: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
        let denied = match act() {
            Err(Errno::ACCESS) if !self.terms.read_only => Errno::ACCESS,
            done => return done,
        };
        let stat = stat(path)?;
        let mode = u32::from(stat.stx_mode) & 0o7777;
        // What runs as its owner stays as it is: that cannot be set again.
        if !self.terms.owners.is_own(&stat) || mode & bits == bits || mode & RUNS_AS_OWNER != 0 {
            return Err(denied);
        }
        self.set_mode(path, mode | bits)?;
        let done = act();
        // It may be gone by now.
        let _ = self.set_mode(path, mode);
        done
    }

    /// Opens a folder of which there is a descriptor that only names it.
    fn list_path(&self, path: &OwnedFd) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        self.as_owner(path, 0o500, || openat(path, c".", flags, Mode::empty()))
    }

    /// Opens a file of which there is a descriptor that only names it.
    fn open_path(&self, path: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let bits = match flags {
            _ if flags.contains(OFlags::RDWR) => 0o600,
            _ if flags.contains(OFlags::WRONLY) => 0o200,
            _ => 0o400,
        };
        // What is not regular does not make anybody wait.
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        self.as_owner(path, bits, || openat(&self.descriptors, &*number_of(path), flags, Mode::empty()))
    }

    fn set_mode(&self, path: &OwnedFd, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode & !RUNS_AS_OWNER & 0o7777);
        chmodat(&self.descriptors, &*number_of(path), mode, AtFlags::empty())
    }

    fn may_change(&self) -> Result<(), Errno> {
        if self.terms.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }
}

/// The name of a descriptor in /proc/self/fd.
fn number_of(file: &impl AsFd) -> String {
    file.as_fd().as_raw_fd().to_string()
}

/// A path to the file that `path` names, for calls that take nothing else.
fn by_number(path: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", path.as_raw_fd())
}

/// Something can be kept of such a file (xattr(7)).
fn may_keep(stat: &Statx) -> bool {
    let kind = FileType::from_raw_mode(stat.stx_mode.into());
    matches!(kind, FileType::RegularFile | FileType::Directory)
}

/// A file's mode when somebody else has written to it: it does not run as its owner any more, nor as its group (inode(7)). Without the
/// group's right to execute it the second bit says something else.
fn without_set_ids(mode: u32) -> u32 {
    let as_group = if mode & 0o010 != 0 { 0o2000 } else { 0 };
    mode & !(RUNS_AS_OWNER | as_group)
}

fn is_folder(stat: &Statx) -> bool {
    FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory
}

/// # Errors
/// ENXIO: to open such a file would do something else than to open it, or make somebody wait.
fn regular(stat: &Statx) -> Result<(), Errno> {
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        FileType::Symlink => Err(Errno::LOOP),
        _ => Err(Errno::NXIO),
    }
}
