//! Published ports: the host's sockets that lead to the guest.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use rustix::process::{Resource, getrlimit};

use crate::config::{Allow, Publish};
use crate::event_loop::Interest;

use super::tcp::Tcp;
use super::{Context, Source};

/// Why there is no network for the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port cannot be published.
    #[error("cannot publish {address}/{protocol}")]
    Publish {
        /// The host's end.
        address: SocketAddr,
        /// `tcp` or `udp`.
        protocol: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There are more ports than open files.
    #[error("cannot publish {ports} ports: each takes an open file, and this process may have {limit}")]
    Files {
        /// All that are to be published.
        ports: usize,
        /// Open files.
        limit: u64,
    },
    /// A setting that would open nothing.
    #[error("`net=user,allow={allow}` opens nothing: {why}")]
    Dead {
        /// What is to be opened.
        allow: Allow,
        /// Why it is not.
        why: &'static str,
        /// What to write.
        hint: &'static str,
    },
    /// The host is out of descriptors.
    #[error("cannot set up the user network")]
    Host(#[from] io::Error),
}

impl Error {
    /// Whether the caller's request was wrong (and not the host refusing it).
    pub fn is_bad_argument(&self) -> bool {
        match self {
            Self::Publish { source, .. } => source.kind() == io::ErrorKind::AddrNotAvailable,
            Self::Dead { .. } => true,
            Self::Files { .. } | Self::Host(_) => false,
        }
    }

    /// What to try.
    pub fn hint(&self) -> String {
        let (address, protocol, source) = match self {
            Self::Publish { address, protocol, source } => (address, protocol, source),
            Self::Files { ports, .. } => {
                return format!(
                    "publish fewer, or raise this shell's limit on open files: sudo prlimit -n{} -p $$",
                    ports + SPARE_FILES
                );
            }
            Self::Dead { hint, .. } => return (*hint).to_owned(),
            Self::Host(_) => return "see what the limits are: ulimit -a".to_owned(),
        };
        let (port, letter) = (address.port(), protocol.chars().next().unwrap_or_default());
        match source.kind() {
            io::ErrorKind::PermissionDenied => format!(
                "publish a port from 1024 on, or allow low ones: sudo sysctl net.ipv4.ip_unprivileged_port_start={port}"
            ),
            io::ErrorKind::AddrNotAvailable => {
                "the host has no such address; it has these: ip -brief address".to_owned()
            }
            _ => format!(
                "publish another port of the host, or see who has this one: ss -{letter}lnp sport = :{port}"
            ),
        }
    }
}

/// What a machine takes beside its published ports, and the connections to them, at the least.
const SPARE_FILES: usize = 1024;

/// Sockets of one protocol, each with the guest's port that it leads to.
type Open<S> = Vec<(S, u16)>;

/// Opens all that is published.
pub fn open(list: &[Publish]) -> Result<(Open<TcpListener>, Open<UdpSocket>), Error> {
    let (mut tcp, mut udp) = (Vec::new(), Vec::new());
    for publish in list {
        for (address, port) in publish.ports() {
            let failed = |source: io::Error| match source.raw_os_error() {
                Some(libc::EMFILE) => Error::Files {
                    ports: list.iter().map(|publish| usize::from(publish.count)).sum(),
                    limit: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
                },
                _ => Error::Publish { address, protocol: publish.protocol(), source },
            };
            if publish.udp {
                let socket = UdpSocket::bind(address).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                udp.push((socket, port));
            } else {
                let socket = TcpListener::bind(address).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                tcp.push((socket, port));
            }
        }
    }
    Ok((tcp, udp))
}

/// Connections taken from one socket before the others have their turn.
const TURN: usize = 64;

struct Listener {
    socket: TcpListener,
    port: u16,
    /// Somebody may be waiting.
    ready: bool,
    /// It is only that others had to have their turn.
    more: bool,
}

/// Ports of TCP.
pub struct Listeners(Vec<Listener>);

impl Listeners {
    pub fn new(context: &Context, sockets: Open<TcpListener>) -> io::Result<Self> {
        let own = |(socket, port)| Listener { socket, port, ready: false, more: false };
        let list: Vec<_> = sockets.into_iter().map(own).collect();
        for (number, listener) in (0..).zip(&list) {
            context.poller.add(&listener.socket, Source::Listener, number, Interest::INPUT)?;
        }
        Ok(Self(list))
    }

    /// Somebody connects to port `number`.
    pub fn ready(&mut self, context: &mut Context, tcp: &mut Tcp, number: u64) {
        let Some(listener) = self.0.get_mut(number as usize) else { return };
        listener.ready = true;
        listener.take(context, tcp);
    }

    /// Goes on where others had to have their turn.
    pub fn resume(&mut self, context: &mut Context, tcp: &mut Tcp) {
        self.0.iter_mut().filter(|listener| listener.more).for_each(|listener| listener.take(context, tcp));
    }

    /// Whether somebody waits for the next turn.
    pub fn is_waiting(&self) -> bool {
        self.0.iter().any(|listener| listener.more)
    }

    /// Whether somebody could not be let in.
    pub fn any(&self) -> bool {
        self.0.iter().any(|listener| listener.ready)
    }

    /// Looks after those who could not be let in.
    pub fn retry(&mut self, context: &mut Context, tcp: &mut Tcp) {
        self.0.iter_mut().filter(|listener| listener.ready).for_each(|listener| listener.take(context, tcp));
    }
}

impl Listener {
    fn take(&mut self, context: &mut Context, tcp: &mut Tcp) {
        self.more = false;
        for _ in 0..TURN {
            match self.socket.accept() {
                Ok((stream, _)) => tcp.accept(context, stream, self.port),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.ready = false;
                    return;
                }
                // The peer has gone again.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                // Out of descriptors: later.
                Err(error) => return log::warn!("user network: published port {}: {error}", self.port),
            }
        }
        self.more = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_taken_is_named_with_what_to_do() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let publish: Publish = format!("{port}:80").parse().unwrap();
        let error = open(&[publish]).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot publish 127.0.0.1:{port}/tcp"));
        assert!(error.hint().contains(&format!("ss -tlnp sport = :{port}")));
        assert!(!error.is_bad_argument());
        let elsewhere: Publish = "192.0.2.1:4000:80/udp".parse().unwrap();
        assert!(open(&[elsewhere]).unwrap_err().hint().contains("ip -brief address"));
    }
}
