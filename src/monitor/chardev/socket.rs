//! A listening unix socket as a host end: one client at a time, who may come back.
//!
//! A second client is turned away at once. Output while nobody is connected goes to a [`Backlog`], which the
//! next client gets first. A client who is done sending (`shutdown`, the end of `socat -`'s input) still receives.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send};

use super::backlog::Backlog;
use super::poll::{EventFlags, Poll, Watch, ready_now};
use super::{Error, Host, Interest};
use crate::listener::Listener;

/// The listening socket and its client.
#[derive(Debug)]
pub struct Socket {
    listener: Listener,
    listening: Watch,
    client: Option<Client>,
    backlog: Backlog,
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
        let listener = Listener::bind(path, SocketType::STREAM)?;
        Ok(Self { listener, listening: None, client: None, backlog: Backlog::default() })
    }

    /// Takes the next client in, or turns it away while there is one.
    fn accept(&mut self) {
        while !self.client.as_ref().is_some_and(|c| c.gone) {
            let Ok(stream) = self.listener.accept() else { return };
            if self.client.is_some() {
                log::info!("{}: turned a second client away", self.listener.path().display());
                continue;
            }
            let mut client = Client { stream, watch: None, silent: false, gone: false };
            client.look();
            self.client = Some(client);
            log::info!("{}: a client connected", self.listener.path().display());
        }
    }

    /// Forgets a client from whom nothing is left to read and who takes nothing.
    fn reap(&mut self) {
        if self.client.as_ref().is_some_and(|c| c.gone && c.silent) {
            self.client = None;
            log::info!("{}: the client left", self.listener.path().display());
        }
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
                log::error!("{}: wait: {error}", self.listener.path().display());
            }
            next_may_come = !client.gone;
        }
        let listening = next_may_come.then_some(EventFlags::IN);
        if let Err(error) = poll.set(self.listener.as_fd(), &mut self.listening, listening) {
            log::error!("{}: wait: {error}", self.listener.path().display());
        }
        want.output && !self.connected()
    }

    fn connected(&self) -> bool {
        self.client.as_ref().is_some_and(|c| !c.gone)
    }

    fn path(&self) -> Option<&Path> {
        Some(self.listener.path())
    }
}
