//! The terminal that the monitor was started from: raw while a guest has it, and given back whatever happens.
//!
//! Entered when a host end on standard input opens, left when that is dropped, on panic, and on signals that end or
//! stop the process. The control thread reads the keys, so that Ctrl-A x works however stuck the guest is.
//! What SIGTERM and SIGINT mean for the guest is not decided here: whoever has a policy installs it before.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fs::OFlags;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use signal_hook::low_level::emulate_default_handler;

use super::escape::{self, Escape, Key, Scanner};
use super::stream::Descriptor;
use crate::event_loop::{EventLoop, Handler, Interest, Registration, Sources};

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
const BACKGROUND_LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };

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

/// The keys typed, from the loop that reads the terminal to whoever takes them.
struct Keyboard {
    queue: Mutex<VecDeque<u8>>,
    /// Readable while there are keys.
    available: OwnedFd,
    /// Wakes the loop: it should look at `queue` again.
    look: OwnedFd,
    /// Readable after the size of the window has changed.
    resized: OwnedFd,
    attached: AtomicBool,
    escape: Mutex<Option<EscapeHandler>>,
}

type EscapeHandler = Box<dyn FnMut(Escape) + Send>;

fn signal(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

fn clear(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0u8; 8][..]);
}

impl Keyboard {
    fn new() -> io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            queue: Mutex::default(),
            available: event()?,
            look: event()?,
            resized: event()?,
            attached: AtomicBool::new(true),
            escape: Mutex::default(),
        })
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Signals that end a process that does nothing about them.
const DEADLY: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// Tokens of what the loop waits for.
const SIGNALS: u32 = 0;
const LOOK: u32 = 1;
const KEYS: u32 = 2;
const BACKGROUND: u32 = 3;

/// What the loop runs: reads keys as long as there is room for them, and handles the terminal's signals.
struct Reader {
    keyboard: Arc<Keyboard>,
    input: Descriptor,
    echo: Descriptor,
    signals: SignalDelivery<UnixStream, SignalOnly>,
    scanner: Scanner,
    listening: bool,
    /// Ticks while this process is a job in the background.
    background: OwnedFd,
}

impl Reader {
    fn room(&self) -> usize {
        QUEUE_LIMIT - self.keyboard.queue().len().min(QUEUE_LIMIT)
    }

    /// Waits for keys if there is room for them and they are ours, and not at all otherwise: a hang-up is reported even to those
    /// who do not listen.
    fn listen(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        let foreground = take_if_in_foreground();
        let tick = if foreground || self.input.is_closed() { Timespec::default() } else { BACKGROUND_LOOK };
        let spec = Itimerspec { it_interval: tick, it_value: tick };
        timerfd_settime(&self.background, TimerfdTimerFlags::empty(), &spec)?;
        let listen = self.room() > 0 && foreground && !self.input.is_closed();
        if listen != std::mem::replace(&mut self.listening, listen) {
            let keys = self.input.source();
            return if listen { sources.add(keys, KEYS, Interest::INPUT) } else { sources.remove(keys) };
        }
        Ok(())
    }
}

impl Handler for Reader {
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        sources.add(self.signals.get_read(), SIGNALS, Interest::INPUT)?;
        sources.add(&self.keyboard.look, LOOK, Interest::INPUT)?;
        sources.add(&self.background, BACKGROUND, Interest::INPUT)?;
        self.listen(sources)
    }

    fn ready(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
        match token {
            SIGNALS => self.signals.pending().for_each(|number| self.keyboard.on_signal(number)),
            LOOK => clear(&self.keyboard.look),
            BACKGROUND => clear(&self.background),
            // The foreground may have been taken away since.
            _ if !take_if_in_foreground() => {}
            _ => {
                let mut keys = [0; 512];
                let room = self.room().min(keys.len());
                let len = self.input.read(&mut keys[..room]);
                self.keyboard.typed(&keys[..len], &mut self.scanner, &mut self.echo);
            }
        }
        if let Err(error) = self.listen(sources) {
            log::error!("terminal: wait: {error}");
        }
    }
}

/// The signals that the terminal's loop handles: its own, and the deadly ones that would otherwise leave a
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
    signals.extend(DEADLY.into_iter().chain([SIGTSTP]).filter(free));
    signals
}

/// Standard input as a raw terminal. Dropping it gives the terminal back.
pub(super) struct Terminal {
    keyboard: Arc<Keyboard>,
    /// Set: the signals have their default effect again.
    released: Arc<AtomicBool>,
    _reader: Registration,
}

impl Terminal {
    /// Takes the terminal on standard input over; `events` reads its keys.
    pub(super) fn attach(events: &EventLoop) -> io::Result<Self> {
        let terminal = io::stdin().as_fd().try_clone_to_owned()?;
        let original = tcgetattr(&terminal)?;
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        });
        {
            let mut user = borrowed();
            if user.is_some() {
                return Err(io::Error::other("standard input has a user already"));
            }
            user.replace(Borrowed { terminal, original, raw: false });
        }
        Self::read_by(events).inspect_err(|_| restore())
    }

    /// The terminal is ours, and in raw mode if it is in our hands.
    fn read_by(events: &EventLoop) -> io::Result<Self> {
        take_if_in_foreground();
        let keyboard = Arc::new(Keyboard::new()?);
        let released = Arc::<AtomicBool>::default();
        let signals = ours();
        // Before the others, which come after it in a handler's list.
        for signal in signals.iter().filter(|signal| ![SIGWINCH, SIGCONT].contains(signal)) {
            signal_hook::flag::register_conditional_default(*signal, released.clone())?;
        }
        let (read, write) = UnixStream::pair()?;
        let reader = Reader {
            keyboard: keyboard.clone(),
            input: Descriptor::shared(io::stdin().as_fd(), OFlags::RDONLY, "terminal")?,
            echo: Descriptor::shared(io::stdin().as_fd(), OFlags::WRONLY, "terminal")?,
            signals: SignalDelivery::with_pipe(read, write, SignalOnly, signals)?,
            scanner: Scanner::default(),
            listening: false,
            background: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
        };
        let reader = events.add(reader)?;
        Ok(Self { keyboard, released, _reader: reader })
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
        self.released.store(true, Ordering::SeqCst);
        self.keyboard.attached.store(false, Ordering::SeqCst);
        // What the handler holds may be the machine: let it go.
        let old = self.keyboard.escape.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(old);
    }
}

#[cfg(test)]
pub(crate) mod tests;
