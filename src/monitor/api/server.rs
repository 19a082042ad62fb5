//! The control thread: serves a machine's control socket, takes its signals, keeps the time of a stop.
//!
//! Never blocks on a client: sockets do not block, requests are short lines, and a client that is slow to ask or to
//! listen is cut off. Sees the machine through [`Control`] only.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::protocol::{self, Answer, Command, MAX_REQUEST, Seen};
use super::registry::Entry;
use super::signals::{Signals, Wish};
use super::{Control, Error, State, Status, Watch};
use crate::event_loop::{Handler, Worker};

/// How long a client may take from one request to the end of the next.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients at a time; more have to wait in the socket's queue.
const MAX_CLIENTS: usize = 64;

/// A machine's control thread. Dropping it gives the name back, then ends every connection and the thread.
#[derive(Debug)]
pub struct Server {
    // In this order: whoever waits for a connection to end must find the name free.
    entry: Entry,
    _worker: Worker,
}

impl Server {
    /// Serves `control` on `entry`, and on `signals` if they are to be taken. A stop that says nothing else becomes hard
    /// after `stop_timeout`.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn start(
        entry: Entry,
        signals: Option<Signals>,
        control: Arc<dyn Control>,
        stop_timeout: Duration,
    ) -> Result<Self, Error> {
        let start = || {
            let desk = Desk::new(&entry, signals, control, stop_timeout)?;
            Worker::spawn("control", desk)
        };
        let worker = start().map_err(Error::Thread)?;
        Ok(Self { entry, _worker: worker })
    }

    /// The name that is served.
    pub fn name(&self) -> &str {
        self.entry.name()
    }
}

/// Tokens of the epoll set; clients have theirs from [`FIRST_CLIENT`] on.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const SIGNALS: u64 = 2;
const FIRST_CLIENT: u64 = 3;

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// When it is cut off; none if it waits for the machine's end.
    until: Option<Instant>,
    /// Once it has asked for a sample. Ends with the connection, however that ends.
    watch: Option<Box<dyn Watch>>,
}

struct Desk {
    control: Arc<dyn Control>,
    stop_timeout: Duration,
    poll: OwnedFd,
    listener: std::os::unix::net::UnixListener,
    signals: Option<Signals>,
    timer: OwnedFd,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    /// The listener is out of the set until then: no room, or no descriptors.
    accept_again: Option<Instant>,
    /// The stop in progress becomes hard then.
    stop_at: Option<Instant>,
    stopping: bool,
    /// SIGTERM or SIGINT has come.
    signalled: bool,
}

impl Desk {
    fn new(
        entry: &Entry,
        signals: Option<Signals>,
        control: Arc<dyn Control>,
        stop_timeout: Duration,
    ) -> io::Result<Self> {
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        let listener = entry.listener().try_clone()?;
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let add = |source: BorrowedFd<'_>, token| {
            epoll::add(&poll, source, EventData::new_u64(token), EventFlags::IN)
        };
        add(listener.as_fd(), LISTENER)?;
        add(timer.as_fd(), TIMER)?;
        for source in signals.iter().flat_map(Signals::sources) {
            add(source, SIGNALS)?;
        }
        Ok(Self {
            control,
            stop_timeout,
            poll,
            listener,
            signals,
            timer,
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
            accept_again: None,
            stop_at: None,
            stopping: false,
            signalled: false,
        })
    }

    fn accept(&mut self) {
        while self.clients.len() < MAX_CLIENTS {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::warn!("control socket: {error}");
                    break;
                }
            };
            let token = self.next_client;
            let added = stream.set_nonblocking(true).and_then(|()| {
                Ok(epoll::add(&self.poll, &stream, EventData::new_u64(token), EventFlags::IN)?)
            });
            if added.is_ok() {
                self.next_client += 1;
                let until = Some(Instant::now() + CLIENT_TIMEOUT);
                self.clients.insert(token, Client { stream, input: Vec::new(), until, watch: None });
            }
        }
        // A listener that stays readable while nothing can be accepted would keep the thread busy.
        self.listen(false);
        self.accept_again = Some(Instant::now() + Duration::from_secs(1));
    }

    fn listen(&self, on: bool) {
        let flags = if on { EventFlags::IN } else { EventFlags::empty() };
        if let Err(error) = epoll::modify(&self.poll, &self.listener, EventData::new_u64(LISTENER), flags) {
            log::error!("control socket: {error}");
        }
    }

    /// Reads what a client sent. It is cut off when it has ended, or does not keep to the protocol.
    fn hear(&mut self, token: u64) {
        let Some(mut client) = self.clients.remove(&token) else { return };
        let mut bytes = [0; MAX_REQUEST];
        let count = match client.stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(_) => return,
        };
        client.input.extend_from_slice(&bytes[..count]);
        while let Some(end) = client.input.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = client.input.drain(..=end).collect();
            if !self.serve(&mut client, &line) {
                return;
            }
        }
        if client.input.len() >= MAX_REQUEST {
            let answer = Answer::Error(format!("a request is at most {MAX_REQUEST} bytes"));
            let _ = client.stream.write(&protocol::reply(answer));
            return;
        }
        self.clients.insert(token, client);
    }

    /// Answers one request. False if the client is to be cut off.
    fn serve(&mut self, client: &mut Client, line: &[u8]) -> bool {
        let answer = protocol::parse_request(line).and_then(|command| {
            log::debug!("control socket: {command:?}");
            if command == Command::Sample && client.watch.is_none() {
                client.watch = Some(self.control.watch()?);
            }
            self.obey(command).map(|()| command)
        });
        let ends = answer.as_ref().is_ok_and(|command| command.ends());
        let reply = protocol::reply(match (answer, &client.watch) {
            (Ok(Command::Sample), Some(watch)) => {
                Answer::Sample(Box::new(Seen { status: self.status(), sample: watch.sample() }))
            }
            (Ok(_), _) => Answer::Status(self.status()),
            (Err(reason), _) => Answer::Error(reason),
        });
        client.until = if ends { None } else { Some(Instant::now() + CLIENT_TIMEOUT) };
        // Replies are smaller than a socket's buffer: one that does not fit is not being read.
        matches!(client.stream.write(&reply), Ok(written) if written == reply.len())
    }

    fn status(&self) -> Status {
        let mut status = self.control.status();
        if self.stopping {
            status.state = State::Stopping;
        }
        status
    }

    fn obey(&mut self, command: Command) -> Result<(), String> {
        match command {
            Command::Status | Command::Sample => Ok(()),
            Command::Pause if self.stopping => Err("it is being stopped".to_owned()),
            Command::Pause => self.control.pause(),
            Command::Resume => self.control.resume(),
            Command::Stop { timeout_seconds } => {
                self.stop(timeout_seconds.map_or(self.stop_timeout, Duration::from_secs))
            }
            Command::Kill => {
                self.kill();
                Ok(())
            }
        }
    }

    /// Asks the guest to power off, and sees to it that it is gone after `timeout`.
    fn stop(&mut self, timeout: Duration) -> Result<(), String> {
        // A paused guest cannot hear its power button.
        if self.control.status().state == State::Paused {
            self.control.resume()?;
        }
        self.control.power_button()?;
        self.stopping = true;
        let at = Instant::now().checked_add(timeout);
        self.stop_at = [self.stop_at, at].into_iter().flatten().min();
        Ok(())
    }

    fn kill(&mut self) {
        self.stopping = true;
        self.stop_at = None;
        self.control.kill();
    }

    fn obey_signals(&mut self) {
        for wish in self.signals.as_mut().map(Signals::wishes).unwrap_or_default() {
            if wish == Wish::Kill || self.signalled {
                log::info!("signal: stopping hard");
                self.kill();
                continue;
            }
            self.signalled = true;
            log::info!("signal: pressing the power button");
            if let Err(reason) = self.stop(self.stop_timeout) {
                log::warn!("no power button ({reason}): stopping hard");
                self.kill();
            }
        }
    }

    /// Does what is due, and sets the timer for what is next.
    fn keep_time(&mut self) {
        let now = Instant::now();
        let due = |at: &Option<Instant>| at.is_some_and(|at| at <= now);
        if due(&self.stop_at) {
            log::warn!("the guest did not power off in time: stopping it hard");
            self.kill();
        }
        self.clients.retain(|_, client| !due(&client.until));
        if due(&self.accept_again) {
            self.accept_again = None;
            self.listen(true);
        }
        let others = [self.stop_at, self.accept_again];
        let next = self.clients.values().map(|client| client.until).chain(others).flatten().min();
        // Zero would disarm the timer.
        let after = next.map(|at| at.saturating_duration_since(now).max(Duration::from_micros(1)));
        let value = after.and_then(|after| Timespec::try_from(after).ok()).unwrap_or_default();
        let spec = Itimerspec { it_interval: Timespec::default(), it_value: value };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            log::error!("control thread's timer: {error}");
        }
    }
}

impl Handler for Desk {
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.poll.as_fd()]
    }

    fn ready(&mut self, _: usize) {
        let mut space = [MaybeUninit::<Event>::uninit(); 16];
        let tokens: Vec<u64> = match epoll::wait(&self.poll, &mut space, Some(&Timespec::default())) {
            Ok((events, _)) => events.iter().map(|event| event.data.u64()).collect(),
            Err(_) => return,
        };
        for token in tokens {
            match token {
                LISTENER => self.accept(),
                TIMER => {
                    let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                }
                SIGNALS => self.obey_signals(),
                client => self.hear(client),
            }
        }
        self.keep_time();
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        for client in self.clients.values() {
            // Not left to closing: a child process may hold the same descriptor for longer.
            let _ = client.stream.shutdown(Shutdown::Both);
        }
    }
}
