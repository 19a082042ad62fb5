//! The control thread's server: it answers the control socket, takes the process's signals, and times a stop.
//!
//! It always obeys: it waits for no client (sockets do not block, requests are short lines, and a client that is slow to ask or to
//! listen is cut off), for no device (what may take its time is an errand of another thread) and for no log. A machine that has not
//! ended a second after it was killed is ended with its process. Sees the machine through [`Control`] only.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use super::protocol::{self, Answer, Command, Ended, MAX_REQUEST, MachineSample, Refusal};
use super::reception::Reception;
use super::registry::Entry;
use super::signals::{Signals, Wish};
use super::{Control, Error, State, Status, Watch, passing};
use crate::bus::lock;
use crate::error_chain;
use crate::event_loop::{Event, EventLoop, Handler, Interest, Registration, Sources};
use crate::kvm::VcpuState;
use crate::machine::Attached;
use crate::snapshot::{self, Below, Parts, Saving};
use crate::threads::{self, Role};
use crate::timer::Timer;

/// How long a client may take from one request to the end of the next.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients at a time; more have to wait in the socket's queue.
const MAX_CLIENTS: usize = 64;
/// Clients that may wait for the end of the run, for as long as that takes: the others must find room.
const MAX_WAITING: usize = 32;
/// From a kill to the end of the process, whatever still holds it up.
const KILL_LIMIT: Duration = Duration::from_millis(900);
/// Signals to stop that come this soon after the first are the same wish: `timeout` signals its child, then the child's group.
const SAME_WISH: Duration = Duration::from_secs(1);

/// Why an order is refused that has no use any more.
const BEING_STOPPED: &str = "it is being stopped";

/// Serves a machine's orders on an event loop. Dropping it gives the name back, then ends every connection.
#[derive(Debug)]
pub struct Server {
    entry: Arc<Entry>,
    orders: Option<Registration>,
}

impl Server {
    /// Serves `control` on `entry`, and on `signals` if they are to be taken, by `events`. A stop that says nothing else
    /// becomes hard after `stop_timeout`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn start(
        events: &EventLoop,
        entry: Entry,
        signals: Option<Signals>,
        control: Arc<dyn Control>,
        stop_timeout: Duration,
    ) -> Result<Self, Error> {
        let entry = Arc::new(entry);
        let start = || events.add(Orders::new(&entry, signals, control, stop_timeout)?);
        let orders = Some(start().map_err(Error::Thread)?);
        Ok(Self { entry, orders })
    }

    /// The name that is served.
    pub fn name(&self) -> &str {
        self.entry.name()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Whoever waits for a connection to end must find the name free.
        self.entry.give_back();
        self.orders = None;
    }
}

/// Tokens of the descriptors; clients have theirs from [`FIRST_CLIENT`] on.
const LISTENER: u32 = 0;
const TIMER: u32 = 1;
const SIGNALS: u32 = 2;
const ERRAND: u32 = 3;
const FIRST_CLIENT: u32 = 4;

struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// When it is cut off; none if it waits for the machine's end, or for an errand.
    until: Option<Instant>,
    /// Once it has asked for a sample. Ends with the connection, however that ends.
    watch: Option<Box<dyn Watch>>,
    /// It wants to hear how the run ends, and nothing else any more.
    waits: bool,
    /// Descriptors that have come with what is not served yet.
    passed: Vec<OwnedFd>,
    /// The machine stands still for its sake.
    holds: bool,
}

/// Whether a client is to be kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Yes,
    No,
    /// It is answered when the errand is over, and not heard before.
    UntilDone,
}

/// What may take its time, under way on a thread of its own: a pause, a look at the vCPUs, a change of devices, a snapshot.
struct Errand {
    over: Event,
    result: Arc<Mutex<Option<Done>>>,
    under_way: bool,
    /// Who has asked for it, and who wants something like it when it is over, in order.
    clients: VecDeque<Asked>,
}

/// What a client has asked for.
struct Asked {
    client: u32,
    command: Command,
    passed: Vec<OwnedFd>,
}

/// Its result.
enum Done {
    Paused(Result<(), String>),
    Saved(Result<bool, Refusal>),
    Forked(Result<Vec<OwnedFd>, Refusal>),
    Looked(Result<Vec<VcpuState>, String>),
    Changed(Result<Attached, Refusal>),
    Added(Result<Option<Attached>, Refusal>),
}

struct Orders {
    control: Arc<dyn Control>,
    entry: Arc<Entry>,
    stop_timeout: Duration,
    reception: Reception,
    signals: Option<Signals>,
    timer: Timer,
    errand: Errand,
    clients: BTreeMap<u32, Client>,
    next_client: u32,
    /// The stop in progress becomes hard then.
    stop_at: Option<Instant>,
    /// The process ends then, whatever holds the machine up.
    give_up_at: Option<Instant>,
    stopping: bool,
    /// When SIGTERM or SIGINT came first.
    signalled: Option<Instant>,
}

impl Orders {
    fn new(
        entry: &Arc<Entry>,
        signals: Option<Signals>,
        control: Arc<dyn Control>,
        stop_timeout: Duration,
    ) -> io::Result<Self> {
        let errand = Errand {
            over: Event::new()?,
            result: Arc::default(),
            under_way: false,
            clients: VecDeque::new(),
        };
        Ok(Self {
            control,
            entry: entry.clone(),
            stop_timeout,
            reception: Reception::new(entry.clone(), LISTENER, MAX_CLIENTS),
            signals,
            timer: Timer::new()?,
            errand,
            clients: BTreeMap::new(),
            next_client: FIRST_CLIENT,
            stop_at: None,
            give_up_at: None,
            stopping: false,
            signalled: None,
        })
    }

    fn accept(&mut self, sources: &mut Sources<'_, '_>) {
        let (clients, next) = (&mut self.clients, &mut self.next_client);
        self.reception.take_in(clients.len(), sources, |stream, sources| {
            let token = *next;
            sources.add(&stream, token, Interest::INPUT)?;
            // Clients are few and short-lived: a token comes round long after its last user has gone.
            *next = token.checked_add(1).unwrap_or(FIRST_CLIENT);
            let until = Some(Instant::now() + CLIENT_TIMEOUT);
            let (input, passed) = (Vec::new(), Vec::new());
            let client = Client { stream, input, until, watch: None, waits: false, passed, holds: false };
            clients.insert(token, client);
            Ok(())
        });
    }

    fn cut_off(&mut self, client: &Client, sources: &mut Sources<'_, '_>) {
        // It is not there while it waits for an errand.
        let _ = sources.remove(&client.stream);
        self.let_go(client);
    }

    /// The machine stands still for nobody who is gone.
    fn let_go(&self, client: &Client) {
        if client.holds && !self.stopping {
            // Somebody else has resumed it, or it has ended.
            let _ = self.control.resume();
        }
    }

    /// Reads what a client sent. It is cut off when it has ended, or does not keep to the protocol.
    fn hear(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
        let Some(mut client) = self.clients.remove(&token) else { return };
        match self.serve_all(&mut client, token) {
            Keep::Yes => _ = self.clients.insert(token, client),
            Keep::No => self.cut_off(&client, sources),
            Keep::UntilDone => {
                let _ = sources.remove(&client.stream);
                self.clients.insert(token, client);
            }
        }
    }

    fn serve_all(&mut self, client: &mut Client, token: u32) -> Keep {
        let mut bytes = [0; MAX_REQUEST];
        let count = match passing::receive(&client.stream, &mut bytes, &mut client.passed) {
            Ok(0) => return Keep::No,
            Ok(count) => count,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(_) => return Keep::No,
        };
        client.input.extend_from_slice(&bytes[..count]);
        // One request's are all that there can be.
        if client.passed.len() > passing::MOST {
            return Keep::No;
        }
        self.serve_lines(client, token)
    }

    /// Answers the requests that have come whole.
    fn serve_lines(&mut self, client: &mut Client, token: u32) -> Keep {
        while let Some(end) = client.input.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = client.input.drain(..=end).collect();
            match self.serve(client, token, &line) {
                Keep::Yes => {}
                other => return other,
            }
        }
        if client.input.len() >= MAX_REQUEST {
            let answer = Answer::Error(format!("a request is at most {MAX_REQUEST} bytes").into());
            let _ = client.stream.write(&protocol::reply(answer));
            return Keep::No;
        }
        Keep::Yes
    }

    /// Answers one request.
    fn serve(&mut self, client: &mut Client, token: u32, line: &[u8]) -> Keep {
        let command = match protocol::parse_request(line) {
            Ok(command) => command,
            Err(reason) => return answer(client, Answer::Error(reason.into()), false),
        };
        log::debug!("control socket: {command:?}");
        let passed = std::mem::take(&mut client.passed);
        if client.waits {
            let _ = answer(client, Answer::Error("nothing may follow a wait".into()), false);
            return Keep::No;
        }
        if command == Command::Wait {
            // This client is not among them while it is being served.
            if self.clients.values().filter(|other| other.waits).count() >= MAX_WAITING {
                let reason = format!("{MAX_WAITING} clients wait for its end already");
                return answer(client, Answer::Error(reason.into()), false);
            }
            (client.waits, client.until) = (true, None);
            return Keep::Yes;
        }
        if command == Command::Devices {
            return answer(client, self.control.devices().map_or_else(refused, Answer::Devices), false);
        }
        if command == Command::Files {
            return answer(client, Answer::Files(self.control.files()), false);
        }
        if self.stopping && command.is_for_a_machine_that_stays() {
            return answer(client, Answer::Error(BEING_STOPPED.into()), false);
        }
        // A machine that is being paused resumes when that is over.
        if command.may_take_time() || (command == Command::Resume && self.errand.under_way) {
            let mut asked = Asked { client: token, command, passed };
            return match self.begin_errand(&mut asked) {
                Ok(()) => {
                    self.errand.clients.push_back(asked);
                    client.until = None;
                    Keep::UntilDone
                }
                Err(reason) => answer(client, Answer::Error(reason.into()), false),
            };
        }
        let ends = command.ends();
        let is_sample = command == Command::Sample;
        let obeyed = self.obey(command, client);
        let reply = match (obeyed, &client.watch) {
            (Ok(()), Some(watch)) if is_sample => {
                Answer::Sample(Box::new(MachineSample { status: self.status(), sample: watch.sample() }))
            }
            (Ok(()), _) => Answer::Status(self.status()),
            (Err(reason), _) => Answer::Error(reason.into()),
        };
        answer(client, reply, ends)
    }

    /// Starts to carry out what is `asked`, which may take its time, unless another like it is under way.
    fn begin_errand(&mut self, asked: &mut Asked) -> Result<(), String> {
        if self.errand.under_way {
            return Ok(());
        }
        let over = self.errand.over.try_clone().map_err(|error| error.to_string())?;
        let (control, result) = (self.control.clone(), self.errand.result.clone());
        let (command, passed) = (asked.command.clone(), std::mem::take(&mut asked.passed));
        let run = move || {
            let done = match command {
                Command::Vcpus => Done::Looked(control.vcpus()),
                Command::AddDevice { device } => {
                    let device =
                        serde_json::from_value(device).map_err(|error| format!("not a device: {error}"));
                    let add = |device| control.add_device(device, passed);
                    Done::Added(device.map_err(Refusal::from).and_then(add))
                }
                Command::RemoveDevice { name, force } => Done::Changed(control.remove_device(&name, force)),
                Command::Snapshot { folder, base, compress, stay } => {
                    let saving = Saving { compress, stay };
                    Done::Saved(save(&*control, &folder, base, passed, saving))
                }
                Command::Fork => Done::Forked(control.fork(passed)),
                _ => Done::Paused(control.pause()),
            };
            *lock(&result) = Some(done);
            over.signal();
        };
        threads::spawn(Role::Errand, run).map_err(|error| format!("start a thread: {error}"))?;
        self.errand.under_way = true;
        Ok(())
    }

    fn end_errand(&mut self, sources: &mut Sources<'_, '_>) {
        self.errand.over.clear();
        let Some(result) = lock(&self.errand.result).take() else { return };
        self.errand.under_way = false;
        // The guest has to hear its power button.
        if self.stopping && matches!(result, Done::Paused(Ok(()))) {
            let _ = self.control.resume();
        }
        let asked = self.errand.clients.pop_front();
        let holds = matches!(result, Done::Saved(Ok(true)));
        let mut descriptors = Vec::new();
        let reply = match result {
            Done::Forked(result) => self.done(result.map(|files| descriptors.extend(files))),
            Done::Paused(result) => self.done(result),
            Done::Saved(result) => self.done(result.map(drop)),
            Done::Looked(states) => states.map_or_else(refused, Answer::Vcpus),
            Done::Changed(device) => device.map_or_else(refused, Answer::Device),
            Done::Added(Ok(None)) => Answer::Files(Vec::new()),
            Done::Added(Ok(Some(device))) => Answer::Device(device),
            Done::Added(Err(refusal)) => refused(refusal),
        };
        self.reply(asked, (reply, holds), &descriptors, sources);
        // Those who came meanwhile get their turn.
        while let Some(mut asked) = self.errand.clients.pop_front() {
            // What somebody has given up waiting for does not happen.
            if self.clients.get(&asked.client).is_none_or(|client| has_hung_up(&client.stream)) {
                if let Some(client) = self.clients.remove(&asked.client) {
                    self.let_go(&client);
                }
                continue;
            }
            let result = match &asked.command {
                Command::Resume => self.control.resume(),
                command if self.stopping && command.is_for_a_machine_that_stays() => {
                    Err(BEING_STOPPED.to_owned())
                }
                _ => match self.begin_errand(&mut asked) {
                    Ok(()) => return self.errand.clients.push_front(asked),
                    Err(reason) => Err(reason),
                },
            };
            let reply = self.done(result);
            self.reply(Some(asked), (reply, false), &[], sources);
        }
    }

    fn done(&self, result: Result<(), impl Into<Refusal>>) -> Answer {
        result.map_or_else(refused, |()| Answer::Status(self.status()))
    }

    /// Answers a client that has waited, and hears it again. The machine may stand still for its sake from now on.
    fn reply(
        &mut self,
        asked: Option<Asked>,
        (reply, holds): (Answer, bool),
        descriptors: &[OwnedFd],
        sources: &mut Sources<'_, '_>,
    ) {
        let Some(Asked { client: token, .. }) = asked else { return };
        let Some(mut client) = self.clients.remove(&token) else { return };
        client.holds |= holds;
        let mut keep = answer_with(&mut client, reply, holds, descriptors);
        if keep == Keep::Yes {
            keep = self.serve_lines(&mut client, token);
        }
        let is_kept = match keep {
            Keep::Yes => sources.add(&client.stream, token, Interest::INPUT).is_ok(),
            // Nothing is waited for on a stream that is closed next: the next client's would have its number.
            Keep::No => false,
            Keep::UntilDone => true,
        };
        match is_kept {
            true => _ = self.clients.insert(token, client),
            false => self.let_go(&client),
        }
    }

    fn status(&self) -> Status {
        let mut status = self.control.status();
        if self.stopping {
            status.state = State::Stopping;
        }
        status
    }

    /// Carries out what takes no time.
    fn obey(&mut self, command: Command, client: &mut Client) -> Result<(), String> {
        match command {
            Command::Status => Ok(()),
            Command::Sample => {
                if client.watch.is_none() {
                    client.watch = Some(self.control.watch()?);
                }
                Ok(())
            }
            // Answered before it comes to this.
            Command::Devices
            | Command::Files
            | Command::Wait
            | Command::Pause
            | Command::Vcpus
            | Command::AddDevice { .. }
            | Command::RemoveDevice { .. }
            | Command::Snapshot { .. }
            | Command::Fork => Ok(()),
            Command::Take { .. } => Err("it is a virtual machine, not a pool".to_owned()),
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
        // A paused guest cannot hear its power button. One that is being paused resumes when that is over.
        if !self.errand.under_way && self.control.status().state == State::Paused {
            self.control.resume()?;
        }
        if !self.control.power_button()? {
            // Nobody is there yet who could power off.
            self.kill();
            return Ok(());
        }
        self.stopping = true;
        let at = Instant::now().checked_add(timeout);
        self.stop_at = [self.stop_at, at].into_iter().flatten().min();
        Ok(())
    }

    /// Tells the clients that it is over. Not left to closing: a child process may hold the same descriptors for longer, and so may a
    /// thread of ours that the host does not let go.
    fn dismiss(&self) {
        let ended = self.control.exit_status().map(|code| protocol::reply(Answer::Ended(Ended { code })));
        for client in self.clients.values() {
            if let (true, Some(ended)) = (client.waits, &ended) {
                let _ = (&client.stream).write(ended);
            }
            let _ = client.stream.shutdown(Shutdown::Both);
        }
    }

    fn kill(&mut self) {
        self.stopping = true;
        self.stop_at = None;
        self.give_up_at.get_or_insert(Instant::now() + KILL_LIMIT);
        self.control.kill();
    }

    fn obey_signals(&mut self) {
        for wish in self.signals.as_mut().map(Signals::wishes).unwrap_or_default() {
            match self.signalled {
                Some(first) if wish == Wish::Stop && first.elapsed() < SAME_WISH => continue,
                None if wish == Wish::Stop => {}
                _ => {
                    log::info!("signal: stopping hard");
                    self.kill();
                    continue;
                }
            }
            self.signalled = Some(Instant::now());
            log::info!("signal: pressing the power button");
            if let Err(reason) = self.stop(self.stop_timeout) {
                log::warn!("no power button ({reason}): stopping hard");
                self.kill();
            }
        }
    }

    /// Does what is due, and sets the timer for what is next.
    fn keep_time(&mut self, sources: &mut Sources<'_, '_>) {
        let now = Instant::now();
        let due = |at: &Option<Instant>| at.is_some_and(|at| at <= now);
        if due(&self.give_up_at) {
            self.give_up_at = None;
            // Whoever finds nobody under the name finds how it ended.
            self.control.keep_end();
            self.entry.give_back();
            self.dismiss();
            self.control.give_up();
        }
        if due(&self.stop_at) {
            log::warn!("the guest did not power off in time: stopping it hard");
            self.kill();
        }
        let late: Vec<u32> = self.clients.iter().filter(|(_, c)| due(&c.until)).map(|(t, _)| *t).collect();
        for client in late.iter().filter_map(|token| self.clients.remove(token)).collect::<Vec<_>>() {
            self.cut_off(&client, sources);
        }
        let others = [self.stop_at, self.give_up_at, self.reception.keep_time(now, sources)];
        let next = self.clients.values().map(|client| client.until).chain(others).flatten().min();
        self.timer.set(next.map(|at| at.saturating_duration_since(now)));
    }
}

/// Has the machine saved in the files that were `passed`: those of `folder`, then those of what is found as `base` from there, if anything.
fn save(
    control: &dyn Control,
    folder: &Path,
    base: Option<PathBuf>,
    mut passed: Vec<OwnedFd>,
    saving: Saving,
) -> Result<bool, Refusal> {
    let names = control.files();
    let others = passed.split_off(names.len().min(passed.len()));
    let refused = |error: snapshot::Error| Refusal::from(error_chain(&error));
    let parts = Parts::of_files(folder, passed.into_iter().zip(names)).map_err(refused)?;
    let below = base.map(|base| Below::of_descriptors(base, others)).transpose().map_err(refused)?;
    control.snapshot(&parts, below, saving)
}

/// Its peer is gone: nobody reads a reply.
fn has_hung_up(stream: &UnixStream) -> bool {
    recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok_and(|(count, _)| count == 0)
}

fn refused(why: impl Into<Refusal>) -> Answer {
    Answer::Error(why.into())
}

/// Sends a reply. A client that waits for the machine's end may take its time from then on.
fn answer(client: &mut Client, reply: Answer, ends: bool) -> Keep {
    answer_with(client, reply, ends, &[])
}

fn answer_with(client: &mut Client, reply: Answer, ends: bool, descriptors: &[OwnedFd]) -> Keep {
    let reply = protocol::reply(reply);
    client.until = if ends { None } else { Some(Instant::now() + CLIENT_TIMEOUT) };
    // Replies are smaller than a socket's buffer: one that does not fit is not being read.
    match passing::send(&client.stream, &reply, descriptors) {
        Ok(written) if written == reply.len() => Keep::Yes,
        _ => Keep::No,
    }
}

impl Handler for Orders {
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        self.reception.start(sources)?;
        sources.add(&self.timer, TIMER, Interest::INPUT)?;
        sources.add(&self.errand.over, ERRAND, Interest::INPUT)?;
        let mut signals = self.signals.iter().flat_map(Signals::sources);
        signals.try_for_each(|source| sources.add(source, SIGNALS, Interest::INPUT))
    }

    fn ready(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
        match token {
            LISTENER => self.accept(sources),
            TIMER => {
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            }
            SIGNALS => self.obey_signals(),
            ERRAND => self.end_errand(sources),
            client => self.hear(client, sources),
        }
        self.keep_time(sources);
    }
}

impl Drop for Orders {
    fn drop(&mut self) {
        self.dismiss();
    }
}
