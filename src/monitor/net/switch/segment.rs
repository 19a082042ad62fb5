//! The folder of a segment, `switch/NAME`: a socket of each port, named by the port's number in hexadecimal digits, and who that is (`names`).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, fchmod, rmdir, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with, sockopt,
};
use rustix::rand::{GetRandomFlags, getrandom};

use super::names;
use crate::runtime_dir;

/// A port's number.
pub type Id = u64;

/// Bytes that may be on the way from one port to another, as far as the host allows (net.core.wmem_max).
const BUFFER: usize = 4 << 20;
/// A folder's time is no finer than a tick of the host's kernel (10 ms at most): of two changes this close, the second may not show.
const COARSE: Duration = Duration::from_millis(20);
/// Somebody may leave, and take the folder away, while we enter.
const TRIES: usize = 10;

/// Our place in it. Dropping it leaves.
#[derive(Debug)]
pub struct Segment {
    pub folder: PathBuf,
    pub name: String,
    /// Ours.
    pub id: Id,
    /// When the folder had been changed last as it was looked at last.
    seen: Option<SystemTime>,
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
}

fn path(folder: &Path, id: Id) -> PathBuf {
    folder.join(format!("{id:016x}"))
}

/// A socket whose messages go to the port `id` of the segment in `folder`. `None` if it is gone, and then nothing is left of it.
fn reach(folder: &Path, id: Id) -> Option<OwnedFd> {
    let open = || {
        let socket = socket()?;
        // What one port does not fetch is none of the others' room: so each has a socket.
        let _ = sockopt::set_socket_send_buffer_size(&socket, BUFFER);
        connect(&socket, &SocketAddrUnix::new(path(folder, id))?)?;
        Ok::<_, Errno>(socket)
    };
    match open() {
        Ok(socket) => Some(socket),
        Err(Errno::CONNREFUSED) => {
            bury(folder, id);
            None
        }
        Err(error) => {
            log::debug!("switch: port {id:016x}: {error}");
            None
        }
    }
}

/// The port `id` was killed: nobody else takes away what it has here.
fn bury(folder: &Path, id: Id) {
    // The socket last: whoever finds one without a port clears away both.
    let _ = unlink(names::path(folder, id));
    let _ = unlink(path(folder, id));
}

/// Whether port `id` of the segment in `folder` is there.
pub fn is_there(folder: &Path, id: Id) -> bool {
    reach(folder, id).is_some()
}

/// The folder of all segments in `runtime`.
pub fn segments(runtime: &Path) -> PathBuf {
    runtime.join("switch")
}

impl Segment {
    /// Enters the segment called `name` of those in `runtime`, and makes it if nobody is there; with the socket on which the others
    /// reach us.
    pub fn enter(runtime: &Path, name: &str) -> io::Result<(Self, OwnedFd)> {
        let all = segments(runtime);
        match runtime_dir::make_private(&all) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                runtime_dir::make_private(runtime)?;
                runtime_dir::make_private(&all)?;
            }
            made => _ = made?,
        }
        let folder = all.join(name);
        let mut bytes = [0; 8];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        let id = Id::from_ne_bytes(bytes);
        let address = SocketAddrUnix::new(path(&folder, id))?;
        let socket = socket()?;
        // The file that bind makes takes its mode from the socket.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        for _ in 0..TRIES {
            runtime_dir::make_private(&folder)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", folder.display())))?;
            match bind(&socket, &address) {
                Err(Errno::NOENT) => {}
                result => {
                    return Ok(
                        result.map(|()| (Self { folder, name: name.to_owned(), id, seen: None }, socket))?
                    );
                }
            }
        }
        Err(Errno::NOENT.into())
    }

    /// The others that are there, if they may be others than when this was asked before: a look at the folder's time tells.
    pub fn news(&mut self) -> Vec<Id> {
        let changed = fs::metadata(&self.folder).and_then(|folder| folder.modified()).ok();
        let settled = changed.is_some_and(|changed| changed.elapsed().is_ok_and(|age| age > COARSE));
        if settled && changed == self.seen {
            return Vec::new();
        }
        // A folder that may change again within the same tick is looked at again.
        self.seen = changed.filter(|_| settled);
        self.others()
    }

    /// The others that are there.
    fn others(&self) -> Vec<Id> {
        let Ok(list) = fs::read_dir(&self.folder) else { return Vec::new() };
        let names = list.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let ids = names.filter(|name| name.len() == 16).filter_map(|name| Id::from_str_radix(&name, 16).ok());
        ids.filter(|id| *id != self.id).collect()
    }

    /// A socket whose messages go to the port `id`. `None` if it is gone, and then nothing is left of it.
    pub fn reach(&self, id: Id) -> Option<OwnedFd> {
        reach(&self.folder, id)
    }

    /// The port `id` was killed: nobody else takes away what it has here.
    pub fn bury(&self, id: Id) {
        bury(&self.folder, id);
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.bury(self.id);
        // Fails unless we were the last.
        let _ = rmdir(&self.folder);
    }
}
