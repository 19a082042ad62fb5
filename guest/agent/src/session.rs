//! One connection, from its hello to the exit: reads messages, has a [`Job`] do what they say, and sends what comes of it.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{Errno, read};
use vmm_agent::protocol::{Decoder, Exit, Malformed, Message, Reason, Request, VERSION};

use crate::job::Job;
use crate::orders;
use crate::output::Output;
use crate::process::{self, PACK, RENEW, UNPACK, said};
use crate::renewal;

/// How long a client may take to say what it wants, and to take what is said to it at the end of a session that failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// A client's connection, which does not block.
pub struct Session {
    connection: OwnedFd,
    decoder: Decoder,
    state: State,
    /// Another than nothing once it is under way.
    job: Option<Job>,
    output: Output,
    /// When a session that is not under way is over.
    deadline: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing has come.
    New { busy: bool },
    /// The hello has.
    Greeted { busy: bool },
    /// The request has.
    UnderWay,
    /// All is said; the rest is to be sent.
    Ending,
}

/// The client has gone.
struct Gone;

impl Session {
    pub fn new(connection: OwnedFd) -> Self {
        let deadline = Some(Instant::now() + PATIENCE);
        let (decoder, output) = (Decoder::default(), Output::default());
        Self { connection, decoder, state: State::New { busy: false }, job: None, output, deadline }
    }

    /// Serves it to its end. One that is too many is told that the agent is `busy`.
    pub fn run(mut self, busy: bool) {
        self.state = State::New { busy };
        while self.turn().is_ok() {}
        if let Some(job) = self.job.take() {
            drop(self.connection);
            job.abandon();
        }
    }

    fn turn(&mut self) -> Result<(), Gone> {
        self.wait()?;
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Gone);
        }
        if let Some(job) = &mut self.job {
            job.on_time(&mut self.output);
            if let Some(exit) = job.finished() {
                self.output.put(&Message::Exit(exit));
                self.job = None;
                self.state = State::Ending;
            }
        }
        self.output.send(self.connection.as_fd()).map_err(|_| Gone)?;
        if self.state == State::Ending && self.output.is_empty() { Err(Gone) } else { Ok(()) }
    }

    /// Waits until something can be done, and does it.
    fn wait(&mut self) -> Result<(), Gone> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, !self.output.is_full());
        flags.set(PollFlags::OUT, !self.output.is_empty());
        let mut fds = vec![PollFd::new(&self.connection, flags)];
        let mut about = Vec::new();
        if let Some(job) = &self.job {
            job.interests(&self.output, &mut fds, &mut about);
        }
        let deadline = self.job.as_ref().and_then(Job::deadline).into_iter().chain(self.deadline).min();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(_) => return Err(Gone),
        }
        let connection = fds[0].revents();
        let reported = about.into_iter().zip(fds[1..].iter().map(PollFd::revents).collect::<Vec<_>>());
        // What is said first holds first: a signal, or that nobody reads any more.
        if connection.contains(PollFlags::IN) {
            self.receive()?;
        } else if connection.intersects(PollFlags::HUP | PollFlags::ERR) {
            return Err(Gone);
        }
        if let Some(job) = &mut self.job {
            for (ready, flags) in reported.filter(|(_, flags)| !flags.is_empty()) {
                job.on_ready(ready, flags, &mut self.output);
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Gone> {
        match read(&self.connection, self.decoder.room()) {
            Ok(0) => return Err(Gone),
            // All has been said: nothing of it is kept.
            Ok(_) if self.state == State::Ending => {
                self.decoder = Decoder::default();
                return Ok(());
            }
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => return Err(Gone),
        }
        loop {
            let result = match self.decoder.next() {
                Ok(None) => return Ok(()),
                Ok(Some(message)) => match (&mut self.job, self.state) {
                    (_, State::Ending) => return Ok(()),
                    (Some(job), _) => job.on_message(&message, &mut self.output),
                    (None, State::New { busy }) => match message {
                        Message::Hello { version, nonce } => {
                            self.output.put(&Message::Hello { version: VERSION, nonce });
                            // It has been told our version: nothing else that it says can be understood.
                            let same = version == VERSION;
                            self.state = if same { State::Greeted { busy } } else { State::Ending };
                            Ok(())
                        }
                        _ => Err(Malformed::Order),
                    },
                    (None, State::Greeted { busy: true }) => {
                        self.output.put(&Message::Failed(
                            Reason::Busy,
                            b"the agent in the guest runs as many commands as it may",
                        ));
                        self.state = State::Ending;
                        Ok(())
                    }
                    (None, State::Greeted { busy: false }) => match message {
                        Message::Request(request) => {
                            begin(request, &mut self.job, &mut self.output);
                            self.state = if self.job.is_some() { State::UnderWay } else { State::Ending };
                            self.deadline = self.job.is_none().then(|| Instant::now() + PATIENCE);
                            Ok(())
                        }
                        _ => Err(Malformed::Order),
                    },
                    (None, State::UnderWay) => Err(Malformed::Order),
                },
                Err(malformed) => Err(malformed),
            };
            if let Err(malformed) = result {
                let text = format!("the agent in the guest was sent {malformed}");
                self.output.put(&Message::Failed(Reason::Protocol, text.as_bytes()));
                self.state = State::Ending;
                self.deadline = Some(Instant::now() + PATIENCE);
                // Whatever runs has lost its client.
                let _ = self.output.send(self.connection.as_fd());
                return Err(Gone);
            }
        }
    }
}

/// Starts a job, or does at once what needs none.
fn begin(request: Request, job: &mut Option<Job>, output: &mut Output) {
    let done = |result: std::io::Result<()>, what: &str| {
        result.map_err(|error| (Reason::Refused, format!("the guest cannot {what}: {error}")))
    };
    let started = match request {
        Request::Exec(exec) => process::start(&exec).and_then(Job::of),
        Request::Pack { path, name } => process::start_own(&[PACK, &path, &name], false).and_then(Job::of),
        Request::Unpack { path, owners, rename } => {
            process::start_own(&[UNPACK, &path, said(owners), said(rename)], true).and_then(Job::of)
        }
        Request::Connect { address } => Job::connect(&address),
        Request::Facts => {
            output.put(&Message::Facts(orders::facts()));
            return;
        }
        Request::SetTime(time) => return answer(done(orders::set_time(time), "set its clock"), output),
        Request::Reseed(seed) => return answer(done(orders::reseed(&seed), "mix in a seed"), output),
        Request::SetHostname(name) => {
            return answer(done(orders::set_hostname(&name), "set its host name"), output);
        }
        Request::SetNetwork(network) => {
            let what = format!("set up {}", network.device.escape_ascii());
            return answer(done(orders::set_network(&network), &what), output);
        }
        Request::Renew(renewal) => renewal::first(&renewal).and_then(|()| {
            let generation = renewal::text(&renewal.generation);
            let arguments = [RENEW, generation.as_bytes(), said(renewal.machine_id)];
            process::start_own(&arguments, false).and_then(Job::of)
        }),
        // The command is to find nothing that it has in common with other copies.
        Request::RenewAndExec(renewal, exec) => {
            renewal::complete(&renewal).and_then(|()| process::start(&exec)).and_then(Job::of)
        }
        Request::ShutDown => return answer(done(orders::shut_down(), "power off"), output),
    };
    match started {
        Ok(started) => {
            output.put(&Message::Started);
            *job = Some(started);
        }
        Err(refusal) => answer(Err(refusal), output),
    }
}

fn answer(result: Result<(), process::Refusal>, output: &mut Output) {
    match result {
        Ok(()) => output.put(&Message::Exit(Exit::Code(0))),
        Err((reason, text)) => output.put(&Message::Failed(reason, text.as_bytes())),
    }
}
