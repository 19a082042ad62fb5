//! A pseudo-terminal as a host end: `screen /dev/pts/N` may attach, leave, and come back.
//!
//! While nobody has the slave open the master only reports a hang-up, for ever, and never says when that ends;
//! so the slave's openings are watched by inotify instead. Output meanwhile goes to a [`Backlog`].

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, inotify, open};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::backlog::Backlog;
use super::poll::{EventFlags, Poll, Watch, ready_now};
use super::{Error, Host, Interest};

/// The master's side of a pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    master: OwnedFd,
    watch: Watch,
    /// Becomes readable when somebody opens the slave.
    openings: OwnedFd,
    openings_watch: Watch,
    /// Somebody has the slave open.
    attached: bool,
    /// Nobody has, and what they typed is read.
    drained: bool,
    backlog: Backlog,
    path: PathBuf,
}

impl Pty {
    /// Makes a new one. The slave starts in raw mode, so that the guest's output is not echoed back to it.
    pub fn open() -> Result<Self, Error> {
        let start = || -> io::Result<Self> {
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
            grantpt(&master)?;
            unlockpt(&master)?;
            fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
            let path = PathBuf::from(OsString::from_vec(ptsname(&master, Vec::new())?.into_bytes()));
            // Raw mode outlives the slave's closing, because the master stays open. Closing it also makes
            // the master report hang-ups from the first, as it will after every client.
            let slave = open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
            let mut termios = tcgetattr(&slave)?;
            termios.make_raw();
            tcsetattr(&slave, OptionalActions::Now, &termios)?;
            drop(slave);
            let openings = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            inotify::add_watch(&openings, &path, inotify::WatchFlags::OPEN)?;
            let backlog = Backlog::default();
            let (watch, openings_watch, attached, drained) = (None, None, false, true);
            Ok(Self { master, watch, openings, openings_watch, attached, drained, backlog, path })
        };
        let pty = start().map_err(Error::Pty)?;
        log::info!("pseudo-terminal {}", pty.path.display());
        Ok(pty)
    }

    fn send(master: &OwnedFd, attached: &mut bool, data: &[u8]) -> usize {
        match rustix::io::write(master, data) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                *attached = false;
                0
            }
        }
    }
}

impl Host for Pty {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        if self.drained || buf.is_empty() {
            return 0;
        }
        match rustix::io::read(&self.master, &mut *buf) {
            Ok(len @ 1..) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // EIO: nobody has it open, and nothing is left.
            Ok(_) | Err(_) => {
                (self.attached, self.drained) = (false, true);
                0
            }
        }
    }

    fn write(&mut self, data: &[u8]) -> usize {
        let Self { master, attached, backlog, .. } = self;
        let mut taken = 0;
        if *attached && backlog.flush(|kept| Self::send(master, attached, kept)) {
            taken = Self::send(master, attached, data);
        }
        if *attached {
            return taken;
        }
        backlog.push(&data[taken..]);
        data.len()
    }

    fn service(&mut self) {
        let mut buf = [MaybeUninit::uninit(); 512];
        let mut reader = inotify::Reader::new(&self.openings, &mut buf);
        let mut opened = false;
        while reader.next().is_ok() {
            opened = true;
        }
        // Someone may have come, typed and gone: look for that too.
        self.drained &= !opened;
        let hung_up = ready_now(self.master.as_fd(), PollFlags::empty()).contains(PollFlags::HUP);
        if self.attached == hung_up {
            log::info!("{}: {}", self.path.display(), if hung_up { "detached" } else { "attached" });
        }
        self.attached = !hung_up;
        if self.attached {
            self.drained = false;
            let Self { master, attached, backlog, .. } = self;
            backlog.flush(|data| Self::send(master, attached, data));
        }
    }

    fn watch(&mut self, poll: &Poll, want: Interest) -> bool {
        let mut events = EventFlags::empty();
        events.set(EventFlags::IN, want.input && !self.drained);
        events.set(EventFlags::OUT, self.attached && (want.output || !self.backlog.is_empty()));
        // Detached, a hang-up is reported for ever: then only what was typed before is of interest.
        let events = (self.attached || events.contains(EventFlags::IN)).then_some(events);
        let result = poll
            .set(self.master.as_fd(), &mut self.watch, events)
            .and_then(|()| poll.set(self.openings.as_fd(), &mut self.openings_watch, Some(EventFlags::IN)));
        if let Err(error) = result {
            log::error!("{}: wait: {error}", self.path.display());
        }
        want.output && !self.attached
    }

    fn connected(&self) -> bool {
        self.attached
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }
}
