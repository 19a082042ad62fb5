//! [`Recording`]: what the recorder's rings and the kernel have, written to a trace file by a thread of its own while a machine
//! runs; at its end KVM's counters and the guest's symbols.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::file::{CLOCK, COUNTERS, DROPPED, EVENTS, Error, Header, IN_KERNEL, MAGIC, NAME, REASON, SYMBOLS};
use super::kallsyms::{self, Roots};
use super::kernel::KernelExits;
use vmm_monitor::kvm::Counters;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::recorder::{Event, Kind, Recorder, Step, Steps, Taken, clock};

/// Between two drains. A ring holds more exits than a vCPU can make in that time on any hardware.
pub(super) const PERIOD: Duration = Duration::from_millis(5);

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
            let (mut known, mut reasons) = (BTreeSet::new(), 0);
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
                // A monitor that is killed leaves what there was until now.
                file.flush()?;
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

fn chunk(file: &mut impl Write, kind: u32, track: usize, contents: &[u8]) -> io::Result<()> {
    for number in [kind, track as u32, contents.len() as u32] {
        file.write_all(&number.to_le_bytes())?;
    }
    file.write_all(contents)
}

/// Writes what the recorder has. `known` are the tracks that have been named.
fn drain(
    file: &mut impl Write,
    recorder: &Recorder,
    known: &mut BTreeSet<usize>,
    roots: &Mutex<Roots>,
) -> io::Result<()> {
    let mut result = Ok(());
    recorder.drain(&mut |Taken { track, name, events, dropped }| {
        let registers = events.iter().filter(|event| event.kind == Kind::Registers as u8);
        registers.for_each(|event| lock(roots).see(track, event));
        let mut write = || {
            // Not in order: a track that was made first may have something to say last.
            if known.insert(track) {
                chunk(file, NAME, track, name.as_bytes())?;
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
    let mut keep = |vcpu, event| tracks.entry(vcpu).or_default().push(event);
    kernel.take(&mut keep);
    if over {
        kernel.last(&mut keep);
    }
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
            let mut file = Vec::new();
            drain(&mut file, recorder, &mut known, &Mutex::default()).unwrap();
            String::from_utf8_lossy(&file).matches("vcpu").count()
        };
        second.write(event(1));
        assert_eq!(named(&recorder), 1);
        first.write(event(2));
        second.write(event(3));
        assert_eq!(named(&recorder), 1);
    }
}
