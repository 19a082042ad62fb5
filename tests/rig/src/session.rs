//! One run of a command in the machine: start (from a snapshot, else by booting; once more if the
//! machine dies before the command runs), hand over the request, carry output and input, wait for
//! the end. Called by `main`; knows frames, not QEMU.

use crate::boot_files::{BootFiles, FixedRun};
use crate::machine::{Console, Machine, Shape, Start};
use crate::memory_root;
use crate::options::{Options, warn};
use crate::process;
use crate::qmp::Qmp;
use crate::snapshot::Snapshot;
use crate::terminal::{self, RawTerminal};
use anyhow::{Context, Result, bail, ensure};
use rig_init::{Frame, Request};
use rustix::process::{Resource, getrlimit};
use std::io::{self, IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Exit code for a command that ran out of time, as timeout(1) has it.
pub const EXIT_TIMEOUT: i32 = 124;

/// The machine's connection to which a new terminal size goes.
static RESIZED: Mutex<Option<UnixStream>> = Mutex::new(None);

/// What the reading thread tells the waiting one.
enum Event {
    Ready,
    /// The command runs; the caller's terminal is raw if the command has one.
    Started(io::Result<Option<RawTerminal>>),
    Exit(i32),
    /// The caller no longer reads the command's output.
    Unread,
    Closed,
}

/// Why a run has no exit code.
enum Failure {
    /// The command did not start: another machine may do better.
    Start(anyhow::Error),
    /// The command ran.
    Run(anyhow::Error),
}

/// Runs the command that `options` names; its exit code.
pub fn run(options: &Options, files: &BootFiles) -> Result<i32> {
    ensure!(!options.tty || io::stdin().is_terminal(), "--tty: standard input is not a terminal");
    process::watch_signals(|signal| match signal {
        libc::SIGWINCH => resize(),
        _ => {
            terminal::restore();
            process::end_all();
            std::process::exit(128 + signal);
        }
    });
    let shape = Shape::of(options);
    let console = Console::new(options.console.as_deref())?;
    let snapshot = match options.cold || options.icount {
        true => None,
        false => saved_machine(options, shape, files, &console),
    };
    let first = match &snapshot {
        Some(snapshot) => restored(options, shape, files, &console, snapshot),
        None => booted(options, shape, files, &console),
    };
    let again = match first {
        Err(Failure::Start(error)) => {
            warn(format!("the machine did not start ({error:#}); booting another"));
            eprint!("{}", console.tail());
            if let Some(snapshot) = snapshot {
                snapshot.discard();
            }
            booted(options, shape, files, &console)
        }
        other => other,
    };
    again.map_err(|failure| {
        eprint!("{}", console.tail());
        match failure {
            Failure::Start(error) | Failure::Run(error) => error,
        }
    })
}

fn saved_machine(options: &Options, shape: Shape, files: &BootFiles, console: &Console) -> Option<Snapshot> {
    let found = Snapshot::find(shape, files).and_then(|found| match found {
        Some(snapshot) => Ok(snapshot),
        None => {
            options.say("booting the machine once, to start it from a snapshot later");
            Snapshot::make(shape, files, console)
        }
    });
    found
        .inspect_err(|error| {
            warn(format!("no snapshot ({error:#}); booting"));
            eprint!("{}", console.tail());
        })
        .ok()
}

fn restored(
    options: &Options,
    shape: Shape,
    files: &BootFiles,
    console: &Console,
    snapshot: &Snapshot,
) -> Result<i32, Failure> {
    let (machine, qmp) = snapshot.start(shape, files, console).map_err(Failure::Start)?;
    keep_awake(qmp);
    let request = request(options).map_err(Failure::Run)?;
    serve(options, machine, Some(request), false, Duration::from_secs(60))
}

fn booted(options: &Options, shape: Shape, files: &BootFiles, console: &Console) -> Result<i32, Failure> {
    let request = request(options).map_err(Failure::Run)?;
    let start = |start| Machine::start(shape, files, start, console).map_err(Failure::Start);
    if !options.icount {
        let machine = start(Start::Boot)?;
        let qmp = machine.qmp.try_clone().map_err(|error| Failure::Start(error.into()))?;
        keep_awake(Qmp::new(qmp).map_err(Failure::Start)?);
        return serve(options, machine, Some(request), true, Duration::from_secs(180));
    }
    // A request or a file on its way in at any moment of the wall clock would upset the machine's.
    let fixed =
        FixedRun { request: request.encode(), root: memory_root::collect(options).map_err(Failure::Run)? };
    let machine = start(Start::BootFixed(&fixed))?;
    serve(options, machine, None, false, Duration::from_secs(1200))
}

/// Interrupts the machine now and then, until it is gone: QEMU loses an interrupt once in some millions of exits, and if that was
/// the timer's of a processor that runs a guest, nothing but another interrupt from outside would end that guest's turn.
fn keep_awake(mut qmp: Qmp) {
    const EVERY: Duration = Duration::from_secs(1);
    thread::spawn(move || {
        while qmp.interrupt().is_ok() {
            thread::sleep(EVERY);
        }
    });
}

/// Hands `request` to the machine (after it said that it is ready, if it will) and serves the
/// command until its end.
fn serve(
    options: &Options,
    machine: Machine,
    mut request: Option<Request>,
    says_ready: bool,
    patience: Duration,
) -> Result<i32, Failure> {
    let start_error = |error: io::Error| Failure::Start(error.into());
    let mut control = machine.control.try_clone().map_err(start_error)?;
    let (sender, events) = mpsc::channel();
    let frames = machine.control.try_clone().map_err(start_error)?;
    let tty = options.tty;
    thread::spawn(move || read_frames(frames, tty, &sender));
    let deadline = Instant::now() + patience;
    if says_ready {
        match next(&events, Some(deadline)) {
            Ok(Event::Ready) => (),
            other => return Err(Failure::Start(unexpected(other))),
        }
    }
    if let Some(request) = &mut request {
        request.time = now();
        Frame::Request(Box::new(request.clone())).write(&mut control).map_err(start_error)?;
    }
    let raw = match next(&events, Some(deadline)) {
        Ok(Event::Started(raw)) => raw.map_err(|error| Failure::Run(error.into()))?,
        other => return Err(Failure::Start(unexpected(other))),
    };

    if options.tty {
        *resized() = Some(control);
        resize();
    }
    if options.stdin || options.tty {
        let port = machine.stdin.try_clone().map_err(start_error)?;
        thread::spawn(move || send_stdin(port));
    }
    let deadline = options.time().map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let result = match next(&events, deadline) {
        Ok(Event::Exit(code)) => Ok(code),
        Ok(Event::Unread) => Ok(128 + libc::SIGPIPE),
        Err(RecvTimeoutError::Timeout) => {
            drop(raw);
            warn(format!(
                "the command ran longer than {} seconds: killed",
                options.time().unwrap_or_default()
            ));
            return Ok(EXIT_TIMEOUT);
        }
        other => Err(Failure::Run(
            unexpected(other).context("the machine died under the command, which is not run again"),
        )),
    };
    drop(raw);
    result
}

fn next(events: &Receiver<Event>, deadline: Option<Instant>) -> Result<Event, RecvTimeoutError> {
    match deadline {
        Some(deadline) => events.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
    }
}

fn unexpected(event: Result<Event, RecvTimeoutError>) -> anyhow::Error {
    anyhow::anyhow!(match event {
        Ok(Event::Ready | Event::Started(_) | Event::Exit(_)) => "an answer out of order",
        Ok(Event::Unread) => "nobody reads the output",
        Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => "it ended without an exit code",
        Err(RecvTimeoutError::Timeout) => "no answer in time",
    })
}

/// Writes the command's output where it belongs and tells `events` the rest. With `tty` the
/// terminal becomes raw here, before the first output and not earlier.
fn read_frames(mut from: UnixStream, tty: bool, events: &Sender<Event>) {
    loop {
        let event = match Frame::read(&mut from) {
            Ok(Frame::Stdout(bytes)) => match write_out(io::stdout().lock(), &bytes) {
                Ok(()) => continue,
                Err(_) => Event::Unread,
            },
            Ok(Frame::Stderr(bytes)) => match write_out(io::stderr().lock(), &bytes) {
                Ok(()) => continue,
                Err(_) => Event::Unread,
            },
            Ok(Frame::Note(text)) => {
                warn(format!("machine: {text}"));
                continue;
            }
            Ok(Frame::Ready) => Event::Ready,
            Ok(Frame::Started) => Event::Started(tty.then(RawTerminal::new).transpose()),
            Ok(Frame::Exit(code)) => Event::Exit(code),
            Ok(_) | Err(_) => Event::Closed,
        };
        let last = !matches!(event, Event::Ready | Event::Started(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}

fn write_out(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Carries the caller's standard input to the machine until its end.
fn send_stdin(mut port: UnixStream) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        // Unbuffered by the standard library: what is not sent stays in the file for others.
        let count = match rustix::io::read(io::stdin(), &mut buffer[..]) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => 0,
        };
        let sent = Frame::Stdin(buffer[..count].to_vec()).write(&mut port);
        if count == 0 || sent.is_err() {
            return;
        }
    }
}

fn resized() -> std::sync::MutexGuard<'static, Option<UnixStream>> {
    RESIZED.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Tells the machine the terminal's size, if the command has a terminal.
fn resize() {
    if let (Some(control), Ok((rows, columns))) = (&mut *resized(), terminal::size()) {
        let _ = Frame::Resize(rows, columns).write(control);
    }
}

/// What the machine shall run: the caller's surroundings, or for a repeatable clock as much of
/// them as does not change from run to run.
fn request(options: &Options) -> Result<Request> {
    let mut seed = vec![0; 32];
    if !options.icount {
        let none = rustix::rand::GetRandomFlags::empty();
        let count = rustix::rand::getrandom(&mut seed[..], none)?;
        ensure!(count == seed.len(), "too few random numbers");
    }
    let limits = [
        (Resource::Core, libc::RLIMIT_CORE),
        (Resource::Memlock, libc::RLIMIT_MEMLOCK),
        (Resource::Nofile, libc::RLIMIT_NOFILE),
        (Resource::Stack, libc::RLIMIT_STACK),
    ]
    .map(|(resource, number)| {
        let limit = getrlimit(resource);
        let value = |limit: Option<u64>| limit.unwrap_or(libc::RLIM_INFINITY);
        (number, value(limit.current), value(limit.maximum))
    });
    let cwd = std::env::current_dir().context("working directory")?;
    if options.command.is_empty() {
        bail!("no command");
    }
    Ok(Request {
        args: options.command.iter().map(|arg| arg.as_bytes().to_vec()).collect(),
        env: std::env::vars_os()
            .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
            .collect(),
        cwd: cwd.as_os_str().as_bytes().to_vec(),
        hostname: rustix::system::uname().nodename().to_bytes().to_vec(),
        seed,
        limits: limits.to_vec(),
        umask: umask(),
        own_root: options.icount,
        time: 0,
        terminal: options.tty.then(terminal::size).transpose()?,
        stdin: options.stdin || options.tty,
    })
}

/// Wall-clock time in nanoseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

/// The file mode creation mask, which can only be read by setting it.
fn umask() -> u32 {
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o77));
    rustix::process::umask(mask);
    mask.as_raw_mode()
}
