//! A spare and its pool speak over a socket of their own, a JSON message a line: the spare says that it stands ready, the pool that it
//! is wanted, the spare that it runs. Then, as when either has ended, the socket is closed.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::api::passing;
use crate::api::signals::Signals;
use crate::threads;

/// The longest message in bytes.
const MAX_MESSAGE: usize = 4096;

/// What a spare says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Said {
    /// It stands before its first instruction.
    Ready {
        /// Memory that it has for itself, in bytes.
        private: Option<u64>,
    },
    /// It runs, under the name that it was told.
    Runs,
    /// It does not.
    Failed(Reason),
}

/// Why a spare failed, in the words of its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// What went wrong.
    pub error: String,
    /// What to try.
    pub hint: Option<String>,
    /// The exit status of a command that fails so; none if it is the pool that says so.
    pub code: Option<u8>,
}

/// A spare is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// By this name, under which it listens already.
    pub name: String,
    /// It has its guest told that it is a copy; otherwise others do.
    pub renew: bool,
    /// It ends with the connection whose descriptor comes along, and nothing is to be left of it.
    pub tied: bool,
}

/// The pool, as the process of a spare sees it. Clones are the same.
#[derive(Debug, Clone)]
pub struct Spare(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    pool: UnixStream,
    /// The pool has had the last word that it waits for.
    is_over: AtomicBool,
}

impl Spare {
    /// A spare called `name` until it is wanted, whose pool is at the other end of `socket`.
    pub fn new(name: &str, socket: OwnedFd) -> Self {
        let (name, is_over) = (name.to_owned(), AtomicBool::new(false));
        Self(Arc::new(Inner { name, pool: socket.into(), is_over }))
    }

    /// Its name until it is wanted.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Says that it stands ready, and waits until it is wanted. `None`: it never will be; its pool has ended, or one of `signals` asks
    /// for its end. With the connection with which it is to end, if it is tied to one.
    pub(crate) fn wait(&self, signals: &Signals) -> Option<(Wanted, Option<OwnedFd>)> {
        let pool = &self.0.pool;
        self.say(&Said::Ready { private: private_bytes() }).ok()?;
        let (mut lines, mut passed) = (Lines::default(), Vec::new());
        loop {
            let [stop, kill] = signals.sources().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            let mut fds = [PollFd::new(pool, PollFlags::IN), stop, kill];
            match threads::hear_orders(|| poll(&mut fds, None)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return None,
            }
            if fds[1..].iter().any(|fd| !fd.revents().is_empty()) {
                return None;
            }
            if !fds[0].revents().is_empty() && !lines.read_with(pool, &mut passed) {
                return None;
            }
            if let Some(line) = lines.next() {
                let wanted: Wanted = parse(&line)?;
                // Untied it would run for ever.
                let tie = if wanted.tied { Some(passed.pop()?) } else { None };
                return Some((wanted, tie));
            }
        }
    }

    /// Says that it runs. The pool needs it no longer.
    ///
    /// # Errors
    /// There is no pool any more.
    pub(crate) fn runs(&self) -> io::Result<()> {
        self.finish(&Said::Runs)
    }

    /// Says why it does not run, or cannot. Whether the pool had not had a last word before, and has this one.
    pub fn failed(&self, reason: &Reason) -> bool {
        !self.0.is_over.load(Ordering::Relaxed) && self.finish(&Said::Failed(reason.clone())).is_ok()
    }

    fn finish(&self, said: &Said) -> io::Result<()> {
        self.0.is_over.store(true, Ordering::Relaxed);
        let said = self.say(said);
        // Whoever else has the descriptor, the conversation is over.
        let _ = self.0.pool.shutdown(Shutdown::Both);
        said
    }

    fn say(&self, said: &Said) -> io::Result<()> {
        (&self.0.pool).write_all(&message(said))
    }
}

/// A message as the line that is sent.
pub(super) fn message(message: &impl Serialize) -> Vec<u8> {
    // Strings and numbers, written to memory: that cannot fail.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Reads a message.
pub(super) fn parse<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    serde_json::from_slice(line).ok()
}

/// What has come on a socket, by lines.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// Takes in what has come. False if that was the last, or more than a message.
    pub fn read(&mut self, from: &UnixStream) -> bool {
        self.read_with(from, &mut Vec::new())
    }

    /// The same, with the descriptors that come along.
    fn read_with(&mut self, from: &UnixStream, passed: &mut Vec<OwnedFd>) -> bool {
        let mut bytes = [0; MAX_MESSAGE];
        match passing::receive(from, &mut bytes, passed) {
            Ok(count @ 1..) => self.0.extend_from_slice(&bytes[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Ok(0) | Err(_) => return false,
        }
        self.0.len() <= MAX_MESSAGE || self.0.contains(&b'\n')
    }

    /// The next that is whole.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        let end = self.0.iter().position(|byte| *byte == b'\n')?;
        Some(self.0.drain(..=end).collect())
    }
}

/// Memory that this process alone has (Documentation/filesystems/proc.rst, smaps_rollup). Of files it has nothing of its own: what it
/// happens to be the only one to have mapped, of the saved memory above all, is there for all.
fn private_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let kib = |field: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(field))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    };
    // Huge pages are counted apart.
    let huge = kib("Private_Hugetlb:").unwrap_or(0);
    Some((kib("Anonymous:")? + huge) << 10)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_spare_waits_until_it_is_wanted_or_its_pool_ends() {
        let signals = Signals::take().unwrap();
        let (pool, socket) = UnixStream::pair().unwrap();
        let spare = Spare::new("p@1", socket.into());
        let waiting = thread::scope(|scope| {
            let waiting = scope.spawn(|| spare.wait(&signals));
            let mut lines = Lines::default();
            assert!(lines.read(&pool));
            let ready: Said = parse(&lines.next().unwrap()).unwrap();
            assert!(matches!(ready, Said::Ready { private: Some(1..) }), "{ready:?}");
            (&pool).write_all(br#"{"name":"w-1","#).unwrap();
            (&pool).write_all(b"\"renew\":true,\"tied\":false}\n").unwrap();
            waiting.join().unwrap()
        });
        let (wanted, tie) = waiting.unwrap();
        assert_eq!(wanted, Wanted { name: "w-1".to_owned(), renew: true, tied: false });
        assert!(tie.is_none());
        spare.runs().unwrap();
        let reason = Reason { error: "too late".to_owned(), hint: None, code: None };
        assert!(!spare.failed(&reason), "it has had the last word");
        let mut lines = Lines::default();
        assert!(lines.read(&pool) && parse(&lines.next().unwrap()) == Some(Said::Runs) && !lines.read(&pool));

        let (pool, socket) = UnixStream::pair().unwrap();
        drop(pool);
        assert!(Spare::new("p@2", socket.into()).wait(&signals).is_none());
    }

    #[test]
    fn one_that_is_tied_has_what_it_is_tied_to() {
        let signals = Signals::take().unwrap();
        let wanted = message(&Wanted { name: "w-1".to_owned(), renew: false, tied: true });
        for is_there in [true, false] {
            let (pool, socket) = UnixStream::pair().unwrap();
            let (mut client, connection) = UnixStream::pair().unwrap();
            let ties: Vec<_> = Some(connection).into_iter().filter(|_| is_there).collect();
            passing::send(&pool, &wanted, &ties).unwrap();
            drop(ties);
            let found = Spare::new("p@1", socket.into()).wait(&signals);
            // Untied it is not to run.
            assert_eq!(found.is_some(), is_there);
            assert_eq!(client.write(b"x").is_ok(), is_there);
        }
    }

    #[test]
    fn a_line_without_an_end_is_not_read_for_ever() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        writer.write_all(&[b'x'; MAX_MESSAGE + 1]).unwrap();
        let mut lines = Lines::default();
        assert!(lines.read(&reader) && !lines.read(&reader) && lines.next().is_none());
    }
}
