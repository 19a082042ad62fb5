//! [`Folder`]: a host folder's files, as a FUSE server's operations. Knows no wire format and no device.
//!
//! The guest's kernel decides who may do what there (`default_permissions`), by the owners and modes that it is shown. What the host denies
//! this process on a file of its own, such as writing to one of mode 0444, the guest's root may do all the same.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, StatVfs, Statx, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags, chmodat, copy_file_range, fallocate, fdatasync, fstatvfs,
    fsync, ftruncate, getxattr, linkat, listxattr, makedev, mkdirat, mknodat, openat, readlinkat,
    removexattr, renameat_with, seek, setxattr, symlinkat, syncfs, unlinkat, utimensat,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::handles::{self, Handles};
use super::kept::{self, Kept};
use super::nodes::{self, Nodes, find, stat};
use super::owners::Owners;
use crate::memory::{Buffers, Slices};

/// How a folder is shared.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Nothing in it changes, not even for a moment.
    pub read_only: bool,
    /// Whom the guest sees its files belong to.
    pub owners: Owners,
    /// Owners, modes and kinds that the guest gives its files and the host's cannot have are kept beside them.
    pub keeps: bool,
    /// Descriptors that may be open for the guest at a time.
    pub descriptors: usize,
}

/// A node as the guest is told of it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) number: u64,
    pub(super) stat: Statx,
}

/// What a file is made with.
#[derive(Debug, Clone, Copy)]
pub(super) struct New {
    pub(super) mode: u32,
    /// The guest's user and group who make it.
    pub(super) by: (u32, u32),
}

/// What of a file is set; what is none stays.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) times: Option<Timestamps>,
}

/// Neither of the times of a file.
pub(super) const NO_TIMES: Timestamps = {
    let omitted = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    Timestamps { last_access: omitted, last_modification: omitted }
};
/// The moment of the call.
pub(super) const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };

/// The bits of a mode that a guest sets: of a file none by which it would run as its owner, who is somebody else there than here.
const FILE_BITS: u32 = 0o1777;
const FOLDER_BITS: u32 = 0o3777;
/// S_ISUID
const RUNS_AS_OWNER: u32 = 0o4000;
/// What of open(2)'s flags is the guest's to choose. The rest is done by its kernel, or says where a file is.
const OPEN_FLAGS: OFlags =
    OFlags::RDWR.union(OFlags::WRONLY).union(OFlags::APPEND).union(OFlags::TRUNC).union(OFlags::SYNC);
/// Extended attributes that the guest's kernel and programs keep; those of namespaces that mean something to this host stay its own.
const XATTR_PREFIX: &[u8] = b"user.";
/// The most bytes of an extended attribute, and of all names of a file's (include/uapi/linux/limits.h).
const XATTR_MOST: usize = 64 << 10;

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
            terms,
            descriptors: openat(CWD, "/proc/self/fd", flags, Mode::empty())?.into(),
        })
    }

    /// How it is shared.
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    pub(super) fn lookup(&mut self, folder: u64, name: &CStr) -> Result<Found, Errno> {
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
    pub(super) fn clear(&mut self) {
        self.nodes.clear();
        self.handles.clear();
    }

    pub(super) fn save(&self) -> Saved {
        Saved { nodes: self.nodes.save(), handles: self.handles.save() }
    }

    /// Takes over what the guest knew and had open.
    ///
    /// # Errors
    /// No guest can have had that.
    pub(super) fn restore(&mut self, saved: Saved) -> Result<(), String> {
        self.nodes.restore(saved.nodes)?;
        self.handles.restore(saved.handles, OPEN_FLAGS | AS_FOLDER)
    }

    pub(super) fn forget(&mut self, number: u64, lookups: u64) {
        self.nodes.forget(number, lookups);
    }

    /// Of the node, by what is open of it if `handle` is given.
    pub(super) fn stat(&mut self, number: u64, handle: Option<u64>) -> Result<Statx, Errno> {
        match handle.and_then(|handle| self.handle(handle, number).ok()) {
            Some(file) => Ok(self.seen(&file, stat(&file)?)),
            None => {
                let path = self.nodes.path(number)?;
                Ok(self.seen(&path, stat(&path)?))
            }
        }
    }

    pub(super) fn change(
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
        if self.terms.keeps {
            if changes.mode.is_none() && changes.uid.is_none() && changes.gid.is_none() {
                return Ok(());
            }
            let mut kept = Kept::of(&self.seen(path, *before));
            kept.uid = changes.uid.unwrap_or(kept.uid);
            kept.gid = changes.gid.unwrap_or(kept.gid);
            kept.mode = changes.mode.map_or(kept.mode, |mode| mode & 0o7777);
            return self.keep(path, before, &kept);
        }
        self.terms.owners.give(before, changes.uid, changes.gid)?;
        match changes.mode {
            Some(mode) if is_folder(before) => self.set_mode(path, mode & FOLDER_BITS),
            Some(mode) => self.set_mode(path, mode & FILE_BITS),
            None => Ok(()),
        }
    }

    pub(super) fn read_link(&mut self, number: u64) -> Result<Vec<u8>, Errno> {
        let path = self.nodes.path(number)?;
        Ok(readlinkat(&*path, c"", Vec::new())?.into_bytes())
    }

    pub(super) fn make_link(&mut self, folder: u64, name: &CStr, target: &CStr) -> Result<Found, Errno> {
        self.make(folder, name, |at| symlinkat(target, at, name))
    }

    pub(super) fn make_folder(&mut self, folder: u64, name: &CStr, new: New) -> Result<Found, Errno> {
        let bits = self.bits(new, true);
        let found = self.make(folder, name, |at| mkdirat(at, name, bits))?;
        self.settled(folder, found, new, None)
    }

    /// A file that is not open: any but a device, which would be one of this host's.
    pub(super) fn make_node(
        &mut self,
        folder: u64,
        name: &CStr,
        new: New,
        device: (u32, u32),
    ) -> Result<Found, Errno> {
        let kind = FileType::from_raw_mode(new.mode);
        if self.terms.keeps && kind != FileType::RegularFile {
            return self.make_kept(folder, name, new, kind, device);
        }
        // Overlay file systems mark with it what is not there.
        let is_whiteout = kind == FileType::CharacterDevice && device == (0, 0);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            _ if is_whiteout => {}
            _ => return Err(Errno::PERM),
        }
        let bits = self.bits(new, false);
        let found =
            self.make(folder, name, |at| mknodat(at, name, kind, bits, makedev(device.0, device.1)))?;
        self.settled(folder, found, new, None)
    }

    /// A file of any `kind` that has no data, as an empty regular one that the guest sees as that.
    fn make_kept(
        &mut self,
        folder: u64,
        name: &CStr,
        new: New,
        kind: FileType,
        device: (u32, u32),
    ) -> Result<Found, Errno> {
        use FileType::{BlockDevice, CharacterDevice, Fifo, Socket};
        if !matches!(kind, BlockDevice | CharacterDevice | Fifo | Socket) {
            return Err(Errno::PERM);
        }
        let bits = self.bits(new, false);
        let found = self.make(folder, name, |at| mknodat(at, name, FileType::RegularFile, bits, 0))?;
        self.settled(folder, found, new, Some((kind, device)))
    }

    /// Another name for node `old`.
    pub(super) fn link(&mut self, old: u64, folder: u64, name: &CStr) -> Result<Found, Errno> {
        let path = self.nodes.path(old)?;
        let descriptors = self.descriptors.clone();
        let from = number_of(&path);
        self.make(folder, name, |at| linkat(&descriptors, &*from, at, name, AtFlags::SYMLINK_FOLLOW))
    }

    /// Makes entry `name` of `folder` by `how`, and tells of it.
    fn make(
        &mut self,
        folder: u64,
        name: &CStr,
        how: impl Fn(&OwnedFd) -> Result<(), Errno>,
    ) -> Result<Found, Errno> {
        self.may_change()?;
        let at = self.nodes.path(folder)?;
        self.as_owner(&at, 0o300, || how(&at))?;
        let path = self.as_owner(&at, 0o100, || find(&at, name))?;
        self.tell(folder, name, path)
    }

    /// What the host's file is made with.
    fn bits(&self, New { mode, .. }: New, is_folder: bool) -> Mode {
        Mode::from_raw_mode(match (self.terms.keeps, is_folder) {
            (true, true) => mode & 0o777 | 0o700,
            (true, false) => mode & 0o777 | 0o600,
            (false, true) => mode & FOLDER_BITS,
            (false, false) => mode & FILE_BITS,
        })
    }

    /// What was made in `folder` gets the mode that was asked for, and if that is kept, its owner and kind. The guest's kernel has taken its
    /// own mask off the mode already; so has this process's, against which it is set again.
    fn settled(
        &mut self,
        folder: u64,
        mut found: Found,
        new: New,
        kind: Option<(FileType, (u32, u32))>,
    ) -> Result<Found, Errno> {
        let path = self.nodes.path(found.number)?;
        if self.terms.keeps {
            let above = self.nodes.path(folder)?;
            let above = self.seen(&above, stat(&above)?);
            let here = stat(&path)?;
            let mut kept = Kept { uid: new.by.0, gid: new.by.1, mode: new.mode & 0o7777, ..Kept::of(&here) };
            // inode(7): the group, and of folders this itself, goes on to what is made in one.
            if u32::from(above.stx_mode) & 0o2000 != 0 {
                kept.gid = above.stx_gid;
                kept.mode |= if is_folder(&here) { 0o2000 } else { 0 };
            }
            if let Some((kind, device)) = kind {
                (kept.kind, kept.device) = (kind, device);
            }
            self.keep(&path, &here, &kept)?;
        } else if (u32::from(found.stat.stx_mode) ^ new.mode) & 0o777 != 0 {
            self.set_mode(&path, u32::from(found.stat.stx_mode) & 0o7000 | new.mode & 0o777)?;
        } else {
            return Ok(found);
        }
        found.stat = self.seen(&path, stat(&path)?);
        Ok(found)
    }

    /// Removes entry `name` of `folder`, a folder if `is_folder`.
    pub(super) fn remove(&mut self, folder: u64, name: &CStr, is_folder: bool) -> Result<(), Errno> {
        self.may_change()?;
        let at = self.nodes.path(folder)?;
        let flags = if is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        // What keeps it if it is open, or has another name.
        let path = self.as_owner(&at, 0o100, || find(&at, name))?;
        self.as_owner(&at, 0o300, || unlinkat(&at, name, flags))?;
        self.nodes.lost(folder, name, path);
        Ok(())
    }

    /// As renameat2(2) has `flags`.
    pub(super) fn rename(&mut self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> Result<(), Errno> {
        self.may_change()?;
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let [old, new] = [self.nodes.path(from.0)?, self.nodes.path(to.0)?];
        let moved = self.as_owner(&old, 0o100, || find(&old, from.1))?;
        let replaced = find(&new, to.1).ok();
        self.as_owner(&old, 0o300, || {
            self.as_owner(&new, 0o300, || renameat_with(&old, from.1, &new, to.1, flags))
        })?;
        match replaced {
            Some(other) if flags.contains(RenameFlags::EXCHANGE) => self.nodes.moved(from.0, from.1, &other),
            Some(other) => self.nodes.lost(to.0, to.1, other),
            None => {}
        }
        self.nodes.moved(to.0, to.1, &moved);
        Ok(())
    }

    /// A handle for node `number`.
    pub(super) fn open(&mut self, number: u64, flags: u32) -> Result<u64, Errno> {
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            self.may_change()?;
        }
        self.handles.room()?;
        let path = self.nodes.path(number)?;
        regular(&stat(&path)?)?;
        let file = self.open_path(&path, flags)?;
        self.handles.add(number, flags - OFlags::TRUNC, file)
    }

    /// Makes a regular file, and a handle for it. One that is there already is opened, unless `flags` have O_EXCL.
    pub(super) fn create(
        &mut self,
        folder: u64,
        name: &CStr,
        flags: u32,
        new: New,
    ) -> Result<(Found, u64), Errno> {
        self.may_change()?;
        self.handles.room()?;
        let all = OFlags::from_bits_retain(flags);
        let kept = all & OPEN_FLAGS;
        let make = kept | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let at = self.nodes.path(folder)?;
        let bits = self.bits(new, false);
        match self.as_owner(&at, 0o300, || openat(&at, name, make, bits)) {
            Ok(file) => {
                let path = self.as_owner(&at, 0o100, || find(&at, name))?;
                let found = self.tell(folder, name, path)?;
                let found = self.settled(folder, found, new, None)?;
                let handle = self.handles.add(found.number, kept - OFlags::TRUNC, file)?;
                Ok((found, handle))
            }
            Err(Errno::EXIST) if !all.contains(OFlags::EXCL) => {
                let found = self.lookup(folder, name)?;
                let handle = self.open(found.number, flags);
                if handle.is_err() {
                    self.nodes.forget(found.number, 1);
                }
                Ok((found, handle?))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a regular file without a name in `folder`, and a handle for it.
    pub(super) fn make_nameless(&mut self, folder: u64, flags: u32, new: New) -> Result<(Found, u64), Errno> {
        self.may_change()?;
        self.handles.room()?;
        let flags = OFlags::from_bits_retain(flags);
        let make = flags & (OPEN_FLAGS | OFlags::EXCL) | OFlags::TMPFILE | OFlags::CLOEXEC;
        let at = self.nodes.path(folder)?;
        let bits = self.bits(new, false);
        let file = self.as_owner(&at, 0o300, || openat(&at, c".", make, bits))?;
        let path =
            openat(&self.descriptors, &*number_of(&file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let stat = stat(&path)?;
        let number = self.nodes.found(None, path, &stat)?;
        let found = self.settled(folder, Found { number, stat }, new, None)?;
        let kept = flags & (OPEN_FLAGS - OFlags::TRUNC);
        Ok((found, self.handles.add(number, kept, file)?))
    }

    pub(super) fn open_folder(&mut self, number: u64) -> Result<u64, Errno> {
        self.handles.room()?;
        let path = self.nodes.path(number)?;
        let folder = self.list_path(&path)?;
        self.handles.add(number, AS_FOLDER, folder)
    }

    /// What is open as `handle` of node `number`.
    pub(super) fn handle(&mut self, handle: u64, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        let known = self.handles.get(handle, number)?;
        if let Some(file) = &known.file {
            return Ok(file.clone());
        }
        let flags = known.flags;
        let path = self.nodes.path(number)?;
        let file = match flags.contains(AS_FOLDER) {
            true => self.list_path(&path)?,
            false => {
                regular(&stat(&path)?)?;
                self.open_path(&path, flags)?
            }
        };
        let file = Arc::new(file);
        self.handles.opened(handle, file.clone());
        Ok(file)
    }

    pub(super) fn close(&mut self, handle: u64) {
        self.handles.close(handle);
    }

    /// Reads until `to` is full or the file ends. How many.
    pub(super) fn read(
        &mut self,
        handle: u64,
        number: u64,
        offset: u64,
        to: &Buffers,
    ) -> Result<usize, Errno> {
        let file = self.handle(handle, number)?;
        in_pieces(to, |slices, done| slices.read_at(&file, offset.saturating_add(done)))
    }

    /// Writes all of `from`, or as much as there is room for.
    pub(super) fn write(
        &mut self,
        handle: u64,
        number: u64,
        offset: u64,
        from: &Buffers,
    ) -> Result<usize, Errno> {
        self.may_change()?;
        let file = self.handle(handle, number)?;
        in_pieces(from, |slices, done| slices.write_at(&file, offset.saturating_add(done)))
    }

    pub(super) fn sync(&mut self, handle: u64, number: u64, data_only: bool) -> Result<(), Errno> {
        let file = self.handle(handle, number)?;
        if data_only { fdatasync(file) } else { fsync(file) }
    }

    /// All that there is of the share's file system.
    pub(super) fn sync_all(&mut self, number: u64) -> Result<(), Errno> {
        let path = self.nodes.path(number)?;
        syncfs(openat(&path, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    }

    pub(super) fn space(&mut self, number: u64) -> Result<StatVfs, Errno> {
        fstatvfs(&*self.nodes.path(number)?)
    }

    pub(super) fn allocate(
        &mut self,
        handle: u64,
        number: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        self.may_change()?;
        let flags = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        fallocate(self.handle(handle, number)?, flags, offset, len)
    }

    /// Where the next data or the next hole is.
    pub(super) fn seek(&mut self, handle: u64, number: u64, offset: u64, whence: u32) -> Result<u64, Errno> {
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        seek(self.handle(handle, number)?, to)
    }

    /// Copies up to `len` bytes between files that are open. How many.
    pub(super) fn copy(
        &mut self,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        len: u64,
    ) -> Result<usize, Errno> {
        self.may_change()?;
        let [source, target] = [self.handle(from.0, from.1)?, self.handle(to.0, to.1)?];
        let (mut read, mut written) = (from.2, to.2);
        copy_file_range(source, Some(&mut read), target, Some(&mut written), len.min(COPY_MOST) as usize)
    }

    /// The value of an extended attribute.
    pub(super) fn attribute(&mut self, number: u64, name: &CStr) -> Result<Vec<u8>, Errno> {
        if !is_shared(name) {
            return Err(Errno::NODATA);
        }
        let path = self.nodes.path(number)?;
        self.as_owner(&path, 0o400, || {
            let mut value = vec![0; XATTR_MOST];
            let len = getxattr(by_number(&path), name, &mut *value)?;
            value.truncate(len);
            Ok(value)
        })
    }

    /// The names of a file's extended attributes, each with a zero byte at its end.
    pub(super) fn attributes(&mut self, number: u64) -> Result<Vec<u8>, Errno> {
        let path = self.nodes.path(number)?;
        let mut all = vec![0; XATTR_MOST];
        let len = listxattr(by_number(&path), &mut *all)?;
        all.truncate(len);
        let names = all.split_inclusive(|byte| *byte == 0);
        let shared = |name: &&[u8]| CStr::from_bytes_with_nul(name).is_ok_and(is_shared);
        Ok(names.filter(shared).flatten().copied().collect())
    }

    pub(super) fn set_attribute(
        &mut self,
        number: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        self.may_change()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if !is_shared(name) {
            return Err(Errno::OPNOTSUPP);
        }
        if value.len() > XATTR_MOST {
            return Err(Errno::TOOBIG);
        }
        let path = self.nodes.path(number)?;
        self.as_owner(&path, 0o200, || setxattr(by_number(&path), name, value, flags))
    }

    pub(super) fn remove_attribute(&mut self, number: u64, name: &CStr) -> Result<(), Errno> {
        self.may_change()?;
        if !is_shared(name) {
            return Err(Errno::OPNOTSUPP);
        }
        let path = self.nodes.path(number)?;
        self.as_owner(&path, 0o200, || removexattr(by_number(&path), name))
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

/// Moves `buffers` by `part`, which is told how many bytes are moved already, until none is left, there are no more, or there is an error
/// behind some. How many bytes.
fn in_pieces(
    buffers: &Buffers,
    mut part: impl FnMut(&Slices<'_>, u64) -> io::Result<usize>,
) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buffers.len() {
        match part(&Slices::of([buffers], done), done as u64) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(_) if done > 0 => break,
            // An offset that no file has.
            Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL)),
        }
    }
    Ok(done)
}

/// The most bytes of one copy, so that none takes for ever.
const COPY_MOST: u64 = 16 << 20;

/// The name of a descriptor in /proc/self/fd.
fn number_of(file: &impl AsFd) -> String {
    file.as_fd().as_raw_fd().to_string()
}

/// A path to the file that `path` names, for calls that take nothing else.
fn by_number(path: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", path.as_raw_fd())
}

/// The guest may have extended attributes of this name.
fn is_shared(name: &CStr) -> bool {
    name.to_bytes().starts_with(XATTR_PREFIX) && name != kept::NAME
}

/// Something can be kept of such a file (xattr(7)).
fn may_keep(stat: &Statx) -> bool {
    let kind = FileType::from_raw_mode(stat.stx_mode.into());
    matches!(kind, FileType::RegularFile | FileType::Directory)
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
