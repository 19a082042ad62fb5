//! Where the sockets of this user's machines are.

use std::env;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, fstat, mkdir, open};
use rustix::io::Errno;

use crate::sandbox::started_by;

/// The user's: `$XDG_RUNTIME_DIR/vmm`, `/run/user/UID/vmm` or `/tmp/vmm-UID`, the first that can be.
pub fn of_user() -> PathBuf {
    let uid = started_by().as_raw();
    let own = |path: &Path| fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == uid);
    let given = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|p| p.is_absolute());
    let candidates = [given, Some(format!("/run/user/{uid}").into())];
    match candidates.into_iter().flatten().find(|path| own(path)) {
        Some(runtime) => runtime.join("vmm"),
        None => format!("/tmp/vmm-{uid}").into(),
    }
}

/// Makes and opens `path`, which none but this user may enter; one that is there already must be such a folder.
///
/// # Errors
/// As mkdir(2) and open(2) have them; or it is another's, or open to others.
pub fn make_private(path: &Path) -> io::Result<OwnedFd> {
    match mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = open(path, flags, Mode::empty())?;
    let stat = fstat(&folder)?;
    if stat.st_uid != started_by().as_raw() {
        return Err(io::Error::other("it belongs to another user"));
    }
    if stat.st_mode & 0o077 != 0 {
        return Err(io::Error::other("it is open to other users"));
    }
    Ok(folder)
}
