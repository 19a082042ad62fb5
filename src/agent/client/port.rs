//! Connects to the agent by a port of the guest's console, whose unix socket takes one client at a time: see [`crate::port`].

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{Error, Patience, is_timeout, left, random};
use crate::port::{Reader, put, put_mark};

/// Between two attempts, while another client has the port.
const AGAIN: Duration = Duration::from_millis(20);

/// How much is carried at once.
const PIECE: usize = 32 << 10;

/// Connects to the agent by the socket at `path`. Two threads carry the bytes, until either side is gone.
///
/// # Errors
/// Others have the port all the time, or nobody in the guest answers.
pub fn dial_port(path: &Path, patience: Patience) -> Result<UnixStream, Error> {
    let (started, mut taken) = (Instant::now(), false);
    loop {
        let failed = |source| Error::Socket { path: path.to_owned(), source };
        let socket = UnixStream::connect(path).map_err(failed)?;
        match greet(&socket, patience.answer) {
            Ok(Some((reader, first))) => return carry(socket, reader, &first).map_err(failed),
            // Turned away, as there is a client.
            Ok(None) if Instant::now() < patience.answer => {
                taken = true;
                thread::sleep(AGAIN);
            }
            Ok(None) => return Err(Error::PortTaken { waited: started.elapsed() }),
            // The last of many attempts has no time to be turned away.
            Err(error) if is_timeout(&error) && taken => {
                return Err(Error::PortTaken { waited: started.elapsed() });
            }
            Err(error) if is_timeout(&error) => return Err(Error::PortSilent { waited: started.elapsed() }),
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Begins a connection: what reads it from here on, and the first data of it. None if the port is taken.
fn greet(mut socket: &UnixStream, deadline: Instant) -> io::Result<Option<(Reader, Vec<u8>)>> {
    let (token, mut mark) = (random()?, Vec::new());
    put_mark(token, &mut mark);
    socket.set_write_timeout(Some(left(deadline)))?;
    match socket.write_all(&mark) {
        Err(error) if is_gone(&error) => return Ok(None),
        written => written?,
    }
    socket.set_write_timeout(None)?;
    let (mut reader, mut bytes) = (Reader::default(), vec![0; PIECE]);
    loop {
        socket.set_read_timeout(Some(left(deadline)))?;
        let count = match socket.read(&mut bytes) {
            Ok(0) => return Ok(None),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        // What others left behind, and their marks, go by. An adversary can have them go by until the deadline.
        let mut rest = bytes.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            let (read, found) = reader.read(rest, &mut Vec::new());
            rest = rest.get(read..).unwrap_or_default();
            if found == Some(token) {
                socket.set_read_timeout(None)?;
                return Ok(Some((reader, rest.to_vec())));
            }
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Starts the threads; returns the end that is like a connection of its own.
fn carry(socket: UnixStream, mut reader: Reader, first: &[u8]) -> io::Result<UnixStream> {
    let (near, far) = UnixStream::pair()?;
    let (mut from, mut to) = (far.try_clone()?, socket.try_clone()?);
    thread::spawn(move || {
        let (mut bytes, mut out) = (vec![0; PIECE], Vec::new());
        while let Some(count @ 1..) = read(&mut from, &mut bytes) {
            out.clear();
            put(bytes.get(..count).unwrap_or_default(), &mut out);
            if to.write_all(&out).is_err() {
                break;
            }
        }
        // The port is free for others.
        let _ = to.shutdown(Shutdown::Both);
    });
    let first = first.to_vec();
    thread::spawn(move || {
        let (mut from, mut to) = (socket, far);
        let (mut bytes, mut data) = (vec![0; PIECE], Vec::new());
        let mut goes_on = pass(&mut reader, &first, &mut data, &mut to);
        while goes_on && let Some(count @ 1..) = read(&mut from, &mut bytes) {
            goes_on = pass(&mut reader, bytes.get(..count).unwrap_or_default(), &mut data, &mut to);
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    Ok(near)
}

/// Hands data on; false at the connection's end.
fn pass(reader: &mut Reader, bytes: &[u8], data: &mut Vec<u8>, to: &mut UnixStream) -> bool {
    data.clear();
    // A mark is this connection's end, whatever its token.
    let (_, mark) = reader.read(bytes, data);
    to.write_all(data).is_ok() && mark.is_none()
}

fn read(from: &mut UnixStream, bytes: &mut [u8]) -> Option<usize> {
    loop {
        match from.read(bytes) {
            Ok(count) => return Some(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}
