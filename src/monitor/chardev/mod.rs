//! The host's ends of character devices: terminal, pipes, files, pseudo-terminals, sockets.
//!
//! The console and the serial port read and write an [`Endpoint`] from their worker threads; nothing in it ever
//! blocks, and all it keeps is bounded. It knows nothing of devices or virtio.

mod backlog;
mod ends;
mod escape;
mod file;
mod poll;
mod pty;
mod pump;
mod socket;
mod stdio;
mod stream;
mod tail;
pub mod terminal;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::bus::lock;
use crate::config::CharTarget;
use crate::event_loop::EventLoop;
use crate::listener;
use crate::output;
use poll::Poll;
use stream::{Descriptor, Stream};
use tail::Tail;

/// What a device waits for: input that it has room for; room for output that was refused, or simply another turn soon, where there
/// is always room.
pub use crate::event_loop::Interest;
pub use ends::{Ends, LastWords};
pub use escape::Escape;

/// Why there is no host end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output file.
    #[error("cannot open output file {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The listening socket.
    #[error(transparent)]
    Socket(#[from] listener::Error),
    /// The pseudo-terminal.
    #[error("cannot make a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// Standard input or output.
    #[error("cannot use standard input and output")]
    Stdio(#[source] io::Error),
    /// The descriptors to wait with.
    #[error("cannot make an epoll descriptor")]
    Poll(#[source] io::Error),
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<Cow<'static, str>> {
        match self {
            Self::File { path, source } => Some(output::hint(path, source, "console.log").into()),
            Self::Socket(error) => Some(error.hint().into()),
            Self::Pty(_) => Some(
                "raise the host's limits: sudo sysctl -w kernel.pty.max=8192 fs.inotify.max_user_instances=1024"
                    .into(),
            ),
            Self::Stdio(_) => {
                Some("send the console elsewhere: `console=pty`, `console=file=PATH` or `console=off`".into())
            }
            Self::Poll(_) => None,
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        match self {
            Self::File { .. } | Self::Socket(_) => true,
            Self::Pty(_) | Self::Stdio(_) | Self::Poll(_) => false,
        }
    }
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// Width.
    pub columns: u16,
    /// Height.
    pub rows: u16,
}

/// One kind of host end. Nothing here blocks.
trait Host: Send {
    /// Takes input: 0 if there is none now.
    fn read(&mut self, buf: &mut [u8]) -> usize;
    /// Takes output: 0 if it is stalled.
    fn write(&mut self, data: &[u8]) -> usize;
    /// Looks after itself: clients come and go.
    fn service(&mut self) {}
    /// Registers what should wake the device. True if it is ready already and cannot be waited for.
    fn watch(&mut self, poll: &Poll, want: Interest) -> bool;
    /// Somebody is at the other end.
    fn connected(&self) -> bool {
        true
    }
    /// The terminal's size, if it is one.
    fn size(&self) -> Option<WindowSize> {
        None
    }
    /// Where to reach it.
    fn path(&self) -> Option<&Path> {
        None
    }
    /// It has put a terminal into raw mode.
    fn is_terminal(&self) -> bool {
        false
    }
    /// Who is told of the terminal's escape sequences.
    fn on_escape(&self, _: Box<dyn FnMut(Escape) + Send>) {}
}

struct Shared {
    host: Box<dyn Host>,
    poll: Poll,
    tail: Tail,
    /// See [`Endpoint::openers`].
    openers: u32,
    next_is_new: bool,
}

impl Shared {
    fn opened(&mut self) {
        if std::mem::take(&mut self.next_is_new) {
            self.openers = self.openers.saturating_add(1);
        }
    }
}

/// A host end: a byte stream each way. Clones are the same end; it lasts as long as one of them.
///
/// One device drives it at a time, like this: wait until [`Endpoint::as_fd`] is readable; call
/// [`service`](Endpoint::service); [`read`](Endpoint::read) and [`write`](Endpoint::write) until they return 0 or
/// the device has had enough; say what to wait for next by [`want`](Endpoint::want). A clone that
/// is kept aside lets clients, the terminal and the pseudo-terminal's name outlive the device (a guest's reboot).
///
/// Nobody connected (socket, pty): output is never refused; the latest 64 KiB of it are kept for the next client.
/// Somebody connected who does not read: [`write`](Endpoint::write) refuses, and nothing is lost.
#[derive(Clone)]
pub struct Endpoint {
    shared: Arc<Mutex<Shared>>,
    fd: Arc<OwnedFd>,
    text: Arc<str>,
}

impl Endpoint {
    /// Opens what the configuration says. A terminal's keys are read by `events`.
    ///
    /// # Errors
    /// [`Error`] names the path and what was tried. Nothing that others use was changed, except that
    /// an output file is truncated.
    pub fn open(place: &CharTarget, events: &EventLoop) -> Result<Self, Error> {
        let host: Box<dyn Host> = match place {
            CharTarget::Off => Box::new(Stream::default()),
            CharTarget::Stdio => Box::new(stdio::Stdio::open(events).map_err(Error::Stdio)?),
            CharTarget::Pty => Box::new(pty::Pty::open()?),
            CharTarget::Socket(path) => Box::new(socket::Socket::listen(path)?),
            CharTarget::File(file) => file::open(file)?,
        };
        let text = match (place, host.path()) {
            (CharTarget::Pty, Some(path)) => format!("pty={}", path.display()),
            _ => place.to_string(),
        };
        Self::new(host, &text).map_err(Error::Poll)
    }

    /// A host end over a connected stream: for tests and for whoever brings their own.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn from_stream(stream: UnixStream) -> io::Result<Self> {
        let input = Some(Descriptor::owned(stream.try_clone()?.into(), "stream")?);
        let output = Some(Descriptor::owned(stream.into(), "stream")?);
        Self::new(Box::new(Stream { input, output }), "stream")
    }

    /// A host end that is a piece of this process: `take` gets all output, on the thread of whoever writes; there is no input.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn from_taker(take: impl FnMut(&[u8]) + Send + 'static) -> io::Result<Self> {
        Self::new(Box::new(Taker(take)), "taker")
    }

    fn new(host: Box<dyn Host>, text: &str) -> io::Result<Self> {
        let poll = Poll::new()?;
        let fd = Arc::new(poll.try_clone_fd()?);
        let shared = Shared { host, poll, tail: Tail::default(), openers: 0, next_is_new: true };
        let endpoint = Self { shared: Arc::new(Mutex::new(shared)), fd, text: text.into() };
        endpoint.want(Interest::default());
        Ok(endpoint)
    }

    /// Lets the host end look after itself (clients who come and go). First thing on every event.
    pub fn service(&self) {
        lock(&self.shared).host.service();
    }

    /// Reads input into `buf`: 0 if there is none now. Input may come again later even after an end of file: a
    /// new client connects.
    pub fn read(&self, buf: &mut [u8]) -> usize {
        lock(&self.shared).host.read(buf)
    }

    /// Takes output, or as much of it as there is room for: 0 means that the other end is stalled. What
    /// nobody will ever read (a closed pipe, `off`) is taken and vanishes.
    pub fn write(&self, data: &[u8]) -> usize {
        let shared = &mut *lock(&self.shared);
        if !data.is_empty() {
            shared.opened();
        }
        let taken = shared.host.write(data);
        shared.tail.push(&data[..taken.min(data.len())]);
        taken
    }

    /// The last few KiB of output that were taken.
    pub fn tail(&self) -> Vec<u8> {
        lock(&self.shared).tail.bytes()
    }

    /// Forgets the output so far: what [`Endpoint::tail`] gives comes after this.
    pub fn forget(&self) {
        lock(&self.shared).tail = Tail::default();
    }

    /// Tells that the device has been reset or set up: who opens it next is another one.
    pub fn set_up_anew(&self) {
        lock(&self.shared).next_is_new = true;
    }

    /// Tells that a driver uses the device. So does whoever writes to it.
    pub fn opened(&self) {
        lock(&self.shared).opened();
    }

    /// How many have used the device, one after the other: a boot program, then a kernel.
    pub fn openers(&self) -> u32 {
        lock(&self.shared).openers
    }

    /// Says what to wait for. Due after every use, because use changes what there is to wait for.
    pub fn want(&self, interest: Interest) {
        let shared = &mut *lock(&self.shared);
        let ready = shared.host.watch(&shared.poll, interest);
        if let Err(error) = shared.poll.set_ready(ready) {
            log::error!("{self}: wait: {error}");
        }
    }

    /// Somebody is at the other end. True of what has no such notion.
    pub fn connected(&self) -> bool {
        lock(&self.shared).host.connected()
    }

    /// The size of the terminal at the other end, if it is one that tells.
    pub fn size(&self) -> Option<WindowSize> {
        lock(&self.shared).host.size()
    }

    /// Where to reach the other end: the pseudo-terminal's or the socket's path.
    pub fn path(&self) -> Option<PathBuf> {
        lock(&self.shared).host.path().map(Path::to_owned)
    }

    /// It is the terminal that the monitor was started from, in raw mode.
    pub fn is_terminal(&self) -> bool {
        lock(&self.shared).host.is_terminal()
    }

    /// Has `act` called, on the thread that reads the terminal, when a person types an escape sequence. It replaces who
    /// was told before. Without effect where there is no terminal.
    pub fn on_escape(&self, act: impl FnMut(Escape) + Send + 'static) {
        lock(&self.shared).host.on_escape(Box::new(act));
    }
}

impl AsFd for Endpoint {
    /// Readable (level-triggered) when something that the device wants has come about.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// As the configuration writes it, with the path of a pseudo-terminal.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.text).finish()
    }
}

/// See [`Endpoint::from_taker`].
struct Taker<F>(F);

impl<F: FnMut(&[u8]) + Send> Host for Taker<F> {
    fn read(&mut self, _: &mut [u8]) -> usize {
        0
    }

    fn write(&mut self, data: &[u8]) -> usize {
        (self.0)(data);
        data.len()
    }

    fn watch(&mut self, _: &Poll, want: Interest) -> bool {
        want.output
    }
}

#[cfg(test)]
mod tests;
