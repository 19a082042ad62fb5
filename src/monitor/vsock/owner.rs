//! Whose socket lies beside ours, where others may put some: a guest's call is to reach nobody whom only another user named.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};

use crate::sandbox::started_by;

/// Whether others than this user and root may put something beside `path`.
pub fn is_shared(path: &Path) -> bool {
    let is_ours = |uid| uid == started_by().as_raw() || uid == 0;
    // The folder that a link leads to is the one that counts.
    let folder = path.parent().and_then(|folder| std::fs::metadata(folder).ok());
    folder.is_none_or(|folder| !is_ours(folder.uid()) || folder.mode() & 0o022 != 0)
}

/// Another name of the socket at `path`, if it is this user's and no link. It stands for this very socket, whatever comes to be at
/// `path`, for as long as what is returned beside it is held.
///
/// # Errors
/// There is none; or, of kind [`io::ErrorKind::PermissionDenied`], it is another user's, or a link.
pub fn own(path: &Path) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    let file = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&file)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::Socket || stat.st_uid != started_by().as_raw() {
        let what =
            format!("{} is no socket of this user's, in a folder that is open to others", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    Ok((format!("/proc/self/fd/{}", file.as_raw_fd()).into(), Some(file)))
}
