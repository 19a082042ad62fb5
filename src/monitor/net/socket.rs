//! Frames over a unix socket: a stream as QEMU's `-netdev stream` has it, or datagrams.
//!
//! In a stream each frame has its length in front, four bytes, the most significant first: what passt, gvproxy, socket_vmnet and
//! QEMU itself speak. Short frames of one batch go together: a write wakes the peer, which costs more than copying them. Beside
//! those, a frame of which the socket takes or gives only a part stays here, and nothing else does.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::{Error, HEADER, Head, MAX_FRAME, START, Wire};
use crate::memory::{Buffers, Slices};
use crate::planted;

/// Bytes of a frame's length in a stream.
const PREFIX: usize = 4;

/// Bytes of the longest frame that waits for others, and of all that wait.
const SHORT: usize = 2 << 10;
const BATCH: usize = 32 << 10;

/// A stream socket.
pub struct Stream {
    socket: OwnedFd,
    up: bool,
    refused: bool,
    /// Short frames of this batch, and what is left of a frame that the peer has begun to take, prefixes and all.
    unsent: Vec<u8>,
    /// Length of the next frame, and how many bytes of that have come.
    prefix: [u8; PREFIX],
    prefixed: usize,
    /// What has come of that frame, if not all of it came at once.
    begun: Vec<u8>,
}

/// What there is to read.
enum Came {
    Bytes(usize),
    Nothing,
}

impl Stream {
    /// A connection to who listens at `path`.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Connect { path: path.to_owned(), source };
        let open = || {
            planted::check(path)?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // A listener that does not come round to us is an error, too, and not waited for.
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Self::new(socket)
        };
        open().map_err(failed)
    }

    /// A connection that is there.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let (unsent, begun) = Default::default();
        Ok(Self { socket, up: true, refused: false, unsent, prefix: [0; PREFIX], prefixed: 0, begun })
    }

    /// The peer is gone, or cannot be understood any more.
    fn lose(&mut self, why: &str) {
        log::warn!("network socket: {why}: the link is down");
        self.up = false;
        (self.unsent, self.begun) = Default::default();
    }

    /// What a read gave.
    fn came(&mut self, result: io::Result<usize>) -> Came {
        match result {
            Ok(0) => self.lose("the peer has closed it"),
            Ok(n) => return Came::Bytes(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => self.lose(&error.to_string()),
        }
        Came::Nothing
    }

    /// Reads the length of the next frame. `None` if it has not come.
    fn length(&mut self) -> Option<usize> {
        while self.prefixed < PREFIX {
            let read = rustix::io::read(&self.socket, &mut self.prefix[self.prefixed..]);
            match self.came(read.map_err(Into::into)) {
                Came::Bytes(n) => self.prefixed += n,
                Came::Nothing => return None,
            }
        }
        let len = u32::from_be_bytes(self.prefix) as usize;
        if len > MAX_FRAME {
            self.lose(&format!("a frame of {len} bytes, more than any has"));
            return None;
        }
        Some(len)
    }

    /// Reads on in a frame of `len` bytes of which a part is here. True when it is whole.
    fn complete(&mut self, len: usize) -> bool {
        while self.begun.len() < len {
            let mut rest = vec![0; len - self.begun.len()];
            let read = rustix::io::read(&self.socket, &mut rest);
            match self.came(read.map_err(Into::into)) {
                Came::Bytes(n) => self.begun.extend_from_slice(&rest[..n]),
                Came::Nothing => return false,
            }
        }
        true
    }
}

impl Wire for Stream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn is_up(&self) -> bool {
        self.up
    }

    fn send(&mut self, _: &[u8; HEADER], frame: &Buffers) -> bool {
        let slices = Slices::of([frame], 0);
        if !self.up || !slices.is_whole() || slices.len() > MAX_FRAME {
            self.refused = true;
            return true;
        }
        let prefix = (slices.len() as u32).to_be_bytes();
        let (held, all) = (self.unsent.len(), PREFIX + slices.len());
        if all <= SHORT && held + all <= BATCH {
            self.unsent.resize(held + all, 0);
            self.unsent[held..held + PREFIX].copy_from_slice(&prefix);
            slices.copy_to(0, &mut self.unsent[held + PREFIX..]);
            return true;
        }
        if !self.flush() {
            return false;
        }
        match slices.write_to(&self.socket, &prefix) {
            Ok(n) if n < all => {
                // The rare case in which a frame is copied: where the socket has taken a part, the rest has to follow.
                self.unsent = vec![0; all];
                self.unsent[..PREFIX].copy_from_slice(&prefix);
                slices.copy_to(0, &mut self.unsent[PREFIX..]);
                self.unsent.drain(..n);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) => {
                self.lose(&error.to_string());
                self.refused = true;
            }
        }
        true
    }

    fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match rustix::io::write(&self.socket, &self.unsent) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return false,
                Err(error) => self.lose(&error.to_string()),
            }
        }
        self.unsent = Vec::new();
        true
    }

    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        if !self.up {
            return None;
        }
        let len = self.length()?;
        *head = Head::default();
        let (start, behind) = (len.min(START), len.saturating_sub(START));
        if self.begun.is_empty() && behind <= rest.len() && len > 0 {
            let mut next = [0; PREFIX];
            let read = rest.read_from(&self.socket, &mut [&mut head.start[..start]], behind, &mut next);
            let Came::Bytes(n) = self.came(read) else { return None };
            if n >= len {
                (self.prefix, self.prefixed) = (next, n - len);
                return Some(len);
            }
            // Only a part has come: it comes back out of the guest's buffers, which may serve another purpose meanwhile.
            self.begun = vec![0; n];
            let own = n.min(start);
            self.begun[..own].copy_from_slice(&head.start[..own]);
            rest.copy_to(0, &mut self.begun[own..]);
        }
        if !self.complete(len) {
            return None;
        }
        self.prefixed = 0;
        let frame = std::mem::take(&mut self.begun);
        head.start[..start].copy_from_slice(&frame[..start]);
        rest.copy_from(&frame[start..]);
        Some(len)
    }
}

/// A socket whose datagrams are frames.
pub struct Datagram {
    socket: OwnedFd,
    /// An empty message is the end (SOCK_SEQPACKET).
    connected: bool,
    up: bool,
    refused: bool,
}

impl Datagram {
    /// On a socket that is connected.
    pub fn new(socket: OwnedFd, connected: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket, connected, up: true, refused: false })
    }

    fn lose(&mut self, why: &str) {
        log::warn!("network socket: {why}: the link is down");
        self.up = false;
    }
}

impl Wire for Datagram {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn is_up(&self) -> bool {
        self.up
    }

    fn send(&mut self, _: &[u8; HEADER], frame: &Buffers) -> bool {
        let slices = Slices::of([frame], 0);
        if !self.up || !slices.is_whole() || slices.len() > MAX_FRAME {
            self.refused = true;
            return true;
        }
        match slices.write_to(&self.socket, &[]) {
            Ok(_) => return true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) if is_the_end(&error) => self.lose(&error.to_string()),
            // Too large for the socket, say: as on any wire, the frame is lost.
            Err(_) => {}
        }
        self.refused = true;
        true
    }

    fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        if !self.up {
            return None;
        }
        *head = Head::default();
        // A byte more than there is room for tells a frame that was cut from one that fits.
        let mut over = [0];
        match rest.read_from(&self.socket, &mut [&mut head.start], usize::MAX, &mut over) {
            Ok(0) if self.connected => self.lose("the peer has closed it"),
            Ok(n) => return Some(n),
            Err(error) if is_the_end(&error) => self.lose(&error.to_string()),
            Err(_) => {}
        }
        None
    }
}

fn is_the_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionRefused | ConnectionReset | NotConnected)
}
