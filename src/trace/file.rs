//! Trace files: a header that makes them readable anywhere, then chunks as they were drained from the rings.
//!
//! Everything is little-endian. The file starts with [`MAGIC`] and the header's length (4 bytes), then the header as JSON;
//! then chunks: kind, track, length in bytes (4 bytes each), and the contents. A file that ends in the middle (the monitor
//! was killed, the disk was full) is good up to there; so is one with a hole, which nobody wrote.
//!
//! A file may be anybody's: its texts are made [`printable`] as they are read, what is kept of it is no more
//! than a little over what it holds, and nothing that it names is opened here.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zerocopy::FromBytes;

use vmm_monitor::config::host_path;
use vmm_monitor::printable;
use vmm_monitor::recorder::{Event, Kind};

/// The first bytes of a trace file; the last is the version.
pub const MAGIC: [u8; 8] = *b"vmmtrac\x01";

/// A header's length at most.
const MAX_HEADER: u32 = 1 << 20;
/// A chunk's length at most.
pub(super) const MAX_CHUNK: u32 = 64 << 20;
/// Bytes that are read at once. If all of so many are 0, it is a hole.
const BLOCK: usize = 64 << 10;
/// Events that are kept: 900 MiB of them. Those behind them are counted.
const MAX_EVENTS: usize = 16 << 20;
/// Tracks at most: vCPUs, and devices' workers.
const MAX_TRACKS: usize = 4096;
/// Bytes of a track's or a reason's name, and of KVM's counters, at most.
const MAX_NAME: usize = 256;
const MAX_COUNTERS: usize = 4 << 20;

// Kinds of chunks.
/// A track's name.
pub(super) const NAME: u32 = 1;
/// Events.
pub(super) const EVENTS: u32 = 2;
/// 8 bytes: events lost before what comes next of that track.
pub(super) const DROPPED: u32 = 3;
/// Ticks and nanoseconds since the start, 8 bytes each, read together.
pub(super) const CLOCK: u32 = 4;
/// The name of the reason, as KVM writes it, whose number stands in place of the track.
pub(super) const REASON: u32 = 5;
/// KVM's counters at the end, as JSON: by vCPU, by name.
pub(super) const COUNTERS: u32 = 6;
/// The guest's own symbols, as lines of address, type and name.
pub(super) const SYMBOLS: u32 = 7;
/// Why no events follow, though the run went on.
pub(super) const STOPPED: u32 = 8;

/// Tracks of exits inside KVM have this and the vCPU's number.
pub(super) const IN_KERNEL: u32 = 1 << 16;
/// Tracks of what else the kernel saw of the monitor's threads have this and a number of their own. Each has the thread's name.
pub(super) const OF_THREADS: u32 = 1 << 17;

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened, written or read.
    #[error("cannot {what} trace file {}", path.display())]
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
    #[serde(default, with = "host_path::optional")]
    pub kernel: Option<PathBuf>,
    /// What was loaded is the monitor's own program that finds a kernel on a disk.
    #[serde(default)]
    pub boots_disk: bool,
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
    /// The device at `address` among `ranges`, and the offset into it. Of a PCI function and the window around it, the function.
    pub fn find(ranges: &[Range], address: u64) -> Option<(&str, u64)> {
        let inside =
            |range: &&Range| address.checked_sub(range.base).is_some_and(|offset| offset < range.size);
        let smallest = ranges.iter().filter(inside).min_by_key(|range| range.size);
        smallest.map(|range| (range.name.as_str(), address - range.base))
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
    /// The guest's own list of its symbols, where it has one: as it was, not printable.
    pub symbols: String,
    /// Why there are no events of the rest of the run.
    pub stopped: Option<String>,
    /// Events behind those that are kept.
    pub left_out: u64,
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
        let header = serde_json::from_slice(&json).map(printable::value).and_then(serde_json::from_value);
        let header =
            header.map_err(|error| format(&format!("its header: {}", printable::Printable(error))))?;
        let mut trace = Self { header, ..Self::default() };
        let (mut clocks, mut contents) = (None, Vec::new());
        loop {
            match read_chunk(&mut file, &mut contents) {
                Ok(Some((kind, track))) => trace.take(kind, track, &contents, &mut clocks),
                Ok(None) => break,
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    return Err(format(&error.to_string()));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        drop(contents);
        trace.set_clock(clocks);
        trace.events.sort_by_key(|(_, event)| event.time);
        trace.join_kernel();
        Ok(trace)
    }

    /// Puts exits inside KVM on the tracks of their vCPUs, and what else the kernel saw on those of its threads. Exits that went on
    /// to the monitor are there already.
    fn join_kernel(&mut self) {
        let own = || self.tracks.range(..IN_KERNEL);
        let numbers: BTreeMap<u32, u32> = own()
            .filter_map(|(track, name)| Some((name.strip_prefix("vcpu")?.parse().ok()?, *track)))
            .collect();
        let threads: BTreeMap<u32, u32> = self
            .tracks
            .range(OF_THREADS..)
            .filter_map(|(thread, name)| Some((*thread, *own().find(|(_, own)| *own == name)?.0)))
            .collect();
        let mut reached: BTreeMap<u32, Vec<(u64, usize)>> = BTreeMap::new();
        for (index, (track, event)) in self.events.iter().enumerate() {
            // A signal ends what KVM does by itself; it is not what hardware left the guest for.
            if event.kind().is_some_and(|kind| kind.is_exit() && kind != Kind::Kicked) {
                reached.entry(*track).or_default().push((event.time, index));
            }
        }
        // The place of the exit to the monitor that one in KVM became.
        let became = |track: u32, event: &Event| {
            let exits = reached.get(&track).map_or(&[][..], Vec::as_slice);
            let next = exits.partition_point(|(time, _)| *time < event.time);
            let (time, index) = exits.get(next)?;
            (time - event.time <= event.handled.into()).then_some(*index)
        };
        let known = |track: u32| match track {
            OF_THREADS.. => threads.get(&track).copied(),
            _ => track.checked_sub(IN_KERNEL).and_then(|vcpu| numbers.get(&vcpu).copied()),
        };
        for (track, _) in &mut self.events {
            // A vCPU that never reached the monitor has no track of its own.
            if let Some(own) = known(*track) {
                *track = own;
            }
        }
        let inside = self.events.iter().filter(|(_, event)| event.kind() == Some(Kind::InKernel));
        let gone_on = inside.filter_map(|(track, event)| Some((became(*track, event)?, event.count)));
        for (index, number) in gone_on.collect::<Vec<_>>() {
            self.events[index].1.reason = number.checked_add(1).unwrap_or(0);
        }
        self.events
            .retain(|(track, event)| event.kind() != Some(Kind::InKernel) || became(*track, event).is_none());
        for (track, _) in &self.events {
            if let Some(vcpu) = track.checked_sub(IN_KERNEL).filter(|_| *track < OF_THREADS) {
                self.tracks.entry(*track).or_insert_with(|| format!("vcpu{vcpu}"));
            }
        }
        if self.dropped.contains_key(&IN_KERNEL) {
            self.tracks.entry(IN_KERNEL).or_insert_with(|| "KVM".to_owned());
        }
    }

    fn take(&mut self, kind: u32, track: u32, contents: &[u8], clocks: &mut Option<[[u64; 2]; 2]>) {
        let name = || {
            let name = String::from_utf8_lossy(&contents[..contents.len().min(MAX_NAME)]);
            printable::text(&name).into_owned()
        };
        match kind {
            NAME if self.tracks.len() < MAX_TRACKS => _ = self.tracks.insert(track, name()),
            EVENTS => {
                let events = contents.chunks_exact(size_of::<Event>());
                let events = events.filter_map(|bytes| Event::read_from_bytes(bytes).ok());
                // Of a later version, or of nobody.
                let known = events.filter(|event| event.kind().is_some());
                let room = MAX_EVENTS.saturating_sub(self.events.len());
                let mut left_out = 0;
                self.events.extend(known.enumerate().filter_map(|(number, event)| {
                    left_out += u64::from(number >= room);
                    (number < room).then_some((track, event))
                }));
                self.left_out += left_out;
            }
            DROPPED if self.dropped.len() < MAX_TRACKS || self.dropped.contains_key(&track) => {
                let count = <[u8; 8]>::try_from(contents).map_or(0, u64::from_le_bytes);
                let all = self.dropped.entry(track).or_default();
                *all = all.saturating_add(count);
            }
            CLOCK => {
                if let Ok(pair) = <[u64; 2]>::read_from_bytes(contents) {
                    clocks.get_or_insert([pair, pair])[1] = pair;
                }
            }
            // Their numbers in events have 8 bits.
            REASON if track <= u32::from(u8::MAX) => _ = self.reasons.insert(track, name()),
            SYMBOLS => self.symbols = String::from_utf8_lossy(contents).into_owned(),
            STOPPED => self.stopped = Some(name()),
            COUNTERS if contents.len() <= MAX_COUNTERS => {
                let counters = serde_json::from_slice(contents).map(printable::value);
                self.counters = counters.and_then(serde_json::from_value).unwrap_or_default();
            }
            // Of a later version.
            _ => {}
        }
    }

    /// From the first pair of ticks and nanoseconds and the last, which may be the same in a trace that was cut off: then
    /// ticks are shown as if there were one a nanosecond.
    fn set_clock(&mut self, clocks: Option<[[u64; 2]; 2]>) {
        let [first, last] = clocks.unwrap_or_default();
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

/// The next chunk's kind and track, its contents in `contents`; `None` at the end, or where nothing was written. Of events that
/// are cut off, those that are there are as good as any.
fn read_chunk(file: &mut impl Read, contents: &mut Vec<u8>) -> io::Result<Option<(u32, u32)>> {
    static HOLE: [u8; BLOCK] = [0; BLOCK];
    let mut head = [0; 12];
    let Some(()) = whole(file.read_exact(&mut head))? else { return Ok(None) };
    let [kind, track, length] =
        std::array::from_fn(|at| u32::from_le_bytes(std::array::from_fn(|byte| head[4 * at + byte])));
    if kind == 0 {
        return Ok(None);
    }
    if length > MAX_CHUNK {
        return Err(io::Error::new(ErrorKind::InvalidData, "a chunk is too long"));
    }
    // Grows as it is read: the length is the file's word only.
    contents.clear();
    while contents.len() < length as usize {
        let (start, most) = (contents.len(), BLOCK.min(length as usize - contents.len()));
        if file.take(most as u64).read_to_end(contents)? < most || contents[start..] == HOLE {
            return Ok((kind == EVENTS).then_some((kind, track)));
        }
    }
    Ok(Some((kind, track)))
}

/// None where the file ends.
fn whole<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        result => result.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::recording::{Recording, Start};
    use vmm_monitor::memory::Memory;
    use vmm_monitor::recorder::{Recorder, clock};

    fn event(value: u64) -> Event {
        let (time, kind) = (clock::ticks(), Kind::PioOut as u8);
        Event { time, value, kind, size: 1, count: 1, ..Event::default() }
    }

    fn record(path: &Path) {
        let recorder = Arc::<Recorder>::default();
        let ram = Memory::new(&"2M".parse().unwrap()).unwrap().ram().clone();
        let header = Header { vmm: "1".to_owned(), ..Header::default() };
        let recording = Recording::start(
            &path.to_owned().into(),
            header,
            recorder.clone(),
            Start::now(),
            Vec::new(),
            ram,
        )
        .unwrap();
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
        let mut known = 0;
        for len in 0..whole.len() {
            std::fs::write(file.path(), &whole[..len]).unwrap();
            let trace = Trace::read(file.path());
            assert_eq!(trace.is_ok(), len >= header, "{len}");
            // Not by chunks, of which one may be all that there is.
            let events = trace.map_or(0, |trace| trace.events.len());
            assert!((known..=known + 1).contains(&events), "{len}: {events} after {known}");
            known = events;
        }
        assert_eq!(known, 21);
        let mut bad = whole.clone();
        bad[header + 8..header + 12].fill(0xff);
        std::fs::write(file.path(), &bad).unwrap();
        assert!(matches!(Trace::read(file.path()), Err(Error::Format { .. })), "a chunk of 4 GiB");
    }
}
