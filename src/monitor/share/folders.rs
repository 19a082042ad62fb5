//! [`Folders`]: the shared folders of one configuration, and the servers of those that others serve, opened once and kept over the guest's resets.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::{Folder, Owners, Server, Terms};
use crate::config::{Share, ShareLocks, ShareOwners, host_path::quoted};
use crate::planted;
use crate::sandbox;
use crate::vhost::{self, FrontEnd};

/// The most descriptors that a guest has for one folder, whatever the host would allow.
const DESCRIPTORS_MOST: u64 = 16 << 10;
/// However few there are, a guest has some.
const DESCRIPTORS_LEAST: u64 = 64;

/// Why a folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be opened.
    #[error("cannot share {}", path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Its file system has no extended attributes of users.
    #[error("{}: nothing can be kept beside its files, because its file system has no extended attributes", .0.display())]
    NoAttributes(PathBuf),
    /// Who serves it instead of this process.
    #[error(transparent)]
    VhostUser(#[from] vhost::Error),
}

impl Error {
    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        !matches!(self, Self::VhostUser(vhost::Error::Host(_)))
    }

    /// What to try.
    pub fn hint(&self) -> String {
        match self {
            Self::VhostUser(error) => error.hint(),
            Self::NoAttributes(_) => {
                "drop `owners=xattr`, or share a folder of a disk's file system".to_owned()
            }
            Self::Open { path, source } => match source.kind() {
                io::ErrorKind::NotFound => format!("to make an empty folder: mkdir {}", quoted(path)),
                io::ErrorKind::NotADirectory => "share the folder that it is in".to_owned(),
                io::ErrorKind::PermissionDenied => format!("see who may use it: ls -ld {}", quoted(path)),
                _ => format!("see what is there: ls -ld {}", quoted(path)),
            },
        }
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Folders {
    ours: BTreeMap<usize, OwnedFd>,
    others: BTreeMap<usize, Arc<FrontEnd>>,
}

impl Folders {
    /// A server of the `index`th of `count` folders or files, which is opened if this is the first time that it is asked for, and shared as
    /// `share` says.
    ///
    /// # Errors
    /// [`Error`] names the folder.
    pub fn server(&mut self, index: usize, count: usize, share: &Share) -> Result<Server, Error> {
        let path = share.from.path();
        let failed = |source| Error::Open { path: path.clone(), source };
        let root = match self.ours.get(&index) {
            Some(root) => root,
            None => {
                let folder = planted::open(path, OFlags::PATH | OFlags::CLOEXEC).map_err(failed)?;
                let folder = sandbox::alone(folder.into(), share.readonly).map_err(failed)?;
                self.ours.entry(index).or_insert(folder)
            }
        };
        let root = root.try_clone().map_err(failed)?;
        let kind = fstat(&root).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let single = match kind.map_err(|error| failed(error.into()))? {
            FileType::Directory => None,
            FileType::RegularFile => Some(share.name().ok_or_else(|| failed(Errno::INVAL.into()))?),
            _ => return Err(failed(Errno::NOTDIR.into())),
        };
        // The other half is for all else.
        let half = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 2;
        let descriptors = (half / count.max(1) as u64).clamp(DESCRIPTORS_LEAST, DESCRIPTORS_MOST) as usize;
        let (uid, gid) = share.owner();
        let owners = Owners::new(sandbox::owner_of_files(), (uid, gid));
        let terms = Terms {
            read_only: share.readonly,
            owners,
            keeps: share.owners == ShareOwners::Xattr,
            shares_locks: share.locks == ShareLocks::Shared,
            descriptors,
        };
        let folder = Folder::new(root, terms).map_err(|error| match error {
            Errno::OPNOTSUPP => Error::NoAttributes(path.clone()),
            error => failed(error.into()),
        })?;
        Ok(Server::new(folder, single, share.cache))
    }

    /// The other process that serves the `index`th, and listens at `path`. One that is gone, and there again, is found by a reboot.
    ///
    /// # Errors
    /// [`Error::VhostUser`]
    pub fn back_end(&mut self, path: &Path, index: usize) -> Result<Arc<FrontEnd>, Error> {
        let known = self.others.get(&index).cloned();
        if let Some(back_end) = known.clone().filter(|back_end| back_end.is_up()) {
            return Ok(back_end);
        }
        match (FrontEnd::connect(path, 1), known) {
            (Ok(back_end), _) => {
                let back_end = Arc::new(back_end);
                self.others.insert(index, back_end.clone());
                Ok(back_end)
            }
            (Err(_), Some(gone)) => Ok(gone),
            (Err(error), None) => Err(error.into()),
        }
    }
}
