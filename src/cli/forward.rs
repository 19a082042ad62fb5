//! `vmm forward` and `vmm ssh-proxy`: connections into a guest by its agent. The guest needs no network for them.

// The doc comments are the text of --help, where brackets mark what may be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::Context;

use super::agent::{Guest, Reach};
use vmm_agent::client::{self, Streams, run};
use vmm_agent::protocol::Request;
use vmm_command::{Code, Failure, log_output};
use vmm_monitor::api::Error;
use vmm_monitor::api::client::Client;
use vmm_monitor::api::registry::Registry;

/// Connections at a time.
const MOST: usize = 1024;

/// Where ssh listens, over TCP and over vsock.
const SSH: u16 = 22;

/// The options of `vmm forward`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    reach: Reach,
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// [ADDR:]PORT[:GUESTPORT]: connections to this port of the host's 127.0.0.1, or ADDR, go to the guest's 127.0.0.1, to the same
    /// port or another
    #[arg(required = true, value_name = "PORT[:GUESTPORT]")]
    ports: Vec<Forward>,
}

/// The options of `vmm ssh-proxy`.
#[derive(Debug, clap::Args)]
pub struct ProxyOptions {
    #[command(flatten)]
    reach: Reach,
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// A port of the guest's 127.0.0.1 [default: ssh's over vsock, if something listens there, else over TCP: 22 both]
    port: Option<u16>,
}

/// One port of the host and where it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Forward {
    here: SocketAddr,
    there: u16,
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port"));
        // An IPv6 address is in brackets, as its colons are none of these.
        let (address, ports) = match text.strip_prefix('[').and_then(|rest| rest.split_once("]:")) {
            Some((address, ports)) => (Some(address), ports),
            None => match text.split_once(':') {
                Some((address, ports)) if address.contains('.') => (Some(address), ports),
                _ => (None, text),
            },
        };
        let address = match address {
            Some(address) => address.parse().map_err(|_| format!("{address:?} is no address"))?,
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
        };
        let (here, there) = ports.split_once(':').unwrap_or((ports, ports));
        let forward = Self { here: SocketAddr::new(address, port(here)?), there: port(there)? };
        if forward.there == 0 { Err("a guest has no port 0".to_owned()) } else { Ok(forward) }
    }
}

impl Forward {
    fn request(self) -> Request {
        Request::Connect {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, self.there)).to_string().into_bytes(),
        }
    }
}

/// `vmm forward`. Lasts until it is killed.
///
/// # Errors
/// There is no agent, or a port is taken.
pub fn forward(options: Options) -> Result<Code, Failure> {
    let Options { reach, name, ports } = options;
    let guest = reach.guest(&name)?;
    // Before a port says that something is there.
    guest.facts().map_err(|error| guest.failure(error))?;
    let listen = |forward: &Forward| {
        let listener =
            TcpListener::bind(forward.here).with_context(|| format!("cannot listen on {}", forward.here));
        let error = |error| Failure::new(Code::Host, error).hint(Some("choose another port: 8080:80"));
        listener.map(|listener| (listener, *forward)).map_err(error)
    };
    let listeners = ports.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
    log_output::serve();
    tell_the_end(name.clone());
    let open = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = listeners
        .into_iter()
        .map(|(listener, forward)| {
            let here = listener.local_addr().unwrap_or(forward.here);
            log_output::say(&format!("{here} leads to port {} of {name}\n", forward.there));
            let (guest, open) = (guest.clone(), open.clone());
            thread::spawn(move || serve(&listener, forward, &guest, &open))
        })
        .collect();
    for thread in threads {
        let _ = thread.join();
    }
    Ok(Code::Success)
}

/// Says once that the virtual machine has ended: the ports stay, for the next one of its name.
fn tell_the_end(name: String) {
    thread::spawn(move || {
        let ended = Client::connect(&Registry::of_user(), &name).and_then(Client::wait);
        if matches!(ended, Ok(_) | Err(Error::NoSuchVm(_))) {
            log_output::say(&format!(
                "{name} has ended; the next virtual machine of this name will be served\n"
            ));
        }
    });
}

fn serve(listener: &TcpListener, forward: Forward, guest: &Guest, open: &Arc<AtomicUsize>) {
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                log::warn!("cannot accept a connection on {}: {error}", forward.here);
                // Out of descriptors, say: not at once again.
                thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
        };
        if open.fetch_add(1, Ordering::SeqCst) >= MOST {
            open.fetch_sub(1, Ordering::SeqCst);
            log::warn!("more than {MOST} connections: one is refused");
            continue;
        }
        let (guest, open) = (guest.again(), open.clone());
        thread::spawn(move || {
            if let Err(error) = carry(&guest, forward, stream) {
                log::warn!("a connection to {forward}: {error}");
            }
            open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for the guest's port {}", self.here, self.there)
    }
}

fn carry(guest: &Guest, forward: Forward, stream: TcpStream) -> Result<(), client::Error> {
    let lost = |error| client::Error::Lost(Some(error));
    let session = guest.start(forward.request())?;
    stream.set_nodelay(true).map_err(lost)?;
    let (input, output) = (stream.try_clone().map_err(lost)?, stream.try_clone().map_err(lost)?);
    let streams = Streams {
        stdin: Some(Box::new(input)),
        stdout: Box::new(HalfClosing(output, |stream| stream.shutdown(Shutdown::Write))),
        stderr: Box::new(io::sink()),
    };
    let result = run(session, streams);
    // Whoever still reads it here is woken.
    let _ = stream.shutdown(Shutdown::Both);
    result.map(drop)
}

/// A socket whose other end reads an end when nothing more is written.
struct HalfClosing<S: Write>(S, fn(&S) -> io::Result<()>);

impl<S: Write> Write for HalfClosing<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<S: Write> Drop for HalfClosing<S> {
    fn drop(&mut self) {
        let _ = self.1(&self.0);
    }
}

/// `vmm ssh-proxy`: standard input and output for a connection, as ssh's ProxyCommand.
///
/// # Errors
/// Nothing listens there.
pub fn ssh_proxy(options: ProxyOptions) -> Result<Code, Failure> {
    let ProxyOptions { reach, name, port } = options;
    let guest = reach.guest(&name)?;
    let host =
        |error| Failure::new(Code::Host, anyhow::Error::new(error).context("cannot carry the connection"));
    let direct = match port {
        None => guest.again().dial(SSH.into()).ok(),
        Some(_) => None,
    };
    let stream = match direct {
        Some(stream) => stream,
        None => {
            let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            let session = guest.start(Forward { here, there: port.unwrap_or(SSH) }.request());
            let session = session.map_err(|error| guest.failure(error))?;
            let (near, far) = UnixStream::pair().map_err(host)?;
            let streams = Streams {
                stdin: Some(Box::new(far.try_clone().map_err(host)?)),
                stdout: Box::new(HalfClosing(far, |stream| stream.shutdown(Shutdown::Write))),
                stderr: Box::new(io::sink()),
            };
            thread::spawn(move || run(session, streams));
            near
        }
    };
    let mut to = stream.try_clone().map_err(host)?;
    thread::spawn(move || {
        let _ = pass(io::stdin(), &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    // What the other side says last is the end: ssh waits for it.
    pass(stream, io::stdout()).map_err(host)?;
    Ok(Code::Success)
}

/// Writes at once what is read.
fn pass(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut piece = vec![0; 32 << 10];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&piece[..count]).and_then(|()| to.flush())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        let read = |text: &str| text.parse::<Forward>().map(|f| (f.here.to_string(), f.there));
        assert_eq!(read("8080:80"), Ok(("127.0.0.1:8080".to_owned(), 80)));
        assert_eq!(read("80"), Ok(("127.0.0.1:80".to_owned(), 80)));
        assert_eq!(read("0.0.0.0:8080:80"), Ok(("0.0.0.0:8080".to_owned(), 80)));
        assert_eq!(read("[::1]:8080:80"), Ok(("[::1]:8080".to_owned(), 80)));
        for bad in ["", "x", "1:2:3", "80:0", "65536", "1.2.3:80", "80:"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
