//! [`Unsent`]: what a connection's reader on the host has not taken yet.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read};
use std::os::fd::AsFd;

use rustix::io::{Errno, writev};
use rustix::net::{SendFlags, send};

use super::Kind;
use crate::memory::Buffers;

/// Messages without a byte that may wait: nothing else bounds those.
const MAX_EMPTY: usize = 1024;

/// Bytes that wait, of a stream or in messages. Who adds them bounds them; there is memory for as many only while there are any.
#[derive(Debug, Default)]
pub struct Unsent {
    bytes: VecDeque<u8>,
    /// Lengths of the messages that are whole.
    messages: VecDeque<u32>,
    /// Bytes of the message that is not.
    begun: usize,
    /// Messages without a byte.
    empty: usize,
}

impl Unsent {
    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.messages.is_empty()
    }

    /// Whether there is something that a reader could take: of a message all, that is.
    pub fn is_sendable(&self, kind: Kind) -> bool {
        match kind {
            Kind::Stream => !self.bytes.is_empty(),
            Kind::Seqpacket => !self.messages.is_empty(),
        }
    }

    /// Adds all of `data`. `most` is what there may ever be.
    pub fn add(&mut self, data: &mut Buffers, most: usize) {
        if self.bytes.capacity() == 0 && !data.is_empty() {
            self.bytes.reserve_exact(most);
        }
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = data.read(&mut piece) {
            self.bytes.extend(&piece[..n]);
            self.begun += n;
        }
    }

    /// What was added since the last message ends here, and is one.
    ///
    /// # Errors
    /// Too many without a byte wait already.
    pub fn end_message(&mut self) -> io::Result<()> {
        let len = std::mem::take(&mut self.begun);
        self.empty += usize::from(len == 0);
        if self.empty > MAX_EMPTY {
            return Err(io::Error::other("the guest sends empty messages that nobody takes"));
        }
        self.messages.push_back(len as u32);
        Ok(())
    }

    /// Sends what `fd` takes. Returns how many bytes that was.
    ///
    /// # Errors
    /// The host's, but for one that only says to wait.
    pub fn flush(&mut self, fd: impl AsFd, kind: Kind) -> io::Result<usize> {
        let mut sent = 0;
        while self.is_sendable(kind) {
            let len = self.messages.front().map_or(self.bytes.len(), |len| *len as usize);
            match self.send(&fd, len) {
                Ok(n) => {
                    self.bytes.drain(..n);
                    sent += n;
                    if kind == Kind::Seqpacket {
                        self.messages.pop_front();
                        self.empty -= usize::from(len == 0);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.bytes.is_empty() {
            self.bytes = VecDeque::new();
        }
        Ok(sent)
    }

    /// Sends the first `len` bytes, by one call.
    fn send(&self, fd: impl AsFd, len: usize) -> rustix::io::Result<usize> {
        // An empty message is what no writev sends.
        if len == 0 {
            return send(fd, &[], SendFlags::NOSIGNAL);
        }
        let (front, back) = self.bytes.as_slices();
        let first = &front[..len.min(front.len())];
        let second = &back[..len - first.len()];
        writev(fd, &[IoSlice::new(first), IoSlice::new(second)])
    }
}
