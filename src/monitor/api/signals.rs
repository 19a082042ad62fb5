//! The process's signals as something to poll: SIGTERM and SIGINT ask the guest to power off, SIGHUP ends it, SIGXFSZ and SIGXCPU
//! do nothing.
//!
//! The handlers do nothing but write a byte to a socket, which is all that is safe in them; [`super::server`] reads it.
//! Taken before anything needs cleaning up, so that a signal during start-up is kept, not fatal.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use signal_hook::SigId;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGXCPU, SIGXFSZ};
use signal_hook::{flag, low_level};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// SIGTERM, SIGINT: the power button; the second time, a hard stop.
    Stop,
    /// SIGHUP: a hard stop. There is nobody left to wait.
    Kill,
}

/// The signals, taken. While this lives they do not end the process by themselves; afterwards they do again.
#[derive(Debug)]
pub struct Signals {
    stop: UnixStream,
    kill: UnixStream,
    handlers: Vec<SigId>,
    // Dropped last: then the signals have their default effect again.
    _held: Held,
}

impl Signals {
    /// Takes the signals over, except those that the parent had this process ignore (`nohup`, a shell's `&`).
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn take() -> io::Result<Self> {
        Self::take_over(true)
    }

    /// The same for who has another use for those that are orders to end: none of them comes.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn take_no_orders() -> io::Result<Self> {
        Self::take_over(false)
    }

    fn take_over(orders: bool) -> io::Result<Self> {
        let (stop, stop_writer) = UnixStream::pair()?;
        let (kill, kill_writer) = UnixStream::pair()?;
        stop.set_nonblocking(true)?;
        kill.set_nonblocking(true)?;
        let ignored = ignored();
        let mut handlers = Vec::new();
        // A limit of the host's (ulimit -f, -t) is no reason to end a machine: a write beyond it fails (EFBIG), and that is
        // answered where it was made. A handler, because what is ignored would be so in child processes, too.
        for signal in [SIGXFSZ, SIGXCPU] {
            handlers.push(flag::register(signal, Arc::default())?);
        }
        for (signal, writer) in [(SIGTERM, &stop_writer), (SIGINT, &stop_writer), (SIGHUP, &kill_writer)] {
            if orders && ignored & (1 << (signal - 1)) == 0 {
                hold(signal)?;
                handlers.push(low_level::pipe::register(signal, writer.try_clone()?)?);
            }
        }
        Ok(Self { stop, kill, handlers, _held: Held::new() })
    }

    /// What to wait on.
    pub fn sources(&self) -> [BorrowedFd<'_>; 2] {
        [self.stop.as_fd(), self.kill.as_fd()]
    }

    /// The signals that came, since the last call.
    pub fn wishes(&mut self) -> Vec<Wish> {
        let mut wishes = Vec::new();
        let mut bytes = [0; 16];
        for (source, wish) in [(&mut self.stop, Wish::Stop), (&mut self.kill, Wish::Kill)] {
            while let Ok(count @ 1..) = source.read(&mut bytes) {
                wishes.extend((0..count).map(|_| wish));
            }
        }
        wishes
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.handlers.drain(..) {
            low_level::unregister(id);
        }
    }
}

/// The ends of this process's children as something to poll.
#[derive(Debug)]
pub struct ChildEnds {
    ended: UnixStream,
    handler: SigId,
}

impl ChildEnds {
    /// From now on.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn take() -> io::Result<Self> {
        let (ended, writer) = UnixStream::pair()?;
        ended.set_nonblocking(true)?;
        let handler = low_level::pipe::register(SIGCHLD, writer)?;
        Ok(Self { ended, handler })
    }

    /// What to wait on.
    pub fn source(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Those that came are known: the next makes it readable again.
    pub fn clear(&mut self) {
        let mut bytes = [0; 64];
        while matches!(self.ended.read(&mut bytes), Ok(1..)) {}
    }
}

impl Drop for ChildEnds {
    fn drop(&mut self) {
        low_level::unregister(self.handler);
    }
}

/// A handler's registration is for good, so what it does depends on whether any [`Signals`] are there.
#[derive(Debug)]
struct Held;

static HELD: Mutex<usize> = Mutex::new(0);
static RELEASED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

impl Held {
    fn new() -> Self {
        Self::count(1);
        Self
    }

    fn count(by: isize) {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        *held = held.saturating_add_signed(by);
        RELEASED.get_or_init(Arc::default).store(*held == 0, Ordering::SeqCst);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        Self::count(-1);
    }
}

/// Has `signal` its default effect while nobody holds it. Registered once, and before all else that it is to do.
fn hold(signal: i32) -> io::Result<()> {
    static REGISTERED: Mutex<Vec<i32>> = Mutex::new(Vec::new());
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    if !registered.contains(&signal) {
        flag::register_conditional_default(signal, RELEASED.get_or_init(Arc::default).clone())?;
        registered.push(signal);
    }
    Ok(())
}

/// Whether the parent had this process ignore `signal`: `nohup`, a shell's `&`.
pub fn is_ignored(signal: i32) -> bool {
    ignored() & 1 << (signal - 1) != 0
}

/// The set of signals that are ignored: bit n - 1 is signal n. From proc(5), as there is no other way without `unsafe`;
/// a host without /proc is one where nothing is.
fn ignored() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is a name in parentheses, which may hold anything; sigignore is the 33rd.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_ascii_whitespace().nth(30).and_then(|field| field.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_known() {
        // Rust's runtime ignores SIGPIPE (13) in every process, and nothing ignores SIGTERM here.
        assert_eq!(ignored() & (1 << 12 | 1 << 14), 1 << 12);
    }

    #[test]
    fn a_signal_becomes_a_wish() {
        let mut signals = Signals::take().unwrap();
        assert!(signals.wishes().is_empty());
        low_level::raise(SIGTERM).unwrap();
        low_level::raise(SIGINT).unwrap();
        low_level::raise(SIGHUP).unwrap();
        assert_eq!(signals.wishes(), [Wish::Stop, Wish::Stop, Wish::Kill]);
    }
}
