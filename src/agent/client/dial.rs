//! Connects to a vsock port of a guest: by the unix socket of its socket device, as Firecracker has it (`CONNECT PORT`, and an `OK`
//! if somebody listens), or by AF_VSOCK.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use interface::vsock;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SocketType, connect, recv};

use super::{Error, is_timeout, left};

/// Between two attempts to reach a guest that is still booting.
const AGAIN: Duration = Duration::from_millis(20);

/// A refusal of the guest's kernel comes at once. One that takes so long is the monitor's, for want of any answer: that gives a guest 2 s,
/// which one on a busy host may need longer for.
const SILENCE: Duration = Duration::from_millis(1500);

/// The longest answer to `CONNECT`: `OK`, a number of 32 bits, and the end of the line.
const MAX_ANSWER: usize = 32;

/// How long to wait for a guest.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// A guest that refuses may be booting until then.
    pub boot: Instant,
    /// One that is silent is waited for until then.
    pub answer: Instant,
}

/// Connects to `port` of the guest, by the unix socket at `path`.
///
/// # Errors
/// Nobody listens there and the guest has had its time to boot, or it does not answer.
pub fn dial(path: &Path, port: u32, patience: Patience) -> Result<UnixStream, Error> {
    dial_with(|| UnixStream::connect(path), path, port, patience)
}

/// The same, by connections to `path` that `connect` makes.
///
/// # Errors
/// As [`dial`].
pub fn dial_with(
    connect: impl Fn() -> io::Result<UnixStream>,
    path: &Path,
    port: u32,
    patience: Patience,
) -> Result<UnixStream, Error> {
    let failed = |source| Error::Socket { path: path.to_owned(), source };
    let call = || {
        // That there is none is no refusal of the guest's.
        let mut stream = connect().map_err(failed)?;
        let answered = ask(&mut stream, port, patience.answer).map(|listens| listens.then_some(stream));
        unless_timeout(answered).map_err(failed)
    };
    dial_by(call, port, patience)
}

/// The same, of the guest whose connections the host's kernel carries, at address `cid`.
///
/// # Errors
/// As [`dial`], or there is no such guest.
pub fn dial_cid(cid: u32, port: u32, patience: Patience) -> Result<UnixStream, Error> {
    let call = || {
        let connected = retry_on_intr(|| connect_cid(cid, port)).map(Some).or_else(|error| match error {
            // The second: for the 2 s that the host's kernel gives it, the guest has said nothing.
            Errno::CONNRESET | Errno::TIMEDOUT => Ok(None),
            error => Err(io::Error::from(error)),
        });
        connected.map(Answer::of).map_err(|source| Error::Vsock { cid, source })
    };
    dial_by(call, port, patience)
}

fn connect_cid(cid: u32, port: u32) -> Result<UnixStream, Errno> {
    let socket = vsock::socket(SocketType::STREAM)?;
    connect(&socket, &vsock::Address::new(cid, port))?;
    // Nothing but its address tells it from the other kind.
    Ok(UnixStream::from(socket))
}

/// What becomes of one call.
enum Answer {
    Listens(UnixStream),
    Refused,
    /// None within the time that there was.
    None,
}

impl Answer {
    fn of(stream: Option<UnixStream>) -> Self {
        stream.map_or(Self::Refused, Self::Listens)
    }
}

fn unless_timeout(answered: io::Result<Option<UnixStream>>) -> io::Result<Answer> {
    match answered {
        Ok(stream) => {
            stream.iter().try_for_each(|stream| stream.set_read_timeout(None))?;
            Ok(Answer::of(stream))
        }
        Err(error) if is_timeout(&error) => Ok(Answer::None),
        Err(error) => Err(error),
    }
}

/// Calls until somebody answers, or the time for that is over.
fn dial_by(
    call: impl Fn() -> Result<Answer, Error>,
    port: u32,
    patience: Patience,
) -> Result<UnixStream, Error> {
    let started = Instant::now();
    loop {
        let asked = Instant::now();
        match call()? {
            Answer::Listens(stream) => return Ok(stream),
            Answer::Refused if asked.elapsed() >= SILENCE => {
                if Instant::now() >= patience.answer {
                    return Err(Error::NoAnswer { port, waited: started.elapsed() });
                }
            }
            Answer::Refused if Instant::now() < patience.boot => thread::sleep(AGAIN),
            Answer::Refused => return Err(Error::NobodyListens(port)),
            Answer::None => return Err(Error::NoAnswer { port, waited: started.elapsed() }),
        }
    }
}

/// Whether somebody listens. Reads not one byte past the answer: what follows is the connection's.
fn ask(stream: &mut UnixStream, port: u32, deadline: Instant) -> io::Result<bool> {
    stream.set_write_timeout(Some(left(deadline)))?;
    match stream.write_all(&call_to(port)) {
        Err(error) if is_gone(&error) => return Ok(false),
        result => result?,
    }
    stream.set_write_timeout(None)?;
    is_answered(stream, deadline)
}

/// What the one who takes connections is told first.
pub(super) fn call_to(port: u32) -> Vec<u8> {
    format!("CONNECT {port}\n").into_bytes()
}

/// Whether somebody listens, of a stream that has said [`call_to`].
pub(super) fn is_answered(stream: &mut UnixStream, deadline: Instant) -> io::Result<bool> {
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER {
        stream.set_read_timeout(Some(left(deadline)))?;
        let mut bytes = [0; MAX_ANSWER];
        match recv(&*stream, &mut bytes, RecvFlags::PEEK).map_err(io::Error::from) {
            Ok((_, 0)) => return Ok(false),
            Ok((_, count)) => {
                let there = &mut bytes[..count];
                let end = there.iter().position(|byte| *byte == b'\n').map_or(count, |at| at + 1);
                stream.read_exact(&mut there[..end])?;
                answer.extend_from_slice(&there[..end]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_gone(&error) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    match answer.starts_with(b"OK ") {
        true => Ok(true),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "it does not answer CONNECT with OK")),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
