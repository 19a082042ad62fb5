//! The terminal that the monitor was started from: raw while a guest has it, and given back whatever happens.
//!
//! Entered when a host end on standard input opens, left when that is dropped, on panic, and on signals that end or
//! stop the process. A thread of its own reads the keys, so that Ctrl-A x works however stuck the guest is.
//! What SIGTERM and SIGINT mean for the guest is not decided here: whoever has a policy installs it before.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use signal_hook::low_level::emulate_default_handler;

use super::escape::{self, Escape, Key, Scanner};
use super::stream::Descriptor;

/// The terminal as it was, while it is not.
struct Borrowed {
    terminal: OwnedFd,
    original: Termios,
    raw: bool,
}

static BORROWED: Mutex<Option<Borrowed>> = Mutex::new(None);

fn borrowed() -> MutexGuard<'static, Option<Borrowed>> {
    BORROWED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Borrowed {
    /// Whether changing the mode would be ours to do: a job in the background would be stopped for trying, and
    /// its shell has set the mode that it wants.
    fn in_foreground(&self) -> bool {
        tcgetpgrp(&self.terminal).map_or(true, |group| group == getpgrp())
    }

    fn set_raw(&mut self) {
        if self.raw || !self.in_foreground() {
            return;
        }
        let mut mode = self.original.clone();
        mode.make_raw();
        mode.special_codes[SpecialCodeIndex::VMIN] = 1;
        mode.special_codes[SpecialCodeIndex::VTIME] = 0;
        match tcsetattr(&self.terminal, OptionalActions::Now, &mode) {
            Ok(()) => self.raw = true,
            Err(error) => log::warn!("terminal: set raw mode: {error}"),
        }
    }

    /// At once, not when output is drained: a terminal that is stalled must not keep us from ending.
    fn set_original(&mut self) {
        if self.raw && self.in_foreground() {
            let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.original);
        }
        self.raw = false;
    }
}

/// Whether this process may read the terminal, which is then raw. One in the background would be stopped for reading (SIGTTIN), and
/// the keys are another's.
fn take_if_in_foreground() -> bool {
    let mut borrowed = borrowed();
    let Some(terminal) = borrowed.as_mut() else { return true };
    let foreground = terminal.in_foreground();
    if foreground {
        terminal.set_raw();
    }
    foreground
}

/// How often a job in the background looks whether it has come to the foreground: a shell's `fg` sends no signal to one that runs.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// Gives the terminal back in the mode that it was found in, for good. From any thread, any number of times; call
/// it before ending the process past destructors.
pub fn restore() {
    if let Some(mut terminal) = borrowed().take() {
        terminal.set_original();
    }
}

/// Keys that the guest has not taken: past this many the terminal is not read, and so fills up and pushes back.
/// An escape sequence behind them is not seen.
const QUEUE_LIMIT: usize = 16 << 10;

/// The keys typed, from the terminal's thread to whoever reads them.
struct Keyboard {
    queue: Mutex<VecDeque<u8>>,
    /// Readable while there are keys.
    available: OwnedFd,
    /// Wakes the thread: it should look at `queue` and `attached` again.
    look: OwnedFd,
    /// Readable after the size of the window has changed.
    resized: OwnedFd,
    attached: AtomicBool,
    escape: Mutex<Option<EscapeHandler>>,
}

type EscapeHandler = Box<dyn FnMut(Escape) + Send>;

/// There is one standard input, so there is one of these, and its thread lasts: giving back a signal that somebody
/// else may have come to share is not possible.
static KEYBOARD: OnceLock<Arc<Keyboard>> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

fn signal(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

fn clear(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0u8; 8][..]);
}

impl Keyboard {
    fn start() -> io::Result<Arc<Self>> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let keyboard = Arc::new(Self {
            queue: Mutex::default(),
            available: event()?,
            look: event()?,
            resized: event()?,
            attached: AtomicBool::new(false),
            escape: Mutex::default(),
        });
        let input = Descriptor::shared(io::stdin().as_fd(), OFlags::RDONLY, "terminal")?;
        let echo = Descriptor::shared(io::stdin().as_fd(), OFlags::WRONLY, "terminal")?;
        let (read, write) = UnixStream::pair()?;
        let signals = SignalDelivery::with_pipe(read, write, SignalOnly, ours())?;
        let shared = keyboard.clone();
        thread::Builder::new()
            .name("terminal".to_owned())
            .spawn(move || shared.serve(input, echo, signals))?;
        Ok(keyboard)
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(
        &self,
        mut input: Descriptor,
        mut echo: Descriptor,
        mut signals: SignalDelivery<UnixStream, SignalOnly>,
    ) {
        let mut scanner = Scanner::default();
        loop {
            let room = QUEUE_LIMIT - self.queue().len().min(QUEUE_LIMIT);
            let attached = self.attached.load(Ordering::SeqCst) && !input.is_closed();
            let foreground = take_if_in_foreground();
            let listen = room > 0 && attached && foreground;
            let look = (attached && !foreground).then_some(&LOOK);
            let keys = if listen { PollFlags::IN } else { PollFlags::empty() };
            let mut fds = [
                PollFd::new(signals.get_read(), PollFlags::IN),
                PollFd::new(&self.look, PollFlags::IN),
                PollFd::new(&input, keys),
            ];
            // A hang-up is reported even to those who do not listen.
            let watched = if listen { 3 } else { 2 };
            match poll(&mut fds[..watched], look) {
                Ok(_) | Err(Errno::INTR) => (),
                Err(error) => {
                    log::error!("terminal: wait: {error}");
                    return;
                }
            }
            let typed = !fds[2].revents().is_empty();
            clear(&self.look);
            signals.pending().for_each(|number| self.on_signal(number));
            if listen && typed {
                let mut buf = [0; 512];
                let len = input.read(&mut buf[..room.min(512)]);
                self.typed(&buf[..len], &mut scanner, &mut echo);
            }
        }
    }

    fn typed(&self, keys: &[u8], scanner: &mut Scanner, echo: &mut Descriptor) {
        for key in keys {
            match scanner.feed(*key) {
                Key::Nothing => (),
                Key::Byte(byte) => self.queue().push_back(byte),
                Key::Help => {
                    echo.write(escape::HELP.as_bytes());
                }
                Key::Escape(escape) => self.act(escape),
            }
        }
        // With the queue locked, so that it cannot be emptied between the look and the signal.
        let queue = self.queue();
        if !queue.is_empty() {
            signal(&self.available);
        }
    }

    /// Calls the handler with no lock held: it may end the very endpoint that it was given to.
    fn act(&self, escape: Escape) {
        let slot = || self.escape.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut act) = slot().take() else {
            log::warn!("terminal: nothing handles {escape:?}");
            return;
        };
        act(escape);
        if self.attached.load(Ordering::SeqCst) {
            slot().get_or_insert(act);
        }
    }

    fn on_signal(&self, number: i32) {
        match number {
            SIGWINCH => signal(&self.resized),
            SIGTSTP => {
                if let Some(terminal) = borrowed().as_mut() {
                    terminal.set_original();
                }
                let _ = emulate_default_handler(SIGTSTP);
            }
            SIGCONT => {
                if let Some(terminal) = borrowed().as_mut() {
                    // Whoever ran meanwhile may have set another mode.
                    terminal.raw = false;
                    terminal.set_raw();
                }
                signal(&self.resized);
            }
            fatal => {
                restore();
                let _ = emulate_default_handler(fatal);
            }
        }
    }
}

/// The signals that the terminal's thread handles: its own, and the deadly ones that would otherwise leave a
/// raw terminal behind. One that is handled or ignored by others already stays theirs.
fn ours() -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
    };
    let taken = mask("SigIgn:") | mask("SigCgt:");
    let free = |number: &i32| taken & (1 << (number - 1)) == 0;
    let mut signals = vec![SIGWINCH, SIGCONT];
    signals.extend([SIGTSTP, SIGHUP, SIGINT, SIGQUIT, SIGTERM].into_iter().filter(free));
    signals
}

/// Standard input as a raw terminal. Dropping it gives the terminal back.
pub(super) struct Terminal {
    keyboard: Arc<Keyboard>,
}

impl Terminal {
    /// Takes the terminal on standard input over.
    pub(super) fn attach() -> io::Result<Self> {
        let terminal = io::stdin().as_fd().try_clone_to_owned()?;
        let original = tcgetattr(&terminal)?;
        let keyboard = {
            let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
            match KEYBOARD.get() {
                Some(keyboard) => keyboard.clone(),
                None => KEYBOARD
                    .get_or_init({
                        let keyboard = Keyboard::start()?;
                        || keyboard
                    })
                    .clone(),
            }
        };
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        });
        if keyboard.attached.swap(true, Ordering::SeqCst) {
            return Err(io::Error::other("standard input has a user already"));
        }
        let mut borrowed = borrowed();
        borrowed.insert(Borrowed { terminal, original, raw: false }).set_raw();
        drop(borrowed);
        signal(&keyboard.look);
        Ok(Self { keyboard })
    }

    /// Takes keys: 0 if there are none now.
    pub(super) fn read(&self, buf: &mut [u8]) -> usize {
        let mut queue = self.keyboard.queue();
        let full = queue.len() >= QUEUE_LIMIT;
        let len = buf.len().min(queue.len());
        for (to, key) in buf.iter_mut().zip(queue.drain(..len)) {
            *to = key;
        }
        if queue.is_empty() {
            clear(&self.keyboard.available);
        }
        if full && len > 0 {
            signal(&self.keyboard.look);
        }
        len
    }

    /// Readable while there are keys.
    pub(super) fn available(&self) -> &OwnedFd {
        &self.keyboard.available
    }

    /// Readable when the window has changed its size since [`Terminal::acknowledge_resize`].
    pub(super) fn resized(&self) -> &OwnedFd {
        &self.keyboard.resized
    }

    /// The new size is known.
    pub(super) fn acknowledge_resize(&self) {
        clear(&self.keyboard.resized);
    }

    /// Says who is told of escape sequences.
    pub(super) fn on_escape(&self, act: EscapeHandler) {
        // The old one is dropped with no lock held: what it holds may end an endpoint.
        let old = self.keyboard.escape.lock().unwrap_or_else(PoisonError::into_inner).replace(act);
        drop(old);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
        self.keyboard.attached.store(false, Ordering::SeqCst);
        // What the handler holds may be the machine: let it go.
        let old = self.keyboard.escape.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(old);
    }
}

#[cfg(test)]
pub(crate) mod tests;
