//! Takes connections, and gives each a thread: so many at most.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType, accept_with};

use crate::session::Session;

/// Sessions at a time. One more is told that the agent is busy.
pub const MAX_SESSIONS: u32 = 512;

/// Further connections, which are there to be told so.
const MAX_REFUSED: u32 = 32;

/// A session's thread keeps its buffers on the heap.
pub const STACK: usize = 128 << 10;

/// To wait before the next attempt, when the guest has no memory or descriptors for a connection.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// The sessions that run.
pub static SESSIONS: AtomicU32 = AtomicU32::new(0);

/// One of [`SESSIONS`], until it is dropped.
struct Place;

impl Place {
    fn take() -> (Self, u32) {
        (Self, SESSIONS.fetch_add(1, Ordering::SeqCst))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        SESSIONS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Listens on a vsock port, whatever the guest's own address is.
pub fn vsock(port: u32) -> io::Result<OwnedFd> {
    Ok(interface::vsock::listen(port, SocketType::STREAM)?)
}

/// Listens on a unix socket at `path`.
pub fn unix(path: &[u8]) -> io::Result<OwnedFd> {
    Ok(UnixListener::bind(OsStr::from_bytes(path))?.into())
}

/// Serves whoever connects. Returns when the socket is none any more: its driver has gone, say.
pub fn serve(listener: &OwnedFd) {
    loop {
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(connection) => start(connection),
            Err(Errno::BADF | Errno::INVAL | Errno::NOTSOCK) => return,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => thread::sleep(EXHAUSTED),
            // The one that connected is gone again.
            Err(_) => {}
        }
    }
}

/// Serves a connection, which must not block.
pub fn start(connection: OwnedFd) {
    let (place, before) = Place::take();
    if before >= MAX_SESSIONS + MAX_REFUSED {
        return;
    }
    let busy = before >= MAX_SESSIONS;
    // Without a thread for it the connection is closed, which its client understands.
    let _ = thread::Builder::new().stack_size(STACK).spawn(move || {
        Session::new(connection).run(busy);
        drop(place);
    });
}
