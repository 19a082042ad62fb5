//! Connects to a vsock port of a guest by the unix socket of its socket device, as Firecracker has it: `CONNECT PORT`, and an
//! `OK` if somebody listens.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

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

/// Connects to `port` of the guest.
///
/// # Errors
/// Nobody listens there and the guest has had its time to boot, or it does not answer.
pub fn dial(path: &Path, port: u32, patience: Patience) -> Result<UnixStream, Error> {
    let started = Instant::now();
    loop {
        let failed = |source| Error::Socket { path: path.to_owned(), source };
        let mut stream = UnixStream::connect(path).map_err(failed)?;
        let asked = Instant::now();
        match ask(&mut stream, port, patience.answer) {
            Ok(true) => {
                stream.set_read_timeout(None).map_err(failed)?;
                return Ok(stream);
            }
            Ok(false) if asked.elapsed() >= SILENCE => {
                if Instant::now() >= patience.answer {
                    return Err(Error::NoAnswer { port, waited: started.elapsed() });
                }
            }
            Ok(false) if Instant::now() < patience.boot => thread::sleep(AGAIN),
            Ok(false) => return Err(Error::NobodyListens(port)),
            Err(error) if is_timeout(&error) => {
                return Err(Error::NoAnswer { port, waited: started.elapsed() });
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Whether somebody listens. Reads not one byte past the answer: what follows is the connection's.
fn ask(stream: &mut UnixStream, port: u32, deadline: Instant) -> io::Result<bool> {
    stream.set_write_timeout(Some(left(deadline)))?;
    match stream.write_all(format!("CONNECT {port}\n").as_bytes()) {
        Err(error) if is_gone(&error) => return Ok(false),
        result => result?,
    }
    stream.set_write_timeout(None)?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER {
        stream.set_read_timeout(Some(left(deadline)))?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Ok(false),
            Ok(_) => answer.push(byte[0]),
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
