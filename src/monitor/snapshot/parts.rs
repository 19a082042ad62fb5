//! [`Parts`]: the files of a snapshot, whether they are in a folder or have no name.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_getfd};

use super::{Error, file};
use crate::planted;

/// One of them, and what to call it.
#[derive(Debug)]
pub(super) struct Part {
    pub path: PathBuf,
    pub file: File,
}

/// How long the kernel may take to let go of memory that was written.
const SEAL_LIMIT: Duration = Duration::from_secs(5);

/// The files that every snapshot has.
pub(super) const NAMES: [&str; 3] = ["config.json", "state", "memory"];

/// See the module's text.
#[derive(Debug)]
pub struct Parts {
    /// The machine's configuration.
    pub(super) config: Part,
    /// Its state.
    pub(super) state: Part,
    /// Its memory.
    pub(super) memory: Part,
    /// Disks that its guest may write to: as many as its configuration has in the folder.
    pub(super) disks: Vec<Part>,
}

impl Parts {
    fn of(mut part: impl FnMut(&str) -> Result<Part, Error>) -> Result<Self, Error> {
        let [config, state, memory] = NAMES;
        Ok(Self { config: part(config)?, state: part(state)?, memory: part(memory)?, disks: Vec::new() })
    }

    /// Those of `list`, in the order of [`NAMES`], and then disks.
    ///
    /// # Errors
    /// They are too few.
    pub(super) fn from_list(list: Vec<Part>) -> Result<Self, Error> {
        let mut list = list.into_iter();
        let missing = |name: &str| file("open", Path::new(name))(io::ErrorKind::NotFound.into());
        let mut parts = Self::of(|name| list.next().ok_or_else(|| missing(name)))?;
        parts.disks = list.collect();
        Ok(parts)
    }

    /// All of them, in that order.
    pub(super) fn all(&self) -> impl Iterator<Item = &Part> {
        [&self.config, &self.state, &self.memory].into_iter().chain(&self.disks)
    }

    /// New ones that are gone when nobody has them open.
    pub(super) fn unnamed() -> Result<Self, Error> {
        Self::of(|name| {
            let made = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
            let path = PathBuf::from(format!("the copy's {name}"));
            let file = made.map_err(|error| file("make", &path)(error.into()))?.into();
            Ok(Part { path, file })
        })
    }

    /// Nobody changes them any more: several processes have [those without names](Self::unnamed), and each is a guest's.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn seal(&self) -> Result<(), Error> {
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let end = Instant::now() + SEAL_LIMIT;
        [&self.config, &self.state, &self.memory].into_iter().try_for_each(|part| {
            loop {
                match fcntl_add_seals(&part.file, seals) {
                    // The kernel still holds a page of it, such as one that is yet to be put on its lists: it has waited 150 ms by
                    // itself, which a busy host may not find enough (memfd_wait_for_pins, mm/memfd.c).
                    Err(Errno::BUSY) if Instant::now() < end => {}
                    result => return result.map_err(|error| part.failed("seal")(error.into())),
                }
            }
        })
    }

    /// Those in `folder`, to be read.
    ///
    /// # Errors
    /// They are not there.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        Self::of(|name| Part::open(folder.join(name)))
    }

    /// The state alone of those in `folder`.
    pub(super) fn state(folder: &Path) -> Result<Part, Error> {
        Part::open(folder.join("state"))
    }

    /// Those that this process was given as `descriptors`, of which it keeps the disks' alone: they are found by those.
    ///
    /// # Errors
    /// It has none of these numbers.
    pub fn inherited(descriptors: &[u32]) -> Result<Self, Error> {
        let mut descriptors = descriptors.iter();
        // Opened anew, each process has its own place in it.
        let open = |number: &u32| {
            let mut part = Part::open(PathBuf::from(format!("/proc/self/fd/{number}")))?;
            // Where it has a name it is known by that: errors tell of it, and what is saved of its machine.
            if let Ok(path) = fs::canonicalize(&part.path) {
                part.path = path;
            }
            Ok::<_, Error>(part)
        };
        let mut parts = Self::of(|name| match descriptors.next() {
            Some(number) => {
                let part = open(number)?;
                close_given(*number);
                Ok(part)
            }
            None => Err(file("open", Path::new(name))(io::ErrorKind::NotFound.into())),
        })?;
        parts.disks = descriptors.map(open).collect::<Result<_, _>>()?;
        Ok(parts)
    }

    /// Their descriptors, as [`Parts::of_descriptors`] and [`Parts::inherited`] has them.
    pub fn into_descriptors(self) -> Vec<OwnedFd> {
        let parts = [self.config, self.state, self.memory].into_iter().chain(self.disks);
        parts.map(|part| part.file.into()).collect()
    }

    /// New ones of these names, which will be in `folder`.
    ///
    /// # Errors
    /// They are too few.
    pub fn of_files(
        folder: &Path,
        files: impl IntoIterator<Item = (OwnedFd, PathBuf)>,
    ) -> Result<Self, Error> {
        let part = |(file, name): (OwnedFd, PathBuf)| Part { path: folder.join(name), file: file.into() };
        Self::from_list(files.into_iter().map(part).collect())
    }

    /// Those whose descriptors these are. Messages tell of them as `named`, by what they are.
    ///
    /// # Errors
    /// They are too few.
    pub fn of_descriptors(
        descriptors: impl IntoIterator<Item = OwnedFd>,
        named: impl Fn(&str) -> PathBuf,
    ) -> Result<Self, Error> {
        let names = NAMES.into_iter().chain(std::iter::repeat("disk"));
        let part = |(file, name): (OwnedFd, _)| Part { path: named(name), file: file.into() };
        Self::from_list(descriptors.into_iter().zip(names).map(part).collect())
    }
}

/// Closes descriptor `number` if this process was given it: a copy whose memory was copied would otherwise keep what that was copied from.
fn close_given(number: u32) {
    let Some(raw) = RawFd::try_from(number).ok().filter(|raw| *raw > 2) else { return };
    // SAFETY: only asked for its flags; a number that is no descriptor is an error of that.
    let given = unsafe { BorrowedFd::borrow_raw(raw) };
    // Whatever this process has opened itself closes at exec, and is somebody's.
    if fcntl_getfd(given).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC)) {
        // SAFETY: it is open, and nobody has it: it was passed to this process to be named by this number alone.
        drop(unsafe { OwnedFd::from_raw_fd(raw) });
    }
}

impl Part {
    /// One that is there, to be read.
    pub fn open(path: PathBuf) -> Result<Self, Error> {
        // Without O_NONBLOCK a FIFO would be waited for.
        let opened = planted::open(&path, OFlags::RDONLY | OFlags::NONBLOCK);
        let file = opened.map_err(file("open", &path))?;
        let part = Self { path, file };
        match part.file.metadata().map_err(part.failed("look at"))?.is_file() {
            true => Ok(part),
            false => Err(part.damaged("not a regular file")),
        }
    }

    /// At most `most` bytes of it.
    pub fn read(&self, most: u64) -> Result<Vec<u8>, Error> {
        let len = self.file.metadata().map_err(self.failed("look at"))?.len();
        let mut bytes = Vec::with_capacity(len.min(most) as usize + 1);
        // Who wrote it may have left off at its end.
        (&self.file).rewind().map_err(self.failed("read"))?;
        (&self.file).take(most).read_to_end(&mut bytes).map_err(self.failed("read"))?;
        Ok(bytes)
    }

    /// Adds `bytes` to its end.
    pub fn write(&self, bytes: &[&[u8]]) -> Result<(), Error> {
        bytes.iter().try_for_each(|bytes| (&self.file).write_all(bytes)).map_err(self.failed("write"))
    }

    /// It is not what a snapshot has there.
    pub fn damaged(&self, what: &str) -> Error {
        Error::Damaged { path: self.path.clone(), what: what.to_owned() }
    }

    /// An error of it.
    pub fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error {
        file(what, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vm_memory::FileOffset;
    use vm_memory::mmap::MmapRegion;

    use super::*;

    #[test]
    fn memory_that_the_kernel_still_holds_is_sealed_once_it_lets_go() {
        let parts = Parts::unnamed().unwrap();
        parts.memory.file.set_len(1 << 16).unwrap();
        // A mapping that may be written to is what stands in the way here, and is as busy.
        let file = FileOffset::new(parts.memory.file.try_clone().unwrap(), 0);
        let mapped = MmapRegion::<()>::from_file(file, 1 << 16).unwrap();
        let held = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            drop(mapped);
        });
        parts.seal().unwrap();
        held.join().unwrap();
        let refused = (&parts.memory.file).write(b"x").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    }
}
