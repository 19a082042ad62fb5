//! What a session carries out: a command with its streams, or a connection from within the guest.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, ioctl_fionread, write};
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process_group, pidfd_open, waitpid};
use vmm_agent::protocol::{Exit, Malformed, Message, Reason, Size, Stream, WINDOW};

use crate::output::Output;
use crate::process::{Refusal, Started, resize};

/// How long what a command left behind may go on writing into its streams. What it wrote itself is sent in any case.
const GRACE: Duration = Duration::from_millis(100);

/// How long a command whose client has gone has from SIGHUP to SIGKILL.
const HANGUP: Duration = Duration::from_secs(5);

/// How long a connection within the guest may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How much is read from a stream at once.
const PIECE: usize = 32 << 10;

/// What runs, and the streams that it has left.
#[derive(Debug)]
pub struct Job {
    command: Option<Command>,
    exit: Option<Exit>,
    stdin: Option<Sink>,
    /// What the client may still send: also when nothing takes it any more, as it cannot know that yet.
    stdin_allowed: u32,
    outputs: Vec<Source>,
    tty: Option<OwnedFd>,
}

#[derive(Debug)]
struct Command {
    pid: Pid,
    /// Readable when it has ended.
    ended: OwnedFd,
    /// As [`Started`] has it.
    ends_by_itself: bool,
}

/// The near end of stdin.
#[derive(Debug)]
struct Sink {
    fd: OwnedFd,
    /// At most a window.
    queue: VecDeque<u8>,
    /// Nothing follows.
    ended: bool,
    /// Taken since credit was last given.
    owed: u32,
    is_socket: bool,
}

/// The near end of stdout or stderr.
#[derive(Debug)]
struct Source {
    stream: Stream,
    fd: OwnedFd,
    credit: u32,
    /// What its command wrote before it ended, and is not read yet.
    left_behind: Option<u64>,
    /// When it is closed, whoever still has the other end.
    deadline: Option<Instant>,
}

impl Source {
    fn new(stream: Stream, fd: OwnedFd) -> Self {
        Self { stream, fd, credit: WINDOW, left_behind: None, deadline: None }
    }

    /// Reads once; false at its end.
    fn read(&mut self, output: &mut Output) -> bool {
        let limit = (self.credit as usize).min(PIECE);
        match output.put_read(self.stream, limit, &self.fd) {
            Ok(0) => false,
            Ok(count) => {
                self.credit -= count as u32;
                self.left_behind = self.left_behind.map(|left| left.saturating_sub(count as u64));
                true
            }
            Err(Errno::AGAIN) => {
                self.left_behind = self.left_behind.map(|_| 0);
                true
            }
            Err(Errno::INTR) => true,
            // EIO: a terminal that nobody has open any more.
            Err(_) => false,
        }
    }

    fn set_deadline(&mut self) {
        if self.left_behind == Some(0) && self.deadline.is_none() {
            self.deadline = Some(Instant::now() + GRACE);
        }
    }
}

/// What a poll's entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    Ended,
    Stdin,
    Output(Stream),
}

impl Job {
    /// Of a command that was started.
    ///
    /// # Errors
    /// The kernel is older than 5.3.
    pub fn of(started: Started) -> Result<Self, Refusal> {
        let Started { child, stdin, stdout, stderr, tty, ends_by_itself } = started;
        let command = Command::of(&child, ends_by_itself).map_err(|error| {
            (Reason::Refused, format!("the guest's kernel has no process descriptors (Linux 5.3): {error}"))
        })?;
        let stderr = stderr.map(|fd| Source::new(Stream::Stderr, fd));
        Ok(Self {
            command: Some(command),
            exit: None,
            stdin_allowed: if stdin.is_some() { WINDOW } else { 0 },
            stdin: stdin.map(|fd| Sink {
                fd,
                queue: VecDeque::new(),
                ended: false,
                owed: 0,
                is_socket: false,
            }),
            outputs: [Source::new(Stream::Stdout, stdout)].into_iter().chain(stderr).collect(),
            tty,
        })
    }

    /// Of a connection to `address`.
    ///
    /// # Errors
    /// It is no address, or takes none.
    pub fn connect(address: &[u8]) -> Result<Self, Refusal> {
        let text = String::from_utf8_lossy(address);
        let parsed: SocketAddr = text
            .parse()
            .map_err(|_| (Reason::CannotRun, format!("{text:?} is not an address and a port")))?;
        let refused = |error| (Reason::Refused, format!("cannot connect to {parsed} in the guest: {error}"));
        let socket = TcpStream::connect_timeout(&parsed, CONNECT).map_err(refused)?;
        socket.set_nonblocking(true).and_then(|()| socket.set_nodelay(true)).map_err(refused)?;
        let fd = OwnedFd::from(socket.try_clone().map_err(refused)?);
        Ok(Self {
            command: None,
            exit: Some(Exit::Code(0)),
            stdin: Some(Sink { fd, queue: VecDeque::new(), ended: false, owed: 0, is_socket: true }),
            stdin_allowed: WINDOW,
            outputs: vec![Source::new(Stream::Stdout, socket.into())],
            tty: None,
        })
    }

    /// How it ended, once all of its output has been put.
    pub fn finished(&self) -> Option<Exit> {
        let is_relay = self.stdin.as_ref().is_some_and(|sink| sink.is_socket);
        self.exit.filter(|_| self.outputs.is_empty() && !is_relay)
    }

    /// What to wait for, and until when. What cannot go on for want of credit or room is not waited for: a hang-up is reported even
    /// to those who do not ask.
    pub fn interests<'a>(&'a self, output: &Output, fds: &mut Vec<PollFd<'a>>, ready: &mut Vec<Ready>) {
        if let Some(command) = &self.command {
            fds.push(PollFd::new(&command.ended, PollFlags::IN));
            ready.push(Ready::Ended);
        }
        if let Some(sink) = &self.stdin {
            let flags = if sink.queue.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            fds.push(PollFd::new(&sink.fd, flags));
            ready.push(Ready::Stdin);
        }
        for source in self.outputs.iter().filter(|source| source.credit > 0 && !output.is_full()) {
            fds.push(PollFd::new(&source.fd, PollFlags::IN));
            ready.push(Ready::Output(source.stream));
        }
    }

    /// The next moment at which something is to be done without a cause.
    pub fn deadline(&self) -> Option<Instant> {
        self.outputs.iter().filter_map(|source| source.deadline).min()
    }

    /// Closes what has had its time.
    pub fn on_time(&mut self, output: &mut Output) {
        let now = Instant::now();
        self.outputs.retain(|source| {
            let over = source.deadline.is_some_and(|deadline| deadline <= now);
            if over {
                output.put(&Message::End(source.stream));
            }
            !over
        });
    }

    /// Does what can be done.
    pub fn on_ready(&mut self, ready: Ready, flags: PollFlags, output: &mut Output) {
        match ready {
            Ready::Ended => self.reap(),
            Ready::Stdin => self.write_stdin(flags, output),
            Ready::Output(stream) => self.outputs.retain_mut(|source| {
                let goes_on = source.stream != stream || source.read(output);
                if !goes_on {
                    output.put(&Message::End(stream));
                }
                source.set_deadline();
                goes_on
            }),
        }
    }

    /// Takes the exit, and looks how much of what it wrote is still to be read.
    fn reap(&mut self) {
        let Some(command) = &self.command else { return };
        let status = match waitpid(Some(command.pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => status,
            Ok(None) | Err(Errno::INTR) => return,
            Err(_) => return self.ended(Exit::Code(u8::MAX)),
        };
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => self.ended(Exit::Code(code as u8)),
            (_, Some(signal)) => self.ended(Exit::Signal(signal as u8)),
            // Stopped: not the end.
            _ => {}
        }
    }

    fn ended(&mut self, exit: Exit) {
        self.command = None;
        self.exit = Some(exit);
        self.stdin = None;
        for source in &mut self.outputs {
            source.left_behind = Some(ioctl_fionread(&source.fd).unwrap_or(0));
            source.set_deadline();
        }
    }

    fn write_stdin(&mut self, flags: PollFlags, output: &mut Output) {
        let Some(sink) = &mut self.stdin else { return };
        let mut gone = flags.intersects(PollFlags::ERR | PollFlags::HUP) && !flags.contains(PollFlags::OUT);
        while !gone && !sink.queue.is_empty() {
            match write(&sink.fd, sink.queue.as_slices().0) {
                Ok(count) => {
                    sink.queue.drain(..count);
                    sink.owed += count as u32;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => gone = true,
            }
        }
        if gone {
            output.put(&Message::Stop(Stream::Stdin));
            self.stdin = None;
            return;
        }
        if sink.owed > 0 && (sink.queue.is_empty() || sink.owed >= WINDOW / 4) {
            output.put(&Message::Credit(Stream::Stdin, sink.owed));
            self.stdin_allowed += std::mem::take(&mut sink.owed);
        }
        if sink.ended && sink.queue.is_empty() {
            if sink.is_socket {
                let _ = shutdown(&sink.fd, Shutdown::Write);
            }
            self.stdin = None;
        }
    }

    /// What the client sends while it runs.
    ///
    /// # Errors
    /// The message does not belong there.
    pub fn on_message(&mut self, message: &Message<'_>, output: &mut Output) -> Result<(), Malformed> {
        match *message {
            Message::Data(Stream::Stdin, bytes) => {
                let allowed = self.stdin_allowed.checked_sub(bytes.len() as u32);
                self.stdin_allowed = allowed.ok_or(Malformed::Window)?;
                if let Some(sink) = &mut self.stdin {
                    if sink.ended {
                        return Err(Malformed::Order);
                    }
                    sink.queue.extend(bytes);
                    self.write_stdin(PollFlags::OUT, output);
                }
            }
            Message::End(Stream::Stdin) => {
                if let Some(sink) = &mut self.stdin {
                    sink.ended = true;
                    // A terminal does not end: whoever reads it waits for a key.
                    if self.tty.is_none() {
                        self.write_stdin(PollFlags::OUT, output);
                    }
                }
            }
            Message::Credit(stream @ (Stream::Stdout | Stream::Stderr), count) => {
                if let Some(source) = self.outputs.iter_mut().find(|source| source.stream == stream) {
                    let credit = source.credit.checked_add(count).filter(|sum| *sum <= WINDOW);
                    source.credit = credit.ok_or(Malformed::Window)?;
                }
            }
            Message::Stop(stream @ (Stream::Stdout | Stream::Stderr)) => {
                self.outputs.retain(|source| source.stream != stream);
                if self.tty.is_some() {
                    // Without a reader a terminal has been hung up.
                    (self.tty, self.stdin) = (None, None);
                }
            }
            Message::Signal(number) => self.signal(number),
            Message::Resize(size) => self.resize(size),
            _ => return Err(Malformed::Order),
        }
        Ok(())
    }

    fn signal(&self, number: u8) {
        // Of a command that has ended the number may be another's by now.
        if let (Some(command), Some(signal)) = (&self.command, Signal::from_named_raw(i32::from(number))) {
            let _ = kill_process_group(command.pid, signal);
        }
    }

    /// A command without a terminal has no size, and is told nothing.
    fn resize(&self, size: Size) {
        if let Some(tty) = &self.tty {
            let _ = resize(tty, size);
        }
    }

    /// Ends it for want of a client: closes its streams, hangs it up, and kills it if that does not help.
    pub fn abandon(self) {
        let Self { command, stdin, outputs, tty, .. } = self;
        drop((stdin, outputs, tty));
        let Some(command) = command else { return };
        if !command.ends_by_itself {
            let _ = kill_process_group(command.pid, Signal::HUP);
        }
        let _ = kill_process_group(command.pid, Signal::CONT);
        let limit = Timespec { tv_sec: HANGUP.as_secs() as i64, tv_nsec: 0 };
        let mut ended = [PollFd::new(&command.ended, PollFlags::IN)];
        if poll(&mut ended, Some(&limit)) != Ok(1) {
            let _ = kill_process_group(command.pid, Signal::KILL);
        }
        let _ = waitpid(Some(command.pid), WaitOptions::empty());
    }
}

impl Command {
    fn of(child: &Child, ends_by_itself: bool) -> io::Result<Self> {
        let pid = Pid::from_child(child);
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(ended) => Ok(Self { pid, ended, ends_by_itself }),
            Err(error) => {
                let _ = kill_process_group(pid, Signal::KILL);
                let _ = waitpid(Some(pid), WaitOptions::empty());
                Err(error.into())
            }
        }
    }
}
