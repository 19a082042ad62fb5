//! Standard error, which may stall: a stopped terminal, a full pipe, a dead connection. Logging never waits for it.
//!
//! Log lines go to a bounded queue, and a thread of its own writes them ([`serve`]). The last message of a run ([`say`]) is
//! waited for, but only for so long.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use env_logger::{Builder, Env, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_monitor::output::Rotating;
use vmm_monitor::printable;
use vmm_monitor::threads::{self, Role};

/// Bytes of lines that wait.
const LIMIT: usize = 256 << 10;
/// How long last words wait for a stalled standard error.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// What a pipe or terminal that is ready takes without blocking.
const PIECE: usize = 256;

struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: u64,
    /// There is a thread.
    served: bool,
    /// It is in a system call.
    writing: bool,
}

static STATE: Mutex<State> =
    Mutex::new(State { lines: VecDeque::new(), bytes: 0, dropped: 0, served: false, writing: false });
static CHANGED: Condvar = Condvar::new();
/// What takes the place of standard error.
static FILE: Mutex<Option<Rotating>> = Mutex::new(None);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn push(&mut self, line: &[u8]) {
        if self.bytes + line.len() > LIMIT {
            self.dropped += 1;
            return;
        }
        self.bytes += line.len();
        self.lines.push_back(line.to_vec());
    }

    fn take(&mut self) -> Vec<u8> {
        let mut text = self.lines.drain(..).flatten().collect::<Vec<_>>();
        self.bytes = 0;
        if self.dropped > 0 {
            let (lost, end) = (std::mem::take(&mut self.dropped), line_end());
            let _ = write!(text, "vmm: warn: {lost} log lines lost: standard error was stalled{end}");
        }
        text
    }
}

/// A guest's console may have put the terminal into raw mode, where a line feed does not return to the first column; in any other
/// mode the extra return does no harm.
fn line_end() -> &'static str {
    if io::stderr().is_terminal() { "\r\n" } else { "\n" }
}

/// Where env_logger writes.
struct Queue;

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        state().push(line);
        CHANGED.notify_all();
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging with so many `-v`s: warnings unless they or `RUST_LOG` say otherwise.
pub fn start(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    Builder::from_env(Env::default().default_filter_or(level))
        .target(Target::Pipe(Box::new(Queue)))
        .format(move |out, record| {
            let end = line_end();
            let text = printable::lines(&record.args().to_string()).replace('\n', end);
            let level = record.level().as_str().to_lowercase();
            if verbose == 0 {
                return write!(out, "vmm: {level}: {text}{end}");
            }
            let time = out.timestamp_millis();
            write!(out, "{time} {level} {}: {text}{end}", record.target())
        })
        .init();
}

/// Starts the thread that writes log lines. Without it they wait for [`say`]. Nothing happens if there is one.
pub fn serve() {
    if std::mem::replace(&mut state().served, true) {
        return;
    }
    let run = || {
        loop {
            let waited = CHANGED.wait_while(state(), |state| state.lines.is_empty());
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            let text = state.take();
            state.writing = true;
            drop(state);
            if !write_to_file(&text) {
                // Gone: there is nobody to tell.
                let _ = io::stderr().write_all(&text);
            }
            self::state().writing = false;
            CHANGED.notify_all();
        }
    };
    // Without a thread they come at the end.
    if threads::spawn(Role::Log, run).is_err() {
        state().served = false;
    }
}

/// Has all that is logged and said go to `file` from now on: for a run that leaves its terminal.
pub fn move_to(file: Rotating) {
    *FILE.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
}

/// False if there is no file to write to. What the file does not take is lost, as there is nobody to tell.
fn write_to_file(text: &[u8]) -> bool {
    let mut file = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(file) = &mut *file else { return false };
    let mut rest = text;
    while !rest.is_empty() {
        match file.write(rest) {
            Ok((written, _)) if written > 0 => rest = &rest[written..],
            _ => break,
        }
    }
    true
}

/// Writes the lines that wait, and then `text`, in one piece if it can be. A standard error that takes nothing for half a second
/// gets nothing.
pub fn say(text: &str) {
    let end = Instant::now() + LAST_WORDS;
    let mut queue = state();
    while queue.writing {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        queue = CHANGED.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
    }
    let mut waiting = queue.take();
    drop(queue);
    waiting.extend_from_slice(text.as_bytes());
    if write_to_file(&waiting) {
        return;
    }
    let mut rest = waiting.as_slice();
    while !rest.is_empty() {
        let Some(piece) = room(rest.len(), end) else { return };
        match rustix::io::write(io::stderr(), &rest[..piece]) {
            Ok(written) => rest = &rest[written..],
            Err(rustix::io::Errno::INTR) => {}
            // There is nobody to tell.
            Err(_) => return,
        }
    }
}

/// How many of `len` bytes standard error takes without blocking, once it takes any. None: nothing until `end`.
fn room(len: usize, end: Instant) -> Option<usize> {
    let left = end.saturating_duration_since(Instant::now());
    let stderr = io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
        Ok(0) => None,
        // A terminal's word is worth less than a pipe's.
        Ok(_) if stderr.is_terminal() => Some(len.min(PIECE)),
        Ok(_) => Some(len.min(4096)),
        Err(_) => Some(len),
    }
}
