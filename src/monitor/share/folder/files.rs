//! Files and folders of a shared folder that are open.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, OFlags, SeekFrom, StatVfs, copy_file_range, fallocate, fdatasync, fstatvfs, fsync, seek,
    syncfs,
};
use rustix::io::Errno;

use super::{AS_FOLDER, Folder, OPEN_FLAGS, is_folder, regular, stat};
use crate::memory::{Buffers, Slices};

/// The most bytes of one copy, so that none takes for ever.
const COPY_MOST: u64 = 16 << 20;

impl Folder {
    /// A handle for node `number`, for a user of the guest's.
    pub(in crate::share) fn open(&mut self, number: u64, flags: u32, by: (u32, u32)) -> Result<u64, Errno> {
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            self.may_change()?;
        }
        self.handles.room()?;
        let path = self.nodes.path(number)?;
        regular(&stat(&path)?)?;
        let file = self.open_path(&path, flags)?;
        if flags.contains(OFlags::TRUNC) {
            self.changed_by(&file, by)?;
        }
        self.handles.add(number, flags - OFlags::TRUNC, file)
    }

    pub(in crate::share) fn open_folder(&mut self, number: u64) -> Result<u64, Errno> {
        self.handles.room()?;
        let path = self.nodes.path(number)?;
        let folder = self.list_path(&path)?;
        self.handles.add(number, AS_FOLDER, folder)
    }

    /// What is open as `handle` of node `number`.
    pub(in crate::share) fn handle(&mut self, handle: u64, number: u64) -> Result<Arc<OwnedFd>, Errno> {
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

    pub(in crate::share) fn close(&mut self, handle: u64) {
        self.handles.close(handle);
        self.locks.closed(handle);
    }

    /// Reads until `to` is full or the file ends. How many.
    pub(in crate::share) fn read(
        &mut self,
        handle: u64,
        number: u64,
        offset: u64,
        to: &Buffers,
    ) -> Result<usize, Errno> {
        let file = self.handle(handle, number)?;
        in_pieces(to, |slices, done| slices.read_at(&file, offset.saturating_add(done)))
    }

    /// Writes all of `from`, or as much as there is room for. Whoever does may not set the bits that `drops_set_ids` is about.
    pub(in crate::share) fn write(
        &mut self,
        handle: u64,
        number: u64,
        offset: u64,
        from: &Buffers,
        drops_set_ids: bool,
    ) -> Result<usize, Errno> {
        self.may_change()?;
        let file = self.handle(handle, number)?;
        if drops_set_ids {
            self.drop_set_ids(&file)?;
        }
        in_pieces(from, |slices, done| slices.write_at(&file, offset.saturating_add(done)))
    }

    pub(in crate::share) fn sync(&mut self, handle: u64, number: u64, data_only: bool) -> Result<(), Errno> {
        let file = self.handle(handle, number)?;
        if data_only { fdatasync(file) } else { fsync(file) }
    }

    /// All that there is of the share's file system.
    pub(in crate::share) fn sync_all(&mut self, number: u64) -> Result<(), Errno> {
        let path = self.nodes.path(number)?;
        syncfs(match is_folder(&stat(&path)?) {
            true => self.list_path(&path)?,
            false => self.open_path(&path, OFlags::RDONLY)?,
        })
    }

    pub(in crate::share) fn space(&mut self, number: u64) -> Result<StatVfs, Errno> {
        fstatvfs(&*self.nodes.path(number)?)
    }

    pub(in crate::share) fn allocate(
        &mut self,
        handle: u64,
        number: u64,
        mode: u32,
        (offset, len): (u64, u64),
        by: (u32, u32),
    ) -> Result<(), Errno> {
        self.may_change()?;
        let flags = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        let file = self.handle(handle, number)?;
        self.changed_by(&file, by)?;
        fallocate(file, flags, offset, len)
    }

    /// Where the next data or the next hole is.
    pub(in crate::share) fn seek(
        &mut self,
        handle: u64,
        number: u64,
        offset: u64,
        whence: u32,
    ) -> Result<u64, Errno> {
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        seek(self.handle(handle, number)?, to)
    }

    /// Copies up to `len` bytes between files that are open. How many.
    pub(in crate::share) fn copy(
        &mut self,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        len: u64,
        by: (u32, u32),
    ) -> Result<usize, Errno> {
        self.may_change()?;
        let [source, target] = [self.handle(from.0, from.1)?, self.handle(to.0, to.1)?];
        self.changed_by(&target, by)?;
        let (mut read, mut written) = (from.2, to.2);
        copy_file_range(source, Some(&mut read), target, Some(&mut written), len.min(COPY_MOST) as usize)
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
