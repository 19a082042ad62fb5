//! [`End`]: the host's end of one connection, a unix socket that does not block.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendFlags, Shutdown, recv, recvmsg, send, shutdown, sockopt,
};

use super::Kind;
use super::unsent::Unsent;
use crate::memory::{Buffers, Slices};

/// What a socket may hold for its reader: a message has to fit whole.
const SEND_BUFFER: usize = 256 << 10;

/// What there is to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// Nothing, for now.
    Nothing,
    /// No more.
    End,
    /// So many bytes: of a message all of its, even none.
    Bytes(usize),
}

/// The host's end of a connection.
#[derive(Debug)]
pub struct End {
    fd: OwnedFd,
    id: u64,
    kind: Kind,
    unsent: Unsent,
}

impl End {
    /// Over a socket that is connected.
    pub(super) fn new(fd: OwnedFd, id: u64, kind: Kind) -> io::Result<Self> {
        ioctl_fionbio(&fd, true)?;
        if kind == Kind::Seqpacket {
            // Each message comes with its sender's name then, and so an empty one differs from the end.
            sockopt::set_socket_passcred(&fd, true)?;
            sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER)?;
        }
        Ok(Self { fd, id, kind, unsent: Unsent::default() })
    }

    /// What events on it are told by. No other connection ever has the same.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What goes over it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Sends what came from the guest; `ends` says that a message does, with it. What the reader does not take now waits here, at
    /// most `most` bytes for all that is known to the caller. Returns how many bytes went on, of these and those that waited.
    ///
    /// # Errors
    /// Nobody reads any more, or a message does not fit into the socket.
    pub fn send(&mut self, mut data: Buffers, ends: bool, most: usize) -> io::Result<usize> {
        let mut sent = 0;
        while self.unsent.is_empty() && !data.is_empty() && (ends || self.kind == Kind::Stream) {
            let slices = Slices::of([&data], 0);
            if self.kind == Kind::Seqpacket && !slices.is_whole() {
                break;
            }
            match slices.write_to(&self.fd, &[]) {
                Ok(n) if n == data.len() => return Ok(sent + n),
                Ok(n) => {
                    sent += n;
                    data = data.split_off_back(data.len() - n);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.unsent.add(&mut data, most);
        if self.kind == Kind::Seqpacket && ends {
            self.unsent.end_message()?;
            sent += self.flush()?;
        }
        Ok(sent)
    }

    /// Sends on what waits. Returns how many bytes went on.
    ///
    /// # Errors
    /// As [`End::send`].
    pub fn flush(&mut self) -> io::Result<usize> {
        self.unsent.flush(&self.fd, self.kind)
    }

    /// Nothing waits to be sent.
    pub fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// The reader has to take something before more goes on.
    pub fn is_stalled(&self) -> bool {
        self.unsent.is_sendable(self.kind)
    }

    /// Whether the reader of a stream may still take something. Of messages that shows only when one is sent.
    pub fn is_read(&self) -> bool {
        let nothing = || send(&self.fd, &[], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        self.kind == Kind::Seqpacket || !matches!(nothing(), Err(Errno::PIPE | Errno::CONNRESET))
    }

    /// What waits is not sent any more.
    pub fn discard(&mut self) {
        self.unsent = Unsent::default();
    }

    /// What there is to read: of a stream whether there is something, of messages the next one's length. Takes nothing.
    ///
    /// # Errors
    /// The writer is gone, and not by ending.
    pub fn look(&self) -> io::Result<Input> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        if self.kind == Kind::Stream {
            return input(recv(&self.fd, &mut [0], flags).map(|(n, _)| n), false);
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(&self.fd, &mut [], &mut control, flags | RecvFlags::TRUNC);
        let is_message = control.drain().next().is_some();
        input(message.map(|message| message.bytes), is_message)
    }

    /// Whether the program on the host is gone.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::empty())];
        let _ = poll(&mut fds, Some(&Timespec::default()));
        fds[0].revents().contains(PollFlags::HUP)
    }

    /// Takes up to `limit` bytes, straight into `room`.
    ///
    /// # Errors
    /// As [`End::look`].
    pub fn receive(&self, room: &Slices, limit: usize) -> io::Result<Input> {
        let taken = room.read_from(&self.fd, &mut [], limit, &mut []);
        input(taken.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)), false)
    }

    /// Takes the next message, which has `len` bytes.
    ///
    /// # Errors
    /// As [`End::look`].
    pub fn take_message(&self, len: usize) -> io::Result<Vec<u8>> {
        let mut message = vec![0; len];
        let (n, _) = recv(&self.fd, &mut *message, RecvFlags::DONTWAIT)?;
        message.truncate(n);
        Ok(message)
    }

    /// Tells the host's program that its call was answered at host port `port`.
    ///
    /// # Errors
    /// It is gone.
    pub fn greet(&self, port: u32) -> io::Result<()> {
        let line = format!("OK {port}\n");
        // Nothing was sent before, so it fits.
        let sent = send(&self.fd, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        if sent == line.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
    }

    /// The program on the host reads the end behind what was sent.
    pub fn end_output(&self) {
        // Fails only where it is gone.
        let _ = shutdown(&self.fd, Shutdown::Write);
    }

    /// The program on the host can write no more.
    pub fn end_input(&self) {
        let _ = shutdown(&self.fd, Shutdown::Read);
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What a read came to, which may be of a message of no bytes.
fn input(read: rustix::io::Result<usize>, is_message: bool) -> io::Result<Input> {
    match read {
        Ok(0) if !is_message => Ok(Input::End),
        Ok(n) => Ok(Input::Bytes(n)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Input::Nothing),
        Err(error) => Err(error.into()),
    }
}
