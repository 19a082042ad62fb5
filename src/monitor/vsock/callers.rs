//! [`Callers`]: programs of the host that have connected, and have yet to say whom in the guest they want.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::Kind;

/// Callers at a time: the one that has waited longest makes room.
const MAX_CALLERS: usize = 256;
/// Bytes of the longest line that says something.
const MAX_LINE: usize = 32;

/// One who has said whom they want.
#[derive(Debug)]
pub struct Call {
    pub fd: OwnedFd,
    pub kind: Kind,
    /// The guest's port.
    pub port: u32,
}

/// What a caller has said so far.
enum Heard {
    Port(u32),
    NotAll,
    Nonsense,
}

/// By number: the lowest has waited longest.
#[derive(Debug, Default)]
pub struct Callers(BTreeMap<u64, (OwnedFd, Kind)>);

impl Callers {
    pub fn add(&mut self, id: u64, fd: OwnedFd, kind: Kind) {
        if self.0.len() >= MAX_CALLERS {
            self.0.pop_first();
        }
        self.0.insert(id, (fd, kind));
    }

    /// Caller `id` has said something, or is gone.
    pub fn ready(&mut self, id: u64) -> Option<Call> {
        let (fd, kind) = self.0.get(&id)?;
        let heard = hear(fd, *kind);
        if matches!(heard, Heard::NotAll) {
            return None;
        }
        let (fd, kind) = self.0.remove(&id)?;
        match heard {
            Heard::Port(port) => Some(Call { fd, kind, port }),
            Heard::NotAll | Heard::Nonsense => None,
        }
    }
}

/// Takes the first line, once it is whole, and nothing of what comes behind it.
fn hear(fd: impl AsFd, kind: Kind) -> Heard {
    let mut line = [0; MAX_LINE];
    let seen = match recv(&fd, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((n @ 1.., _)) => n,
        Err(Errno::AGAIN | Errno::INTR) => return Heard::NotAll,
        // The end of it; an empty message says as little.
        Ok(_) | Err(_) => return Heard::Nonsense,
    };
    let end = line[..seen].iter().position(|byte| *byte == b'\n');
    let len = match (kind, end) {
        (Kind::Stream, Some(end)) => end + 1,
        (Kind::Stream, None) if seen < MAX_LINE => return Heard::NotAll,
        (Kind::Stream, None) => return Heard::Nonsense,
        (Kind::Seqpacket, _) => seen,
    };
    match (recv(&fd, &mut line[..len], RecvFlags::DONTWAIT), port(&line[..len])) {
        (Ok(_), Some(port)) => Heard::Port(port),
        _ => Heard::Nonsense,
    }
}

/// The port in `CONNECT PORT`.
fn port(line: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(line).ok()?.split_ascii_whitespace();
    let verb = words.next()?;
    let port = words.next()?.parse().ok()?;
    (verb.eq_ignore_ascii_case("CONNECT") && words.next().is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_connect_and_a_port() {
        for (line, expect) in [
            ("CONNECT 5000\n", Some(5000)),
            ("connect 0\r\n", Some(0)),
            ("CONNECT  4294967295\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT\n", None),
            ("CONNECT 1 2\n", None),
            ("LISTEN 1\n", None),
            ("\n", None),
            ("CONNECT \u{661}\n", None),
        ] {
            assert_eq!(port(line.as_bytes()), expect, "{line:?}");
        }
        assert_eq!(port(b"CONNECT \xff\n"), None);
    }
}
