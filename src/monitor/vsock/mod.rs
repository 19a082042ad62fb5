//! Sockets: where a guest's connections leave for the host, and come from. They know no virtio.
//!
//! The host's side is unix sockets in Firecracker's manner. Whoever connects to PATH and says `CONNECT PORT` reaches that port of the
//! guest; the guest reaches on port N of the host whoever listens at PATH_N. Messages (SOCK_SEQPACKET) have PATH.seqpacket, and
//! sockets of their own type.
//!
//! Or it is AF_VSOCK, and the host's kernel has all of it ([`Vhost`]).

mod callers;
mod end;
mod error;
mod limit;
mod owner;
mod unsent;
mod vhost;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::config::Vsock;
use crate::event_loop::Interest;
use crate::listener::Listener;
use crate::poller::{self, Poller};
use crate::timer::Timer;
use callers::Callers;

pub use end::{End, Input};
pub use error::Error;
pub use limit::MAX_CONNECTIONS;
pub use vhost::Vhost;

/// What goes over a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    Stream,
    /// Messages.
    Seqpacket,
}

impl Kind {
    fn socket_type(self) -> SocketType {
        match self {
            Self::Stream => SocketType::STREAM,
            Self::Seqpacket => SocketType::SEQPACKET,
        }
    }

    /// What is waited for where nothing waits to be sent. That a stream's reader takes no more shows in nothing else than that there
    /// is, all of a sudden, room ([`End::is_read`]).
    fn interest(self) -> Interest {
        match self {
            Self::Stream => Interest::BOTH,
            Self::Seqpacket => Interest::INPUT,
        }
    }
}

/// What happens on the host's side.
#[derive(Debug)]
pub enum Event {
    /// A program of the host calls this port of the guest, and waits at this end.
    Call(End, u32),
    /// A connection can go on.
    Ready {
        /// The end's.
        id: u64,
        /// There is something to read, or the end of it.
        input: bool,
        /// There is room to write, or nobody to write to.
        output: bool,
        /// The program on the host is gone.
        hung_up: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Caller,
    Connection,
    Timer,
}

impl poller::Source for Source {
    const ALL: &'static [Self] = &[Self::Listener, Self::Caller, Self::Connection, Self::Timer];
}

/// Connections taken from one socket before others have their turn.
const TURN: usize = 64;
/// The name of the socket in a machine's own folder.
pub const SOCKET: &str = "vsock";
/// What follows a socket's name in that of the one for messages.
const SEQPACKET: &str = ".seqpacket";
/// How long until a host that was out of descriptors is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// The host's side of one guest. Never blocks.
#[derive(Debug)]
pub struct Host {
    path: PathBuf,
    /// The same path, as it is found when the guest runs.
    way: PathBuf,
    /// Others may put sockets beside ours.
    is_shared: bool,
    listeners: [(Listener, Kind); 2],
    /// For as long as the way leads through it.
    _folder: Option<Arc<OwnedFd>>,
    callers: Callers,
    poller: Poller<Source>,
    timer: Timer,
    /// When the timer runs out.
    armed: Option<Instant>,
    /// The host was out of descriptors: nobody is taken in before.
    retry_at: Option<Instant>,
    next_id: u64,
    limit: usize,
}

impl Host {
    /// At `path`; or at `path` in `folder`, whatever that is called by then.
    fn open(path: &Path, folder: Option<Arc<OwnedFd>>) -> Result<Self, Error> {
        let path = checked(path)?;
        let way = folder.as_ref().map(|folder| format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()));
        let way = way.map(PathBuf::from);
        let listener = |path: &Path, kind: Kind| Ok((Listener::bind(path, kind.socket_type())?, kind));
        let mut listeners = [
            listener(&path, Kind::Stream)?,
            listener(&beside(&path, SEQPACKET), Kind::Seqpacket).map_err(Error::Listen)?,
        ];
        if let Some(way) = &way {
            let ways = [way.clone(), beside(way, SEQPACKET)];
            listeners.iter_mut().zip(ways).for_each(|((listener, _), way)| listener.lies_at(way));
        }
        let host = Self {
            is_shared: owner::is_shared(&path),
            way: way.unwrap_or_else(|| path.clone()),
            path,
            listeners,
            _folder: folder,
            callers: Callers::default(),
            poller: Poller::new()?,
            timer: Timer::new()?,
            armed: None,
            retry_at: None,
            next_id: 0,
            limit: limit::raise(),
        };
        host.poller.add(&host.timer, Source::Timer, 0, Interest::INPUT)?;
        host.listen()?;
        Ok(host)
    }

    /// Takes in who connects.
    fn listen(&self) -> io::Result<()> {
        let mut listeners = self.listeners.iter().zip(0..);
        listeners.try_for_each(|((listener, _), id)| self.poller.add_steady(listener, Source::Listener, id))
    }

    /// The most connections at a time.
    pub fn limit(&self) -> usize {
        self.limit
    }

    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// What has happened. There may be more, and the set is readable then.
    pub fn events(&mut self) -> Vec<Event> {
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
            if let Err(error) = self.listen() {
                log::error!("{}: wait for clients: {error}", self.path.display());
            }
        }
        let mut events = Vec::new();
        for ready in self.poller.ready() {
            match ready.source {
                Source::Listener => self.accept(ready.id as usize),
                Source::Caller => events.extend(self.hear(ready.id)),
                Source::Connection => events.push(Event::Ready {
                    id: ready.id,
                    input: ready.input,
                    output: ready.output,
                    hung_up: ready.hung_up,
                }),
                Source::Timer => self.armed = None,
            }
        }
        events
    }

    fn accept(&mut self, number: usize) {
        for _ in 0..TURN {
            let Some((listener, kind)) = self.listeners.get(number) else { return };
            let kind = *kind;
            match listener.accept() {
                Ok(fd) => {
                    let id = self.next_id();
                    match self.poller.add(&fd, Source::Caller, id, Interest::INPUT) {
                        Ok(()) => self.callers.add(id, fd, kind),
                        Err(error) => log::warn!("{}: wait for a client: {error}", self.path.display()),
                    }
                }
                Err(Errno::AGAIN) => return,
                // One who is gone already.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => {
                    log::warn!("{}: take in a client: {error}", self.path.display());
                    // They wait in the socket's queue, and nobody is woken for them meanwhile.
                    self.listeners.iter().for_each(|(listener, _)| drop(self.poller.remove(listener)));
                    self.retry_at = Some(Instant::now() + RETRY);
                    return;
                }
            }
        }
    }

    /// Takes in a program of this process, as if it had connected. Its end of the connection, which blocks.
    fn take_in(&mut self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let (ours, id) = (OwnedFd::from(ours), self.next_id());
        self.poller.add(&ours, Source::Caller, id, Interest::INPUT)?;
        self.callers.add(id, ours, Kind::Stream);
        Ok(theirs)
    }

    fn hear(&mut self, id: u64) -> Option<Event> {
        let call = self.callers.ready(id)?;
        let end = self.poller.change(&call.fd, Source::Connection, id, call.kind.interest());
        match end.and_then(|()| End::new(call.fd, id, call.kind)) {
            Ok(end) => Some(Event::Call(end, call.port)),
            Err(error) => {
                log::warn!("{}: a client: {error}", self.path.display());
                None
            }
        }
    }

    /// Connects to who listens for the guest on `port`.
    ///
    /// # Errors
    /// Nobody does, or not for this kind, or too many wait there already; or, of kind [`io::ErrorKind::PermissionDenied`], it is
    /// somebody whom this user may not reach, or not by this path.
    pub fn connect(&mut self, port: u32, kind: Kind) -> io::Result<End> {
        let path = beside(&self.way, &format!("_{port}"));
        // Held until there is a connection.
        let (path, _own) = if self.is_shared { owner::own(&path)? } else { (path, None) };
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, kind.socket_type(), flags, None)?;
        connect(&fd, &address)?;
        let id = self.next_id();
        self.poller.add(&fd, Source::Connection, id, kind.interest())?;
        End::new(fd, id, kind)
    }

    /// From now on it is told, or not, when `end` takes more. Of streams it always is.
    pub fn wait_for_room(&self, end: &End, on: bool) {
        let interest = if on { Interest::BOTH } else { end.kind().interest() };
        if let Err(error) = self.poller.change(end, Source::Connection, end.id(), interest) {
            log::error!("{}: wait for a client: {error}", self.path.display());
        }
    }

    /// The set is readable at `deadline` at the latest.
    pub fn wake_at(&mut self, deadline: Option<Instant>) {
        let next = deadline.into_iter().chain(self.retry_at).min();
        // One that comes too early only looks around in vain.
        if let Some(next) = next.filter(|next| self.armed.is_none_or(|armed| *next < armed)) {
            self.timer.set(Some(next.saturating_duration_since(Instant::now())));
            self.armed = Some(next);
        }
    }
}

/// `path` as an absolute one, if a socket can lie there.
fn checked(path: &Path) -> Result<PathBuf, Error> {
    // The longest that lies beside it: `_` and ten digits, or `.seqpacket`.
    const LONGEST: usize = 107 - 11;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if path.as_os_str().len() > LONGEST {
        return Err(Error::TooLong { path, most: LONGEST });
    }
    Ok(path)
}

/// The path that `suffix` makes of `path`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = OsString::from(path);
    path.push(suffix);
    path.into()
}

/// The host's side, shared by the device and who keeps it over the guest's resets. Clones are the same.
#[derive(Debug, Clone)]
pub struct Sockets {
    host: Arc<Mutex<Host>>,
    /// Its set once more: to be waited on without a lock.
    fd: Arc<OwnedFd>,
}

impl Sockets {
    /// Listens at `path`.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::new(Host::open(path, None)?)
    }

    fn new(host: Host) -> Result<Self, Error> {
        let fd = Arc::new(host.poller.as_fd().try_clone_to_owned()?);
        Ok(Self { host: Arc::new(Mutex::new(host)), fd })
    }

    /// The host's side, for one turn.
    pub fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to a guest for programs of this process, without the socket. It does not keep the sockets open.
#[derive(Debug, Clone)]
pub struct Dialer(Weak<Mutex<Host>>);

impl Dialer {
    /// A connection whose other end has yet to hear `CONNECT PORT`, as if it had been made by the socket.
    ///
    /// # Errors
    /// The machine has ended; the host is out of descriptors.
    pub fn dial(&self) -> io::Result<UnixStream> {
        let host = self.0.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        host.lock().unwrap_or_else(PoisonError::into_inner).take_in()
    }
}

impl AsFd for Sockets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The sockets of one configuration, opened once and kept over the guest's resets.
#[derive(Debug, Default)]
pub struct Doors {
    open: Option<Sockets>,
    kernel: Option<Arc<Vhost>>,
    /// Where they are if the configuration does not say: a folder's path, and the folder, which another process may rename.
    default: Option<(PathBuf, Arc<OwnedFd>)>,
}

impl Doors {
    /// They are in this folder if the configuration does not say where.
    pub fn lie_in(&mut self, (path, folder): (PathBuf, OwnedFd)) {
        self.default = Some((path, Arc::new(folder)));
    }

    /// The sockets, opened now if they are asked for the first time.
    ///
    /// # Errors
    /// [`Error`]
    pub fn get(&mut self, config: &Vsock) -> Result<Sockets, Error> {
        if let Some(open) = &self.open {
            return Ok(open.clone());
        }
        let sockets = match (&config.path, &self.default) {
            (Some(path), _) => Sockets::open(path)?,
            (None, Some((path, folder))) => {
                Sockets::new(Host::open(&path.join(SOCKET), Some(folder.clone()))?)?
            }
            (None, None) => return Err(Error::NoPath),
        };
        self.open = Some(sockets.clone());
        Ok(sockets)
    }

    /// The way to the guest for programs of this process; none if the sockets are not open.
    pub fn dialer(&self) -> Option<Dialer> {
        self.open.as_ref().map(|sockets| Dialer(Arc::downgrade(&sockets.host)))
    }

    /// The kernel's end, opened now if it is asked for the first time. Connections of an earlier guest have ended.
    ///
    /// # Errors
    /// [`Error`]
    pub fn kernel(&mut self, config: &Vsock) -> Result<Arc<Vhost>, Error> {
        if let Some(kernel) = &self.kernel {
            kernel.renew()?;
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(Vhost::open(config.cid())?);
        self.kernel = Some(kernel.clone());
        Ok(kernel)
    }
}
