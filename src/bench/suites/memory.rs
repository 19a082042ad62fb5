//! Memory: what idle instances cost, in their processes and in the kernel, one and many at a time.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{merge, own_mounts};
use crate::host::Host;
use crate::measure::stats::quantile;
use crate::measure::{self, Absent, Contender, INTERRUPTED, Plan, Quantity};
use crate::result::{self, Better, Figure, Suite, Unit};
use crate::rivals::idle::{Instances, at_once};
use crate::rivals::program::Root;
use crate::rivals::weight::{Kernel, Weight};
use crate::rivals::{self, RAM_MIB, Rival, Setting};

/// Instances at a time.
const COUNTS: [usize; 3] = [10, 50, 100];
/// Unless the plan has a limit: the samples of one contender take no longer, and neither does its climb through [`COUNTS`].
const BUDGET: Duration = Duration::from_secs(60);
/// Of one instance: memory is steadier than time.
const SAMPLES: usize = 5;
/// The share of the available memory that instances may take.
const SHARE: f64 = 0.7;

const fn kib(name: &'static str) -> Quantity {
    Quantity { name, unit: Unit::Kibibytes, better: Better::Lower }
}

const PSS: &str = "processes: PSS";

const QUANTITIES: [Quantity; 6] = [
    kib(PSS),
    kib("processes: anonymous"),
    kib("processes: peak resident"),
    kib("guest RAM resident"),
    kib("kernel memory"),
    kib("less MemAvailable"),
];

type Part = (Vec<result::Contender>, Vec<Figure>);

/// One that takes part, and what one instance of it takes.
struct Entrant {
    rival: Box<dyn Rival>,
    /// To start and end one among many.
    time: Duration,
    /// Of the host's memory.
    kib: f64,
}

impl Entrant {
    fn idle<'a>(&'a mut self, goal: &'a Cell<usize>, stay: bool) -> Box<dyn Contender + 'a> {
        Box::new(Idle { rival: &mut *self.rival, goal, stay, running: None })
    }
}

/// Runs the suite.
///
/// # Errors
/// The root file system cannot be made, or the clock counts instructions.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    if setting.repeatable_clock {
        return Err("memory is no matter of the clock, and takes long by this one".to_owned());
    }
    let host = Host::look(false);
    own_mounts();
    let budget = plan.limit.unwrap_or(BUDGET);
    let plan = Plan { limit: Some(budget), ..plan };
    let root = Root::make(&setting.scratch)?;
    let (mut entrants, mut absent, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
    for found in rivals::idle(setting, &root) {
        match found.and_then(|rival| try_out(rival, progress)) {
            Ok(entrant) => entrants.push(entrant),
            // What was interrupted did not fail.
            Err(_) if INTERRUPTED.load(Ordering::SeqCst) => break,
            Err(missing) => absent.push(missing),
        }
    }
    let mut parts = vec![alone(&mut entrants, &absent, plan, &mut |share, whose| {
        progress(0.1 + 0.3 * share, whose);
    })];
    let firsts: Vec<_> = parts[0].1.iter().filter(|figure| figure.name.starts_with(PSS)).cloned().collect();
    let first = |name: &str| firsts.iter().find_map(|figure| median(figure, name));
    let failed = |name: &str| parts[0].0.iter().any(|found| found.name == name && found.failure.is_some());
    entrants.retain(|entrant| !failed(entrant.rival.name()));
    let all = entrants.len() as f64;
    for (index, entrant) in entrants.iter_mut().enumerate() {
        let mut part = |share: f64, whose: &str| progress(0.4 + 0.6 * (index as f64 + share) / all, whose);
        let first = first(entrant.rival.name());
        let (climbed, left) = climb(entrant, setting.instances, budget, first, &mut part)?;
        parts.extend(climbed);
        left_out.extend(left);
    }
    let (contenders, figures) = merge(parts);
    Ok(Suite {
        name: "memory".to_owned(),
        title: "Memory: what an idle instance costs".to_owned(),
        host,
        seed: plan.seed,
        method: method(setting.instances, budget, &left_out),
        contenders,
        figures,
    })
}

/// Starts one instance, to see whether it works and what many would take.
fn try_out(mut rival: Box<dyn Rival>, progress: &mut dyn FnMut(f64, &str)) -> Result<Entrant, Absent> {
    progress(0.0, rival.name());
    let first = Instances::start(&mut *rival, 1).and_then(|one| Weight::of(&one.processes()?));
    // The next ones are as all others will be.
    let start = Instant::now();
    let again = Instances::start(&mut *rival, at_once()).map(drop);
    rival.tidy();
    match first.and_then(|weight| again.map(|()| weight)) {
        Ok(weight) => {
            // And what the kernel has for it: the host's own figures tell nothing of a single one.
            let kib = (weight.anonymous + weight.guest + 1024) as f64;
            Ok(Entrant { rival, time: start.elapsed() / at_once() as u32, kib })
        }
        Err(why) => Err(Absent { name: rival.name().to_owned(), command: rival.shown(), why }),
    }
}

/// One instance of each, in turns.
fn alone(
    entrants: &mut [Entrant],
    absent: &[Absent],
    plan: Plan,
    progress: &mut dyn FnMut(f64, &str),
) -> Part {
    let goal = Cell::new(1);
    let mut contenders: Vec<_> = entrants.iter_mut().map(|entrant| entrant.idle(&goal, false)).collect();
    let plan = Plan { samples: plan.samples.min(SAMPLES), warm_up: 0, ..plan };
    named(measure::series(&mut contenders, absent, &QUANTITIES, plan, progress), 1)
}

/// More and more instances of one, which stay until there are as many as there can be. And what was left out.
fn climb(
    entrant: &mut Entrant,
    most: usize,
    budget: Duration,
    first: Option<f64>,
    progress: &mut dyn FnMut(f64, &str),
) -> Result<(Vec<Part>, Option<String>), String> {
    let name = entrant.rival.name().to_owned();
    let (time, kib, available) = (entrant.time, entrant.kib, Kernel::now()?.available as f64);
    let goal = Cell::new(0);
    let (mut contender, mut parts) = ([entrant.idle(&goal, true)], Vec::new());
    for count in COUNTS.into_iter().filter(|count| *count <= most) {
        if INTERRUPTED.load(Ordering::SeqCst) {
            break;
        }
        if time * count as u32 > budget {
            return Ok((
                parts,
                Some(format!("{count} of {name}: {:.0} s", (time * count as u32).as_secs_f64())),
            ));
        }
        if kib * count as f64 > available * SHARE {
            return Ok((parts, Some(format!("{count} of {name}: {:.0} MiB", kib * count as f64 / 1024.0))));
        }
        goal.set(count);
        let plan = Plan { samples: 1, warm_up: 0, seed: 0, limit: None };
        let mut told =
            |_: f64, _: &str| progress(count as f64 / 2.0 / most as f64, &format!("{count} of {name}"));
        let mut part = named(measure::series(&mut contender, &[], &QUANTITIES, plan, &mut told), count);
        if let (Some(first), Some(figure)) =
            (first, part.1.iter().find(|figure| figure.name.starts_with(PSS)))
        {
            let further = further(figure, count, first);
            part.1.insert(1, further);
        }
        let failure = part.0.iter_mut().find_map(|contender| contender.failure.as_mut());
        let failed = failure.map(|why| *why = format!("with {count} instances: {why}")).is_some();
        parts.push(part);
        // With more of them it would be no better.
        if failed {
            break;
        }
    }
    Ok((parts, None))
}

/// Says in the names of the figures how many there were.
fn named((contenders, mut figures): Part, count: usize) -> Part {
    figures.iter_mut().for_each(|figure| figure.name = format!("{}, each of {count}", figure.name));
    figures.retain(|figure| !figure.series.is_empty());
    (contenders, figures)
}

fn median(figure: &Figure, who: &str) -> Option<f64> {
    let series = figure.series.iter().find(|series| series.who == who)?;
    Some(quantile(&series.samples, 0.5))
}

/// What each one more than the first adds, of a `figure` of each of `count` where the first alone has `first`.
fn further(figure: &Figure, count: usize, first: f64) -> Figure {
    let mut further = Figure { name: format!("{PSS}, each further one of {count}"), ..figure.clone() };
    let samples = further.series.iter_mut().flat_map(|series| &mut series.samples);
    samples.for_each(|each| *each = (*each * count as f64 - first) / (count - 1) as f64);
    further
}

/// As many idle instances as `goal` says.
struct Idle<'a> {
    rival: &'a mut dyn Rival,
    goal: &'a Cell<usize>,
    /// Whether those of one sample stay for the next.
    stay: bool,
    /// What the host's memory was before the first.
    running: Option<(Kernel, Instances)>,
}

impl Idle<'_> {
    fn weigh(&mut self) -> Result<Vec<f64>, String> {
        let count = self.goal.get();
        let (before, instances) = match &mut self.running {
            Some(running) => running,
            none => none.insert((Kernel::settled()?, Instances::none()?)),
        };
        instances.grow(self.rival, count)?;
        let after = Kernel::settled()?;
        let weight = Weight::of(&instances.processes()?)?;
        let expected = if self.rival.guest_ram() { count } else { 0 };
        if weight.guests != expected {
            return Err(format!(
                "{} mappings are as large as a guest's RAM, where {expected} are due",
                weight.guests
            ));
        }
        let own = [weight.pss, weight.anonymous, weight.peak, weight.guest].map(|kib| kib as f64);
        let host =
            [after.kernel as f64 - before.kernel as f64, before.available as f64 - after.available as f64];
        Ok(own.into_iter().chain(host).map(|kib| kib / count as f64).collect())
    }

    fn end(&mut self) {
        self.running = None;
        self.rival.tidy();
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

impl Contender for Idle<'_> {
    fn name(&self) -> &str {
        self.rival.name()
    }

    fn command(&self) -> String {
        self.rival.shown()
    }

    fn version(&self) -> Option<String> {
        self.rival.version()
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let weighed = self.weigh();
        if !self.stay {
            self.end();
        }
        weighed
    }
}

fn method(most: usize, budget: Duration, left_out: &[String]) -> Vec<String> {
    let mut method = vec![
        "Every figure is per instance. An instance is the same program as in the boot suite, which says its line and then sleeps; \
         whatever stays running beside it (a monitor, conmon) is weighed with it, a daemon is not."
            .to_owned(),
        "Processes: sums over /proc/PID/smaps, without guest RAM. PSS shares a page's size among all processes that map it, \
         instances or not; anonymous pages are no file's: what the process has written of its own; peak resident is the most that \
         it ever had (VmHWM), shared pages in full."
            .to_owned(),
        "Each further one: what all of them have, less the median of one alone, among the others.".to_owned(),
        format!("Guest RAM resident: the mapping, or adjoining ones, of exactly the guest's size, {RAM_MIB} MiB: what the guest's kernel and programs \
         have touched of it."),
        "Kernel memory: how much Slab, PageTables, SecPageTables, KernelStack and Percpu of /proc/meminfo grow. Less MemAvailable: \
         by how much that falls. Both are the whole host's: whatever else runs shows in them, most where instances are few."
            .to_owned(),
        format!("A single instance is started anew for each sample: at most {SAMPLES}, and no more than {} if they have taken {} s. Of \
         many there is one sample, itself a mean over all of them: {} are started, those that run already among them. (--instances \
         {most})", measure::FEWEST, budget.as_secs(), COUNTS.map(|count| count.to_string()).join(", then ")),
    ];
    if !left_out.is_empty() {
        method.push(format!(
            "Left out, since they would take more than {} s to start, or {:.0}% of the free memory: {}.",
            budget.as_secs(),
            SHARE * 100.0,
            left_out.join("; ")
        ));
    }
    method
}
