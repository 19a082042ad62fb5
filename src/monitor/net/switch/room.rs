//! [`Room`]: a port whose queue is full, and how long it is waited for: as long as it fetches now and then, and not longer.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::segment::Id;
use crate::event_loop::{Event, Interest};
use crate::poller::{self, Poller};
use crate::timer::Timer;

/// A port that makes no room for so long is not waited for until it has taken a frame again.
const PATIENCE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Receive,
    Port,
    Timer,
    More,
}

impl poller::Source for Source {
    const ALL: &'static [Self] = &[Self::Receive, Self::Port, Self::Timer, Self::More];
}

/// What one port waits for: messages, what is left of one, and room for one of its own.
#[derive(Debug)]
pub struct Room {
    poller: Poller<Source>,
    timer: Timer,
    more: Event,
    has_more: bool,
    /// The port that is waited for, and since when.
    full: Option<(Id, Instant)>,
    /// Those whose room is told by the poller.
    watched: BTreeSet<Id>,
    stalled: BTreeSet<Id>,
}

impl Room {
    /// Messages come by `socket`.
    pub fn new(socket: impl AsFd) -> io::Result<Self> {
        let (poller, timer, more) = (Poller::new()?, Timer::new()?, Event::new()?);
        poller.add_steady(socket, Source::Receive, 0)?;
        poller.add(&timer, Source::Timer, 0, Interest::INPUT)?;
        poller.add_steady(&more, Source::More, 0)?;
        let (watched, stalled) = Default::default();
        Ok(Self { poller, timer, more, has_more: false, full: None, watched, stalled })
    }

    /// Readable when there is a message, or a part of one, or when a frame that found no room is worth another try.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    /// A message that came has more than was fetched of it, or no longer.
    pub fn set_more(&mut self, has_more: bool) {
        if std::mem::replace(&mut self.has_more, has_more) != has_more {
            if has_more { self.more.signal() } else { self.more.clear() }
        }
    }

    /// Port `id` is full, and reached by `socket`. True if it is to be waited for.
    pub fn wait_for(&mut self, id: Id, socket: impl AsFd) -> bool {
        if self.stalled.contains(&id) {
            return false;
        }
        match self.full {
            Some((waited, since)) if waited == id => {
                self.look();
                if since.elapsed() < PATIENCE {
                    return true;
                }
                self.go_on(id, socket);
                self.stalled.insert(id);
                false
            }
            // Of another port that was waited for, the driver is gone, and the frame with it.
            _ => {
                let interest = Interest { input: false, output: true };
                let number = id & (u64::MAX >> 3);
                let watched = match self.watched.contains(&id) {
                    true => self.poller.change(socket, Source::Port, number, interest),
                    false => self.poller.add(socket, Source::Port, number, interest),
                };
                if watched.is_err() {
                    return false;
                }
                self.watched.insert(id);
                self.full = Some((id, Instant::now()));
                self.timer.set(Some(PATIENCE));
                true
            }
        }
    }

    /// Port `id` has taken a frame.
    pub fn has_taken(&mut self, id: Id, socket: impl AsFd) {
        if !self.watched.is_empty() || !self.stalled.is_empty() {
            self.go_on(id, socket);
            self.stalled.remove(&id);
        }
    }

    /// Takes note of what has become ready: it is said once.
    pub fn look(&self) {
        if !self.watched.is_empty() {
            self.poller.ready();
        }
    }

    fn go_on(&mut self, id: Id, socket: impl AsFd) {
        if self.watched.contains(&id) {
            let _ = self.poller.remove(socket);
        }
        self.end(id);
    }

    fn end(&mut self, id: Id) {
        self.watched.remove(&id);
        if self.full.is_some_and(|(waited, _)| waited == id) {
            self.timer.set(None);
            self.full = None;
        }
    }

    /// Port `id` is gone, and its socket closed.
    pub fn forget(&mut self, id: Id) {
        self.stalled.remove(&id);
        self.end(id);
    }
}
