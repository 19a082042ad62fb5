//! Where gdb connects: a unix socket that only its owner may open, or a TCP port.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use gdbstub::conn::Connection;

use crate::chardev::{self, Listener};

/// A gdb that takes nothing for so long is gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// Answers are sent in pieces of so many bytes at most.
const PIECE: usize = 4096;

/// `unix:PATH` or `tcp:[HOST:]PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A socket's path.
    Unix(PathBuf),
    /// Host and port: "127.0.0.1:1234".
    Tcp(String),
}

impl TryFrom<&OsStr> for Place {
    type Error = &'static str;

    fn try_from(text: &OsStr) -> Result<Self, Self::Error> {
        const FORM: &str = "expected unix:PATH or tcp:[HOST:]PORT";
        if let Some(path) = text.as_bytes().strip_prefix(b"unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(OsStr::from_bytes(path).into()));
        }
        match text.to_str().ok_or(FORM)?.split_once(':') {
            Some(("tcp", port)) if port.parse::<u16>().is_ok() => Ok(Self::Tcp(format!("127.0.0.1:{port}"))),
            Some(("tcp", address)) => match address.rsplit_once(':') {
                Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                    Ok(Self::Tcp(address.to_owned()))
                }
                _ => Err(FORM),
            },
            _ => Err(FORM),
        }
    }
}

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The unix socket.
    #[error(transparent)]
    Unix(#[from] chardev::Error),
    /// The TCP port.
    #[error("cannot listen on {address}")]
    Tcp {
        /// Where.
        address: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The host is out of threads or descriptors.
    #[error("cannot start the thread that talks to gdb")]
    Thread(#[source] io::Error),
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unix(error) => error.hint(),
            Self::Tcp { .. } => Some("choose a free port, or a unix socket: `gdb=unix:PATH`"),
            Self::Thread(_) => None,
        }
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
            Place::Unix(path) => Ok(Self::Unix(Listener::bind(path)?)),
            Place::Tcp(address) => {
                let failed = |source| Error::Tcp { address: address.clone(), source };
                let listener = TcpListener::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Self::Tcp(listener))
            }
        }
    }

    /// The next who wants to connect.
    pub fn accept(&self) -> Option<Line> {
        let line = match self {
            Self::Unix(listener) => Stream::Unix(listener.accept()?.into()),
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
        assert_eq!(place("tcp:1234"), Ok(Place::Tcp("127.0.0.1:1234".to_owned())));
        assert_eq!(place("tcp:[::1]:1"), Ok(Place::Tcp("[::1]:1".to_owned())));
        for wrong in ["", "1234", "unix:", "tcp:", "tcp:x", "tcp:99999", "tcp::1", "udp:1"] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }
}
