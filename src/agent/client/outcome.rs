//! Waits for the end of what has neither input nor a reader of its output, and keeps the beginning of what it complained of.

use std::time::Instant;

use super::{Error, Session, failed, is_timeout, left};
use crate::protocol::{Exit, Malformed, Message, Stream};

/// The most that is kept of complaints, in bytes.
const KEPT: usize = 2048;

impl Session {
    /// How it ended, and what it wrote to stderr, as far as that is kept. One that is not over by `deadline` is hung up.
    ///
    /// # Errors
    /// It is not over; the connection is lost; the agent breaks the protocol.
    pub fn outcome(mut self, deadline: Instant) -> Result<(Exit, String), Error> {
        let (started, mut complaints) = (Instant::now(), Vec::new());
        let lost = |error| Error::Lost(Some(error));
        loop {
            // Also of one that has much to say.
            if Instant::now() >= deadline {
                return Err(Error::Silent { waited: started.elapsed() });
            }
            self.stream.set_read_timeout(Some(left(deadline))).map_err(lost)?;
            let read = match self.receive() {
                Ok(Some(Message::Data(stream @ (Stream::Stdout | Stream::Stderr), bytes))) => {
                    let room = if stream == Stream::Stderr { KEPT - complaints.len() } else { 0 };
                    complaints.extend_from_slice(&bytes[..bytes.len().min(room)]);
                    (stream, bytes.len() as u32)
                }
                Ok(Some(Message::End(Stream::Stdout | Stream::Stderr))) => continue,
                Ok(Some(Message::Exit(exit))) => {
                    return Ok((exit, String::from_utf8_lossy(&complaints).trim_end().to_owned()));
                }
                Ok(Some(Message::Failed(reason, text))) => return Err(failed(reason, text)),
                Ok(Some(_)) => return Err(Malformed::Order.into()),
                Ok(None) => return Err(Error::Lost(None)),
                Err(Error::Lost(Some(error))) if is_timeout(&error) => continue,
                Err(error) => return Err(error),
            };
            let (stream, count) = read;
            // An agent that is done with it reads no more, and its last word is on the way.
            let _ = self.sender.send(&Message::Credit(stream, count));
        }
    }
}
