//! Standard input or output that may block whoever uses it: its description is shared with others, so O_NONBLOCK is not ours to
//! set, and it cannot be reopened (a terminal of another user, after `su`). A thread of its own does the system calls, and may
//! block in one for ever: nobody waits for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::event_loop::Event;
use crate::threads::{self, Role};

/// Bytes on their way out.
const LIMIT: usize = 64 << 10;
/// Bytes asked for at a time: what is read and not taken is lost to whoever reads after us.
const PIECE: usize = 256;
/// A pump that is dropped waits this long for its last bytes to be written.
const LAST_WORDS: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// A reader is to read more.
    wanted: bool,
    /// The end of input, or an error.
    end: Option<io::Result<()>>,
    /// The pump is gone: the thread ends at the next chance.
    closed: bool,
    /// The thread is in a system call for bytes that are not in `bytes` any more.
    writing: bool,
}

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    /// Set while there is something to take (a reader), or room for more (a writer).
    ready: Event,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment or call.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        let state = self.state();
        self.changed.wait_while(state, condition).unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) {
        loop {
            let mut state = self.wait_while(|state| state.bytes.is_empty() && !state.closed);
            if state.bytes.is_empty() {
                return;
            }
            let mut piece: Vec<u8> = state.bytes.drain(..).collect();
            state.writing = true;
            drop(state);
            self.ready.signal();
            while !piece.is_empty() {
                match rustix::io::write(&self.fd, &piece) {
                    Ok(len) => drop(piece.drain(..len)),
                    Err(Errno::INTR) => {}
                    // The other side has made it non-blocking.
                    Err(Errno::AGAIN) => std::thread::sleep(Duration::from_millis(10)),
                    Err(error) => {
                        self.state().end = Some(Err(error.into()));
                        piece.clear();
                    }
                }
            }
            self.state().writing = false;
            self.changed.notify_all();
        }
    }

    fn read(&self) {
        loop {
            let state = self.wait_while(|state| !state.wanted && !state.closed);
            if state.closed {
                return;
            }
            drop(state);
            let mut piece = [0; PIECE];
            let result = rustix::io::read(&self.fd, &mut piece[..]);
            let mut state = self.state();
            match result {
                Ok(0) => state.end = Some(Ok(())),
                Ok(len) => state.bytes.extend(&piece[..len]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    drop(state);
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(error) => state.end = Some(Err(error.into())),
            }
            state.wanted = false;
            drop(state);
            self.ready.signal();
        }
    }
}

/// One direction of what may block.
#[derive(Debug)]
pub struct Pump {
    shared: Arc<Shared>,
    reads: bool,
}

impl Pump {
    /// For reading or writing `fd`.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn new(fd: OwnedFd, reads: bool) -> io::Result<Self> {
        let (state, changed, ready) = (Mutex::default(), Condvar::new(), Event::new()?);
        let shared = Arc::new(Shared { fd, state, changed, ready });
        let pump = Self { shared: shared.clone(), reads };
        if reads {
            pump.ask();
        } else {
            pump.shared.ready.signal();
        }
        threads::spawn(Role::Output, move || if reads { shared.read() } else { shared.write() })?;
        Ok(pump)
    }

    fn ask(&self) {
        self.shared.state().wanted = true;
        self.shared.changed.notify_all();
    }

    /// Takes what has been read, as read(2) that never blocks does.
    pub fn read(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut state = self.shared.state();
        let len = buf.len().min(state.bytes.len());
        for (to, byte) in buf.iter_mut().zip(state.bytes.drain(..len)) {
            *to = byte;
        }
        if len > 0 && !state.bytes.is_empty() {
            return Ok(len);
        }
        match &state.end {
            _ if len > 0 => {}
            Some(Ok(())) => return Ok(0),
            Some(Err(error)) => return Err(errno(error)),
            None => {}
        }
        let over = state.end.is_some();
        drop(state);
        if !over {
            self.shared.ready.clear();
            self.ask();
        }
        if len > 0 { Ok(len) } else { Err(Errno::AGAIN) }
    }

    /// Takes bytes to be written, as write(2) that never blocks does.
    pub fn write(&self, data: &[u8]) -> Result<usize, Errno> {
        let mut state = self.shared.state();
        if let Some(Err(error)) = &state.end {
            return Err(errno(error));
        }
        let len = data.len().min(LIMIT - state.bytes.len());
        state.bytes.extend(&data[..len]);
        let full = state.bytes.len() == LIMIT;
        if full {
            self.shared.ready.clear();
        }
        drop(state);
        self.shared.changed.notify_all();
        if len > 0 { Ok(len) } else { Err(Errno::AGAIN) }
    }
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

impl AsFd for Pump {
    /// Readable while there is something to take, or room for more.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.ready.as_fd()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.closed = true;
        self.shared.changed.notify_all();
        let end = Instant::now() + LAST_WORDS;
        while !self.reads && (state.writing || !state.bytes.is_empty()) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write, pipe};
    use std::sync::mpsc::channel;

    /// Fails if `act` takes longer than anything that does not block.
    fn at_once<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, over) = channel();
        std::thread::spawn(move || done.send(act()));
        over.recv_timeout(Duration::from_secs(10)).expect("it blocks")
    }

    #[test]
    fn a_stalled_output_refuses_what_does_not_fit_and_loses_nothing() {
        let (mut reader, writer) = pipe().unwrap();
        let pump = Pump::new(writer.into(), false).unwrap();
        let (pump, sent) = at_once(move || {
            let mut sent = 0;
            // The pipe and the pump are full when it is refused for good.
            let mut refusals = 0;
            while refusals < 20 {
                match pump.write(&[7; 9000]) {
                    Ok(len) => sent += len,
                    Err(error) => {
                        assert_eq!(error, Errno::AGAIN);
                        refusals += 1;
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            }
            (pump, sent)
        });
        assert!(sent > LIMIT, "{sent}");
        let mut got = 0;
        let mut buf = [0; 4096];
        while got < sent {
            got += reader.read(&mut buf).unwrap();
        }
        assert_eq!(got, sent);
        // Nobody reads: the end does not wait for it.
        while pump.write(&[7; 9000]).is_ok() {}
        at_once(move || drop(pump));
        drop(reader);
    }

    #[test]
    fn input_comes_as_it_is_there_and_then_its_end() {
        let (reader, mut writer) = pipe().unwrap();
        let pump = Pump::new(reader.into(), true).unwrap();
        let (pump, nothing) = at_once(move || {
            let nothing = pump.read(&mut [0; 8]);
            (pump, nothing)
        });
        assert_eq!(nothing, Err(Errno::AGAIN));
        writer.write_all(b"some words").unwrap();
        let mut said = Vec::<u8>::new();
        let end = Instant::now() + Duration::from_secs(10);
        while said.len() < 10 {
            assert!(Instant::now() < end);
            let mut buf = [0; 4];
            match pump.read(&mut buf) {
                Ok(len) => said.extend(&buf[..len]),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        assert_eq!(said, b"some words");
        drop(writer);
        while pump.read(&mut [0; 4]) == Err(Errno::AGAIN) {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(pump.read(&mut [0; 4]), Ok(0));
    }

    #[test]
    fn a_broken_output_says_so() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let pump = Pump::new(writer.into(), false).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while pump.write(b"abc").is_ok() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(pump.write(b"abc"), Err(Errno::PIPE));
    }
}
