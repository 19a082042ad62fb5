//! Serves clients by a port of the guest's console, one after the other, where there is no vsock: see [`vmm_agent::port`].
//!
//! The port is waited for by the edge: while nobody is at the host's end it reports a hang-up all the time.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, read, write};
use vmm_agent::port::{END, NAME, Reader, Token, put, put_mark};

use crate::listen;

/// How much is carried at once.
const PIECE: usize = 32 << 10;

/// Opens the port, if the guest has it.
pub fn find() -> Option<OwnedFd> {
    open(device()?, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Its device. Where there is no udev nobody makes /dev/virtio-ports, so sysfs is asked for the names.
fn device() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let named = |port: &fs::DirEntry| {
        fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim_end() == NAME)
    };
    let port = ports.flatten().find(named)?;
    Some(Path::new("/dev").join(port.file_name()))
}

/// The port, and the client that has it.
struct Line {
    port: OwnedFd,
    reader: Reader,
    /// The near end of its session's connection.
    session: Option<UnixStream>,
    /// Somebody has been seen at the host's end since the session began: of a hang-up before that nothing follows, as the kernel may
    /// tell of a client after what it sent.
    seen: bool,
    /// What was read of the port, and not looked at yet.
    came: Vec<u8>,
    /// The token of a client that has come.
    mark: Option<Token>,
    /// For the session.
    input: Vec<u8>,
    /// For the port.
    output: Vec<u8>,
}

/// Serves whoever is at the host's end. Returns when the port is gone.
pub fn serve(port: OwnedFd) {
    let (came, input, output) = (Vec::new(), Vec::new(), Vec::new());
    let reader = Reader::default();
    let mut line = Line { port, reader, session: None, seen: false, came, mark: None, input, output };
    // What the port has gets lost with it.
    let _ = line.run();
}

impl Line {
    fn run(&mut self) -> Result<(), Errno> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let all = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&events, &self.port, epoll::EventData::new_u64(0), all)?;
        let mut ready = Vec::with_capacity(4);
        loop {
            self.look()?;
            let received = self.receive()?;
            // Without one its client waits in vain, and says so.
            if let Some(token) = self.mark.take()
                && let Ok(session) = begin()
            {
                epoll::add(&events, &session, epoll::EventData::new_u64(1), all)?;
                put_mark(token, &mut self.output);
                self.session = Some(session);
            }
            let moved = [received, self.hand_in(), self.take_out(), self.send()?];
            if moved == [false; 4] {
                ready.clear();
                match epoll::wait(&events, rustix::buffer::spare_capacity(&mut ready), None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Ends the session of a client who has gone.
    fn look(&mut self) -> Result<(), Errno> {
        let mut port = [PollFd::new(&self.port, PollFlags::empty())];
        poll(&mut port, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let is_there = !port[0].revents().contains(PollFlags::HUP);
        if self.seen && !is_there && self.came.is_empty() {
            self.session = None;
        }
        self.seen = self.session.is_some() && (self.seen || is_there);
        Ok(())
    }

    /// Reads from the port, if what was read before has been handed in. True if there was something.
    fn receive(&mut self) -> Result<bool, Errno> {
        if self.came.is_empty() && self.input.is_empty() {
            self.came.resize(PIECE, 0);
            let read = read(&self.port, &mut self.came[..]);
            self.came.truncate(*read.as_ref().unwrap_or(&0));
            match read {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        let (count, mark) = self.reader.read(&self.came, &mut self.input);
        self.came.drain(..count);
        if mark.is_some() {
            // Whatever there was belonged to the client before.
            self.input.clear();
            self.output.clear();
            (self.session, self.seen) = (None, false);
            self.mark = mark.filter(|token| *token != END);
        }
        Ok(count > 0)
    }

    /// Hands the session what has come for it. True if it took some.
    fn hand_in(&mut self) -> bool {
        let Some(session) = &mut self.session else {
            self.input.clear();
            return false;
        };
        if self.input.is_empty() {
            return false;
        }
        match session.write(&self.input) {
            Ok(count) => {
                self.input.drain(..count);
                true
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => false,
            // It has ended: that is found where it is read.
            Err(_) => {
                self.input.clear();
                true
            }
        }
    }

    /// Takes what the session says, if what it said before has been sent. True if there was something.
    fn take_out(&mut self) -> bool {
        let Some(session) = self.session.as_mut().filter(|_| self.output.is_empty()) else { return false };
        let mut bytes = [0; PIECE];
        match session.read(&mut bytes) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => false,
            Ok(0) | Err(_) => {
                self.session = None;
                put_mark(END, &mut self.output);
                true
            }
            Ok(count) => {
                put(&bytes[..count], &mut self.output);
                true
            }
        }
    }

    /// Sends what the port takes. True if it took some.
    fn send(&mut self) -> Result<bool, Errno> {
        if self.output.is_empty() {
            return Ok(false);
        }
        match write(self.port.as_fd(), &self.output) {
            Ok(count) => {
                self.output.drain(..count);
                Ok(count > 0)
            }
            // Nobody is there, or does not read.
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A session for a client that has come; the near end of its connection.
fn begin() -> io::Result<UnixStream> {
    let (near, far) = UnixStream::pair()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    listen::start(far.into());
    Ok(near)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_agent::protocol::{Decoder, Exec, Message, Request, Stream, VERSION};

    fn opening(token: Token, request: Request) -> Vec<u8> {
        let mut message = Message::Hello { version: VERSION, nonce: 7 }.to_vec();
        Message::Request(request).put(&mut message);
        let mut bytes = Vec::new();
        put_mark(token, &mut bytes);
        put(&message, &mut bytes);
        bytes
    }

    fn facts_come(client: &mut UnixStream, token: Token) {
        client.write_all(&opening(token, Request::Facts)).unwrap();
        let (mut reader, mut decoder, mut data, mut bytes) =
            (Reader::default(), Decoder::default(), Vec::new(), [0; 999]);
        let (mut ours, mut told) = (false, false);
        loop {
            let count = client.read(&mut bytes).unwrap();
            assert!(count > 0, "the line is gone");
            let mut rest = &bytes[..count];
            while !rest.is_empty() {
                data.clear();
                let (count, mark) = reader.read(rest, &mut data);
                rest = &rest[count..];
                if ours {
                    decoder.feed(&data);
                    while let Some(message) = decoder.next().unwrap() {
                        told |= matches!(message, Message::Facts(_));
                    }
                }
                if told && mark == Some(END) {
                    return;
                }
                ours |= mark == Some(token);
            }
        }
    }

    #[test]
    fn a_client_finds_the_agent_whatever_those_before_left() {
        let (port, mut client) = UnixStream::pair().unwrap();
        port.set_nonblocking(true).unwrap();
        std::thread::spawn(move || serve(port.into()));
        facts_come(&mut client, [1; 8]);
        client.write_all(b"noise").unwrap();
        facts_come(&mut client, [0xff; 8]);
        // One that stops in the middle of a message, and leaves a command that talks without end.
        let exec = Exec { argv: vec![b"yes".to_vec()], stdin: true, ..Exec::default() };
        client.write_all(&opening([2; 8], Request::Exec(exec))).unwrap();
        let mut piece = Vec::new();
        put(&Message::Data(Stream::Stdin, b"half").to_vec()[..6], &mut piece);
        client.write_all(&piece).unwrap();
        facts_come(&mut client, [3; 8]);
        // And one in the middle of its mark.
        client.write_all(&opening([4; 8], Request::Facts)[..5]).unwrap();
        facts_come(&mut client, [5; 8]);
    }
}
