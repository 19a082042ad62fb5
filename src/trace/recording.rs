//! [`Recording`]: what the recorder's rings and the kernel have, written to a trace file by a thread of its own while a machine
//! runs; at its end KVM's counters, and when the machine is gone the guest's symbols ([`Ended`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::file::{
    CLOCK, COUNTERS, DROPPED, EVENTS, Error, Header, IN_KERNEL, MAGIC, MAX_CHUNK, NAME, OF_THREADS, REASON,
    STOPPED, SYMBOLS,
};
use super::kallsyms::{self, Budget, Roots};
use super::kernel::{Actor, KernelExits};
use super::reasons;
use vmm_monitor::config::{OutputFile, Size};
use vmm_monitor::kvm::Counters;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::output;
use vmm_monitor::recorder::{Event, Kind, Recorder, Step, Steps, Taken, clock};
use vmm_monitor::threads::{self, Role};

/// Between two drains. A ring holds more exits than a vCPU can make in that time on any hardware.
pub(super) const PERIOD: Duration = Duration::from_millis(5);

/// The guest's symbols are searched for so long when its run is over, on an ordinary host ([`Budget`]). A distribution's kernel
/// has them found in a twentieth of it.
pub const SEARCH: Duration = Duration::from_secs(4);
/// The same between two lives of a guest that reboots, which waits for it.
const SHORT_SEARCH: Duration = Duration::from_secs(1);

/// A recording under way. It ends with [`Recording::stop`] or [`Recording::finish`]; one that is dropped has what was known by
/// then.
#[derive(Debug)]
pub struct Recording {
    recorder: Arc<Recorder>,
    counters: Vec<(String, Counters)>,
    memory: Searched,
    stop: Option<Sender<()>>,
    writer: Option<JoinHandle<Log<BufWriter<File>>>>,
    path: PathBuf,
}

impl Recording {
    /// Creates the file, and switches `recorder` on if it was not. To be called by the thread that will start the vCPUs'
    /// threads, before it does: the kernel's events are those of its descendants. Times count from `start`, a moment of both
    /// clocks. `counters` are read at the end, and the guest's symbols from `ram`. A file that has reached its limit takes no
    /// more events, as one that finds no room: that is said, and the guest runs on.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn start(
        target: &OutputFile,
        mut header: Header,
        recorder: Arc<Recorder>,
        start: Start,
        counters: Vec<(String, Counters)>,
        ram: Arc<GuestRam>,
    ) -> Result<Self, Error> {
        recorder.set_on(true);
        let mut steps = Steps::begin(&recorder, "trace");
        let path = target.path.clone();
        let failed = |what| move |source| Error::Io { what, path: target.path.clone(), source };
        let file = output::create(&target.path).map_err(failed("create"))?;
        let mut log = Log::new(BufWriter::with_capacity(1 << 20, file), target);
        let kernel = KernelExits::start();
        header.in_kernel = match &kernel {
            Ok(_) => "tracefs, kvm:kvm_exit".to_owned(),
            Err(error) => format!("not recorded: {error}"),
        };
        let mut kernel = kernel.ok();
        if let Some(kernel) = &mut kernel {
            kernel.add_page_faults(&ram, reasons::vendor(&header.vendor));
        }
        let json =
            serde_json::to_vec(&header).map_err(|error| failed("describe the machine in")(error.into()))?;
        log.begin(&json, start.ticks).map_err(failed("write"))?;
        let (stop, stopped) = channel::<()>();
        let (source, roots) = (recorder.clone(), Arc::<Mutex<Roots>>::default());
        let found = roots.clone();
        let run = move || {
            let (mut known, mut named) = (BTreeSet::new(), [0; 2]);
            loop {
                let over = stopped.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout);
                // Also when the file takes no more: those who watch the machine see what is taken out here.
                drain(&mut log, &source, &mut known, &found);
                if let Some(kernel) = &mut kernel {
                    drain_kernel(&mut log, kernel, &mut named, over);
                }
                if over {
                    let pair = [clock::ticks(), start.moment.elapsed().as_nanos() as u64];
                    log.last_chunk(CLOCK, 0, pair.as_bytes());
                    return log;
                }
                // A monitor that is killed leaves what there was until now.
                log.flush();
                if log.is_over() {
                    source.set_on(false);
                    kernel = None;
                }
            }
        };
        let writer = threads::spawn(Role::Owner("trace"), run);
        let writer = writer.map_err(failed("start the writer of"))?;
        steps.done(Step::Recorder);
        let memory = Searched { ram: Some(ram), roots, symbols: None };
        Ok(Self { recorder, counters, memory, stop: Some(stop), writer: Some(writer), path })
    }

    /// The guest was reset: its memory is looked at for a moment, or until `interrupted`, and let go.
    pub fn pause(&mut self, interrupted: &dyn Fn() -> bool) {
        self.memory.search(&Budget::new(SHORT_SEARCH, interrupted));
    }

    /// It goes on in other memory.
    pub fn resume(&mut self, ram: Arc<GuestRam>) {
        self.memory.ram = Some(ram);
    }

    /// Switches the recorder off and writes what there is. The machine may be closed then, and its memory searched without it
    /// ([`Ended::analyse`]).
    ///
    /// # Errors
    /// [`Error::Io`]: not all of it could be written.
    pub fn stop(mut self) -> Result<Ended, Error> {
        let path = self.path.clone();
        let failed = |source| Error::Io { what: "write", path: path.clone(), source };
        let log = self.end().ok_or_else(|| failed(io::Error::other("the writer panicked")))?;
        let memory = std::mem::take(&mut self.memory);
        let mut ended = Ended { path: path.clone(), log, memory };
        ended.log.result().map_err(failed)?;
        Ok(ended)
    }

    /// [`Recording::stop`] and [`Ended::analyse`] in one: for who runs guests of its own.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn finish(self) -> Result<(), Error> {
        self.stop()?.analyse(SEARCH, &|| false)
    }

    /// The writer's end. None: it has been there before, or panicked.
    fn end(&mut self) -> Option<Log<BufWriter<File>>> {
        self.recorder.set_on(false);
        drop(self.stop.take());
        let mut log = self.writer.take()?.join().ok()?;
        // They keep the VM open.
        let read =
            |(name, counters): (String, Counters)| Some((name, counters.read().ok()?.into_iter().collect()));
        let counters: BTreeMap<String, BTreeMap<String, u64>> =
            self.counters.drain(..).filter_map(read).collect();
        log.last_chunk(COUNTERS, 0, &serde_json::to_vec(&counters).unwrap_or_default());
        log.flush();
        Some(log)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(mut log) = self.end() {
            self.memory.write(&mut log);
            if let Err(error) = log.result() {
                log::error!("trace file {}: {error}", self.path.display());
            }
        }
    }
}

/// A record that is complete but for the guest's symbols.
#[derive(Debug)]
pub struct Ended {
    path: PathBuf,
    log: Log<BufWriter<File>>,
    memory: Searched,
}

impl Ended {
    /// Looks for the guest's symbols in its memory and adds them: for `time` at most, and until `interrupted` says so. What the
    /// guest left there can be made to take for ever. Says when the search was cut short.
    ///
    /// # Errors
    /// [`Error::Io`]: not all of it could be written.
    pub fn analyse(mut self, time: Duration, interrupted: &dyn Fn() -> bool) -> Result<(), Error> {
        let budget = Budget::new(time, interrupted);
        self.memory.search(&budget);
        if let Some(cut) = budget.cut() {
            log::warn!(
                "the search for the guest's symbols was cut short: {cut}; the record is whole, but names may be missing"
            );
        }
        self.memory.write(&mut self.log);
        self.log.result().map_err(|source| Error::Io { what: "write", path: self.path.clone(), source })
    }
}

/// The guest's memory, and what was found there.
#[derive(Debug, Default)]
struct Searched {
    ram: Option<Arc<GuestRam>>,
    roots: Arc<Mutex<Roots>>,
    symbols: Option<String>,
}

impl Searched {
    /// Looks at what lies in memory, if a vCPU has been seen in a kernel there; and lets it go.
    fn search(&mut self, budget: &Budget<'_>) {
        let roots = std::mem::take(&mut *lock(&self.roots));
        let Some(ram) = self.ram.take() else { return };
        let Some(found) = kallsyms::list(&ram, &roots.newest_first(), budget) else { return };
        match &self.symbols {
            // Another kernel, or it lies elsewhere (KASLR): which of them an address means is not to be told. An empty list
            // differs from all that follow.
            Some(known) if *known != found => self.symbols = Some(String::new()),
            _ => self.symbols = Some(found),
        }
    }

    fn write<W: Write>(&self, log: &mut Log<W>) {
        match &self.symbols {
            Some(symbols) if symbols.is_empty() => {
                log::warn!(
                    "the guest's kernel moved when it was reset: no symbols are kept (boot it with nokaslr)"
                );
            }
            Some(symbols) => log.last_chunk(SYMBOLS, 0, symbols.as_bytes()),
            None => {}
        }
        log.flush();
    }
}

/// A trace file that is written. An error, or the limit of its size, ends it, and is said at once: the run goes on.
#[derive(Debug)]
struct Log<W> {
    out: W,
    name: String,
    max: Option<Size>,
    /// Bytes that events and their like may still take, and all.
    left: [u64; 2],
    full: bool,
    failed: Option<io::Error>,
}

impl<W: Write> Log<W> {
    /// Bytes of events in one chunk at most.
    const PIECE: usize = (1 << 20) / size_of::<Event>() * size_of::<Event>();

    fn new(out: W, target: &OutputFile) -> Self {
        let all = target.max.map_or(u64::MAX, Size::bytes);
        // The guest's symbols come last, and without them the rest says little.
        let events = all - (all / 4).min(16 << 20);
        let name = target.path.display().to_string();
        Self { out, name, max: target.max, left: [events, all], full: false, failed: None }
    }

    fn begin(&mut self, header: &[u8], ticks: u64) -> io::Result<()> {
        self.write(&[&MAGIC, &(header.len() as u32).to_le_bytes(), header]);
        self.chunk(CLOCK, 0, [ticks, 0].as_bytes());
        self.flush();
        self.result()
    }

    /// Whether it takes no more events.
    fn is_over(&self) -> bool {
        self.full || self.failed.is_some()
    }

    /// A chunk while the guest runs.
    fn chunk(&mut self, kind: u32, track: usize, contents: &[u8]) {
        if self.is_over() {
            return;
        }
        if (contents.len() + 12) as u64 > self.left[0] {
            if kind == EVENTS {
                let room = self.left[0].saturating_sub(12) as usize / size_of::<Event>();
                self.last_chunk(kind, track, &contents[..room * size_of::<Event>()]);
            }
            self.full = true;
            let max = self.max.map_or_else(String::new, |max| max.to_string());
            log::warn!("trace file {}: it has reached max={max}; what follows is not recorded", self.name);
            self.last_chunk(STOPPED, 0, format!("the file had reached max={max}").as_bytes());
            return;
        }
        self.last_chunk(kind, track, contents);
    }

    /// A chunk, as long as there is any room.
    fn last_chunk(&mut self, kind: u32, track: usize, contents: &[u8]) {
        let len = contents.len() as u64;
        if len > u64::from(MAX_CHUNK) || len + 12 > self.left[1] {
            let max = self.max.map_or_else(String::new, |max| max.to_string());
            log::warn!("trace file {}: no room in max={max} for {len} bytes of what ends it", self.name);
            return;
        }
        let [kind, track, len] = [kind, track as u32, len as u32].map(u32::to_le_bytes);
        self.write(&[&kind, &track, &len, contents]);
    }

    fn write(&mut self, parts: &[&[u8]]) {
        for part in parts {
            let result = if self.failed.is_none() { self.out.write_all(part) } else { return };
            self.note(result);
            self.left = self.left.map(|left| left.saturating_sub(part.len() as u64));
        }
    }

    fn flush(&mut self) {
        if self.failed.is_none() {
            let result = self.out.flush();
            self.note(result);
        }
    }

    fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            log::error!("trace file {}: {error}; what follows is not recorded", self.name);
            self.failed = Some(error);
        }
    }

    fn result(&mut self) -> io::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
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

/// Writes what the recorder has. `known` are the tracks that have been named.
fn drain<W: Write>(log: &mut Log<W>, recorder: &Recorder, known: &mut BTreeSet<usize>, roots: &Mutex<Roots>) {
    recorder.drain(&mut |Taken { track, name, events, dropped }| {
        let registers = events.iter().filter(|event| event.kind == Kind::Registers as u8);
        registers.for_each(|event| lock(roots).see(track, event));
        // Not in order: a track that was made first may have something to say last.
        if known.insert(track) {
            log.chunk(NAME, track, name.as_bytes());
        }
        if dropped > 0 {
            log.chunk(DROPPED, track, &dropped.to_le_bytes());
        }
        for piece in events.as_bytes().chunks(Log::<W>::PIECE) {
            log.chunk(EVENTS, track, piece);
        }
    });
}

/// Writes what the kernel has. `named` is how many reasons and threads have been named.
fn drain_kernel<W: Write>(log: &mut Log<W>, kernel: &mut KernelExits, named: &mut [usize; 2], over: bool) {
    let mut tracks: BTreeMap<u32, Vec<Event>> = BTreeMap::new();
    let mut keep = |actor, event| {
        let track = match actor {
            Actor::Vcpu(number) => IN_KERNEL + number % IN_KERNEL,
            Actor::Thread(number) => OF_THREADS + u32::from(number),
        };
        tracks.entry(track).or_default().push(event);
    };
    kernel.take(&mut keep);
    if over {
        kernel.last(&mut keep);
    }
    for (number, reason) in kernel.reasons().iter().enumerate().skip(named[0]) {
        log.chunk(REASON, number, reason.as_bytes());
    }
    for (number, thread) in kernel.threads().iter().enumerate().skip(named[1]) {
        log.chunk(NAME, OF_THREADS as usize + number, thread.as_bytes());
    }
    *named = [kernel.reasons().len(), kernel.threads().len()];
    for (track, events) in tracks {
        for piece in events.as_bytes().chunks(Log::<W>::PIECE) {
            log.chunk(EVENTS, track as usize, piece);
        }
    }
    match if over { kernel.lost() } else { 0 } {
        0 => {}
        lost => log.chunk(DROPPED, IN_KERNEL as usize, &lost.to_le_bytes()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time: u64) -> Event {
        Event { time, ..Event::default() }
    }

    #[test]
    fn a_track_that_speaks_late_has_its_name() {
        let (recorder, mut known) = (Recorder::default(), BTreeSet::new());
        let (mut first, mut second) = (recorder.track("vcpu0"), recorder.track("vcpu1"));
        let mut named = |recorder: &Recorder| {
            let mut log = Log::new(Vec::new(), &PathBuf::from("log").into());
            drain(&mut log, recorder, &mut known, &Mutex::default());
            String::from_utf8_lossy(&log.out).matches("vcpu").count()
        };
        second.write(event(1));
        assert_eq!(named(&recorder), 1);
        first.write(event(2));
        second.write(event(3));
        assert_eq!(named(&recorder), 1);
    }
}
