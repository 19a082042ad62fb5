//! Where gdb connects: a unix socket that only its owner may open, or a TCP port.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gdbstub::conn::Connection;

use rustix::net::SocketType;
use vmm_monitor::listener::{self, Listener};

/// A gdb that takes nothing for so long is gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// Answers are sent in pieces of so many bytes at most.
const PIECE: usize = 4096;

/// `unix:PATH` or `tcp:[HOST:]PORT[,public]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A socket's path.
    Unix(PathBuf),
    /// A TCP port. gdb has no password: whoever reaches it has the guest.
    Tcp {
        /// Host and port: "127.0.0.1:1234".
        address: String,
        /// An address that other machines reach is meant.
        public: bool,
    },
}

impl Place {
    /// The path of its socket, if it is one.
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp { .. } => None,
        }
    }
}

impl TryFrom<&OsStr> for Place {
    type Error = &'static str;

    fn try_from(text: &OsStr) -> Result<Self, Self::Error> {
        const FORM: &str = "expected unix:PATH or tcp:[HOST:]PORT[,public]";
        if let Some(path) = text.as_bytes().strip_prefix(b"unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(OsStr::from_bytes(path).into()));
        }
        match text.to_str().ok_or(FORM)?.split_once(':') {
            Some(("tcp", address)) => {
                let (address, public) = match address.strip_suffix(",public") {
                    Some(address) => (address, true),
                    None => (address, false),
                };
                let (host, port) = address.rsplit_once(':').unwrap_or(("127.0.0.1", address));
                match port.parse::<u16>() {
                    Ok(_) if !host.is_empty() => Ok(Self::Tcp { address: format!("{host}:{port}"), public }),
                    _ => Err(FORM),
                }
            }
            _ => Err(FORM),
        }
    }
}

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The unix socket.
    #[error(transparent)]
    Unix(#[from] listener::Error),
    /// The TCP port.
    #[error("cannot listen on {address}")]
    Tcp {
        /// Where.
        address: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Other machines would reach the TCP port, and nobody said that they may.
    #[error(
        "`gdb=tcp:{address}`: {reached} is not this machine's own, so whoever reaches it could debug the guest"
    )]
    Exposed {
        /// Where.
        address: String,
        /// What that is.
        reached: IpAddr,
    },
    /// The host is out of threads or descriptors.
    #[error("cannot start the thread that talks to gdb")]
    Thread(#[source] io::Error),
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unix(error) => Some(error.hint()),
            Self::Tcp { .. } => Some("choose a free port, or a unix socket: `gdb=unix:PATH`"),
            Self::Exposed { .. } => {
                Some("use `gdb=unix:PATH` and ssh, or add ,public if everybody there may have the guest")
            }
            Self::Thread(_) => None,
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        matches!(self, Self::Exposed { .. })
    }
}

/// A socket that listens.
#[derive(Debug)]
pub enum Door {
    Unix(Listener),
    Tcp(TcpListener),
}

impl Door {
    /// Opens it.
    pub fn open(place: &Place) -> Result<Self, Error> {
        match place {
            Place::Unix(path) => Ok(Self::Unix(Listener::bind(path, SocketType::STREAM)?)),
            Place::Tcp { address, public } => {
                let failed = |source| Error::Tcp { address: address.clone(), source };
                let places: Vec<_> = address.to_socket_addrs().map_err(failed)?.collect();
                // A name can stand for several.
                if let (false, Some(place)) = (public, places.iter().find(|place| !place.ip().is_loopback()))
                {
                    return Err(Error::Exposed { address: address.clone(), reached: place.ip() });
                }
                let listener = TcpListener::bind(&*places).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self::Tcp(listener))
            }
        }
    }

    /// Who can connect, in words.
    pub fn who(&self) -> &'static str {
        match self {
            Self::Unix(_) => "only you can connect",
            Self::Tcp(listener) if listener.local_addr().is_ok_and(|at| at.ip().is_loopback()) => {
                "every user of this machine can connect"
            }
            Self::Tcp(_) => "everybody who reaches this machine can connect",
        }
    }

    /// The next who wants to connect.
    pub fn accept(&self) -> Option<Line> {
        let line = match self {
            Self::Unix(listener) => Stream::Unix(listener.accept().ok()?.into()),
            Self::Tcp(listener) => Stream::Tcp(listener.accept().ok()?.0),
        };
        line.prepare().ok()?;
        Some(Line { stream: line, waiting: Vec::new() })
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// What to say to gdb: `target remote` takes it.
impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(listener) => write!(f, "{}", listener.path().display()),
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "{address}"),
                Err(_) => f.write_str("?"),
            },
        }
    }
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_write_timeout(Some(PATIENCE)),
            Self::Tcp(stream) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(PATIENCE))
            }
        }
    }
}

/// A connection to gdb. What is said goes out in whole packets.
#[derive(Debug)]
pub struct Line {
    stream: Stream,
    waiting: Vec<u8>,
}

impl Line {
    /// Takes what has come; 0 bytes: gdb is gone. To be called when there is something.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Unix(stream) => stream.read(buf),
            Stream::Tcp(stream) => stream.read(buf),
        }
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Connection for Line {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.waiting.push(byte);
        if self.waiting.len() >= PIECE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        match &mut self.stream {
            Stream::Unix(stream) => Write::write_all(stream, &waiting),
            Stream::Tcp(stream) => Write::write_all(stream, &waiting),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        let place = |text: &str| Place::try_from(OsStr::new(text));
        assert_eq!(place("unix:/a:b"), Ok(Place::Unix("/a:b".into())));
        let bytes = OsStr::from_bytes(b"/\xff");
        assert_eq!(Place::try_from(OsStr::from_bytes(b"unix:/\xff")), Ok(Place::Unix(bytes.into())));
        let tcp = |address: &str, public| Ok(Place::Tcp { address: address.to_owned(), public });
        assert_eq!(place("tcp:1234"), tcp("127.0.0.1:1234", false));
        assert_eq!(place("tcp:[::1]:1"), tcp("[::1]:1", false));
        assert_eq!(place("tcp:0.0.0.0:1,public"), tcp("0.0.0.0:1", true));
        for wrong in ["", "1234", "unix:", "tcp:", "tcp:x", "tcp:99999", "tcp::1", "udp:1", "tcp:1,open"] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_port_that_others_reach_wants_an_explicit_word() {
        let open = |text: &str| Door::open(&OsStr::new(text).try_into().unwrap());
        for exposed in ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:192.0.2.1:0"] {
            assert!(matches!(open(exposed), Err(Error::Exposed { .. })), "{exposed}");
        }
        for (place, who) in [
            ("tcp:0", "every user"),
            ("tcp:localhost:0", "every user"),
            ("tcp:0.0.0.0:0,public", "everybody"),
        ] {
            assert!(open(place).unwrap().who().starts_with(who), "{place}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gdb");
        assert!(open(&format!("unix:{}", path.display())).unwrap().who().starts_with("only you"));
    }
}
