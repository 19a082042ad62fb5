//! Entries of a shared folder: made, named once more, moved and removed.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, Statx, linkat, makedev, mkdirat, mknodat, openat,
    renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::{
    Acl, FILE_BITS, FOLDER_BITS, Folder, Found, Kept, New, OPEN_FLAGS, Which, by_number, find, is_folder,
    number_of, stat,
};

impl Folder {
    pub(in crate::share) fn make_link(
        &mut self,
        folder: u64,
        name: &CStr,
        target: &CStr,
    ) -> Result<Found, Errno> {
        self.make(folder, name, |at| symlinkat(target, at, name))
    }

    pub(in crate::share) fn make_folder(
        &mut self,
        folder: u64,
        name: &CStr,
        new: New,
    ) -> Result<Found, Errno> {
        let bits = self.bits(new, true);
        let found = self.make(folder, name, |at| mkdirat(at, name, bits))?;
        self.settled(folder, found, new, None)
    }

    /// A file that is not open: any but a device, which would be one of this host's.
    pub(in crate::share) fn make_node(
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

    /// Makes a regular file, and a handle for it. One that is there already is opened, unless `flags` have O_EXCL.
    pub(in crate::share) fn create(
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
                let handle = self.open(found.number, flags, new.by);
                if handle.is_err() {
                    self.nodes.forget(found.number, 1);
                }
                Ok((found, handle?))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a regular file without a name in `folder`, and a handle for it.
    pub(in crate::share) fn make_nameless(
        &mut self,
        folder: u64,
        flags: u32,
        new: New,
    ) -> Result<(Found, u64), Errno> {
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

    /// Another name for node `old`.
    pub(in crate::share) fn link(&mut self, old: u64, folder: u64, name: &CStr) -> Result<Found, Errno> {
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
    fn bits(&self, New { mode, umask, .. }: New, is_folder: bool) -> Mode {
        Mode::from_raw_mode(match (self.terms.keeps, is_folder) {
            (true, true) => mode & 0o777 & !umask | 0o700,
            (true, false) => mode & 0o777 & !umask | 0o600,
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
            let mode = self.begin_with_lists(folder, &path, &here, new)?;
            let mut kept = Kept { uid: new.by.0, gid: new.by.1, mode, ..Kept::of(&here) };
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

    /// What was made in `folder` gets the access control lists that it begins with there: its mode, which says the same.
    fn begin_with_lists(
        &mut self,
        folder: u64,
        path: &OwnedFd,
        here: &Statx,
        new: New,
    ) -> Result<u32, Errno> {
        let mode = new.mode & 0o7777;
        let above = self.nodes.path(folder)?;
        let Some(default) = Acl::read(&by_number(&above), Which::Default)? else {
            return Ok(mode & !new.umask);
        };
        let acl = default.inherited(mode);
        if !acl.is_plain() {
            acl.write(&by_number(path), Which::Access)?;
        }
        if is_folder(here) {
            default.write(&by_number(path), Which::Default)?;
        }
        Ok(mode & !0o777 | acl.mode())
    }

    /// Removes entry `name` of `folder`, a folder if `is_folder`.
    pub(in crate::share) fn remove(
        &mut self,
        folder: u64,
        name: &CStr,
        is_folder: bool,
    ) -> Result<(), Errno> {
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
    pub(in crate::share) fn rename(
        &mut self,
        from: (u64, &CStr),
        to: (u64, &CStr),
        flags: u32,
    ) -> Result<(), Errno> {
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
}
