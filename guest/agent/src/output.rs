//! What is to be sent to the client, and has not been taken yet.

use std::io;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::{Errno, read};
use rustix::net::{SendFlags, send};
use vmm_agent::protocol::{MAX_DATA, Message, Stream};

/// While so much waits, nothing is read that would add to it, streams or messages.
const FULL: usize = 256 << 10;

/// Bytes that wait to be sent.
#[derive(Debug, Default)]
pub struct Output {
    bytes: Vec<u8>,
    sent: usize,
}

impl Output {
    pub fn put(&mut self, message: &Message<'_>) {
        message.put(&mut self.bytes);
    }

    pub fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    pub fn is_full(&self) -> bool {
        self.bytes.len() - self.sent >= FULL
    }

    /// Puts a message with what one read(2) of `from` reads, `limit` bytes at most, without copying it again, and without touching
    /// memory for what it does not read. Nothing is put if it reads nothing.
    pub fn put_read(&mut self, stream: Stream, limit: usize, from: impl AsFd) -> Result<usize, Errno> {
        let start = self.bytes.len();
        Message::Data(stream, &[]).put(&mut self.bytes);
        let limit = limit.min(MAX_DATA);
        self.bytes.reserve(limit);
        let result = read(from, &mut self.bytes.spare_capacity_mut()[..limit]).map(|(bytes, _)| bytes.len());
        let count = result.unwrap_or(0);
        if count == 0 {
            self.bytes.truncate(start);
            return result;
        }
        // SAFETY: so many bytes behind those that were there are read, and their place is within the capacity.
        unsafe { self.bytes.set_len(self.bytes.len() + count) };
        let length = (count as u32 + 1).to_le_bytes();
        self.bytes[start + 1..start + 4].copy_from_slice(&length[..3]);
        result
    }

    /// Sends what the connection takes.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send(&mut self, connection: BorrowedFd<'_>) -> io::Result<()> {
        while !self.is_empty() {
            match send(connection.as_fd(), &self.bytes[self.sent..], SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.is_empty() {
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent >= FULL {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}
