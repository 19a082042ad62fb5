//! A listening unix socket: nobody but its owner may connect, and its file goes with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, RenameFlags, fchmod, renameat_with, unlink};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};
use rustix::process::{Pid, test_kill_process};

use crate::planted;
use crate::sandbox::started_by;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Why nobody listens there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refuses.
    #[error("cannot {what} {path}", path = path.display())]
    Socket {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something else has the socket's name, and is not ours to remove.
    #[error("{path} exists and is not a socket", path = _0.display())]
    NotASocket(PathBuf),
    /// Somebody listens there.
    #[error("socket {path} is in use by another process", path = _0.display())]
    InUse(PathBuf),
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Socket { .. } => "use a path of at most 107 bytes, in a directory that exists and is yours",
            Self::NotASocket(_) => "remove it, or use another path",
            Self::InUse(_) => "stop that process (ss -xlp names it), or use another path",
        }
    }
}

/// The socket and its file.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket file, so that only our own is removed.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path` for connections of type `kind`, mode 0600. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// Something else is there, or the host refuses.
    pub fn bind(path: &Path, kind: SocketType) -> Result<Self, Error> {
        let failed = |what| move |source| Error::Socket { what, path: path.to_owned(), source };
        planted::check_way(path).map_err(failed("listen on"))?;
        let address = SocketAddrUnix::new(path).map_err(|e| failed("listen on")(e.into()))?;
        remove_stale(path, &address, kind)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let start = || -> io::Result<OwnedFd> {
            let listener = socket_with(AddressFamily::UNIX, kind, flags, None)?;
            // Before bind, this is the mode that the file gets: there is no moment in which others may connect.
            fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
            bind(&listener, &address)?;
            listen(&listener, BACKLOG)?;
            Ok(listener)
        };
        let fd = start().map_err(failed("listen on"))?;
        let identity = std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        // Where it is removed from there are no links on the way, nor a way back.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
        let path = folder.zip(path.file_name()).map_or(path.clone(), |(folder, name)| folder.join(name));
        Ok(Self { fd, path, identity })
    }

    /// The next who wants to connect.
    ///
    /// # Errors
    /// [`Errno::AGAIN`]: nobody does. Others: the host is out of descriptors, and somebody may wait.
    pub fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.fd, SocketFlags::CLOEXEC)
    }

    /// Its file is found, in the end, at `path`: whatever else its folder is called by then.
    pub fn lies_at(&mut self, path: PathBuf) {
        self.path = path;
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Removes what an ended process left at `path`; anything else that is there is an error.
fn remove_stale(path: &Path, address: &SocketAddrUnix, kind: SocketType) -> Result<(), Error> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(Error::NotASocket(path.to_owned()));
    }
    if serves(address, kind) {
        return Err(Error::InUse(path.to_owned()));
    }
    let failed = |source: Errno| Error::Socket {
        what: "remove the stale socket",
        path: path.to_owned(),
        source: source.into(),
    };
    // Aside first: another start may have put its own there meanwhile, and that goes back.
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}", std::process::id()));
    let aside = PathBuf::from(aside);
    let moved = |from: &Path, to: &Path| renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
    let Ok(address) = SocketAddrUnix::new(&*aside) else {
        return unlink(path).map_err(failed);
    };
    match moved(path, &aside) {
        Err(Errno::NOENT) => return Ok(()),
        moved => moved.map_err(failed)?,
    }
    if serves(&address, kind) && moved(&aside, path).is_ok() {
        return Err(Error::InUse(path.to_owned()));
    }
    unlink(&aside).map_err(failed)
}

/// Somebody listens at `address` who will go on doing so. Not a process that has been killed: it closes its sockets one after the other,
/// and what it has beside them, a VM above all, takes its time.
fn serves(address: &SocketAddrUnix, kind: SocketType) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, kind, flags, None);
    match probe.and_then(|probe| connect(&probe, address).map(|()| probe)) {
        Ok(probe) => {
            !socket_peercred(&probe).is_ok_and(|peer| peer.uid == started_by() && is_ending(peer.pid))
        }
        Err(Errno::CONNREFUSED | Errno::NOENT) => false,
        Err(_) => true,
    }
}

/// No thread of the process `pid` runs any more, or it is gone already.
fn is_ending(pid: Pid) -> bool {
    /// Of a thread (PF_EXITING in include/linux/sched.h).
    const EXITING: u32 = 4;
    if test_kill_process(pid) == Err(Errno::SRCH) {
        return true;
    }
    let flags = |thread: std::fs::DirEntry| -> Option<u32> {
        let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
        // They are the seventh after the name, which may have anything in it (proc_pid_stat(5)).
        stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(6)?.parse().ok()
    };
    let threads = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()));
    threads.is_ok_and(|mut threads| {
        // One that is gone by now has no flags.
        threads
            .all(|thread| thread.is_ok_and(|thread| flags(thread).is_none_or(|flags| flags & EXITING != 0)))
    })
}

impl Drop for Listener {
    fn drop(&mut self) {
        let found = std::fs::symlink_metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if found.is_some() && found == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
