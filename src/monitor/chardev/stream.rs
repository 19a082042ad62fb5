//! Descriptors that must never block: a reader, a writer, or a pair of them as a host end.
//!
//! The hard part is that a descriptor that was handed to us (stdin, stdout) shares its open file description,
//! flags included, with the caller's shell: setting O_NONBLOCK there would break it after we are gone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FileType, Mode as Permissions, OFlags, fcntl_getfl, fcntl_setfl, fstat, major, minor, open,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::termios::isatty;

use super::file::Loss;
use super::poll::{EventFlags, Poll, Watch};
use super::pump::Pump;
use super::{Host, Interest};

/// How a descriptor is kept from blocking.
#[derive(Debug)]
enum Mode {
    /// A description of our own, with O_NONBLOCK.
    Nonblocking,
    /// A socket: every call says MSG_DONTWAIT.
    Socket,
    /// Shared, and cannot be reopened: a thread of its own does the system calls.
    Pumped(Pump),
    /// A regular file or /dev/null: never waits, and cannot be polled.
    Always,
}

/// One direction of a stream.
#[derive(Debug)]
pub struct Descriptor {
    fd: OwnedFd,
    mode: Mode,
    watch: Watch,
    /// For messages.
    name: String,
    /// At its end, or broken: reads give nothing and writes vanish from now on.
    closed: bool,
    /// What errors that did not end it cost.
    loss: Loss,
}

impl Descriptor {
    /// From a descriptor whose description others share. `access` is O_RDONLY or O_WRONLY.
    pub fn shared(fd: BorrowedFd<'_>, access: OFlags, name: &str) -> io::Result<Self> {
        let stat = fstat(fd)?;
        let (mode, fd) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => (Mode::Socket, fd.try_clone_to_owned()?),
            // Reopening /dev/ptmx would make a new terminal.
            FileType::Fifo => reopen(fd, access)?,
            FileType::CharacterDevice
                if isatty(fd) && (major(stat.st_rdev), minor(stat.st_rdev)) != (5, 2) =>
            {
                reopen(fd, access)?
            }
            // /dev/null and its kin (Documentation/admin-guide/devices.txt, 1 char).
            FileType::CharacterDevice if major(stat.st_rdev) == 1 => (Mode::Always, fd.try_clone_to_owned()?),
            FileType::CharacterDevice => pump(fd, access)?,
            // Not reopened: it would have a file position of its own.
            _ => (Mode::Always, fd.try_clone_to_owned()?),
        };
        Ok(Self { fd, mode, watch: None, name: name.to_owned(), closed: false, loss: Loss::default() })
    }

    /// From a descriptor whose description is ours alone.
    pub fn owned(fd: OwnedFd, name: &str) -> io::Result<Self> {
        let mode = match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
            FileType::Socket => Mode::Socket,
            FileType::RegularFile | FileType::BlockDevice => Mode::Always,
            _ => {
                fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
                Mode::Nonblocking
            }
        };
        Ok(Self { fd, mode, watch: None, name: name.to_owned(), closed: false, loss: Loss::default() })
    }

    /// Reads what is there: 0 if nothing is, now or for ever ([`Descriptor::is_closed`]).
    pub fn read(&mut self, buf: &mut [u8]) -> usize {
        if self.closed || buf.is_empty() {
            return 0;
        }
        let result = match &self.mode {
            Mode::Socket => recv(&self.fd, &mut *buf, RecvFlags::DONTWAIT).map(|(_, len)| len.min(buf.len())),
            Mode::Pumped(pump) => pump.read(buf),
            _ => rustix::io::read(&self.fd, &mut *buf),
        };
        match result {
            Ok(0) => {
                log::debug!("{}: end of input", self.name);
                self.closed = true;
                0
            }
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // A terminal whose other end is gone says EIO; it is an end like any other.
            Err(error) => {
                log::debug!("{}: end of input: {error}", self.name);
                self.closed = true;
                0
            }
        }
    }

    /// Writes what fits: 0 if it is stalled. What a broken descriptor is given vanishes.
    pub fn write(&mut self, data: &[u8]) -> usize {
        if self.closed || data.is_empty() {
            return data.len();
        }
        let result = match &self.mode {
            Mode::Socket => send(&self.fd, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Mode::Pumped(pump) => pump.write(data),
            Mode::Nonblocking | Mode::Always => rustix::io::write(&self.fd, data),
        };
        match result {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error @ (Errno::PIPE | Errno::IO | Errno::BADF | Errno::CONNRESET | Errno::NXIO)) => {
                log::warn!("{}: {error}; further output is discarded", self.name);
                self.closed = true;
                data.len()
            }
            // A full disk may have room again later.
            Err(error) => {
                self.loss.add(&self.name, &error, data.len());
                data.len()
            }
        }
    }

    /// No more will come, or can go.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Waits for `events`, or for nothing at all. True if there is no need to wait.
    pub fn watch(&mut self, poll: &Poll, events: Option<EventFlags>) -> bool {
        if matches!(self.mode, Mode::Always) {
            return events.is_some() && !self.closed;
        }
        let wanted = events.filter(|_| !self.closed);
        let (fd, wanted) = match &self.mode {
            Mode::Pumped(pump) => (pump.as_fd(), wanted.map(|_| EventFlags::IN)),
            _ => (self.fd.as_fd(), wanted),
        };
        match poll.set(fd, &mut self.watch, wanted) {
            Ok(()) => false,
            // /dev/null and its kin cannot be polled: they never block either.
            Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
                self.mode = Mode::Always;
                wanted.is_some()
            }
            Err(error) => {
                log::error!("{}: wait: {error}", self.name);
                false
            }
        }
    }
}

impl Descriptor {
    /// What is readable when there is input: for a reader's own loop.
    pub fn source(&self) -> BorrowedFd<'_> {
        match &self.mode {
            Mode::Pumped(pump) => pump.as_fd(),
            _ => self.fd.as_fd(),
        }
    }
}

/// A description of our own for the same pipe or terminal; the given one where that is not allowed (a
/// terminal of another user, no /proc).
fn reopen(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<(Mode, OwnedFd)> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match open(path, flags, Permissions::empty()) {
        Ok(own) => Ok((Mode::Nonblocking, own)),
        Err(_) => pump(fd, access),
    }
}

fn pump(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<(Mode, OwnedFd)> {
    let pump = Pump::new(fd.try_clone_to_owned()?, access == OFlags::RDONLY)?;
    Ok((Mode::Pumped(pump), fd.try_clone_to_owned()?))
}

/// A host end that is a reader and a writer, either of which may be missing.
#[derive(Debug, Default)]
pub struct Stream {
    /// Bytes for the guest come from here.
    pub input: Option<Descriptor>,
    /// Bytes from the guest go here; nowhere if absent.
    pub output: Option<Descriptor>,
}

impl Host for Stream {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        self.input.as_mut().map_or(0, |input| input.read(buf))
    }

    fn write(&mut self, data: &[u8]) -> usize {
        self.output.as_mut().map_or(data.len(), |output| output.write(data))
    }

    fn watch(&mut self, poll: &Poll, want: Interest) -> bool {
        let events = |wanted: bool, events| wanted.then_some(events);
        let read = self.input.as_mut().is_some_and(|i| i.watch(poll, events(want.input, EventFlags::IN)));
        let write = match &mut self.output {
            Some(output) => output.watch(poll, events(want.output, EventFlags::OUT)) || output.is_closed(),
            None => true,
        };
        read || (write && want.output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};
    use std::time::{Duration, Instant};

    use rustix::event::PollFlags;

    use super::super::poll::ready_now;

    /// Other tests start processes, which hold copies of this one's descriptors for a moment: an end of ours that is
    /// closed may be seen as such a little later.
    fn until(mut done: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < end, "nothing happened for 10 s");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn expect_end(input: &mut Descriptor) {
        until(|| {
            assert_eq!(input.read(&mut [0; 4]), 0);
            input.is_closed()
        });
    }

    fn flags(fd: impl AsFd) -> OFlags {
        fcntl_getfl(fd).unwrap()
    }

    #[test]
    fn a_shared_pipe_keeps_its_flags_and_does_not_block() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut input = Descriptor::shared(reader.as_fd(), OFlags::RDONLY, "in").unwrap();
        let mut output = Descriptor::shared(writer.as_fd(), OFlags::WRONLY, "out").unwrap();
        assert!(matches!((&input.mode, &output.mode), (Mode::Nonblocking, Mode::Nonblocking)));
        assert!(!flags(&reader).contains(OFlags::NONBLOCK) && !flags(&writer).contains(OFlags::NONBLOCK));
        let mut buf = [0; 100];
        assert_eq!(input.read(&mut buf), 0);
        assert!(!input.is_closed());
        let mut total = 0;
        loop {
            match output.write(&[7; 5000]) {
                0 => break,
                taken => total += taken,
            }
        }
        assert!((4096..=1 << 20).contains(&total), "{total}");
        drop(output);
        writer.flush().unwrap();
        drop(writer);
        while total > 0 {
            total -= input.read(&mut buf);
        }
        expect_end(&mut input);
    }

    #[test]
    fn what_cannot_be_reopened_does_not_block_either() {
        let (reader, writer) = io::pipe().unwrap();
        let pumped = |fd: OwnedFd, access| {
            let (mode, fd) = pump(fd.as_fd(), access).unwrap();
            Descriptor { fd, mode, watch: None, name: String::new(), closed: false, loss: Loss::default() }
        };
        let mut input = pumped(reader.into(), OFlags::RDONLY);
        let mut output = pumped(writer.into(), OFlags::WRONLY);
        let poll = Poll::new().unwrap();
        let epoll = poll.try_clone_fd().unwrap();
        assert!(!input.watch(&poll, Some(EventFlags::IN)));
        assert!(ready_now(epoll.as_fd(), PollFlags::IN).is_empty());
        assert_eq!(output.write(b"words"), 5);
        let (mut buf, mut said) = ([0; 9], Vec::new());
        until(|| {
            let len = input.read(&mut buf);
            said.extend_from_slice(&buf[..len]);
            said == b"words"
        });
        drop(output);
        expect_end(&mut input);
    }

    #[test]
    fn a_regular_file_shares_its_position_and_is_always_ready() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before").unwrap();
        let mut poll = Poll::new().unwrap();
        let mut output = Descriptor::shared(file.as_fd(), OFlags::WRONLY, "file").unwrap();
        assert!(output.watch(&poll, Some(EventFlags::OUT)));
        assert_eq!(output.write(b" after"), 6);
        assert_eq!(file.stream_position().unwrap(), 12);
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut input = Descriptor::shared(null.as_fd(), OFlags::RDONLY, "null").unwrap();
        assert!(input.watch(&poll, Some(EventFlags::IN)), "cannot be polled, so it is ready");
        assert_eq!((input.read(&mut [0; 4]), input.is_closed()), (0, true));
        assert!(!input.watch(&poll, Some(EventFlags::IN)), "at its end it is never ready again");
        poll.set_ready(true).unwrap();
        let epoll = poll.try_clone_fd().unwrap();
        assert!(ready_now(epoll.as_fd(), PollFlags::IN).contains(PollFlags::IN));
        poll.set_ready(false).unwrap();
        assert!(ready_now(epoll.as_fd(), PollFlags::IN).is_empty());
    }

    #[test]
    fn a_broken_output_takes_everything_and_waits_for_nothing() {
        let (reader, writer) = io::pipe().unwrap();
        let mut output = Descriptor::owned(writer.into(), "out").unwrap();
        drop(reader);
        until(|| {
            assert_eq!(output.write(b"abc"), 3);
            output.is_closed()
        });
        let poll = Poll::new().unwrap();
        assert!(!output.watch(&poll, Some(EventFlags::OUT)));
    }

    #[test]
    fn a_full_disk_loses_output_but_does_not_end_it() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut output = Descriptor::owned(full.into(), "out").unwrap();
        assert_eq!((output.write(b"abc"), output.is_closed(), output.loss.bytes), (3, false, 3));
    }
}
