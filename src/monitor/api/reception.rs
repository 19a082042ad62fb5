//! [`Reception`]: takes in who connects to a name, and leaves them waiting in the socket's queue where there is no room.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::registry::Entry;
use crate::event_loop::{Interest, Sources};

/// How long until somebody is taken in again where there was no room.
const RETRY: Duration = Duration::from_secs(1);

/// See the module's text. It listens by the entry's own descriptor: see [`Entry`].
#[derive(Debug)]
pub struct Reception {
    entry: Arc<Entry>,
    token: u32,
    most: usize,
    /// Nobody is waited for until then: no room, or no descriptors.
    again: Option<Instant>,
}

impl Reception {
    /// Of `entry`, whose socket has `token` on the event loop, for at most `most` clients at a time.
    pub fn new(entry: Arc<Entry>, token: u32, most: usize) -> Self {
        Self { entry, token, most, again: None }
    }

    /// Waits for clients.
    ///
    /// # Errors
    /// The socket is there already.
    pub fn start(&self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        sources.add(self.entry.listener(), self.token, Interest::INPUT)
    }

    /// Somebody waits, and `present` clients are there. Whoever is taken in is passed to `add`; its stream does not block.
    pub fn take_in(
        &mut self,
        present: usize,
        sources: &mut Sources<'_, '_>,
        mut add: impl FnMut(UnixStream, &mut Sources<'_, '_>) -> io::Result<()>,
    ) {
        let mut room = self.most.saturating_sub(present);
        while room > 0 {
            let stream = match self.entry.listener().accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::warn!("control socket: {error}");
                    break;
                }
            };
            if stream.set_nonblocking(true).and_then(|()| add(stream, sources)).is_ok() {
                room -= 1;
            }
        }
        // A listener that stays readable while nothing can be accepted would keep the thread busy.
        self.listen(sources, Interest::default());
        self.again = Some(Instant::now() + RETRY);
    }

    /// Does what is due at `now`, and says when more is.
    pub fn keep_time(&mut self, now: Instant, sources: &mut Sources<'_, '_>) -> Option<Instant> {
        if self.again.is_some_and(|at| at <= now) {
            self.again = None;
            self.listen(sources, Interest::INPUT);
        }
        self.again
    }

    fn listen(&self, sources: &mut Sources<'_, '_>, interest: Interest) {
        if let Err(error) = sources.change(self.entry.listener(), self.token, interest) {
            log::error!("control socket: {error}");
        }
    }
}
