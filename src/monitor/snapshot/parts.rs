//! [`Parts`]: the files of a snapshot, whether they are in a folder or have no name.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::{Error, file};
use crate::output;

/// One of them, and what to call it.
#[derive(Debug)]
pub(super) struct Part {
    pub path: PathBuf,
    pub file: File,
}

/// See the module's text.
#[derive(Debug)]
pub struct Parts {
    /// The machine's configuration.
    pub(super) config: Part,
    /// Its state.
    pub(super) state: Part,
    /// Its memory.
    pub(super) memory: Part,
}

impl Parts {
    fn of(mut part: impl FnMut(&str) -> Result<Part, Error>) -> Result<Self, Error> {
        Ok(Self { config: part("config.json")?, state: part("state")?, memory: part("memory")? })
    }

    /// New ones in `folder`.
    pub(super) fn create(folder: &Path) -> Result<Self, Error> {
        Self::of(|name| {
            let path = folder.join(name);
            let file = output::create(&path).map_err(file("make", &path))?;
            Ok(Part { path, file })
        })
    }

    /// New ones that are gone when nobody has them open.
    pub(super) fn unnamed() -> Result<Self, Error> {
        let new = |name| match memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING) {
            Ok(new) => Ok(new),
            Err(error) => Err(file("make", Path::new(name))(error.into())),
        };
        Ok(Self::from([new("config.json")?, new("state")?, new("memory")?]))
    }

    /// Nobody changes them any more: several processes have [those without names](Self::unnamed), and each is a guest's.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn seal(&self) -> Result<(), Error> {
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        [&self.config, &self.state, &self.memory].into_iter().try_for_each(|part| {
            fcntl_add_seals(&part.file, seals).map_err(|error| part.failed("seal")(error.into()))
        })
    }

    /// Those in `folder`, to be read.
    ///
    /// # Errors
    /// They are not there.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        Self::of(|name| Part::open(folder.join(name)))
    }

    /// Those that this process was given as `descriptors`.
    ///
    /// # Errors
    /// It has none of these numbers.
    pub fn inherited(descriptors: [u32; 3]) -> Result<Self, Error> {
        let mut descriptors = descriptors.into_iter();
        Self::of(|_| Part::open(format!("/proc/self/fd/{}", descriptors.next().unwrap_or_default()).into()))
    }

    /// Their descriptors, as [`Parts::from`] and [`Parts::inherited`] has them.
    pub fn into_descriptors(self) -> [OwnedFd; 3] {
        [self.config, self.state, self.memory].map(|part| part.file.into())
    }
}

impl From<[OwnedFd; 3]> for Parts {
    fn from([config, state, memory]: [OwnedFd; 3]) -> Self {
        let part =
            |name: &str, file: OwnedFd| Part { path: format!("the copy's {name}").into(), file: file.into() };
        Self {
            config: part("config.json", config),
            state: part("state", state),
            memory: part("memory", memory),
        }
    }
}

impl Part {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(file("open", &path))?;
        Ok(Self { path, file })
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

    /// An error of it.
    pub fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error {
        file(what, &self.path)
    }
}
