//! Trace files: a header that makes them readable anywhere, then chunks as they were drained from the rings.
//!
//! Everything is little-endian. The file starts with [`MAGIC`] and the header's length (4 bytes), then the header as JSON;
//! then chunks: kind, track, length in bytes (4 bytes each), and the contents. A file that ends in the middle (the monitor
//! was killed) is good up to there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::kallsyms;
use super::kernel::KernelExits;
use crate::kvm::Counters;
use crate::memory::GuestRam;
use crate::recorder::{Event, Kind, Recorder, Step, Steps, Taken, clock, registers};

/// The first bytes of a trace file; the last is the version.
pub const MAGIC: [u8; 8] = *b"vmmtrac\x01";

/// Between two drains. A ring holds more exits than a vCPU can make in that time on any hardware.
const PERIOD: Duration = Duration::from_millis(5);

/// A header's length at most.
const MAX_HEADER: u32 = 1 << 20;
/// A chunk's length at most.
const MAX_CHUNK: u32 = 64 << 20;

// Kinds of chunks.
/// A track's name.
const NAME: u32 = 1;
/// Events.
const EVENTS: u32 = 2;
/// 8 bytes: events lost before what comes next of that track.
const DROPPED: u32 = 3;
/// Ticks and nanoseconds since the start, 8 bytes each, read together.
const CLOCK: u32 = 4;
/// The name of the reason, as KVM writes it, whose number stands in place of the track.
const REASON: u32 = 5;
/// KVM's counters at the end, as JSON: by vCPU, by name.
const COUNTERS: u32 = 6;
/// The guest's own symbols, as lines of address, type and name.
const SYMBOLS: u32 = 7;

/// Tracks of exits inside KVM have this and the vCPU's number.
const IN_KERNEL: u32 = 1 << 16;

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened, written or read.
    #[error("{what} trace file {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not a trace file of this version.
    #[error("{} is not a trace that this version of vmm can read: {why}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// What a reader must know beside the events.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Version of vmm.
    pub vmm: String,
    /// The kernel, for its symbols.
    pub kernel: Option<PathBuf>,
    /// Its command line.
    pub cmdline: Option<String>,
    /// The host's processor: "AuthenticAMD", "GenuineIntel". Decides which hardware's exit reasons are shown first.
    pub vendor: String,
    /// Devices by port.
    pub ports: Vec<Range>,
    /// Devices by guest address.
    pub addresses: Vec<Range>,
    /// Where the exits inside KVM are from; or why there are none.
    pub in_kernel: String,
}

/// Where a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// The device's name.
    pub name: String,
    /// First address.
    pub base: u64,
    /// Bytes, or ports.
    pub size: u64,
}

impl Header {
    /// The device at `address` among `ranges`, and the offset into it.
    pub fn find(ranges: &[Range], address: u64) -> Option<(&str, u64)> {
        let inside =
            |range: &&Range| address.checked_sub(range.base).is_some_and(|offset| offset < range.size);
        ranges.iter().find(inside).map(|range| (range.name.as_str(), address - range.base))
    }
}

/// A recording under way. It ends, and the file is whole, with [`Recording::finish`] or when it is dropped.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    recorder: Arc<Recorder>,
    counters: Vec<(String, Counters)>,
    ram: Option<Arc<GuestRam>>,
    roots: Arc<Mutex<Roots>>,
    symbols: Option<String>,
    stop: Option<Sender<()>>,
    writer: Option<JoinHandle<io::Result<BufWriter<File>>>>,
}

impl Recording {
    /// Creates the file, and switches `recorder` on if it was not. To be called by the thread that will start the vCPUs'
    /// threads, before it does: the kernel's events are those of its descendants. Times count from `start`, a moment of both
    /// clocks. `counters` are read at the end, and the guest's symbols from `ram`.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn start(
        path: &Path,
        mut header: Header,
        recorder: Arc<Recorder>,
        start: Start,
        counters: Vec<(String, Counters)>,
        ram: Arc<GuestRam>,
    ) -> Result<Self, Error> {
        recorder.set_on(true);
        let mut steps = Steps::begin(&recorder, "trace");
        let failed = |what| move |source| Error::Io { what, path: path.to_owned(), source };
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed("create"))?);
        let kernel = KernelExits::start();
        header.in_kernel = match &kernel {
            Ok(_) => "tracefs, kvm:kvm_exit".to_owned(),
            Err(error) => format!("not recorded: {error}"),
        };
        let mut kernel = kernel.ok();
        let json = serde_json::to_vec(&header).unwrap_or_default();
        let write = |file: &mut BufWriter<File>| {
            file.write_all(&MAGIC)?;
            file.write_all(&(json.len() as u32).to_le_bytes())?;
            file.write_all(&json)?;
            chunk(file, CLOCK, 0, [start.ticks, 0].as_bytes())
        };
        write(&mut file).map_err(failed("write"))?;
        let (stop, stopped) = channel::<()>();
        let (source, roots) = (recorder.clone(), Arc::<Mutex<Roots>>::default());
        let found = roots.clone();
        let run = move || {
            let (mut known, mut reasons) = (0, 0);
            loop {
                let over = stopped.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout);
                drain(&mut file, &source, &mut known, &found)?;
                if let Some(kernel) = &mut kernel {
                    drain_kernel(&mut file, kernel, &mut reasons, over)?;
                }
                if over {
                    let pair = [clock::ticks(), start.moment.elapsed().as_nanos() as u64];
                    chunk(&mut file, CLOCK, 0, pair.as_bytes())?;
                    return Ok(file);
                }
            }
        };
        let writer = std::thread::Builder::new().name("trace".to_owned()).spawn(run);
        let writer = writer.map_err(failed("start the writer of"))?;
        steps.done(Step::Recorder);
        let (path, ram, symbols) = (path.to_owned(), Some(ram), None);
        Ok(Self { path, recorder, counters, ram, roots, symbols, stop: Some(stop), writer: Some(writer) })
    }

    /// The guest was reset: its memory is looked at, and let go.
    pub fn pause(&mut self) {
        self.find_symbols();
    }

    /// It goes on in other memory.
    pub fn resume(&mut self, ram: Arc<GuestRam>) {
        self.ram = Some(ram);
    }

    /// Looks at what lies in memory, if a vCPU has been seen in a kernel there.
    fn find_symbols(&mut self) {
        let roots = std::mem::take(&mut *lock(&self.roots));
        let Some(ram) = self.ram.take() else { return };
        let Some(found) = kallsyms::list(&ram, &roots.newest_first()) else { return };
        match &self.symbols {
            // Another kernel, or it lies elsewhere (KASLR): which of them an address means is not to be told. An empty list
            // differs from all that follow.
            Some(known) if *known != found => self.symbols = Some(String::new()),
            _ => self.symbols = Some(found),
        }
    }

    /// Switches the recorder off and completes the file.
    ///
    /// # Errors
    /// [`Error::Io`]: not all of it could be written.
    pub fn finish(mut self) -> Result<(), Error> {
        let result = self.end();
        result.map_err(|source| Error::Io { what: "write", path: self.path.clone(), source })
    }

    fn end(&mut self) -> io::Result<()> {
        self.recorder.set_on(false);
        drop(self.stop.take());
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let mut file = writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))?;
        let read = |(name, counters): &(String, Counters)| {
            Some((name.clone(), counters.read().ok()?.into_iter().collect()))
        };
        let counters: BTreeMap<String, BTreeMap<String, u64>> =
            self.counters.iter().filter_map(read).collect();
        chunk(&mut file, COUNTERS, 0, &serde_json::to_vec(&counters)?)?;
        self.find_symbols();
        match &self.symbols {
            Some(symbols) if symbols.is_empty() => {
                log::warn!(
                    "the guest's kernel moved when it was reset: no symbols are kept (boot it with nokaslr)"
                );
            }
            Some(symbols) => chunk(&mut file, SYMBOLS, 0, symbols.as_bytes())?,
            None => {}
        }
        file.flush()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::error!("trace file {}: {error}", self.path.display());
        }
    }
}

/// A moment, by the clock that stamps events and by one whose rate is known.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    ticks: u64,
    moment: Instant,
}

impl Start {
    /// Now.
    pub fn now() -> Self {
        Self { ticks: clock::ticks(), moment: Instant::now() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where page tables of a guest's kernel were seen: CR3 and CR4. The first, because those of the kernel itself are never freed,
/// and the last, because those are in use.
#[derive(Debug, Default)]
struct Roots {
    first: Vec<(u64, u64)>,
    last: VecDeque<(u64, u64)>,
    registers: BTreeMap<usize, registers::Collector>,
}

impl Roots {
    /// So many of either.
    const SOME: usize = 8;

    fn see(&mut self, track: usize, event: &Event) {
        let registers = self.registers.entry(track).or_default();
        registers.add(event);
        let Some(registers) = registers.at(event.time) else { return };
        let [_, cr3, cr4, _] = registers.system.unwrap_or_default();
        let rip = registers.general[16];
        let root = (cr3, cr4);
        if cr3 == 0 || !kallsyms::IMAGE.contains(&rip) || self.last.back() == Some(&root) {
            return;
        }
        if self.first.len() < Self::SOME && !self.first.contains(&root) {
            self.first.push(root);
        }
        self.last.retain(|known| *known != root);
        self.last.push_back(root);
        if self.last.len() > Self::SOME {
            self.last.pop_front();
        }
    }

    fn newest_first(&self) -> Vec<(u64, u64)> {
        let mut all: Vec<_> = self.last.iter().rev().chain(&self.first).copied().collect();
        let mut seen = BTreeSet::new();
        all.retain(|root| seen.insert(*root));
        all
    }
}

fn chunk(file: &mut impl Write, kind: u32, track: usize, contents: &[u8]) -> io::Result<()> {
    for number in [kind, track as u32, contents.len() as u32] {
        file.write_all(&number.to_le_bytes())?;
    }
    file.write_all(contents)
}

/// Writes what the recorder has. `known` is how many tracks have been named.
fn drain(
    file: &mut impl Write,
    recorder: &Recorder,
    known: &mut usize,
    roots: &Mutex<Roots>,
) -> io::Result<()> {
    let mut result = Ok(());
    recorder.drain(&mut |Taken { track, name, events, dropped }| {
        let registers = events.iter().filter(|event| event.kind == Kind::Registers as u8);
        registers.for_each(|event| lock(roots).see(track, event));
        let mut write = || {
            if track >= *known {
                chunk(file, NAME, track, name.as_bytes())?;
                *known = track + 1;
            }
            if dropped > 0 {
                chunk(file, DROPPED, track, &dropped.to_le_bytes())?;
            }
            chunk(file, EVENTS, track, events.as_bytes())
        };
        if result.is_ok() {
            result = write();
        }
    });
    result
}

/// Writes what the kernel has. `known` is how many reasons have been named.
fn drain_kernel(
    file: &mut impl Write,
    kernel: &mut KernelExits,
    known: &mut usize,
    over: bool,
) -> io::Result<()> {
    let mut tracks: BTreeMap<u32, Vec<Event>> = BTreeMap::new();
    kernel.take(&mut |vcpu, event| tracks.entry(vcpu).or_default().push(event));
    for (number, reason) in kernel.reasons().iter().enumerate().skip(*known) {
        chunk(file, REASON, number, reason.as_bytes())?;
    }
    *known = kernel.reasons().len();
    for (vcpu, events) in tracks {
        chunk(file, EVENTS, (IN_KERNEL + vcpu % IN_KERNEL) as usize, events.as_bytes())?;
    }
    match if over { kernel.lost() } else { 0 } {
        0 => Ok(()),
        lost => chunk(file, DROPPED, IN_KERNEL as usize, &lost.to_le_bytes()),
    }
}

/// A trace in memory.
#[derive(Debug, Default)]
pub struct Trace {
    /// What the file says of its machine.
    pub header: Header,
    /// The tracks' names, by number.
    pub tracks: BTreeMap<u32, String>,
    /// Track and event, in order of time.
    pub events: Vec<(u32, Event)>,
    /// Events lost, by track.
    pub dropped: BTreeMap<u32, u64>,
    /// KVM's own counters at the end, by vCPU and name: an independent count.
    pub counters: BTreeMap<String, BTreeMap<String, u64>>,
    /// Reasons of exits inside KVM, as it writes them, by number.
    pub reasons: BTreeMap<u32, String>,
    /// The guest's own list of its symbols, where it has one.
    pub symbols: String,
    /// Ticks at the start.
    start: u64,
    /// Nanoseconds per tick.
    rate: f64,
}

impl Trace {
    /// Reads `path`.
    ///
    /// # Errors
    /// It cannot be read, or is no trace. One that ends too early is read as far as it goes.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { what: "read", path: path.to_owned(), source };
        let format = |why: &str| Error::Format { path: path.to_owned(), why: why.to_owned() };
        let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(failed)?);
        let mut magic = [0; 8];
        file.read_exact(&mut magic).map_err(|_| format("it is too short"))?;
        if magic != MAGIC {
            return Err(format("it does not begin like one"));
        }
        let length = read_number(&mut file).map_err(|_| format("it has no header"))?;
        if length > MAX_HEADER {
            return Err(format("its header is too long"));
        }
        let mut json = vec![0; length as usize];
        file.read_exact(&mut json).map_err(|_| format("its header is cut off"))?;
        let header =
            serde_json::from_slice(&json).map_err(|error| format(&format!("its header: {error}")))?;
        let mut trace = Self { header, ..Self::default() };
        let mut clocks = Vec::new();
        loop {
            match read_chunk(&mut file) {
                Ok(Some((kind, track, contents))) => trace.take(kind, track, &contents, &mut clocks),
                Ok(None) => break,
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    return Err(format(&error.to_string()));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        trace.set_clock(&clocks);
        trace.events.sort_by_key(|(_, event)| event.time);
        trace.join_kernel();
        Ok(trace)
    }

    /// Puts exits inside KVM on the tracks of their vCPUs. Those that went on to the monitor are there already.
    fn join_kernel(&mut self) {
        let numbers: BTreeMap<u32, u32> = self
            .tracks
            .iter()
            .filter_map(|(track, name)| Some((name.strip_prefix("vcpu")?.parse().ok()?, *track)))
            .collect();
        let mut reached: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        for (track, event) in &self.events {
            if event.kind().is_some_and(Kind::is_exit) {
                reached.entry(*track).or_default().push(event.time);
            }
        }
        let went_on = |track: u32, event: &Event| {
            let times = reached.get(&track).map_or(&[][..], Vec::as_slice);
            let next = times.partition_point(|time| *time < event.time);
            times.get(next).is_some_and(|time| time - event.time <= event.handled.into())
        };
        let known = |track: u32| track.checked_sub(IN_KERNEL).map(|vcpu| numbers.get(&vcpu).copied());
        for (track, _) in &mut self.events {
            // A vCPU that never reached the monitor has no track of its own.
            if let Some(Some(own)) = known(*track) {
                *track = own;
            }
        }
        self.events.retain(|(track, event)| event.kind() != Some(Kind::InKernel) || !went_on(*track, event));
        for (track, _) in &self.events {
            if let Some(vcpu) = track.checked_sub(IN_KERNEL) {
                self.tracks.entry(*track).or_insert_with(|| format!("vcpu{vcpu}"));
            }
        }
        if self.dropped.contains_key(&IN_KERNEL) {
            self.tracks.entry(IN_KERNEL).or_insert_with(|| "KVM".to_owned());
        }
    }

    fn take(&mut self, kind: u32, track: u32, contents: &[u8], clocks: &mut Vec<[u64; 2]>) {
        match kind {
            NAME => _ = self.tracks.insert(track, String::from_utf8_lossy(contents).into_owned()),
            EVENTS => {
                let events = contents.chunks_exact(size_of::<Event>());
                self.events
                    .extend(events.filter_map(|bytes| Some((track, Event::read_from_bytes(bytes).ok()?))));
            }
            DROPPED => {
                let count = <[u8; 8]>::try_from(contents).map_or(0, u64::from_le_bytes);
                let all = self.dropped.entry(track).or_default();
                *all = all.saturating_add(count);
            }
            CLOCK => clocks.extend(<[u64; 2]>::read_from_bytes(contents)),
            REASON => _ = self.reasons.insert(track, String::from_utf8_lossy(contents).into_owned()),
            SYMBOLS => self.symbols = String::from_utf8_lossy(contents).into_owned(),
            COUNTERS => self.counters = serde_json::from_slice(contents).unwrap_or_default(),
            // Of a later version.
            _ => {}
        }
    }

    /// From the first pair of ticks and nanoseconds and the last, which may be the same in a trace that was cut off: then
    /// ticks are shown as if there were one a nanosecond.
    fn set_clock(&mut self, clocks: &[[u64; 2]]) {
        let (first, last) =
            (clocks.first().copied().unwrap_or_default(), clocks.last().copied().unwrap_or_default());
        self.start = first[0];
        let (ticks, ns) = (last[0].wrapping_sub(first[0]), last[1].saturating_sub(first[1]));
        self.rate = if ticks == 0 || ns == 0 { 1.0 } else { ns as f64 / ticks as f64 };
    }

    /// Nanoseconds that `ticks` are.
    pub fn ns(&self, ticks: u64) -> f64 {
        ticks as f64 * self.rate
    }

    /// Nanoseconds from the start of the recording to `time`.
    pub fn since_start(&self, time: u64) -> f64 {
        time.wrapping_sub(self.start).cast_signed() as f64 * self.rate
    }
}

fn read_number(file: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// The next chunk; `None` at the end.
fn read_chunk(file: &mut impl Read) -> io::Result<Option<(u32, u32, Vec<u8>)>> {
    let kind = match read_number(file) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    };
    let (track, length) = (read_number(file)?, read_number(file)?);
    if length > MAX_CHUNK {
        return Err(io::Error::new(ErrorKind::InvalidData, "a chunk is too long"));
    }
    // Grows as it is read: the length is the file's word only.
    let mut contents = Vec::new();
    if file.take(length.into()).read_to_end(&mut contents)? < length as usize {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((kind, track, contents)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    fn event(value: u64) -> Event {
        let (time, kind) = (clock::ticks(), Kind::PioOut as u8);
        Event { time, value, kind, size: 1, count: 1, ..Event::default() }
    }

    fn record(path: &Path) {
        let recorder = Arc::<Recorder>::default();
        let ram = Memory::new(&"2M".parse().unwrap()).unwrap().ram().clone();
        let header = Header { vmm: "1".to_owned(), ..Header::default() };
        let recording =
            Recording::start(path, header, recorder.clone(), Start::now(), Vec::new(), ram).unwrap();
        assert!(recorder.is_on());
        let (mut a, mut b) = (recorder.track("vcpu0"), recorder.track("vcpu1"));
        for value in 0..10 {
            a.write(event(value));
            b.write(event(100 + value));
        }
        recording.finish().unwrap();
        assert!(!recorder.is_on());
    }

    #[test]
    fn what_was_recorded_is_read_in_order_of_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        record(file.path());
        let mut trace = Trace::read(file.path()).unwrap();
        assert_eq!(trace.header.vmm, "1");
        assert_eq!(trace.tracks.values().collect::<Vec<_>>(), ["trace", "vcpu0", "vcpu1"]);
        assert_eq!(trace.events[0].1.kind(), Some(Kind::Step), "what the recorder took itself");
        trace.events.remove(0);
        let values: Vec<_> = trace.events.iter().map(|(track, event)| (*track, event.value)).collect();
        let expected: Vec<_> = (0..10).flat_map(|value| [(1, value), (2, 100 + value)]).collect();
        assert_eq!(values, expected);
        let times: Vec<_> = trace.events.iter().map(|(_, event)| trace.since_start(event.time)).collect();
        assert!(times[0] >= 0.0 && times[19] < 60e9, "{times:?}");
    }

    #[test]
    fn a_file_that_was_cut_off_is_read_as_far_as_it_goes_and_garbage_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        record(file.path());
        let whole = std::fs::read(file.path()).unwrap();
        let header = 12 + u32::from_le_bytes(whole[8..12].try_into().unwrap()) as usize;
        for len in 0..whole.len() {
            std::fs::write(file.path(), &whole[..len]).unwrap();
            assert_eq!(Trace::read(file.path()).is_ok(), len >= header, "{len}");
        }
        let mut bad = whole.clone();
        bad[header + 8..header + 12].fill(0xff);
        std::fs::write(file.path(), &bad).unwrap();
        assert!(matches!(Trace::read(file.path()), Err(Error::Format { .. })), "a chunk of 4 GiB");
    }
}
