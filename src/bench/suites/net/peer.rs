//! The host's end of a network: serves what comes from inside, one kind of traffic after the other, and has the clock.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::measure::stats;
use crate::work::net::REQUEST;

/// How long each kind of traffic is measured.
const SPAN: Duration = Duration::from_secs(1);
/// The most round trips: more tell no more.
const MOST_TRIPS: usize = 2000;
/// Bytes of an answer.
pub const ANSWER: usize = 1024;
/// Bytes of one read or write.
pub const PIECE: usize = 256 << 10;
/// A connection on which nothing moves for so long is given up.
const SILENCE: Duration = Duration::from_secs(20);
/// How soon it is seen that the other end is gone.
const GLANCE: Duration = Duration::from_millis(50);

/// What was measured, in the order of the suite's quantities.
pub type Values = [f64; 7];

/// The host's end.
pub struct Peer {
    listener: TcpListener,
}

impl Peer {
    /// Listens on a port of `address`.
    ///
    /// # Errors
    /// The host has no such address.
    pub fn listen(address: Ipv4Addr) -> Result<Self, String> {
        let listener = TcpListener::bind((address, 0)).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        Ok(Self { listener: listener.map_err(|error| format!("listen on {address}: {error}"))? })
    }

    /// The port.
    ///
    /// # Errors
    /// Never seen.
    pub fn port(&self) -> Result<u16, String> {
        self.listener.local_addr().map(|address| address.port()).map_err(|error| error.to_string())
    }

    /// Serves [`Traffic::ALL`](crate::work::net::Traffic::ALL). `alive` is asked while nobody comes.
    ///
    /// # Errors
    /// What broke off.
    pub fn serve(&self, alive: &mut dyn FnMut() -> Result<(), String>) -> Result<Values, String> {
        let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let (from, from_cost) = receive(self.accept(alive)?).map_err(failed("receive"))?;
        let (to, to_cost) = send(self.accept(alive)?).map_err(failed("send"))?;
        let (median, p99) = trips(self.accept(alive)?).map_err(failed("round trips"))?;
        let requests = self.requests(alive)?;
        Ok([from, to, median, p99, requests, from_cost, to_cost])
    }

    /// Who comes next. `alive` is asked while nobody does.
    ///
    /// # Errors
    /// What `alive` says, or the host.
    pub fn accept(&self, alive: &mut dyn FnMut() -> Result<(), String>) -> Result<TcpStream, String> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let set_up = || -> io::Result<()> {
                        stream.set_nonblocking(false)?;
                        stream.set_nodelay(true)?;
                        stream.set_read_timeout(Some(SILENCE))?;
                        stream.set_write_timeout(Some(SILENCE))
                    };
                    return set_up().map(|()| stream).map_err(|error| error.to_string());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(format!("accept: {error}")),
            }
            alive()?;
            let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
            let _ = poll(&mut fds, Timespec::try_from(GLANCE).ok().as_ref());
        }
    }

    /// Answers for a while; requests a second.
    fn requests(&self, alive: &mut dyn FnMut() -> Result<(), String>) -> Result<f64, String> {
        let failed = |error: io::Error| format!("requests: {error}");
        answer(self.accept(alive)?, &[b'a'; ANSWER]).map_err(failed)?;
        let start = Instant::now();
        let mut count = 0u32;
        while start.elapsed() < SPAN {
            answer(self.accept(alive)?, &[b'a'; ANSWER]).map_err(failed)?;
            count += 1;
        }
        let span = start.elapsed();
        // No answer: it is over.
        answer(self.accept(alive)?, &[]).map_err(failed)?;
        Ok(f64::from(count) / span.as_secs_f64())
    }
}

/// Answers one request, and waits until the other end is gone.
pub fn answer(mut stream: TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.read_exact(&mut [0; REQUEST])?;
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)?;
    // The client closes first, so that no port of this side waits in TIME_WAIT.
    while stream.read(&mut [0; 64])? > 0 {}
    Ok(())
}

/// MiB a second, and what a GB costs the host's processors, in milliseconds.
fn figures(bytes: u64, span: Duration, busy: Duration) -> (f64, f64) {
    (bytes as f64 / f64::from(1 << 20) / span.as_secs_f64(), busy.as_secs_f64() * 1e3 / (bytes as f64 / 1e9))
}

/// Takes what comes, for a while.
fn receive(mut stream: TcpStream) -> io::Result<(f64, f64)> {
    let mut piece = vec![0; PIECE];
    stream.read_exact(&mut piece[..1])?;
    let (start, before) = (Instant::now(), busy()?);
    let mut bytes = 0;
    while start.elapsed() < SPAN {
        match stream.read(&mut piece)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => bytes += count as u64,
        }
    }
    Ok(figures(bytes, start.elapsed(), busy()? - before))
}

/// Sends for a while, and waits until all of it has arrived.
fn send(mut stream: TcpStream) -> io::Result<(f64, f64)> {
    let piece = vec![0x5a; PIECE];
    let (start, before) = (Instant::now(), busy()?);
    let mut bytes = 0;
    while start.elapsed() < SPAN {
        bytes += stream.write(&piece)? as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    // The other end closes when it has read it all.
    if stream.read(&mut [0])? != 0 {
        return Err(ErrorKind::InvalidData.into());
    }
    Ok(figures(bytes, start.elapsed(), busy()? - before))
}

/// The time that one byte takes there and back: the median and the 99th percentile, in nanoseconds.
fn trips(mut stream: TcpStream) -> io::Result<(f64, f64)> {
    let begin = Instant::now();
    let mut times = Vec::with_capacity(MOST_TRIPS);
    while times.len() < MOST_TRIPS && begin.elapsed() < SPAN {
        let start = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        times.push(start.elapsed().as_nanos() as f64);
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok((stats::quantile(&times, 0.5), stats::quantile(&times, 0.99)))
}

/// What all processors of the host have worked since it started: all but idle and waiting for disks (proc(5)). What a guest
/// computes counts.
fn busy() -> io::Result<Duration> {
    /// What sysconf(_SC_CLK_TCK) is on every Linux of x86-64.
    const TICKS_PER_SECOND: u64 = 100;
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; the rest is part of user and nice.
    let worked = fields.iter().take(8).enumerate().filter(|(at, _)| ![3, 4].contains(at));
    let ticks: u64 = worked.map(|(_, ticks)| *ticks).sum();
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::net::Traffic;
    use std::net::SocketAddrV4;

    #[test]
    fn each_kind_of_traffic_is_measured_and_ends() {
        let peer = Peer::listen(Ipv4Addr::LOCALHOST).unwrap();
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, peer.port().unwrap());
        let (values, counts) = std::thread::scope(|scope| {
            let inside = scope.spawn(|| Traffic::ALL.map(|(traffic, _)| traffic.run(address).unwrap()));
            (peer.serve(&mut || Ok(())).unwrap(), inside.join().unwrap())
        });
        let [from, to, median, p99, requests, ..] = values;
        let mib = f64::from(1 << 20);
        // It sends on until it hears that it is over, and gets all that was sent.
        assert!(counts[0] as f64 >= from * mib && counts[1] as f64 >= to * mib, "{values:?} {counts:?}");
        assert!(median > 0.0 && median <= p99, "{values:?}");
        assert!(counts[2] >= 10 && counts[3] as f64 >= requests * 0.9, "{values:?} {counts:?}");
    }

    #[test]
    fn one_who_never_comes_is_given_up() {
        let peer = Peer::listen(Ipv4Addr::LOCALHOST).unwrap();
        assert_eq!(peer.serve(&mut || Err("it ended".to_owned())).unwrap_err(), "it ended");
    }
}
