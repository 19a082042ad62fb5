//! The host's end: reaches an agent, has it do one thing, and carries the streams.

mod dial;
mod outcome;
mod port;
mod run;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::{Errno, read};

use crate::protocol::{Decoder, Facts, MAX_REQUEST, Malformed, Message, PORT, Reason, Request, VERSION};

use crate::port::NAME;

pub use dial::{Patience, dial, dial_cid, dial_with};
pub use port::dial_port;
pub use run::{Streams, run};

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket that leads to the virtual machine's socket device or console port does not take connections.
    #[error("cannot connect to the guest's socket {}", path.display())]
    Socket {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The guest, or the host's kernel, does not take connections by AF_VSOCK.
    #[error("cannot connect to the guest at vsock address {cid}")]
    Vsock {
        /// The guest's.
        cid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The guest's kernel refuses connections to the port.
    #[error("{}", nobody_listens(*.0))]
    NobodyListens(u32),
    /// Neither accepted nor refused.
    #[error("the guest did not answer on vsock port {port} within {:.0} s", waited.as_secs_f32())]
    NoAnswer {
        /// The port.
        port: u32,
        /// The time that it had.
        waited: Duration,
    },
    /// The agent has taken the connection, and is silent.
    #[error("the agent in the guest did not answer within {:.0} s", waited.as_secs_f32())]
    Silent {
        /// The time that it had.
        waited: Duration,
    },
    /// Nobody in the guest answers by the console port.
    #[error("no agent in the guest answered on the console port {NAME} within {:.0} s", waited.as_secs_f32())]
    PortSilent {
        /// The time that it had.
        waited: Duration,
    },
    /// The console port serves one client at a time.
    #[error("the console port {NAME} was in use by another command for {:.0} s", waited.as_secs_f32())]
    PortTaken {
        /// How long this one has waited.
        waited: Duration,
    },
    /// An agent of another version.
    #[error("the agent in the guest speaks version {theirs} of the protocol, and this vmm version {VERSION}")]
    Version {
        /// The agent's.
        theirs: u16,
    },
    /// The agent, or what poses as one, sends what makes no sense.
    #[error("the agent in the guest sent {0}")]
    Malformed(#[from] Malformed),
    /// What listens there is no agent.
    #[error("what listens on the agent's port in the guest is no agent: it sent {0}")]
    NoAgent(Malformed),
    /// The connection ended before the session did.
    #[error("the connection to the agent was lost")]
    Lost(#[source] Option<io::Error>),
    /// The agent's answer.
    #[error("{text}")]
    Failed {
        /// Its kind.
        reason: Reason,
        /// The agent's words.
        text: String,
    },
    /// Arguments and environment do not fit into a message.
    #[error("the arguments and variables are {0} bytes; {MAX_REQUEST} fit")]
    TooLong(usize),
    /// One of the streams cannot be read or written here.
    #[error("cannot {0} on the host")]
    Stream(&'static str, #[source] io::Error),
}

fn nobody_listens(port: u32) -> String {
    match port {
        PORT => format!("there is no agent in the guest: nothing listens on vsock port {PORT}"),
        _ => format!("nothing in the guest listens on vsock port {port}"),
    }
}

/// A session that the agent has taken up.
#[derive(Debug)]
pub struct Session {
    stream: UnixStream,
    decoder: Decoder,
    sender: Sender,
}

/// Sends to a session, from any thread.
#[derive(Debug, Clone)]
pub struct Sender(Arc<Mutex<UnixStream>>);

impl Sender {
    /// Sends one message. That the connection is gone is for the receiver to say.
    pub fn send(&self, message: &Message<'_>) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&message.to_vec())
    }
}

/// What the agent answered to a request.
enum Answer {
    Started,
    Facts(Facts),
    Done,
}

impl Session {
    /// Says hello on `stream` and makes the request. Returns when it is under way.
    ///
    /// # Errors
    /// There is no agent, or one of another version, or it cannot do that; or it has not answered by `deadline`.
    pub fn start(stream: UnixStream, request: Request, deadline: Instant) -> Result<Self, Error> {
        match Self::ask(stream, request, deadline)? {
            (session, Answer::Started) => Ok(session),
            _ => Err(Malformed::Order.into()),
        }
    }

    /// Asks for the guest's [`Facts`].
    ///
    /// # Errors
    /// As for [`Session::start`].
    pub fn facts(stream: UnixStream, deadline: Instant) -> Result<Facts, Error> {
        match Self::ask(stream, Request::Facts, deadline)? {
            (_, Answer::Facts(facts)) => Ok(facts),
            _ => Err(Malformed::Order.into()),
        }
    }

    /// Has one of those requests carried out that have no streams.
    ///
    /// # Errors
    /// As for [`Session::start`].
    pub fn order(stream: UnixStream, request: Request, deadline: Instant) -> Result<(), Error> {
        match Self::ask(stream, request, deadline)? {
            (_, Answer::Done) => Ok(()),
            _ => Err(Malformed::Order.into()),
        }
    }

    /// To send signals and sizes by.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Its connection, for who is to end it from another thread: a shutdown of it is a lost connection to [`run`].
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn connection(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// The same on a `stream` that has yet to call the agent's port: all of it is said at once, without waiting for an answer.
    ///
    /// # Errors
    /// As for [`Session::start`]; nobody listens there ([`Error::NobodyListens`]): then nothing of it was heard.
    pub fn call(stream: UnixStream, request: Request, deadline: Instant) -> Result<Self, Error> {
        match Self::ask_after(stream, Some(PORT), request, deadline)? {
            (session, Answer::Started) => Ok(session),
            _ => Err(Malformed::Order.into()),
        }
    }

    fn ask(stream: UnixStream, request: Request, deadline: Instant) -> Result<(Self, Answer), Error> {
        Self::ask_after(stream, None, request, deadline)
    }

    /// Asks, behind a call to port `called` if that is still to be made.
    fn ask_after(
        stream: UnixStream,
        called: Option<u32>,
        request: Request,
        deadline: Instant,
    ) -> Result<(Self, Answer), Error> {
        let started = Instant::now();
        let lost = |error| Error::Lost(Some(error));
        let nonce = u64::from_ne_bytes(random().map_err(lost)?);
        let mut opening = called.map(dial::call_to).unwrap_or_default();
        Message::Hello { version: VERSION, nonce }.put(&mut opening);
        let hello = opening.len();
        Message::Request(request).put(&mut opening);
        if opening.len() - hello > MAX_REQUEST {
            return Err(Error::TooLong(opening.len() - hello));
        }
        let sender = Sender(Arc::new(Mutex::new(stream.try_clone().map_err(lost)?)));
        let mut session = Self { stream, decoder: Decoder::default(), sender };
        // What it takes of a request it takes at once; one that does not may be another version's, whose hello is to be read.
        session.stream.set_write_timeout(Some(left(deadline))).map_err(lost)?;
        let sent = session.stream.write_all(&opening);
        if let Some(port) = called {
            match dial::is_answered(&mut session.stream, deadline) {
                Ok(true) => {}
                Ok(false) => return Err(Error::NobodyListens(port)),
                Err(error) if is_timeout(&error) => {
                    return Err(Error::NoAnswer { port, waited: started.elapsed() });
                }
                Err(error) => return Err(lost(error)),
            }
        }
        let mut greeted = false;
        let answer = loop {
            let limit = left(deadline);
            session.stream.set_read_timeout(Some(limit)).map_err(lost)?;
            match session.receive() {
                Ok(Some(Message::Hello { version, .. })) if !greeted && version != VERSION => {
                    return Err(Error::Version { theirs: version });
                }
                Ok(Some(Message::Hello { nonce: theirs, .. })) if !greeted && theirs == nonce => {
                    greeted = true
                }
                Ok(Some(Message::Started)) if greeted => break Answer::Started,
                Ok(Some(Message::Facts(facts))) if greeted => break Answer::Facts(facts),
                Ok(Some(Message::Exit(_))) if greeted => break Answer::Done,
                Ok(Some(Message::Failed(reason, text))) if greeted => return Err(failed(reason, text)),
                Ok(Some(_)) if greeted => return Err(Malformed::Order.into()),
                Ok(Some(_)) => return Err(Error::NoAgent(Malformed::Order)),
                Ok(None) => {
                    return Err(Error::Lost(sent.err()));
                }
                Err(Error::Lost(Some(error))) if is_timeout(&error) => {
                    return Err(Error::Silent { waited: started.elapsed() });
                }
                Err(Error::Malformed(malformed)) if !greeted => return Err(Error::NoAgent(malformed)),
                Err(error) => return Err(error),
            }
        };
        session.stream.set_read_timeout(None).map_err(lost)?;
        session.stream.set_write_timeout(None).map_err(lost)?;
        Ok((session, answer))
    }

    /// The next message; none at the connection's end.
    fn receive(&mut self) -> Result<Option<Message<'_>>, Error> {
        // A message that is there is found twice: the borrow checker does not see that the first look ends here.
        while !self.decoder.has_message()? {
            match read(&self.stream, self.decoder.room()) {
                Ok(0) => return Ok(None),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Lost(Some(error.into()))),
            }
        }
        Ok(self.decoder.next()?)
    }
}

fn failed(reason: Reason, text: &[u8]) -> Error {
    Error::Failed { reason, text: String::from_utf8_lossy(text).into_owned() }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// The time until `deadline`; never zero, which would mean: without limit.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

fn random() -> io::Result<[u8; 8]> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}
