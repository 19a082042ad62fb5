//! What a pool hears, on its control thread: clients who want machines, spares that say how they are, signals.
//!
//! It waits for nobody. What may take its time, above all starting a process, is [`Work`] for the thread of [`super::run`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send};

use super::names::Names;
use super::spare::{Lines, Said, message, parse};
use super::stock::{Next, Stock};
use super::takes::{Take, Takes};
use super::{MAX_TAKEN, PoolStatus, Reason, Wanted};
use crate::api::passing;
use crate::api::protocol::{self, Answer, Command};
use crate::api::reception::Reception;
use crate::api::registry::{Entry, Registry, of_spare};
use crate::api::signals::{ChildEnds, Signals};
use crate::error_chain;
use crate::event_loop::{Handler, Interest, Sources};
use crate::timer::Timer;

/// How long a client may take from one request to the end of the next.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients at a time; more have to wait in the socket's queue.
const MAX_CLIENTS: usize = 128;

/// Tokens of the descriptors; clients and spares have theirs from [`FIRST_PEER`] on. A spare's is its number.
const LISTENER: u32 = 0;
const TIMER: u32 = 1;
const SIGNALS: u32 = 2;
const CHILDREN: u32 = 3;
const STARTER: u32 = 4;
const FIRST_PEER: u32 = 5;

/// What the thread of [`super::run`] is to do.
#[derive(Debug)]
pub(super) enum Work {
    /// Start the process of the spare of this number, with this socket.
    Make(u32, OwnedFd),
    /// Say that all spares are ready.
    Ready,
    /// This one was taken.
    Runs(u32),
    /// This one is of no use: nothing is to be left of it, nor of the name that it was to have.
    Remove(u32, Option<String>),
    /// A process has ended.
    Reap,
    /// End: the first spares cannot be made.
    GiveUp(Reason),
    /// End.
    End,
}

struct Client {
    stream: UnixStream,
    input: Lines,
    /// When it is cut off; none while it waits for an answer.
    until: Option<Instant>,
}

struct SpareEnd {
    stream: UnixStream,
    input: Lines,
    private: Option<u64>,
    /// Who has taken it, and its name from then on.
    taker: Option<(u32, String)>,
}

pub(super) struct Orders {
    name: String,
    source: String,
    size: u32,
    registry: Registry,
    reception: Reception,
    signals: Signals,
    children: ChildEnds,
    /// Who waits for all spares to be ready for the first time.
    starter: Option<OwnedFd>,
    timer: Timer,
    stock: Stock,
    spares: BTreeMap<u32, SpareEnd>,
    clients: BTreeMap<u32, Client>,
    next_peer: u32,
    /// Of the next machine that is called by the pool's name.
    next_number: u64,
    takes: Takes,
    /// Why a spare failed, since one was made.
    failure: Option<Reason>,
    work: Sender<Work>,
    ends: bool,
}

impl Orders {
    /// Of the pool that `entry` is of: its name, what it is of, and its size.
    pub fn new(
        entry: &Arc<Entry>,
        registry: &Registry,
        (name, source, size): (&str, &str, u32),
        signals: Signals,
        starter: OwnedFd,
        work: Sender<Work>,
    ) -> io::Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            source: source.to_owned(),
            size,
            registry: registry.clone(),
            reception: Reception::new(entry.clone(), LISTENER, MAX_CLIENTS),
            signals,
            children: ChildEnds::take()?,
            starter: Some(starter),
            timer: Timer::new()?,
            stock: Stock::new(size),
            spares: BTreeMap::new(),
            clients: BTreeMap::new(),
            next_peer: FIRST_PEER,
            next_number: 1,
            takes: Takes::default(),
            failure: None,
            work,
            ends: false,
        })
    }

    fn tell(&self, work: Work) {
        // Nobody is there to do it once the pool ends.
        let _ = self.work.send(work);
    }

    fn end(&mut self, work: Work) {
        if !std::mem::replace(&mut self.ends, true) {
            self.tell(work);
        }
    }

    fn forget_starter(&mut self, sources: &mut Sources<'_, '_>) {
        if let Some(pipe) = self.starter.take() {
            let _ = sources.remove(&pipe);
        }
    }

    fn accept(&mut self, sources: &mut Sources<'_, '_>) {
        let (clients, next) = (&mut self.clients, &mut self.next_peer);
        self.reception.take_in(clients.len(), sources, |stream, sources| {
            let token = peer(next);
            sources.add(&stream, token, Interest::INPUT)?;
            let until = Some(Instant::now() + CLIENT_TIMEOUT);
            clients.insert(token, Client { stream, input: Lines::default(), until });
            Ok(())
        });
    }

    fn cut_off(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
        if let Some(client) = self.clients.remove(&token) {
            let _ = sources.remove(&client.stream);
        }
        // What it was given runs; nobody waits for more.
        self.takes.cut_off(token);
    }

    fn hear_client(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        let goes_on = client.input.read(&client.stream);
        while let Some(client) = self.clients.get_mut(&token) {
            let Some(line) = client.input.next() else { break };
            match protocol::parse_request(&line) {
                Ok(command) => self.obey(token, command, sources),
                Err(reason) => self.answer(token, Answer::Error(reason.into()), sources),
            }
        }
        if !goes_on {
            self.cut_off(token, sources);
        }
    }

    fn obey(&mut self, token: u32, command: Command, sources: &mut Sources<'_, '_>) {
        let answer = match command {
            Command::Status => Answer::Pool(self.status()),
            Command::Take { count, name, renew, tied } => match self.take(token, count, name, renew, tied) {
                Ok(()) => {
                    if let Some(client) = self.clients.get_mut(&token) {
                        client.until = None;
                    }
                    return self.serve_takes(sources);
                }
                Err(reason) => Answer::Error(reason.into()),
            },
            Command::Stop { .. } | Command::Kill => {
                // Its connection lasts until the pool has ended.
                self.answer(token, Answer::Pool(self.status()), sources);
                return self.end(Work::End);
            }
            _ => Answer::Error("it is a pool, not a virtual machine".into()),
        };
        self.answer(token, answer, sources);
    }

    fn answer(&mut self, token: u32, answer: Answer, sources: &mut Sources<'_, '_>) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        let reply = protocol::reply(answer);
        client.until = Some(Instant::now() + CLIENT_TIMEOUT);
        // Replies are smaller than a socket's buffer: one that does not fit is not being read.
        if !matches!(send(&client.stream, &reply, SendFlags::NOSIGNAL), Ok(sent) if sent == reply.len()) {
            self.cut_off(token, sources);
        }
    }

    fn status(&self) -> PoolStatus {
        let mut private: Vec<_> = self.spares.values().filter_map(|spare| spare.private).collect();
        private.sort_unstable();
        PoolStatus {
            name: self.name.clone(),
            pid: process::id(),
            source: self.source.clone(),
            size: self.size,
            ready: self.stock.ready() as u32,
            taken: self.stock.taken,
            private_bytes: private.get(private.len() / 2).copied(),
            failure: self.failure.as_ref().map(|reason| reason.error.clone()),
            gave_up: self.stock.gave_up(),
        }
    }

    /// Takes a request in.
    fn take(
        &mut self,
        client: u32,
        count: u32,
        name: Option<String>,
        renew: bool,
        tied: bool,
    ) -> Result<(), String> {
        if !(1..=MAX_TAKEN).contains(&count) {
            return Err(format!("{count} machines at once: 1 to {MAX_TAKEN} can be taken"));
        }
        let names = match name {
            Some(name) => Names::of(name, count).map_err(|error| error.to_string())?,
            None => Names::Numbered(self.name.clone(), self.next_number),
        };
        self.takes.add(Take::new(client, names, count, (renew, tied)))
    }

    /// Gives out what there is, and answers whom nothing more is owed.
    fn serve_takes(&mut self, sources: &mut Sources<'_, '_>) {
        while let Some(take) = self.takes.first() {
            let now = Instant::now();
            let Some(number) = self.stock.take(now) else {
                if !self.stock.gave_up() {
                    break;
                }
                let why = self.failure.as_ref().map_or("", |reason| &reason.error);
                take.end(&format!("its machines cannot be made: {why}"));
                continue;
            };
            let Some(spare) = self.spares.get_mut(&number) else { continue };
            match take.names.give(&self.registry, &of_spare(&self.name, number)) {
                Ok(name) => {
                    // Names that were given are not looked at again, however many there are.
                    self.next_number = take.names.next_of(&self.name).unwrap_or(self.next_number);
                    let wanted = message(&Wanted { name: name.clone(), renew: take.renew, tied: take.tied });
                    // One that does not take it has ended, which is heard next.
                    let tie = self.clients.get(&take.client).filter(|_| take.tied);
                    let tie: Vec<_> = tie.iter().map(|client| &client.stream).collect();
                    let _ = passing::send(&spare.stream, &wanted, &tie);
                    take.gave(&name);
                    spare.taker = Some((take.client, name));
                }
                Err(error) => {
                    self.stock.put_back(number, now);
                    take.end(&error_chain(&error));
                }
            }
        }
        self.stock.wanted = self.takes.wanted();
        for (client, taken) in self.takes.done() {
            self.answer(client, Answer::Taken(taken), sources);
        }
    }

    fn hear_spare(&mut self, number: u32, sources: &mut Sources<'_, '_>) {
        let now = Instant::now();
        let Some(spare) = self.spares.get_mut(&number) else { return };
        let goes_on = spare.input.read(&spare.stream);
        while let Some(line) = self.spares.get_mut(&number).and_then(|spare| spare.input.next()) {
            match parse::<Said>(&line) {
                Some(Said::Ready { private }) if self.stock.stands(number, now) => {
                    self.failure = None;
                    if let Some(spare) = self.spares.get_mut(&number) {
                        spare.private = private;
                    }
                }
                Some(Said::Runs) if self.stock.runs(number, now) => {
                    if let Some(spare) = self.remove(number, sources) {
                        self.taken(spare.taker, Ok(()));
                    }
                    self.tell(Work::Runs(number));
                }
                Some(Said::Failed(reason)) => self.lose(number, Some(reason), sources),
                _ => self.lose(number, None, sources),
            }
        }
        if !goes_on {
            self.lose(number, None, sources);
        }
        self.serve_takes(sources);
    }

    fn remove(&mut self, number: u32, sources: &mut Sources<'_, '_>) -> Option<SpareEnd> {
        let spare = self.spares.remove(&number)?;
        let _ = sources.remove(&spare.stream);
        Some(spare)
    }

    /// A spare has failed or ended, and nobody can take it any more.
    fn lose(&mut self, number: u32, reason: Option<Reason>, sources: &mut Sources<'_, '_>) {
        let Some(spare) = self.remove(number, sources) else { return };
        let reason = reason.unwrap_or_else(|| Reason {
            error: "the process of one of its machines has ended".to_owned(),
            hint: None,
            code: None,
        });
        log::warn!("{}: {}", of_spare(&self.name, number), reason.error);
        self.stock.ended(number, Instant::now());
        if self.stock.gave_up() {
            log::error!("no more machines are made: too many have failed");
        }
        self.tell(Work::Remove(number, spare.taker.as_ref().map(|(_, name)| name.clone())));
        self.taken(spare.taker, Err(&reason.error));
        if !self.stock.is_filled() {
            self.end(Work::GiveUp(reason.clone()));
        }
        self.failure = Some(reason);
    }

    /// What became of a machine that a client has asked for.
    fn taken(&mut self, taker: Option<(u32, String)>, result: Result<(), &str>) {
        if let Some((client, name)) = taker {
            self.takes.became(client, name, result);
        }
    }

    /// Does what is due, and sets the timer for what is next.
    fn keep_time(&mut self, sources: &mut Sources<'_, '_>) {
        let now = Instant::now();
        for number in self.stock.late(now) {
            let error = "one of its machines takes too long".to_owned();
            self.lose(number, Some(Reason { error, hint: None, code: None }), sources);
            // Somebody may wait for just that one.
            self.serve_takes(sources);
        }
        let idle = self.clients.iter().filter(|(_, client)| client.until.is_some_and(|until| until <= now));
        for token in idle.map(|(token, _)| *token).collect::<Vec<_>>() {
            // Who waits for the end of the pool hears of that by the end of its connection.
            if !self.ends {
                self.cut_off(token, sources);
            }
        }
        let again = self.reception.keep_time(now, sources);
        let mut at = None;
        while !self.ends {
            match self.stock.next(now) {
                Next::Make => self.make(now, sources),
                Next::At(then) => {
                    at = Some(then);
                    break;
                }
                Next::Nothing => break,
            }
        }
        let clients = self.clients.values().filter_map(|client| client.until).filter(|_| !self.ends).min();
        let next = [at, self.stock.deadline(), clients, again].into_iter().flatten().min();
        self.timer.set(next.map(|at| at.saturating_duration_since(now)));
    }

    fn make(&mut self, now: Instant, sources: &mut Sources<'_, '_>) {
        let number = peer(&mut self.next_peer);
        self.stock.make(number, now);
        let added = UnixStream::pair().and_then(|(stream, socket)| {
            stream.set_nonblocking(true)?;
            sources.add(&stream, number, Interest::INPUT)?;
            Ok((stream, socket))
        });
        match added {
            Ok((stream, socket)) => {
                let spare = SpareEnd { stream, input: Lines::default(), private: None, taker: None };
                self.spares.insert(number, spare);
                self.tell(Work::Make(number, socket.into()));
            }
            Err(error) => {
                log::warn!("a socket for {}: {error}", of_spare(&self.name, number));
                self.stock.ended(number, now);
            }
        }
    }
}

/// The next token for a client or a spare.
fn peer(next: &mut u32) -> u32 {
    let peer = *next;
    // One comes round long after its last user has gone.
    *next = peer.checked_add(1).unwrap_or(FIRST_PEER);
    peer
}

impl Handler for Orders {
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        self.reception.start(sources)?;
        sources.add(&self.timer, TIMER, Interest::INPUT)?;
        sources.add(self.children.source(), CHILDREN, Interest::INPUT)?;
        // That it is gone is told without being asked for.
        self.starter.iter().try_for_each(|pipe| sources.add(pipe, STARTER, Interest::default()))?;
        self.signals.sources().iter().try_for_each(|source| sources.add(source, SIGNALS, Interest::INPUT))?;
        self.keep_time(sources);
        Ok(())
    }

    fn ready(&mut self, token: u32, sources: &mut Sources<'_, '_>) {
        match token {
            LISTENER => self.accept(sources),
            TIMER => {
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            }
            SIGNALS => {
                if !self.signals.wishes().is_empty() {
                    self.end(Work::End);
                }
            }
            CHILDREN => {
                self.children.clear();
                self.tell(Work::Reap);
            }
            STARTER => {
                let error = "the command that started it is gone".to_owned();
                self.end(Work::GiveUp(Reason { error, hint: None, code: None }));
                self.forget_starter(sources);
            }
            peer if self.clients.contains_key(&peer) => self.hear_client(peer, sources),
            peer => {
                let filled = self.stock.is_filled();
                self.hear_spare(peer, sources);
                if !filled && self.stock.is_filled() {
                    self.forget_starter(sources);
                    self.tell(Work::Ready);
                }
            }
        }
        self.keep_time(sources);
    }
}
