//! Memory: what idle instances cost, in their processes and in the kernel, one and many at a time.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{merge, own_mounts};
use crate::bench::host::Host;
use crate::bench::measure::{self, Absent, Contender, INTERRUPTED, Plan, Quantity};
use crate::bench::result::{Better, Suite, Unit};
use crate::bench::rivals::idle::Instances;
use crate::bench::rivals::program::Root;
use crate::bench::rivals::weight::{Kernel, Weight};
use crate::bench::rivals::{self, RAM_MIB, Rival, Setting};

/// Instances at a time.
const COUNTS: [usize; 4] = [1, 10, 50, 100];
/// All samples of one contender with one count of instances take no longer.
const BUDGET: Duration = Duration::from_secs(60);
/// Each sample starts all instances anew, and memory is steadier than time.
const SAMPLES: usize = 5;
/// Fewer say nothing of their spread.
const FEWEST: usize = 3;
/// The share of the available memory that instances may take.
const SHARE: f64 = 0.7;

const fn kib(name: &'static str) -> Quantity {
    Quantity { name, unit: Unit::Kibibytes, better: Better::Lower }
}

const QUANTITIES: [Quantity; 6] = [
    kib("processes: PSS"),
    kib("processes: private dirty"),
    kib("processes: peak resident"),
    kib("guest RAM resident"),
    kib("kernel memory"),
    kib("less MemAvailable"),
];

type Shared = Rc<RefCell<Box<dyn Rival>>>;

/// One that takes part, and what one instance of it takes.
struct Entrant {
    rival: Shared,
    name: String,
    /// To start and end one.
    time: Duration,
    /// Of the host's memory.
    kib: f64,
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
    let mut parts = Vec::new();
    for (pass, count) in COUNTS.into_iter().enumerate() {
        let available = Kernel::now()?.available as f64;
        let (mut samples, fewest) = (plan.samples.min(SAMPLES), plan.samples.min(FEWEST));
        let mut contenders: Vec<Box<dyn Contender>> = Vec::new();
        for entrant in &entrants {
            let time = entrant.time * count as u32;
            if time * fewest as u32 > BUDGET {
                left_out.push(format!("{count} of {}: {:.0} s each", entrant.name, time.as_secs_f64()));
            } else if count > 1 && entrant.kib * count as f64 > available * SHARE {
                left_out.push(format!(
                    "{count} of {}: {:.0} MiB",
                    entrant.name,
                    entrant.kib * count as f64 / 1024.0
                ));
            } else {
                samples = samples.min((BUDGET.as_secs_f64() / time.as_secs_f64()) as usize).max(fewest);
                let (rival, name) = (Rc::clone(&entrant.rival), entrant.name.clone());
                contenders.push(Box::new(Idle { rival, name, count }));
            }
        }
        let mut part = |share: f64, whose: &str| {
            progress((pass as f64 + share) / COUNTS.len() as f64, &format!("{count} of {whose}"));
        };
        let plan = Plan { samples, warm_up: 0, seed: plan.seed.wrapping_add(count as u64) };
        let missing = if pass == 0 { &absent[..] } else { &[] };
        let (mut found, mut figures) =
            measure::series(&mut contenders, missing, &QUANTITIES, plan, &mut part);
        figures.iter_mut().for_each(|figure| figure.name = format!("{}, each of {count}", figure.name));
        figures.retain(|figure| !figure.series.is_empty());
        for contender in found.iter_mut().filter(|contender| !absent.iter().any(|a| a.name == contender.name))
        {
            if let Some(why) = &mut contender.failure {
                *why = format!("with {count} instances: {why}");
                // With more of them it would be no better.
                entrants.retain(|entrant| entrant.name != contender.name);
            }
        }
        parts.push((found, figures));
        if INTERRUPTED.load(Ordering::SeqCst) {
            break;
        }
    }
    let (contenders, figures) = merge(parts);
    Ok(Suite {
        name: "memory".to_owned(),
        title: "Memory: what an idle instance costs".to_owned(),
        host,
        seed: plan.seed,
        method: method(&left_out),
        contenders,
        figures,
    })
}

/// Starts one instance, to see whether it works and what many would take.
fn try_out(rival: Box<dyn Rival>, progress: &mut dyn FnMut(f64, &str)) -> Result<Entrant, Absent> {
    progress(0.0, rival.name());
    let (name, command) = (rival.name().to_owned(), rival.shown());
    let mut idle = Idle { rival: Rc::new(RefCell::new(rival)), name: name.clone(), count: 1 };
    let values = idle.sample();
    // The second one is as all others will be.
    let start = Instant::now();
    let again = Instances::start(&mut **idle.rival.borrow_mut(), 1).map(drop);
    idle.rival.borrow_mut().tidy();
    match values.and_then(|values| again.map(|()| values)) {
        Ok(values) => {
            // And what the kernel has for it: the host's own figures tell nothing of a single one.
            let kib = values[0] + values[2] + 1024.0;
            Ok(Entrant { rival: idle.rival, name, time: start.elapsed(), kib })
        }
        Err(why) => Err(Absent { name, command, why }),
    }
}

/// So many idle instances of a rival.
struct Idle {
    rival: Shared,
    name: String,
    count: usize,
}

impl Contender for Idle {
    fn name(&self) -> &str {
        &self.name
    }

    fn command(&self) -> String {
        self.rival.borrow().shown()
    }

    fn version(&self) -> Option<String> {
        self.rival.borrow().version()
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let rival = &mut **self.rival.borrow_mut();
        let before = Kernel::settled()?;
        let instances = Instances::start(rival, self.count);
        let values = instances.and_then(|instances| {
            let after = Kernel::settled()?;
            let weight = Weight::of(&instances.processes()?)?;
            let expected = if rival.guest_ram() { self.count } else { 0 };
            if weight.guests != expected {
                return Err(format!(
                    "{} mappings are as large as a guest's RAM, where {expected} are due",
                    weight.guests
                ));
            }
            let own = [weight.pss, weight.private_dirty, weight.peak, weight.guest].map(|kib| kib as f64);
            let host = [
                after.kernel as f64 - before.kernel as f64,
                before.available as f64 - after.available as f64,
            ];
            Ok(own.into_iter().chain(host).map(|kib| kib / self.count as f64).collect())
        });
        rival.tidy();
        values
    }
}

fn method(left_out: &[String]) -> Vec<String> {
    let mut method = vec![
        "Every figure is per instance. An instance is the same program as in the boot suite, which says its line and then sleeps; \
         whatever stays running beside it (a monitor, conmon) is weighed with it, a daemon is not."
            .to_owned(),
        "Processes: sums over /proc/PID/smaps, without guest RAM. PSS shares a page's size among all processes that map it, \
         instances or not; private dirty is what only this process has and has written; peak resident is the most that it ever had (VmHWM), shared pages \
         in full."
            .to_owned(),
        format!("Guest RAM resident: the one mapping of exactly the guest's size, {RAM_MIB} MiB: what the guest's kernel and programs \
         have touched of it."),
        "Kernel memory: how much Slab, PageTables, SecPageTables, KernelStack and Percpu of /proc/meminfo grow. Less MemAvailable: \
         by how much that falls. Both are the whole host's: whatever else runs shows in them, most where instances are few."
            .to_owned(),
        format!("Each sample starts all instances anew and ends them, so there are fewer samples: at most {SAMPLES}, as many as \
         fit in {} s for the slowest.", BUDGET.as_secs()),
    ];
    if !left_out.is_empty() {
        let limit = format!("{} s, or {:.0}% of the free memory", BUDGET.as_secs(), SHARE * 100.0);
        method.push(format!(
            "Left out, since {FEWEST} samples would have taken more than {limit}: {}.",
            left_out.join("; ")
        ));
    }
    method
}
