//! What a round trip out of the guest costs, by kind of exit: the monitor's whole path (a session, the
//! vCPU's thread, dispatch, bus, device) beside a bare KVM_RUN loop, and the same path while it is recorded or looked at. Its
//! guests are a few instructions each, so that it runs on any /dev/kvm.

mod bare;
mod guest;
mod viewer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::super::host::Host;
use super::super::measure::{self, Contender, INTERRUPTED, Plan, Quantity, stats};
use super::super::result::{self, Better, Suite, Unit};
use super::super::rivals::Setting;
use bare::Bare;
use guest::Kind;
use viewer::Viewer;
use vmm_monitor::chardev::Endpoint;
use vmm_monitor::config::{CharTarget, Console, Size, VmConfig};
use vmm_monitor::machine::{Handle, Outcome};
use vmm_monitor::recorder::Recorder;
use vmm_monitor::session::{Built, End, Observer, Session};

/// Nothing that works takes longer, also where the KVM is emulated.
const LIMIT: Duration = Duration::from_secs(3);
/// About what the rounds of one sample should take: so many that the marks do not show and that a recording's thread, which
/// looks every 5 ms, gets its turns.
const SAMPLE: Duration = Duration::from_millis(20);
/// Rounds of one sample.
const ROUNDS: std::ops::RangeInclusive<u32> = 100..=50_000;
/// Interrupts of one sample, of which it is the median.
const WAKES: usize = 21;
/// Before each interrupt: longer than KVM polls for one (halt_poll_ns, 200 us) before it lets the thread sleep.
const IDLE: Duration = Duration::from_millis(1);

/// What a running guest tells.
enum Said {
    /// It wrote its mark, then.
    Mark(Instant),
    /// It runs no more, and why.
    Over(String),
}

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Bare,
    Vmm,
    Traced,
    Watched,
}

impl Who {
    const ALL: [Self; 4] = [Self::Bare, Self::Vmm, Self::Traced, Self::Watched];

    fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare loop",
            Self::Vmm => "vmm",
            Self::Traced => "vmm, traced",
            Self::Watched => "vmm, watched",
        }
    }

    fn command(self) -> String {
        match self {
            Self::Bare => {
                "ioctl(KVM_RUN) in a loop that compares the exit reason, in this process".to_owned()
            }
            Self::Vmm => WHOLE.to_owned(),
            Self::Traced => format!("{WHOLE}; --trace FILE"),
            Self::Watched => format!("{WHOLE}; asked for its sums each second, as by vmm top"),
        }
    }
}

const WHOLE: &str =
    "a session of the monitor in this process: --mem 32M --rng, a serial port whose end is in this process";

/// The suite.
///
/// # Errors
/// There is no KVM that runs a guest.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let config = |kind: Kind, rounds| config(kind, rounds, setting.scratch.join("exits.elf"));
    let tsc_khz = bare::tsc_khz(&config(Kind::PioOut, 1)?)?;

    let mut failures: Vec<(Who, Kind, String)> = Vec::new();
    let (mut figures, mut cycles) = (Vec::new(), Vec::new());
    for (index, kind) in Kind::ALL.into_iter().enumerate() {
        if INTERRUPTED.load(Ordering::SeqCst) {
            break;
        }
        // Where the bare loop fails, it is not asked again.
        let (rounds, absent) = match calibrate(kind, &|rounds| config(kind, rounds)) {
            Ok(rounds) => (rounds, None),
            Err(why) => (*ROUNDS.start(), Some((Who::Bare, kind, why))),
        };
        let shared = config(kind, rounds)?;
        let present: Vec<_> = Who::ALL[usize::from(absent.is_some())..].to_vec();
        failures.extend(absent);
        let mut contenders: Vec<_> = present
            .iter()
            .map(|&who| -> Box<dyn Contender> {
                Box::new(RoundTrip { who, kind, rounds, config: shared.clone(), tsc_khz })
            })
            .collect();
        let quantities = kind.names().into_iter().zip([Unit::Nanoseconds, Unit::Cycles]);
        let quantities: Vec<_> =
            quantities.map(|(name, unit)| Quantity { name, unit, better: Better::Lower }).collect();
        let count = if tsc_khz.is_some() { 2 } else { 1 };
        let plan = Plan { seed: plan.seed.wrapping_add(2 * index as u64), ..plan };
        let (who, measured) =
            measure::series(&mut contenders, &[], &quantities[..count], plan, &mut |share, who| {
                let share = (index as f64 + share) / Kind::ALL.len() as f64;
                progress(share, &format!("{}: {who}", kind.names()[0]));
            });
        failures.extend(
            present.into_iter().zip(who).filter_map(|(who, result)| Some((who, kind, result.failure?))),
        );
        let mut measured = measured.into_iter().filter(|figure| !figure.series.is_empty());
        figures.extend(measured.next());
        cycles.extend(measured.next());
    }
    figures.extend(cycles);
    if figures.is_empty() && !failures.is_empty() {
        let (who, kind, why) = &failures[0];
        return Err(format!("{}: {}: {why}", who.name(), kind.names()[0]));
    }
    Ok(Suite {
        name: "exits".to_owned(),
        title: "Exits: the monitor's whole path against a bare KVM_RUN loop".to_owned(),
        host,
        seed: plan.seed,
        method: method(tsc_khz),
        contenders: contenders(failures),
        figures,
    })
}

fn contenders(failures: Vec<(Who, Kind, String)>) -> Vec<result::Contender> {
    let entry = |who: Who, name: String, failure| result::Contender {
        name,
        command: who.command(),
        version: (who != Who::Bare).then(|| env!("CARGO_PKG_VERSION").to_owned()),
        failure,
    };
    let all = Who::ALL.map(|who| entry(who, who.name().to_owned(), None));
    // Each failure is of one kind of exit.
    let failed = failures
        .into_iter()
        .map(|(who, kind, why)| entry(who, format!("{}: {}", who.name(), kind.names()[0]), Some(why)));
    all.into_iter().chain(failed).collect()
}

fn method(tsc_khz: Option<u32>) -> Vec<String> {
    let mut lines = vec![
        format!(
            "A guest of a few instructions goes round; a sample is the host's time between a mark that it writes before and one \
             behind, divided by the rounds: so many that they take about {SAMPLE:?}, the same for both. The loop's own two to \
             four instructions count."
        ),
        "The difference of the first two is the monitor's own share: its thread, dispatch, bus and device (the serial port's \
         scratch register, a virtio device's registers)."
            .to_owned(),
        format!(
            "Traced: every exit is written to a file. Exits inside the kernel are recorded too where tracefs may be read ({}). \
             Watched: every exit is added up while a viewer is attached, and none is kept.",
            viewer::tracefs()
        ),
        "ioeventfd kick, hypercall, CPUID and MSR read are answered in the kernel: the monitor has no part in them, and its \
         ratio should be 1."
            .to_owned(),
        format!(
            "Irqfd to answer: a host thread triggers the interrupt line, the guest's handler answers by a port write; from before \
             the trigger to the exit's arrival at the device (or in the loop). A sample is the median of {WAKES}, {IDLE:?} apart, \
             so that KVM has given up polling for a halted vCPU."
        ),
    ];
    lines.push(match tsc_khz {
        Some(khz) => format!(
            "Cycles are nanoseconds at the time-stamp counter's {} MHz (KVM_GET_TSC_KHZ).",
            khz / 1000
        ),
        None => "No cycles: KVM does not know the time-stamp counter's frequency here (KVM_GET_TSC_KHZ)."
            .to_owned(),
    });
    lines
}

/// A machine for the guest of `kind`, whose kernel is put at `path`.
fn config(kind: Kind, rounds: u32, path: PathBuf) -> Result<VmConfig, String> {
    std::fs::write(&path, kind.kernel(rounds)?)
        .map_err(|error| format!("write {}: {error}", path.display()))?;
    Ok(VmConfig {
        kernel: Some(path),
        mem: vmm_monitor::config::Memory { size: Size::mib(32), ..Default::default() },
        console: Console(Some(CharTarget::Off)),
        // Its end is put in place of this before the machine is built.
        serial: CharTarget::Stdio,
        rng: true,
        ..VmConfig::default()
    })
}

/// So many rounds that a sample of the bare loop takes about [`SAMPLE`].
fn calibrate(kind: Kind, config: &dyn Fn(u32) -> Result<VmConfig, String>) -> Result<u32, String> {
    if kind.is_interrupt() {
        return Ok(1);
    }
    let few = *ROUNDS.start();
    let trip = RoundTrip { who: Who::Bare, kind, rounds: few, config: config(few)?, tsc_khz: None };
    let rounds = SAMPLE.as_nanos() as f64 / trip.nanoseconds()?;
    Ok((rounds as u32).clamp(few, *ROUNDS.end()))
}

/// One contender at one kind of exit.
struct RoundTrip {
    who: Who,
    kind: Kind,
    rounds: u32,
    config: VmConfig,
    tsc_khz: Option<u32>,
}

impl Contender for RoundTrip {
    fn name(&self) -> &str {
        self.who.name()
    }

    fn command(&self) -> String {
        self.who.command()
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let nanoseconds = self.nanoseconds()?;
        let cycles = self.tsc_khz.map(|khz| nanoseconds * f64::from(khz) / 1e6);
        Ok([nanoseconds].into_iter().chain(cycles).collect())
    }
}

impl RoundTrip {
    /// Of one round trip.
    fn nanoseconds(&self) -> Result<f64, String> {
        let (sender, said) = channel();
        match self.who {
            Who::Bare => {
                let bare = Bare::start(&self.config, self.kind, self.rounds, sender)?;
                let line = bare.line.clone();
                let taken = self.take(&said, &|| line.trigger());
                bare.stop();
                // Where it was stopped tells more than that it had to be.
                let over = said.try_iter().find_map(|said| match said {
                    Said::Over(at) => Some(at),
                    Said::Mark(_) => None,
                });
                taken.map_err(|why| over.map_or(why.clone(), |at| format!("{why}; it was at {at}")))
            }
            Who::Vmm | Who::Traced | Who::Watched => self.whole(sender, &said),
        }
    }

    fn whole(&self, sender: Sender<Said>, said: &Receiver<Said>) -> Result<f64, String> {
        let marks = sender.clone();
        let end = Endpoint::from_taker(move |_| {
            let _ = marks.send(Said::Mark(Instant::now()));
        });
        let end = end.map_err(text)?;
        let (who, config) = (self.who, self.config.clone());
        let (tell, built) = channel();
        let run = move || {
            let recorder = Arc::<Recorder>::default();
            let mut seen = Viewer::by(who, &config, recorder.clone());
            let mut herald = Herald(tell);
            let ran = Session::private(&config, recorder).map_err(text).and_then(|mut session| {
                session.put("serial", end);
                session.run(&mut [&mut seen, &mut herald]).map_err(text)
            });
            let end = match ran {
                Ok(Outcome::Crash(report) | Outcome::InternalError(report)) => brief(&report),
                Ok(outcome) => format!("{outcome:?}"),
                Err(error) => error,
            };
            let _ = sender.send(Said::Over(end));
            seen.end()
        };
        let thread = thread::Builder::new().name("machine".to_owned()).spawn(run).map_err(text)?;
        let Ok(handle) = built.recv() else {
            thread.join().map_err(|_| "the machine's thread panicked")??;
            return self.take(said, &|| ());
        };
        let taken = self.take(said, &|| handle.power_button());
        handle.kill();
        thread.join().map_err(|_| "the machine's thread panicked")??;
        taken
    }

    /// Waits for the marks, and makes nanoseconds of them.
    fn take(&self, said: &Receiver<Said>, trigger: &dyn Fn()) -> Result<f64, String> {
        let mark = || match said.recv_timeout(LIMIT) {
            Ok(Said::Mark(at)) => Ok(at),
            Ok(Said::Over(why)) => Err(why),
            Err(RecvTimeoutError::Timeout) => Err(format!("the guest has not answered for {LIMIT:?}")),
            Err(RecvTimeoutError::Disconnected) => Err("the guest's thread is gone".to_owned()),
        };
        let first = mark()?;
        if !self.kind.is_interrupt() {
            return Ok((mark()? - first).as_nanos() as f64 / f64::from(self.rounds));
        }
        let mut spans = Vec::with_capacity(WAKES);
        for _ in 0..WAKES {
            thread::sleep(IDLE);
            let start = Instant::now();
            trigger();
            spans.push((mark()? - start).as_nanos() as f64);
        }
        Ok(stats::quantile(&spans, 0.5))
    }
}

/// Gives a machine's handle to another thread.
struct Herald(Sender<Handle>);

impl Observer for Herald {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let machine = &*built.machine;
        Ok(self.0.send(machine.handle())?)
    }

    fn ended(&mut self, _: &End<'_>) {}
}

/// A failure's report in short: what happened, and the instruction, which is its last line.
fn brief(report: &str) -> String {
    match report.trim().split_once('\n') {
        Some((first, rest)) => format!("{first}: {}", last_line(rest).unwrap_or_default()),
        None => report.trim().to_owned(),
    }
}

fn last_line(text: &str) -> Option<String> {
    Some(text.lines().last()?.trim().to_owned())
}

fn text(error: impl std::error::Error) -> String {
    vmm_monitor::error_chain(&error)
}

#[cfg(test)]
mod tests;
