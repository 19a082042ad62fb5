//! The host's end on a clock that counts instructions: fixed amounts of traffic, and what each unit of it took.
//!
//! Such a host has one processor, and its clock goes on while that idles (a delayed acknowledgement, a helper's timer).
//! [`Spare`] tells that time from work.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::peer::{ANSWER, PIECE, Peer, answer};
use crate::sandbox::idle::idle_class;

/// Bytes before the clock starts: TCP's windows open, buffers exist.
const UNCOUNTED: usize = 2 << 20;
/// Bytes each way.
const COUNTED: usize = 8 << 20;
/// Round trips, after [`FIRST`] that are not counted.
const TRIPS: u32 = 500;
/// Requests, the same.
const REQUESTS: u32 = 100;
/// Uncounted round trips, or requests.
const FIRST: u32 = 20;

/// Instructions per KiB from inside, per KiB to the inside, per round trip, and per request.
pub type Counts = [f64; 4];

impl Peer {
    /// Serves [`Traffic::ALL`](crate::work::net::Traffic::ALL) as [`serve`](Self::serve) does, a fixed amount of each.
    ///
    /// # Errors
    /// What broke off, or there is no thread that idles.
    pub fn count(&self, alive: &mut dyn FnMut() -> Result<(), String>) -> Result<Counts, String> {
        let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let from = receive(self.accept(alive)?).map_err(failed("receive"))?;
        let to = send(self.accept(alive)?).map_err(failed("send"))?;
        let trips = trips(self.accept(alive)?).map_err(failed("round trips"))?;
        let mut request = |bytes: &[u8]| {
            let stream = self.accept(alive)?;
            answer(stream, bytes).map_err(failed("requests"))
        };
        for _ in 0..FIRST {
            request(&[b'a'; ANSWER])?;
        }
        let spare = Spare::watch().map_err(failed("requests"))?;
        for _ in 0..REQUESTS {
            request(&[b'a'; ANSWER])?;
        }
        let requests = spare.worked() / f64::from(REQUESTS);
        // No answer: it is over.
        request(&[])?;
        Ok([from, to, trips, requests])
    }
}

fn receive(mut stream: TcpStream) -> io::Result<f64> {
    let mut piece = vec![0; PIECE];
    let mut take = |mut left: usize| -> io::Result<()> {
        while left > 0 {
            let most = left.min(PIECE);
            match stream.read(&mut piece[..most])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => left -= count,
            }
        }
        Ok(())
    };
    take(UNCOUNTED)?;
    let spare = Spare::watch()?;
    take(COUNTED)?;
    Ok(per_kib(spare.worked()))
}

fn send(mut stream: TcpStream) -> io::Result<f64> {
    let piece = vec![0x5a; PIECE];
    let mut give = |bytes: usize| (0..bytes / PIECE).try_for_each(|_| stream.write_all(&piece));
    give(UNCOUNTED)?;
    let spare = Spare::watch()?;
    give(COUNTED)?;
    stream.shutdown(Shutdown::Write)?;
    // The other end closes when it has read it all.
    if stream.read(&mut [0])? != 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(per_kib(spare.worked()))
}

fn trips(mut stream: TcpStream) -> io::Result<f64> {
    let mut trip = || {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])
    };
    (0..FIRST).try_for_each(|_| trip())?;
    let spare = Spare::watch()?;
    (0..TRIPS).try_for_each(|_| trip())?;
    Ok(spare.worked() / f64::from(TRIPS))
}

fn per_kib(instructions: f64) -> f64 {
    instructions / (COUNTED / 1024) as f64
}

/// The time that a host with one processor has nothing to do: that of a thread which runs only then.
struct Spare {
    start: Instant,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    /// Processor time of the thread, in nanoseconds. It is one look at a clock old at most.
    spent: AtomicU64,
}

impl Shared {
    fn idle(&self) {
        let time = || {
            let time = clock_gettime(ClockId::ThreadCPUTime);
            Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32).as_nanos() as u64
        };
        let before = time();
        while !self.over.load(Ordering::Relaxed) {
            self.spent.store(time() - before, Ordering::Relaxed);
        }
    }
}

impl Spare {
    /// From now on.
    fn watch() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = thread::Builder::new().name("spare".to_owned()).spawn(move || {
            let result = idle_class();
            let is_idle = result.is_ok();
            let _ = ready.send(result);
            if is_idle {
                of_thread.idle();
            }
        })?;
        is_ready.recv().map_err(io::Error::other)??;
        Ok(Self { start: Instant::now(), shared, thread: Some(thread) })
    }

    /// Nanoseconds since then that were not idle: on such a clock, instructions.
    fn worked(self) -> f64 {
        let spent = Duration::from_nanos(self.shared.spent.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(spent).as_nanos() as f64
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::*;
    use crate::work::net::Traffic;

    #[test]
    fn a_fixed_amount_of_each_kind_of_traffic_is_counted() {
        let peer = Peer::listen(Ipv4Addr::LOCALHOST).unwrap();
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, peer.port().unwrap());
        let (counts, moved) = thread::scope(|scope| {
            let inside = scope.spawn(|| Traffic::ALL.map(|(traffic, _)| traffic.run(address).unwrap()));
            (peer.count(&mut || Ok(())).unwrap(), inside.join().unwrap())
        });
        let [sent, received, echoed, asked] = moved;
        assert!(sent >= (UNCOUNTED + COUNTED) as u64, "{sent}");
        assert_eq!(received, (UNCOUNTED + COUNTED) as u64);
        assert_eq!([echoed, asked], [FIRST + TRIPS, FIRST + REQUESTS].map(u64::from));
        assert!(counts.iter().all(|count| *count >= 0.0), "{counts:?}");
    }

    #[test]
    fn what_the_spare_thread_takes_is_not_work() {
        let spare = Spare::watch().unwrap();
        let (start, some) = (spare.start, Duration::from_millis(1));
        while spare.shared.spent.load(Ordering::Relaxed) < some.as_nanos() as u64 {
            thread::yield_now();
        }
        let worked = spare.worked();
        assert!(worked <= (start.elapsed() - some).as_nanos() as f64, "{worked} in {:?}", start.elapsed());
    }
}
