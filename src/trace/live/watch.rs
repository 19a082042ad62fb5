//! [`Live`]: the monitor's side. The recorder is on while there are [`Viewer`]s and not longer, unless the run is recorded anyway.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use super::tally::Tally;
use super::{Sample, Vcpu};
use crate::file::Header;
use crate::recording::PERIOD;
use crate::report::COUNTERS;
use vmm_monitor::api;
use vmm_monitor::bus::lock;
use vmm_monitor::config::VmConfig;
use vmm_monitor::error_chain;
use vmm_monitor::machine::Handle;
use vmm_monitor::recorder::{Recorder, Taken, Watcher, clock};
use vmm_monitor::threads::{self, Role};

/// Viewers at a time: each holds a connection, and those are few.
const MAX_VIEWERS: usize = 8;

/// Why nobody more can look.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are enough.
    #[error("{MAX_VIEWERS} viewers are attached already")]
    TooMany,
    /// The host is out of threads.
    #[error("cannot start the thread that adds events up")]
    Thread(#[source] io::Error),
}

/// A run that can be looked at. Costs nothing until somebody does.
#[derive(Debug)]
pub struct Live {
    recorder: Arc<Recorder>,
    config: VmConfig,
    /// A recording takes the events out of the rings from start to end: nobody else may.
    recorded: bool,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    viewers: usize,
    tally: Arc<Mutex<Tally>>,
    reader: Option<Reader>,
}

/// One who looks. Dropping it detaches.
#[derive(Debug)]
pub struct Viewer(Arc<Live>);

impl Live {
    /// The run of `config`'s machine, whose threads write to `recorder`; `recorded` if that is kept in a file meanwhile.
    pub fn new(config: VmConfig, recorder: Arc<Recorder>, recorded: bool) -> Arc<Self> {
        let started = Instant::now();
        Arc::new(Self { recorder, config, recorded, started, state: Mutex::default() })
    }

    /// Where the machine's threads write.
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// Attaches a viewer. `machine` is what runs at the moment, if anything does.
    ///
    /// # Errors
    /// [`Error`]
    pub fn attach(self: &Arc<Self>, machine: Option<&Handle>) -> Result<Viewer, Error> {
        let mut state = lock(&self.state);
        if state.viewers >= MAX_VIEWERS {
            return Err(Error::TooMany);
        }
        if state.viewers == 0 {
            if !self.recorded {
                // What was still written after the last viewer left is old.
                self.recorder.drain(&mut |_| {});
                state.reader = Some(Reader::start(&self.recorder).map_err(Error::Thread)?);
            }
            let tally = state.tally.clone();
            self.describe(&tally, machine);
            let add = move |taken: &Taken<'_>| lock(&tally).add(taken, Instant::now());
            self.recorder.watch(Some(Watcher(Box::new(add))));
        }
        state.viewers += 1;
        Ok(Viewer(self.clone()))
    }

    /// Says once where the devices are: they stay there over a reboot.
    fn describe(&self, tally: &Mutex<Tally>, machine: Option<&Handle>) {
        let mut tally = lock(tally);
        if let (Some(machine), true) = (machine, tally.is_blank()) {
            tally.describe(Header::of(&self.config, &machine.inventory()));
        }
    }
}

impl Viewer {
    /// The sums now. `machine` is what runs at the moment, if anything does.
    pub fn sample(&self, machine: Option<&Handle>) -> Sample {
        let live = &self.0;
        let (tally, viewers) = {
            let state = lock(&live.state);
            (state.tally.clone(), state.viewers)
        };
        live.describe(&tally, machine);
        if !live.recorded {
            live.recorder.drain(&mut |_| {});
        }
        let mut sample = lock(&tally).sample();
        (sample.ticks, sample.ns) = (clock::ticks(), live.started.elapsed().as_nanos() as u64);
        (sample.recorded, sample.viewers) = (live.recorded, viewers);
        if let Some(machine) = machine {
            look_at_threads(machine, &mut sample);
            for network in machine.networks() {
                let device = sample.devices.entry(network.device.clone()).or_default();
                device.received = network.traffic.received.counts();
                device.sent = network.traffic.sent.counts();
            }
        }
        sample
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.viewers -= 1;
        if state.viewers == 0 {
            self.0.recorder.watch(None);
            state.reader = None;
        }
    }
}

impl api::Viewers for Live {
    fn attach(self: Arc<Self>, machine: Option<&Handle>) -> Result<Box<dyn api::Viewer>, String> {
        Live::attach(&self, machine).map(|viewer| Box::new(viewer) as _).map_err(|error| error_chain(&error))
    }
}

impl api::Viewer for Viewer {
    fn sample(&self, machine: Option<&Handle>) -> api::Sample {
        // Maps with string keys, and numbers: that cannot fail.
        serde_json::to_value(Viewer::sample(self, machine)).unwrap_or_default()
    }
}

/// What the host tells of the vCPUs' threads, and KVM of the vCPUs. One that has not been recorded yet is called out of the guest,
/// so that it will be: only its own thread can open its counters.
fn look_at_threads(machine: &Handle, sample: &mut Sample) {
    let observed = machine.observed();
    if observed.len() < machine.vcpus() {
        machine.kick();
    }
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for (number, seen) in &*observed {
        let vcpu = sample.vcpus.entry(format!("vcpu{number}")).or_default();
        schedstat(seen.thread, vcpu);
        let Some(Ok(counters)) = seen.counters.as_ref().map(|counters| counters.read()) else { continue };
        vcpu.kvm_exits =
            counters.iter().find(|(name, count)| name == "exits" && *count > 0).map(|(_, count)| *count);
        for (name, count) in counters.into_iter().filter(|(name, _)| COUNTERS.contains(&name.as_str())) {
            let sum = sums.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
    }
    sample.kvm = sums;
}

/// Time on a processor and time waiting for one (Documentation/scheduler/sched-stats.rst).
fn schedstat(thread: i32, vcpu: &mut Vcpu) {
    let Ok(text) = fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")) else { return };
    let mut numbers = text.split_ascii_whitespace().map(|word| word.parse().ok());
    vcpu.cpu_ns = numbers.next().flatten();
    vcpu.waiting_ns = numbers.next().flatten();
}

/// The thread that empties the rings while nobody records. Ends when it is dropped.
#[derive(Debug)]
struct Reader {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn start(recorder: &Arc<Recorder>) -> io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        let recorder = recorder.clone();
        let run = move || {
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                recorder.drain(&mut |_| {});
            }
        };
        let thread = threads::spawn(Role::Owner("top"), run)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_monitor::recorder::{Event, Kind};

    fn out() -> Event {
        Event { kind: Kind::PioOut as u8, ..Event::default() }
    }

    #[test]
    fn the_recorder_is_on_while_somebody_looks() {
        let recorder = Arc::<Recorder>::default();
        let live = Live::new(VmConfig::default(), recorder.clone(), false);
        let mut track = recorder.track("vcpu0");
        track.write(out());
        let first = live.attach(None).unwrap();
        assert!(recorder.is_on());
        track.write(out());
        let second = live.attach(None).unwrap();
        track.write(out());
        let sample = second.sample(None);
        assert_eq!((sample.reasons["out"].count, sample.viewers), (2, 2), "not what was there before");
        drop(first);
        assert!(recorder.is_on());
        drop(second);
        assert!(!recorder.is_on());
        let viewers: Vec<_> = (0..MAX_VIEWERS).map(|_| live.attach(None).unwrap()).collect();
        assert!(matches!(live.attach(None), Err(Error::TooMany)));
        drop(viewers);
        assert!(live.attach(None).is_ok());
    }

    #[test]
    fn a_recording_keeps_its_events() {
        let recorder = Arc::<Recorder>::default();
        recorder.set_on(true);
        let live = Live::new(VmConfig::default(), recorder.clone(), true);
        let mut track = recorder.track("vcpu0");
        let viewer = live.attach(None).unwrap();
        track.write(out());
        assert!(viewer.sample(None).reasons.is_empty(), "only the recording takes events out");
        let mut read = 0;
        recorder.drain(&mut |taken| read += taken.events.len());
        assert_eq!((read, viewer.sample(None).reasons["out"].count), (1, 1));
        drop(viewer);
        assert!(recorder.is_on());
    }
}
