//! [`Dump`]: the frames of a machine's network devices, in a pcapng file as they pass.
//!
//! A link's worker puts its frames into a queue in memory, which is bounded; a thread writes them. So a slow disk slows no frame:
//! what the queue has no room for is left out, and counted in the file's last blocks.

mod pcapng;
mod wire;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::traffic::Network;
use super::{Error, MAX_FRAME};
use crate::config::OutputFile;
use crate::output::{self, Rotating};
use crate::threads::{self, Role};
use pcapng::{Direction, Interface};

pub use wire::Dumped;

/// Bytes of frames on their way to the file: some 60 of the longest, or 2700 of Ethernet's.
const LIMIT: usize = 4 << 20;
/// The last frames are waited for so long.
const LAST_LIMIT: Duration = Duration::from_secs(10);

/// Frames on their way to a file. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Queue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whole blocks.
    bytes: Vec<u8>,
    /// By interface: frames that are kept, and those that found no room.
    counts: Vec<(u64, u64)>,
    /// There is a file that takes them.
    open: bool,
    /// No frame comes any more.
    closed: bool,
    /// The thread has written all.
    over: bool,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment or call.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame of `len` bytes, of which `fill` puts the first `kept` into what it is given. Waits for no disk.
    fn add(
        &self,
        interface: u32,
        direction: Direction,
        len: usize,
        kept: usize,
        fill: impl FnOnce(&mut [u8]),
    ) {
        let nanos = now();
        let mut state = self.state();
        if !state.open {
            return;
        }
        let has_room = state.bytes.len() + kept + pcapng::AROUND <= LIMIT;
        let Some((frames, lost)) = state.counts.get_mut(interface as usize) else { return };
        if !has_room {
            *lost += 1;
            if *lost == 1 {
                log::warn!("network dump: the file does not take frames fast enough: some are left out");
            }
            return;
        }
        *frames += 1;
        pcapng::packet(&mut state.bytes, interface, nanos, direction, len, kept, fill);
        drop(state);
        self.0.changed.notify_all();
    }

    /// Writes what comes to `file`, until the queue is closed or the file takes no more.
    fn write(&self, mut file: Target, name: &str) {
        let mut piece = Vec::new();
        loop {
            let mut state = self.state();
            while state.bytes.is_empty() && !state.closed {
                state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            piece.clear();
            std::mem::swap(&mut piece, &mut state.bytes);
            let closed = state.closed;
            if closed {
                let nanos = now();
                for ((kept, lost), interface) in state.counts.iter().zip(0..) {
                    pcapng::statistics(&mut piece, interface, nanos, *kept, *lost);
                }
            }
            drop(state);
            let written = file.write(&piece, name);
            if let Err(error) = &written {
                log::error!("network dump {name}: {error}; it ends here, and the guest runs on");
            }
            if closed || written.is_err() {
                let mut state = self.state();
                (state.open, state.over, state.bytes) = (false, true, Vec::new());
                drop(state);
                return self.0.changed.notify_all();
            }
        }
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos() as u64
}

/// The file.
enum Target {
    Whole(File),
    /// Each file begins with the head.
    Limited {
        file: Rotating,
        head: Vec<u8>,
    },
}

impl Target {
    fn create(target: &OutputFile, head: Vec<u8>) -> io::Result<Self> {
        Ok(match target.max {
            None => {
                let mut file = output::create(&target.path)?;
                file.write_all(&head)?;
                Self::Whole(file)
            }
            Some(max) => {
                let mut file = Rotating::create(&target.path, max.bytes())?;
                write_all(&mut file, &head)?;
                Self::Limited { file, head }
            }
        })
    }

    /// Writes whole blocks.
    fn write(&mut self, mut blocks: &[u8], name: &str) -> io::Result<()> {
        match self {
            Self::Whole(file) => file.write_all(blocks),
            Self::Limited { file, head } => {
                while !blocks.is_empty() {
                    // As many as there is room for in this file; in a new one, the first.
                    let mut end = 0;
                    while let Some(len) = pcapng::block_len(&blocks[end..]) {
                        if !file.has_room(end + len) {
                            break;
                        }
                        end += len;
                    }
                    if end > 0 {
                        write_all(file, &blocks[..end])?;
                    } else {
                        end = pcapng::block_len(blocks).unwrap_or(blocks.len());
                        if write_all(file, &[head, &blocks[..end]].concat())? {
                            log::warn!(
                                "network dump {name}: full twice over; the oldest frames are dropped from here on"
                            );
                        }
                    }
                    blocks = &blocks[end..];
                }
                Ok(())
            }
        }
    }
}

/// True if that made older output go for the first time.
fn write_all(file: &mut Rotating, mut data: &[u8]) -> io::Result<bool> {
    let mut drops = false;
    while !data.is_empty() {
        let (count, drop) = file.write(data)?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        drops |= drop;
        data = &data[count..];
    }
    Ok(drops)
}

/// A file that takes the frames of a [`Queue`]. Dropping it waits for the last of them, for a while.
#[derive(Debug)]
pub struct Dump(Queue);

impl Dump {
    /// Creates the file, and writes the frames of `networks` to it from now on, which `queue` gets by their numbers there.
    ///
    /// # Errors
    /// [`Error::Dump`]: the file cannot be made; or the host is out of threads.
    pub fn start(target: &OutputFile, queue: &Queue, networks: &[Network]) -> Result<Self, Error> {
        let interfaces = networks.iter().map(|network| Interface {
            name: network.device.clone(),
            description: network.to.to_string(),
            mac: network.mac.0,
        });
        let interfaces: Vec<_> = interfaces.collect();
        let failed = |source| Error::Dump { path: target.path.clone(), source };
        let file = Target::create(target, pcapng::head(&interfaces, MAX_FRAME as u32)).map_err(failed)?;
        let mut state = queue.state();
        *state = State { counts: vec![(0, 0); interfaces.len()], open: true, ..State::default() };
        drop(state);
        let (thread, name) = (queue.clone(), shown(&target.path));
        threads::spawn(Role::Output, move || thread.write(file, &name)).map_err(failed)?;
        Ok(Self(queue.clone()))
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

impl Drop for Dump {
    fn drop(&mut self) {
        let mut state = self.0.state();
        (state.closed, state.open) = (true, false);
        self.0.0.changed.notify_all();
        let end = Instant::now() + LAST_LIMIT;
        while !state.over {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return log::warn!("network dump: the last frames were not written in time");
            }
            let waited = self.0.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
