//! The client of the control socket, for `vmm status`, `stop` and so on.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;

use super::passing;
use super::protocol::{self, Answer, Command, Ended, MAX_REPLY, MachineSample, Refusal, Taken};
use super::registry::{Registry, of_pool};
use super::{Error, Status};
use crate::config::Plug;
use crate::kvm::VcpuState;
use crate::machine::Attached;
use crate::pool::PoolStatus;
use crate::snapshot::{Below, Folder, Saving};

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a process may take from its last word to its end.
const NAME: Duration = Duration::from_secs(5);
/// For what has come already.
const HERE: Duration = Duration::from_millis(10);

/// What became of asking one of several virtual machines.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// The process that has the name, where there is one.
    pub pid: Option<u32>,
    /// Its status, or why it is not known.
    pub answer: Result<Status, Error>,
}

/// A connection to a running virtual machine.
#[derive(Debug)]
pub struct Client {
    name: String,
    registry: Registry,
    stream: UnixStream,
    /// Descriptors that came with answers.
    passed: Vec<OwnedFd>,
}

impl Client {
    /// Connects to the virtual machine called `name`.
    ///
    /// # Errors
    /// There is none, or it does not take connections.
    pub fn connect(registry: &Registry, name: &str) -> Result<Self, Error> {
        Self::new(registry, name, registry.connect(name)?)
    }

    /// Connects to the pool called `name`.
    ///
    /// # Errors
    /// There is none, or it does not take connections.
    pub fn connect_pool(registry: &Registry, name: &str) -> Result<Self, Error> {
        let absent = |error| match error {
            Error::NoSuchVm(_) => Error::NoSuchPool(name.to_owned()),
            error => error,
        };
        let called = of_pool(name);
        registry.connect(&called).and_then(|stream| Self::new(registry, &called, stream)).map_err(absent)
    }

    fn new(registry: &Registry, name: &str, stream: UnixStream) -> Result<Self, Error> {
        let client = Self { name: name.to_owned(), registry: registry.clone(), stream, passed: Vec::new() };
        client.stream.set_nonblocking(false).map_err(|e| client.broken(e))?;
        Ok(client)
    }

    /// Asks all of `names` for their status at once, and waits for `patience` in all: a monitor that is stopped delays nobody
    /// else's answer. The answers are in the order of `names`.
    pub fn ask_all(registry: &Registry, names: Vec<String>, patience: Duration) -> Vec<Listed> {
        let deadline = Instant::now() + patience;
        let request = protocol::request(Command::Status);
        let asked = names.into_iter().map(|name| {
            let client = registry.connect_by(&name, deadline);
            let client = client.and_then(|stream| Self::new(registry, &name, stream));
            let pid = client.as_ref().ok().and_then(Self::pid);
            let client = client.and_then(|mut client| {
                client.check_awake()?;
                client.patience(Some(deadline))?;
                client.stream.write_all(&request).map_err(|e| client.broken(e))?;
                Ok(client)
            });
            (name, pid, client)
        });
        // All are asked before the first answer is waited for.
        let asked: Vec<_> = asked.collect();
        let answered = asked.into_iter().map(|(name, pid, client)| {
            let answer = client.and_then(|mut client| {
                // Those before may have taken all the time: an answer that is here counts all the same.
                let line = client.read_line(Some(deadline.max(Instant::now() + HERE)))?;
                client.status(client.parse(&line)?)
            });
            Listed { name, pid, answer }
        });
        answered.collect()
    }

    /// The process that listens there, as the kernel knows it.
    fn pid(&self) -> Option<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.stream).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    /// The process there, if it is stopped (SIGSTOP).
    fn stopped(&self) -> Option<u32> {
        let pid = self.pid()?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The state follows the name, which may have anything in it (proc_pid_stat(5)).
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" T")).then_some(pid)
    }

    /// That the process there is not stopped: it would answer when it is woken, which nobody need wait for.
    fn check_awake(&self) -> Result<(), Error> {
        self.stopped().map_or(Ok(()), |_| Err(Error::NoAnswer(self.name.clone())))
    }

    /// Has the process there run on if it is stopped: for a command that is to be carried out whatever it does.
    pub fn wake(&self) {
        let pid = self.stopped().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        // One that is gone by now is told by what is asked next.
        pid.map(|pid| kill_process(pid, Signal::CONT));
    }

    /// Has `command` carried out; the status is that after it.
    ///
    /// # Errors
    /// The virtual machine refuses, does not answer in time, or is gone.
    pub fn ask(&mut self, command: Command) -> Result<Status, Error> {
        let answer = self.exchange(command)?;
        self.status(answer)
    }

    fn status(&self, answer: Answer) -> Result<Status, Error> {
        match answer {
            Answer::Status(status) => Ok(status),
            Answer::Sample(seen) => Ok(seen.status),
            other => Err(self.other(other)),
        }
    }

    /// What each vCPU does or waits for.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn vcpus(&mut self) -> Result<Vec<VcpuState>, Error> {
        match self.exchange(Command::Vcpus)? {
            Answer::Vcpus(states) => Ok(states),
            other => Err(self.other(other)),
        }
    }

    /// What virtio devices it has.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn devices(&mut self) -> Result<Vec<Attached>, Error> {
        match self.exchange(Command::Devices)? {
            Answer::Devices(devices) => Ok(devices),
            other => Err(self.other(other)),
        }
    }

    /// Gives it another device, whose paths are absolute, and whose `files` are open, if it has any. The device as it is now; none if it
    /// lacks files, and could come with them.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn add_device(&mut self, device: &Plug, files: &[OwnedFd]) -> Result<Option<Attached>, Error> {
        let device = serde_json::to_value(device).map_err(|error| self.broken(error.into()))?;
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.send_with(Command::AddDevice { device }, &files)?;
        match self.answer()? {
            Answer::Device(device) => Ok(Some(device)),
            Answer::Files(_) => Ok(None),
            other => Err(self.other(other)),
        }
    }

    /// Has the guest asked to let the device `name` go; with `force` it is taken away. The device as it is now.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn remove_device(&mut self, name: &str, force: bool) -> Result<Attached, Error> {
        self.device(Command::RemoveDevice { name: name.to_owned(), force })
    }

    /// The names of the files that a snapshot of it has.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn files(&mut self) -> Result<Vec<PathBuf>, Error> {
        match self.exchange(Command::Files)? {
            Answer::Files(names) => Ok(names),
            other => Err(self.other(other)),
        }
    }

    /// Has it saved in the files of `folder`, however long that takes: what is not as in `below`. If it is to stay as it was saved, it
    /// stands still for as long as this client is there.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn snapshot(
        &mut self,
        folder: &Folder,
        below: Option<Below>,
        Saving { compress, stay }: Saving,
    ) -> Result<Status, Error> {
        let base = below.as_ref().map(|below| below.place().to_owned());
        let others = below.map(Below::into_descriptors).unwrap_or_default();
        let files =
            folder.descriptors().into_iter().chain(others.iter().map(AsFd::as_fd)).collect::<Vec<_>>();
        let folder = folder.path().to_owned();
        self.send_with(Command::Snapshot { folder, base, compress, stay }, &files)?;
        let line = self.read_line(None)?;
        match self.parse(&line)? {
            Answer::Status(status) => Ok(status),
            other => Err(self.other(other)),
        }
    }

    /// Has it saved in files without names, however long that takes: configuration, state and memory, then its `disks`.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn fork(&mut self, disks: &[File]) -> Result<Vec<OwnedFd>, Error> {
        self.send_with(Command::Fork, &disks.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
        let line = self.read_line(None)?;
        match self.parse(&line)? {
            Answer::Status(_) => Ok(std::mem::take(&mut self.passed)),
            other => Err(self.other(other)),
        }
    }

    /// Takes `count` machines from a pool: they run when it answers, however long that takes. `name`, `renew` and `tied` are as
    /// [`Command::Take`] has them.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn take(
        &mut self,
        count: u32,
        name: Option<String>,
        renew: bool,
        tied: bool,
    ) -> Result<Taken, Error> {
        match self.take_its_time(Command::Take { count, name, renew, tied })? {
            Answer::Taken(taken) => Ok(taken),
            other => Err(self.other(other)),
        }
    }

    /// How a pool stands. `command` is [`Command::Status`], or [`Command::Stop`] to end it.
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn ask_pool(&mut self, command: Command) -> Result<PoolStatus, Error> {
        match self.exchange(command)? {
            Answer::Pool(status) => Ok(status),
            other => Err(self.other(other)),
        }
    }

    /// The answer to a command, however long that takes.
    fn take_its_time(&mut self, command: Command) -> Result<Answer, Error> {
        self.send(command)?;
        let line = self.read_line(None)?;
        self.parse(&line)
    }

    fn device(&mut self, command: Command) -> Result<Attached, Error> {
        match self.exchange(command)? {
            Answer::Device(device) => Ok(device),
            other => Err(self.other(other)),
        }
    }

    /// What an answer means that is not the one that was asked for.
    fn other(&self, answer: Answer) -> Error {
        let name = self.name.clone();
        match answer {
            Answer::Error(Refusal { reason, hint }) => Error::Refused { name, reason, hint },
            _ => Error::Protocol { name, reason: "it answers something else".to_owned() },
        }
    }

    /// What the virtual machine has been doing, and its status. With the first call this connection is a viewer's. `S` is what
    /// the trace library makes of a [`Sample`](super::Sample).
    ///
    /// # Errors
    /// As for [`Client::ask`].
    pub fn sample<S: DeserializeOwned>(&mut self) -> Result<(Status, S), Error> {
        let name = self.name.clone();
        match self.exchange(Command::Sample)? {
            Answer::Sample(seen) => {
                let MachineSample { status, sample } = *seen;
                let sample = serde_json::from_value(sample);
                Ok((status, sample.map_err(|error| Error::Protocol { name, reason: error.to_string() })?))
            }
            // A monitor that does not know the word yet says that it is no request.
            other => Err(self.other(other)),
        }
    }

    fn exchange(&mut self, command: Command) -> Result<Answer, Error> {
        self.send(command)?;
        self.answer()
    }

    /// The answer to what was sent, which comes soon.
    fn answer(&mut self) -> Result<Answer, Error> {
        let line = self.read_line(Instant::now().checked_add(PATIENCE))?;
        self.parse(&line)
    }

    fn send(&mut self, command: Command) -> Result<(), Error> {
        self.send_with(command, &[])
    }

    /// Sends `files` along.
    fn send_with(&mut self, command: Command, files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.check_awake()?;
        self.stream.set_write_timeout(Some(PATIENCE)).map_err(|e| self.broken(e))?;
        let request = protocol::request(command);
        let sent = passing::send(&self.stream, &request, files).map_err(|e| self.broken(e))?;
        self.stream.write_all(&request[sent..]).map_err(|e| self.broken(e))
    }

    fn parse(&self, line: &[u8]) -> Result<Answer, Error> {
        let protocol = |reason| Error::Protocol { name: self.name.clone(), reason };
        protocol::parse_reply(line).map_err(protocol)
    }

    /// Waits until the virtual machine is gone and its name free: after [`Command::Stop`] and [`Command::Kill`].
    ///
    /// # Errors
    /// It is still there after `patience`.
    pub fn wait_for_end(mut self, patience: Duration) -> Result<(), Error> {
        let deadline = Instant::now().checked_add(patience);
        loop {
            self.patience(deadline)?;
            match self.stream.read(&mut [0; 64]) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => break,
                Err(e) => return Err(self.broken(e)),
            }
        }
        self.await_name();
        Ok(())
    }

    /// Waits until the run is over, however long that takes.
    ///
    /// # Errors
    /// The virtual machine refuses; it is gone ([`Error::NoSuchVm`]) without having told how it ended.
    pub fn wait(mut self) -> Result<Ended, Error> {
        self.stream.write_all(&protocol::request(Command::Wait)).map_err(|e| self.broken(e))?;
        let line = self.read_line(None)?;
        match self.parse(&line)? {
            Answer::Ended(ended) => Ok(ended),
            other => Err(self.other(other)),
        }
    }

    /// Waits until the name is free, for a moment, and removes what is left of it. A process that is killed closes one descriptor after the other, and some, the VM's
    /// above all, take their time: a connection may be gone before the listener is.
    fn await_name(&self) {
        let (deadline, mut pause) = (Instant::now() + NAME, Duration::from_millis(1));
        while self.is_there() && Instant::now() < deadline {
            thread::sleep(pause);
            // Each look is a connection that it has to take.
            pause = (2 * pause).min(Duration::from_millis(100));
        }
        self.registry.forget(&self.name);
    }

    fn is_there(&self) -> bool {
        self.registry.alive(&self.name).is_ok_and(|alive| alive)
    }

    /// The connection has ended without an answer: its process has, or it has so much to do that it gave up this client.
    fn cut_off(&self) -> Error {
        self.await_name();
        if self.is_there() { Error::NoAnswer(self.name.clone()) } else { Error::NoSuchVm(self.name.clone()) }
    }

    /// One reply, which is a line of bounded length.
    fn read_line(&mut self, deadline: Option<Instant>) -> Result<Vec<u8>, Error> {
        let mut line = Vec::new();
        let mut bytes = [0; 4096];
        while line.last() != Some(&b'\n') && line.len() < MAX_REPLY {
            self.patience(deadline)?;
            match passing::receive(&self.stream, &mut bytes, &mut self.passed) {
                Ok(0) => return Err(self.cut_off()),
                Ok(count) => line.extend_from_slice(&bytes[..count]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
        }
        Ok(line)
    }

    /// Lets the next read wait until `deadline` at most.
    fn patience(&self, deadline: Option<Instant>) -> Result<(), Error> {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(Error::NoAnswer(self.name.clone()));
        }
        self.stream.set_read_timeout(left).map_err(|e| self.broken(e))
    }

    fn broken(&self, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::NoAnswer(self.name.clone()),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => self.cut_off(),
            _ => Error::Protocol { name: self.name.clone(), reason: error.to_string() },
        }
    }
}
