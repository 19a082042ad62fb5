//! Work for a network: the inside's end of a connection whose other end, on the host, has the clock and says when it is over.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of one write or read.
const PIECE: usize = 128 << 10;
/// Bytes that a request has.
pub const REQUEST: usize = 64;
/// A network that has just come up may lose the first packets, and the host may not listen yet.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// Bytes to the host, until it closes the connection.
    Send,
    /// Bytes from it, until it has no more.
    Receive,
    /// Each byte back that it sends.
    Echo,
    /// Connections with one request and its answer each, until it gives none.
    Request,
}

impl Traffic {
    /// All, by name.
    pub const ALL: [(Self, &str); 4] = [
        (Self::Send, "net-send"),
        (Self::Receive, "net-receive"),
        (Self::Echo, "net-echo"),
        (Self::Request, "net-request"),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }

    /// Does it with who listens at `peer`. How many bytes, or requests.
    pub fn run(self, peer: SocketAddrV4) -> io::Result<u64> {
        match self {
            Self::Send => send(connect(peer)?),
            Self::Receive => receive(connect(peer)?),
            Self::Echo => echo(connect(peer)?),
            Self::Request => requests(peer),
        }
    }
}

fn connect(peer: SocketAddrV4) -> io::Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect(peer) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => {
                return Err(io::Error::new(error.kind(), format!("connect to {peer}: {error}")));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn send(mut stream: TcpStream) -> io::Result<u64> {
    let piece = vec![0x5a; PIECE];
    let mut sent = 0;
    loop {
        match stream.write(&piece) {
            Ok(count) => sent += count as u64,
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                return Ok(sent);
            }
            Err(error) => return Err(error),
        }
    }
}

fn receive(mut stream: TcpStream) -> io::Result<u64> {
    let mut piece = vec![0; PIECE];
    let mut received = 0;
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok(received),
            count => received += count as u64,
        }
    }
}

fn echo(mut stream: TcpStream) -> io::Result<u64> {
    let mut bytes = [0; 64];
    let mut answered = 0;
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(answered),
            count => stream.write_all(&bytes[..count])?,
        }
        answered += 1;
    }
}

fn requests(peer: SocketAddrV4) -> io::Result<u64> {
    let mut answered = 0;
    let mut answer = Vec::new();
    loop {
        let mut stream = connect(peer)?;
        stream.write_all(&[b'q'; REQUEST])?;
        answer.clear();
        stream.read_to_end(&mut answer)?;
        if answer.is_empty() {
            return Ok(answered);
        }
        answered += 1;
    }
}
