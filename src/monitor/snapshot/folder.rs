//! [`Folder`]: a snapshot's, made by whoever asks for it. The machine writes into the files, which it is given open: it knows no path.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::parts::{Part, Parts};
use super::{Error, file};
use crate::output;

/// A folder that has its name when it is complete, and is gone otherwise.
#[derive(Debug)]
pub struct Folder {
    folder: PathBuf,
    parent: PathBuf,
    hidden: Hidden,
    parts: Parts,
}

/// What it is until then, and is removed if it stays that.
#[derive(Debug)]
struct Hidden(PathBuf);

impl Folder {
    /// Begins what will be `folder`, with new files of these `names`, as [`files`](super::files) has them.
    ///
    /// # Errors
    /// They cannot be made there; or they are no names.
    pub fn begin(folder: &Path, names: &[PathBuf]) -> Result<Self, Error> {
        let invalid =
            |path: &Path, what| file("name", path)(io::Error::new(io::ErrorKind::InvalidInput, what));
        let is_name = |path: &PathBuf| {
            let mut components = path.components();
            matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        };
        // A machine tells them: it is not asked where else it would like to write.
        if let Some(path) = names.iter().find(|path| !is_name(path)) {
            return Err(invalid(path, "it is not the name of a file in a folder"));
        }
        let (parent, hidden) =
            output::hidden(folder).ok_or_else(|| invalid(folder, "it is not a folder's name"))?;
        output::folder(&hidden).map_err(file("make", &hidden))?;
        let (parent, hidden) = (parent.to_owned(), Hidden(hidden));
        let made = names.iter().map(|name| {
            let path = folder.join(name);
            let file = output::create(&hidden.0.join(name)).map_err(file("make", &path))?;
            Ok(Part { path, file })
        });
        let parts = Parts::from_list(made.collect::<Result<_, Error>>()?)?;
        Ok(Self { folder: folder.to_owned(), parent, hidden, parts })
    }

    /// What it will be called.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// What it is called until it is complete.
    pub fn hidden(&self) -> &Path {
        &self.hidden.0
    }

    /// What is written into.
    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The same for another process, in the order of their names.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.parts.all().map(|part| part.file.as_fd()).collect()
    }

    /// All that is in it is on the disk: it gets its name.
    ///
    /// # Errors
    /// Something else has it by now; it cannot be written.
    pub fn name(self) -> Result<(), Error> {
        let synced = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all());
        synced(self.hidden()).map_err(file("write", self.hidden()))?;
        let renamed = renameat_with(CWD, self.hidden(), CWD, &self.folder, RenameFlags::NOREPLACE);
        renamed.map_err(|error| file("make", &self.folder)(error.into()))?;
        synced(&self.parent).map_err(|error| {
            let _ = fs::remove_dir_all(&self.folder);
            file("write", &self.parent)(error)
        })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // What has failed says more than that this does, too; one that has its name is not here any more.
        let _ = fs::remove_dir_all(&self.0);
    }
}
