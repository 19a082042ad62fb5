//! A listening unix socket as a host end: one client at a time, who may come back.
//!
//! A second client is turned away at once. Output while nobody is connected goes to a [`Backlog`], which the
//! next client gets first. A client who is done sending (`shutdown`, the end of `socat -`'s input) still receives.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::event::PollFlags;
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, recv, send, socket_with,
};

use super::backlog::Backlog;
use super::poll::{EventFlags, Poll, Watch, ready_now};
use super::{Error, Host, Interest};

/// The listening socket and its client.
#[derive(Debug)]
pub struct Socket {
    listener: OwnedFd,
    listening: Watch,
    client: Option<Client>,
    backlog: Backlog,
    path: PathBuf,
    /// Device and inode of the socket file, so that only our own is removed.
    identity: Option<(u64, u64)>,
}

#[derive(Debug)]
struct Client {
    stream: OwnedFd,
    watch: Watch,
    /// It sends no more, and all that it sent is read.
    silent: bool,
    /// It takes no more output: it closed its end. What it sent before may still wait to be read.
    gone: bool,
}

impl Client {
    /// Notices that it is gone. HUP: both directions are closed. A half-closed client is not gone.
    fn look(&mut self) {
        let ready = ready_now(self.stream.as_fd(), PollFlags::empty());
        self.gone |= ready.intersects(PollFlags::HUP | PollFlags::ERR);
    }

    fn read(&mut self, buf: &mut [u8]) -> usize {
        if self.silent || buf.is_empty() {
            return 0;
        }
        match recv(&self.stream, &mut *buf, RecvFlags::DONTWAIT) {
            Ok((_, len @ 1..)) => len.min(buf.len()),
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // After a reset there is nothing to read either: the kernel hands out data before the error.
            Ok(_) | Err(_) => {
                self.silent = true;
                0
            }
        }
    }

    fn write(&mut self, data: &[u8]) -> usize {
        match send(&self.stream, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                self.gone = true;
                0
            }
        }
    }
}

impl Socket {
    /// Listens at `path`, mode 0600. A socket file that nobody listens on any more is replaced.
    pub fn listen(path: &Path) -> Result<Self, Error> {
        let failed = |what| move |source| Error::Socket { what, path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|e| failed("listen on")(e.into()))?;
        remove_stale(path, &address)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let start = || -> io::Result<OwnedFd> {
            let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // Before bind, this is the mode that the file gets: there is no moment in which others may connect.
            fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
            bind(&listener, &address)?;
            listen(&listener, 4)?;
            Ok(listener)
        };
        let listener = start().map_err(failed("listen on"))?;
        let identity = std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Ok(Self { listener, listening: None, client: None, backlog: Backlog::default(), path, identity })
    }

    /// Takes the next client in, or turns it away while there is one.
    fn accept(&mut self) {
        while !self.client.as_ref().is_some_and(|c| c.gone) {
            let Ok(stream) = accept_with(&self.listener, SocketFlags::CLOEXEC) else { return };
            if self.client.is_some() {
                log::info!("{}: turned a second client away", self.path.display());
                continue;
            }
            let mut client = Client { stream, watch: None, silent: false, gone: false };
            client.look();
            self.client = Some(client);
            log::info!("{}: a client connected", self.path.display());
        }
    }

    /// Forgets a client from whom nothing is left to read and who takes nothing.
    fn reap(&mut self) {
        if self.client.as_ref().is_some_and(|c| c.gone && c.silent) {
            self.client = None;
            log::info!("{}: the client left", self.path.display());
        }
    }
}

/// Removes what an ended process left at `path`; anything else that is there is an error.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), Error> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(Error::NotASocket(path.to_owned()));
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|probe| connect(&probe, address));
    match probe {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(|source| Error::Socket {
            what: "remove the stale socket",
            path: path.to_owned(),
            source,
        }),
        Err(Errno::NOENT) => Ok(()),
        _ => Err(Error::InUse(path.to_owned())),
    }
}

impl Host for Socket {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let len = self.client.as_mut().map_or(0, |client| client.read(buf));
        self.reap();
        len
    }

    fn write(&mut self, data: &[u8]) -> usize {
        let Some(client) = self.client.as_mut().filter(|c| !c.gone) else {
            self.backlog.push(data);
            return data.len();
        };
        let taken = if self.backlog.flush(|kept| client.write(kept)) { client.write(data) } else { 0 };
        if client.gone {
            self.backlog.push(&data[taken..]);
            self.reap();
            return data.len();
        }
        taken
    }

    fn service(&mut self) {
        if let Some(client) = &mut self.client {
            client.look();
        }
        self.reap();
        self.accept();
        if let Some(client) = self.client.as_mut().filter(|c| !c.gone) {
            self.backlog.flush(|data| client.write(data));
        }
    }

    fn watch(&mut self, poll: &Poll, want: Interest) -> bool {
        let mut next_may_come = true;
        if let Some(client) = &mut self.client {
            let mut events = EventFlags::empty();
            events.set(EventFlags::IN, want.input && !client.silent);
            events.set(EventFlags::OUT, want.output || !self.backlog.is_empty());
            // A client who is gone reports that for ever: then only its last words are of interest.
            let events = if client.gone { want.input.then_some(EventFlags::IN) } else { Some(events) };
            if let Err(error) = poll.set(client.stream.as_fd(), &mut client.watch, events) {
                log::error!("{}: wait: {error}", self.path.display());
            }
            next_may_come = !client.gone;
        }
        let listening = next_may_come.then_some(EventFlags::IN);
        if let Err(error) = poll.set(self.listener.as_fd(), &mut self.listening, listening) {
            log::error!("{}: wait: {error}", self.path.display());
        }
        want.output && !self.connected()
    }

    fn connected(&self) -> bool {
        self.client.as_ref().is_some_and(|c| !c.gone)
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let found = std::fs::symlink_metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if found.is_some() && found == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
