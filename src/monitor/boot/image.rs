//! Files that go into guest memory: an [`Input`] is opened once, before the guest runs, and checked to be a regular file; each start
//! reads its [`Image`] by parts, straight to where they belong.
//!
//! The loaders use them for kernel and initrd. No part of a file is held in the monitor's own memory, except the
//! headers that the loaders ask for.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::BOOT_DISK;
use super::error::{Error, Role};
use crate::config::Kernel;
use crate::memory::{self, GuestRam};
use crate::planted;

/// An open file: a kernel, an initrd or a ROM. The guest's resets read it again, whatever has its name by then.
#[derive(Debug, Clone)]
pub struct Input {
    file: Arc<File>,
    path: PathBuf,
    role: Role,
}

impl Input {
    /// Opens `kernel`. The built-in one becomes a file in memory, so that all goes one way from here on.
    ///
    /// # Errors
    /// As [`Input::open`].
    pub fn kernel(kernel: &Kernel) -> Result<Self, Error> {
        let role = Role::Kernel;
        match kernel {
            Kernel::File(path) => Self::open(path, role),
            Kernel::BootDisk => {
                let path = kernel.path().to_owned();
                match in_memory(BOOT_DISK) {
                    Ok(file) => Ok(Self { file: Arc::new(file), path, role }),
                    Err(source) => Err(Error::Open { role, path, source }),
                }
            }
        }
    }

    /// Opens `path`, which must be a regular file.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::NotAFile`].
    pub fn open(path: &Path, role: Role) -> Result<Self, Error> {
        let failed = |source| Error::Open { role, path: path.to_owned(), source };
        // NONBLOCK: opening a pipe must not wait for its writer. It changes nothing for a regular file.
        let file = planted::open(path, OFlags::RDONLY | OFlags::NONBLOCK).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() {
            let kind = match () {
                () if kind.is_dir() => "a directory",
                () if kind.is_fifo() => "a pipe",
                () if kind.is_char_device() || kind.is_block_device() => "a device",
                () => "not a regular file",
            };
            return Err(Error::NotAFile { role, path: path.to_owned(), kind });
        }
        Ok(Self { file: Arc::new(file), path: path.to_owned(), role })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it now, for one start.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Read`].
    pub fn image(&self) -> Result<Image, Error> {
        let Self { file, path, role } = self.clone();
        match file.metadata() {
            Ok(found) if found.len() == 0 => Err(Error::Empty { role, path }),
            Ok(found) => Ok(Image { file, path, role, len: found.len() }),
            Err(source) => Err(Error::Read { role, path, source }),
        }
    }
}

/// The contents of an [`Input`].
pub struct Image {
    file: Arc<File>,
    path: PathBuf,
    role: Role,
    len: u64,
}

impl Image {
    /// The file's length in bytes at this start.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a header: a plain structure at `offset`. `part` is its name for messages.
    ///
    /// # Errors
    /// [`Error::Truncated`] if the file ends before it does, [`Error::Read`].
    pub fn header<T: ByteValued + Default>(&self, offset: u64, part: &'static str) -> Result<T, Error> {
        let mut value = T::default();
        self.bytes(offset, value.as_mut_slice(), part)?;
        Ok(value)
    }

    /// Fills `buf` from `offset`. `part` is its name for messages.
    ///
    /// # Errors
    /// As [`Image::header`].
    pub fn bytes(&self, offset: u64, buf: &mut [u8], part: &'static str) -> Result<(), Error> {
        self.check(offset, buf.len() as u64, part)?;
        self.file.read_exact_at(buf, offset).map_err(|source| self.read_error(source))
    }

    /// As much of `buf` as the file has from its start: for looking at what it is.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn start<'a>(&self, buf: &'a mut [u8]) -> Result<&'a [u8], Error> {
        let len = usize::try_from(self.len).map_or(buf.len(), |len| len.min(buf.len()));
        self.file.read_exact_at(&mut buf[..len], 0).map_err(|source| self.read_error(source))?;
        Ok(&buf[..len])
    }

    /// Reads `len` bytes at `offset` to guest physical address `to`, with no copy in the monitor's own memory.
    ///
    /// # Errors
    /// As [`Image::header`]; [`Error::Read`] also when `to..to + len` is not all RAM, which callers check first to
    /// say it better.
    pub fn load(
        &self,
        offset: u64,
        len: u64,
        ram: &GuestRam,
        to: u64,
        part: &'static str,
    ) -> Result<(), Error> {
        self.check(offset, len, part)?;
        memory::expect(ram, to..to.saturating_add(len));
        let mut done = self.send(offset, len, ram, to);
        let mut file = &*self.file;
        file.seek(SeekFrom::Start(offset + done)).map_err(|source| self.read_error(source))?;
        while done < len {
            let rest = usize::try_from(len - done).unwrap_or(usize::MAX);
            let read = match ram.read_volatile_from(GuestAddress(to.saturating_add(done)), &mut file, rest) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => Ok(read as u64),
                Err(GuestMemoryError::IOError(e)) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
                Err(GuestMemoryError::IOError(e)) => Err(e),
                Err(other) => Err(io::Error::other(other)),
            };
            done += read.map_err(|source| self.read_error(source))?;
        }
        Ok(())
    }

    /// [`Image::load`] within the host's page cache: from the file to the memory object behind guest RAM, so that no
    /// page need be mapped and zeroed first (twice as fast). Gives the bytes done: fewer, down to none, where memory
    /// has no such object or it takes no writes (huge pages); reading does the rest and finds out about errors.
    fn send(&self, offset: u64, len: u64, ram: &GuestRam, to: u64) -> u64 {
        let Some((region, at)) = ram.to_region_addr(GuestAddress(to)) else { return 0 };
        let Some(object) = memory::shared_object(region) else { return 0 };
        let len = len.min(region.len() - at.0);
        let mut out = object.file();
        if out.seek(SeekFrom::Start(object.start() + at.0)).is_err() {
            return 0;
        }
        let mut position = offset;
        while position - offset < len {
            let rest = usize::try_from(len - (position - offset)).unwrap_or(usize::MAX);
            match rustix::fs::sendfile(out, &self.file, Some(&mut position), rest) {
                Ok(sent) if sent > 0 => {}
                _ => break,
            }
        }
        position - offset
    }

    fn check(&self, offset: u64, len: u64, part: &'static str) -> Result<(), Error> {
        let end = offset.saturating_add(len);
        if end > self.len {
            let (role, path) = (self.role, self.path.clone());
            return Err(Error::Truncated { role, path, part, end, len: self.len });
        }
        Ok(())
    }

    fn read_error(&self, source: io::Error) -> Error {
        Error::Read { role: self.role, path: self.path.clone(), source }
    }

    /// For kernels: the headers contradict themselves.
    pub fn damaged(&self, what: impl Into<String>) -> Error {
        Error::Damaged { path: self.path.clone(), what: what.into() }
    }

    /// Writes a boot structure that belongs to this kernel.
    ///
    /// # Errors
    /// [`Error::Write`] if there is no RAM at `to`.
    pub fn write<T: ByteValued>(
        &self,
        ram: &GuestRam,
        to: u64,
        value: &T,
        what: &'static str,
    ) -> Result<(), Error> {
        self.write_bytes(ram, to, value.as_slice(), what)
    }

    /// [`Image::write`] for bytes.
    ///
    /// # Errors
    /// [`Error::Write`] if there is no RAM at `to`.
    pub fn write_bytes(
        &self,
        ram: &GuestRam,
        to: u64,
        bytes: &[u8],
        what: &'static str,
    ) -> Result<(), Error> {
        let path = || self.path.clone();
        ram.write_slice(bytes, GuestAddress(to)).map_err(|source| Error::Write {
            path: path(),
            what,
            address: to,
            source,
        })
    }
}

fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("boot-disk", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}
