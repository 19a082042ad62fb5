//! Going on from a snapshot: from the call for one or many at once to the first instruction of each, to a command in it, and to its
//! end; and what each has of the host's memory for itself.

use std::mem;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{merge, own_mounts};
use crate::host::Host;
use crate::measure::crowd::{self, Life as Run};
use crate::measure::stats::quantile;
use crate::measure::{self, Absent, Contender, INTERRUPTED, Plan, Quantity};
use crate::result::{self, Better, Figure, Series, Suite, Unit};
use crate::rivals::idle::{Instances, Speaker};
use crate::rivals::launch::{Launch, Launcher};
use crate::rivals::program::Root;
use crate::rivals::weight::{Kernel, Weight};
use crate::rivals::{Life, RAM_MIB, Setting, restored};

const fn milliseconds(name: &'static str) -> Quantity {
    Quantity { name, unit: Unit::Milliseconds, better: Better::Lower }
}

const fn kib(name: &'static str) -> Quantity {
    Quantity { name, unit: Unit::Kibibytes, better: Better::Lower }
}

/// So many at once, and what is told of them: of one, its times; of many, quantiles of their times.
struct Step {
    count: usize,
    times: &'static [Quantity],
    memory: [Quantity; 3],
}

/// The quantiles of many.
const SHARES: [f64; 3] = [0.5, 0.9, 0.99];

/// Of so many at once.
macro_rules! many {
    ($count:literal) => {
        Step {
            count: $count,
            times: &[
                milliseconds(concat!($count, " at once: first output, p50")),
                milliseconds(concat!($count, " at once: first output, p90")),
                milliseconds(concat!($count, " at once: first output, p99")),
                milliseconds(concat!($count, " at once: first byte of a command, p50")),
                milliseconds(concat!($count, " at once: first byte of a command, p90")),
                milliseconds(concat!($count, " at once: first byte of a command, p99")),
                milliseconds(concat!($count, " at once: exit, p50")),
                milliseconds(concat!($count, " at once: exit, p90")),
                milliseconds(concat!($count, " at once: exit, p99")),
            ],
            memory: [
                kib(concat!("each of ", $count, ": private memory")),
                kib(concat!("each of ", $count, ": share of all memory (PSS)")),
                kib(concat!("each of ", $count, ": kernel memory")),
            ],
        }
    };
}

const STEPS: [Step; 3] = [
    Step {
        count: 1,
        times: &[
            milliseconds("one: first output"),
            milliseconds("one: first byte of a command"),
            milliseconds("one: exit"),
        ],
        memory: [
            kib("one: private memory"),
            kib("one: share of all memory (PSS)"),
            kib("one: kernel memory"),
        ],
    },
    many!(10),
    many!(100),
];

/// Runs the suite.
///
/// # Errors
/// The root file system cannot be made.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    own_mounts();
    let root = Root::make(&setting.scratch)?;
    // Dropped last: what failed may have left others behind.
    let _strays = Instances::none()?;
    let (mut launchers, mut absent): (Vec<Box<dyn Launcher>>, Vec<Absent>) = Default::default();
    for found in restored::all(setting, &root) {
        match found {
            Ok(launcher) => launchers.push(launcher),
            Err(missing) => absent.push(missing),
        }
    }
    let steps = STEPS.iter().filter(|step| step.count <= setting.instances.max(1));
    let steps = steps.flat_map(|step| [(step, false), (step, true)]);
    // Memory is no matter of the clock, and takes long by that one.
    let steps: Vec<_> = steps.filter(|(_, idle)| !(*idle && setting.repeatable_clock)).collect();
    let all = steps.len() as f64;
    let mut parts = Vec::new();
    for (number, (step, idle)) in steps.into_iter().enumerate() {
        if INTERRUPTED.load(Ordering::SeqCst) {
            break;
        }
        let plan = Plan { seed: plan.seed.wrapping_add(2 * number as u64), ..plan };
        let mut told = |share: f64, whose: &str| {
            progress((number as f64 + share) / all, &format!("{} of {whose}", step.count));
        };
        parts.push(part(step, idle, &mut launchers, &mem::take(&mut absent), plan, &mut told));
    }
    let (contenders, figures) = merge(parts);
    Ok(Suite {
        name: "fork".to_owned(),
        title: "Going on from a snapshot: one, ten and a hundred at once".to_owned(),
        host,
        seed: plan.seed,
        method: method(setting),
        contenders,
        figures,
    })
}

/// The times of one step, or the memory of those that stay `idle`. Who fails is not asked for more.
fn part(
    step: &Step,
    idle: bool,
    launchers: &mut Vec<Box<dyn Launcher>>,
    absent: &[Absent],
    plan: Plan,
    progress: &mut dyn FnMut(f64, &str),
) -> (Vec<result::Contender>, Vec<Figure>) {
    let count = step.count;
    let mut those: Vec<Box<dyn Contender + '_>> = Vec::new();
    for launcher in launchers.iter_mut().filter(|launcher| !idle || launcher.is_weighed()) {
        those.push(match idle {
            true => Box::new(Idle { launcher, count }),
            false => Box::new(Timed { launcher, count }),
        });
    }
    let (contenders, mut figures) = if idle {
        // Memory is steadier than time, and of many each sample is a mean.
        let plan = Plan { samples: if count == 1 { measure::FEWEST } else { 1 }, warm_up: 0, ..plan };
        measure::series(&mut those, absent, &step.memory, plan, progress)
    } else {
        measure::series(&mut those, absent, step.times, plan, progress)
    };
    drop(those);
    for figure in figures.iter_mut().filter(|_| !idle) {
        // What runs no command has no such figure.
        figure.series.retain(|series| series.samples.iter().any(|sample| *sample > 0.0));
        figure.baseline = figure.series.first().map(|series| series.who.clone());
    }
    figures.retain(|figure| !figure.series.is_empty());
    if count == 1 && !idle {
        let tails: Vec<_> = figures.iter().filter_map(tail).collect();
        figures.extend(tails);
    }
    let failed = |name: &str| contenders.iter().any(|found| found.name == name && found.failure.is_some());
    launchers.retain(|launcher| !failed(launcher.name()));
    (contenders, figures)
}

fn method(setting: &Setting) -> Vec<String> {
    let most = setting.instances;
    let mut method = vec![
        "A span begins when all are called for at once, on the host's monotonic clock. All processes, and what they are asked over \
         an API, are in it: a process a machine, a thread of the measuring process each, all let go together; vmm fork is one command \
         for all, and what it starts."
            .to_owned(),
        "The snapshot is made once, before the first sample, of a guest that looks at a word in its memory all the time. That word is \
         changed in the snapshot's file, so the guest goes on as soon as it runs. The page cache has the file."
            .to_owned(),
        "First output: the first thing that a guest does when it goes on is to say so, by its serial port or virtio console. First \
         byte of a command: then Linux's first program becomes, by execve, a program of some 800 bytes, which says its line and \
         powers the machine off (resets it where the monitor knows nothing else). Exit: the monitor's process is gone."
            .to_owned(),
        "A container's first output is its command's: crun and runc run the same program on the same root file system, each with a \
         /dev of its own. So is that of vmm run --template and vmm pool take: the agent in the guest runs the same program there, once \
         it has made the machine one of its own."
            .to_owned(),
        "Exit, of vmm pool take, is that of the command that was called: its copy is killed then. The end of that, and what it took to \
         have it stand ready, are not in the span."
            .to_owned(),
        format!(
            "Guests have 1 CPU and {RAM_MIB} MiB. \"No Linux\" is a guest of some instructions, which has written to 24 MiB before. Of one \
             machine at a time every sample is drawn; of many, the median (p50), p90 and p99 of each sample's machines, of which p99 of \
             ten is next to the slowest. Ten vmm fork share a pipe, so theirs are the n-th outputs and the n-th exits, whoever's."
        ),
        format!(
            "Memory of those that have run the command and stay, guest RAM among it. Private: pages that are no file's, and what each alone \
             has written of shared memory (smaps). PSS shares a page's size among all who map it, the snapshot's file too. Kernel memory: \
             how much Slab, PageTables, SecPageTables, KernelStack and Percpu of /proc/meminfo have grown, of the whole host. Means over \
             all of one sample. (--instances {most})"
        ),
        "Firecracker maps the snapshot's memory (backend File); Cloud Hypervisor fetches pages when they are touched \
         (memory_restore_mode=ondemand); QEMU reads its migration stream, all of it before its guest goes on. In Firecracker and Cloud \
         Hypervisor the program speaks through /dev/port, a system call a byte, with no driver of a console."
            .to_owned(),
    ];
    if setting.repeatable_clock {
        method.push("The clock counts instructions, 1 ns each, of a host with one processor.".to_owned());
    }
    method
}

/// So many at once, from the call to their ends.
struct Timed<'a> {
    launcher: &'a mut Box<dyn Launcher>,
    count: usize,
}

/// So many that stay when their command has spoken.
struct Idle<'a> {
    launcher: &'a mut Box<dyn Launcher>,
    count: usize,
}

impl Contender for Timed<'_> {
    fn name(&self) -> &str {
        self.launcher.name()
    }

    fn command(&self) -> String {
        self.launcher.shown()
    }

    fn version(&self) -> Option<String> {
        self.launcher.version()
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let launches = self.launcher.launches(Life::Once, self.count)?;
        let limit = limit(&**self.launcher, self.count);
        let runs = crowd::at_once(launches, &self.launcher.marks(), limit)?;
        if let Some(bad) = runs.iter().find(|run| run.status != Some(self.launcher.good_status())) {
            return Err(format!("it said its line, but ended badly: exit code {:?}", bad.status));
        }
        Ok(told(&runs, self.launcher.runs_a_command()))
    }
}

/// What is told of `runs`: the times of one; the quantiles of several. Zeroes of a command where none runs.
fn told(runs: &[Run], runs_a_command: bool) -> Vec<f64> {
    let times: Vec<_> = runs
        .iter()
        .map(|run| {
            let first = run.marks.first().copied().unwrap_or_default();
            let command = run.marks.last().copied().filter(|_| runs_a_command).unwrap_or_default();
            [first, command, run.exit].map(|time| time.as_secs_f64() * 1e3)
        })
        .collect();
    let shares = if runs.len() == 1 { &SHARES[..1] } else { &SHARES };
    let quantiles = (0..3).flat_map(|column| {
        let all: Vec<_> = times.iter().map(|times| times[column]).collect();
        shares.iter().map(move |share| quantile(&all, *share))
    });
    quantiles.collect()
}

/// Samples that have a p99.
const FOR_P99: usize = 100;

/// The p99 of a figure of one at a time, of those with enough samples.
fn tail(figure: &Figure) -> Option<Figure> {
    let enough = figure.series.iter().filter(|series| series.samples.len() >= FOR_P99);
    let series: Vec<_> = enough
        .map(|series| Series { who: series.who.clone(), samples: vec![quantile(&series.samples, 0.99)] })
        .collect();
    let baseline = Some(series.first()?.who.clone());
    Some(Figure { name: format!("{}, p99", figure.name), baseline, series, ..*figure })
}

/// What one may take, for `count` of them on few processors.
fn limit(launcher: &dyn Launcher, count: usize) -> Duration {
    launcher.limit() * (1 + count as u32 / 10)
}

impl Contender for Idle<'_> {
    fn name(&self) -> &str {
        self.launcher.name()
    }

    fn command(&self) -> String {
        self.launcher.shown()
    }

    fn version(&self) -> Option<String> {
        self.launcher.version()
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let launches = self.launcher.launches(Life::Idle, self.count)?;
        let weighed = weigh(&**self.launcher, launches, self.count);
        self.launcher.tidy();
        weighed
    }
}

fn weigh(launcher: &dyn Launcher, launches: Vec<Launch>, count: usize) -> Result<Vec<f64>, String> {
    let before = Kernel::settled()?;
    let mut instances = Instances::none()?;
    let marks = launcher.marks();
    let words = marks.last().copied().unwrap_or_default();
    let who = Speaker { name: launcher.name(), words, limit: limit(launcher, count) };
    instances.launch(launches, &who)?;
    let after = Kernel::settled()?;
    let weight = Weight::of(&instances.processes()?)?;
    let kernel = after.kernel as f64 - before.kernel as f64;
    let all = [weight.private as f64, (weight.pss + weight.guest_pss) as f64, kernel];
    Ok(all.map(|kib| kib / count as f64).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(marks: &[u64], exit: u64) -> Run {
        let marks = marks.iter().map(|mark| Duration::from_millis(*mark)).collect();
        Run { marks, exit: Duration::from_millis(exit), status: Some(0) }
    }

    #[test]
    fn one_has_its_times_and_many_their_quantiles() {
        assert_eq!(told(&[run(&[2, 3], 5)], true), [2.0, 3.0, 5.0]);
        // A container's first output is its command's.
        assert_eq!(told(&[run(&[2], 5)], true), [2.0, 2.0, 5.0]);
        assert_eq!(told(&[run(&[2], 5)], false), [2.0, 0.0, 5.0]);
        let many: Vec<_> = (1..=11).map(|number| run(&[number, 10 * number], 100 * number)).collect();
        let rounded: Vec<_> = told(&many, true).iter().map(|value| value.round()).collect();
        assert_eq!(rounded, [6.0, 10.0, 11.0, 60.0, 100.0, 109.0, 600.0, 1000.0, 1090.0]);
    }

    #[test]
    fn a_tail_needs_samples() {
        let series = |who: &str, count: u32| Series {
            who: who.to_owned(),
            samples: (1..=count).map(f64::from).collect(),
        };
        let figure = |series| Figure {
            name: "one: exit".to_owned(),
            unit: Unit::Milliseconds,
            better: Better::Lower,
            baseline: None,
            series,
        };
        assert!(tail(&figure(vec![series("few", 99)])).is_none());
        let tail = tail(&figure(vec![series("few", 99), series("many", 101)])).unwrap();
        assert_eq!((tail.name.as_str(), tail.baseline.as_deref()), ("one: exit, p99", Some("many")));
        assert_eq!(tail.series, [Series { who: "many".to_owned(), samples: vec![100.0] }]);
    }

    #[test]
    fn every_step_has_a_name_for_each_value() {
        for step in &STEPS {
            let runs: Vec<_> = (0..step.count).map(|_| run(&[1], 2)).collect();
            assert_eq!(step.times.len(), told(&runs, true).len(), "{}", step.count);
            assert!(step.times.iter().chain(&step.memory).all(|quantity| {
                let count = if step.count == 1 { "one".to_owned() } else { step.count.to_string() };
                quantity.name.split([' ', ':']).any(|word| word == count)
            }));
        }
    }
}
