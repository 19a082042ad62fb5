//! One workload in three places: what the cpu, mem, block and console suites have in common.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::super::host::Host;
use super::super::measure::{self, Absent, Contender, Plan, Quantity, span};
use super::super::result::{Figure, Suite};
use super::super::rivals::{Place, Setting, Size};
use super::super::work::Step;

/// How these suites tell time, for their method.
pub const CLOCK: &str = "The host reads the time of the lines that the program writes before and after the work, so start and end \
                         are not in it. A sample in which a busy host read both lines together is taken anew.";

/// For the start, the work and the end, also where everything is emulated.
pub const LIMIT: Duration = Duration::from_secs(240);

/// What is shorter is no measurement: on a busy host both lines may be read together, as if no time was between them.
const SHORTEST: Duration = Duration::from_millis(2);
/// How often a sample is taken anew for that.
const TRIES: usize = 4;

/// What one step's span is turned into.
pub struct Measured {
    /// The work.
    pub step: Step,
    /// What is told of it.
    pub quantity: Quantity,
    /// From seconds to the quantity's unit.
    pub value: fn(&Step, f64) -> f64,
}

/// Someone who does all steps, one process (and VM) a sample.
pub struct Worker<'a> {
    /// "native"
    pub name: &'static str,
    /// Where.
    pub place: Place,
    /// What is at hand.
    pub setting: &'a Setting,
    /// The VM's size.
    pub size: Size,
    /// The work as this one does it.
    pub work: Vec<Measured>,
    /// The VM's disk.
    pub disk: Option<&'a Path>,
}

impl Worker<'_> {
    /// The command that does the work.
    ///
    /// # Errors
    /// Why it cannot be done there.
    pub fn start(&self) -> Result<Command, String> {
        let steps: Vec<String> = self.work.iter().map(|measured| measured.step.to_string()).collect();
        let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
        let mut command = self.place.command(self.setting, &steps, self.size)?;
        if let Some(disk) = self.disk {
            command.arg("--disk").arg(disk);
        }
        Ok(command)
    }
}

impl Contender for Worker<'_> {
    fn name(&self) -> &str {
        self.name
    }

    fn command(&self) -> String {
        self.start().map_or_else(|why| why, |command| shown(&command))
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let mut late = String::new();
        for _ in 0..TRIES {
            match self.spans()? {
                Ok(values) => return Ok(values),
                Err(why) => late = why,
            }
        }
        Err(late)
    }
}

impl Worker<'_> {
    /// Does the work once. The inner error: the reader was late, so that nothing is known.
    fn spans(&self) -> Result<Result<Vec<f64>, String>, String> {
        spans(self.name, self.start()?, &self.work, &mut || ())
    }
}

/// What `command` comes to, which does all of `work`. The inner error: the reader was late, so that nothing is known. `at_mark` is called
/// before and after each piece of the work.
///
/// # Errors
/// It could not be done.
pub fn spans(
    name: &str,
    command: Command,
    work: &[Measured],
    at_mark: &mut dyn FnMut(),
) -> Result<Result<Vec<f64>, String>, String> {
    let marks: Vec<String> =
        work.iter().flat_map(|measured| [measured.step.begin(), measured.step.end()]).collect();
    // A guest's console ends its lines in its own way.
    let marks: Vec<&[u8]> = marks.iter().map(|mark| mark.trim_end().as_bytes()).collect();
    let span = span::measure(command, &marks, LIMIT, &mut |_, _| {
        at_mark();
        Ok(())
    })?;
    if !span.status.success() {
        return Err(format!("{name} ended with {}", span.status));
    }
    let values = work.iter().zip(span.marks.chunks(2)).map(|(work, marks)| {
        let span = marks[1] - marks[0];
        if span < SHORTEST {
            return Err(format!("{} took {span:?}: too short to be measured", work.step));
        }
        Ok((work.value)(&work.step, span.as_secs_f64()))
    });
    Ok(values.collect())
}

/// A command line for people.
pub fn shown(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let word = |word: &std::ffi::OsStr| {
        let text = word.to_string_lossy();
        if text.contains(' ') { format!("'{text}'") } else { text.into_owned() }
    };
    words.map(word).collect::<Vec<_>>().join(" ")
}

/// How much of a step takes about a tenth of a second natively: found by doing more and more of it.
///
/// # Errors
/// It cannot be done here.
pub fn enough(setting: &Setting, start: u64, step: &dyn Fn(u64) -> Step) -> Result<u64, String> {
    const WANTED: f64 = 0.1;
    let mut amount = start;
    loop {
        let step = step(amount);
        let (begin, end) = (step.begin(), step.end());
        let command = Place::Native.command(setting, &[&step.to_string()], Size { cpus: 1, mib: 256 })?;
        let span = span::measure(command, &[begin.as_bytes(), end.as_bytes()], LIMIT, &mut |_, _| Ok(()))?;
        let seconds = (span.marks[1] - span.marks[0]).as_secs_f64().max(1e-5);
        // What is long enough to be told from its start is scaled; the rest is done more of.
        let scaled = (amount as f64 * WANTED / seconds) as u64;
        if seconds >= WANTED / 5.0 || scaled < amount {
            return Ok(scaled.max(1));
        }
        amount = scaled.min(amount.saturating_mul(50)).max(amount + 1);
    }
}

/// Tries whether each can be started at all, and measures those that can.
pub fn measured<'a>(
    workers: Vec<Worker<'a>>,
    quantities: &[Quantity],
    plan: Plan,
    progress: &mut dyn FnMut(f64, &str),
) -> (Vec<super::super::result::Contender>, Vec<Figure>) {
    let (mut contenders, mut absent): (Vec<Box<dyn Contender + 'a>>, Vec<Absent>) = Default::default();
    for worker in workers {
        match worker.start() {
            Ok(_) => contenders.push(Box::new(worker)),
            Err(why) => {
                let steps: Vec<_> = worker.work.iter().map(|work| work.step.to_string()).collect();
                let command = format!("vmm-bench work {} ({:?})", steps.join(" "), worker.place);
                absent.push(Absent { name: worker.name.to_owned(), command, why });
            }
        }
    }
    measure::series(&mut contenders, &absent, quantities, plan, progress)
}

/// The name of a place.
pub fn name(place: Place) -> &'static str {
    match place {
        Place::Native => "native",
        Place::Container => "container",
        Place::Vm => "vmm",
    }
}

/// A suite that does `work(place)` in all places.
///
/// # Errors
/// Nobody could do it, and why.
pub fn suite(
    (name, title): (&str, &str),
    setting: &Setting,
    size: Size,
    work: &dyn Fn() -> Vec<Measured>,
    method: Vec<String>,
    plan: Plan,
    progress: &mut dyn FnMut(f64, &str),
) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let worker = |place| Worker { name: self::name(place), place, setting, size, work: work(), disk: None };
    let quantities: Vec<_> = work().iter().map(|work| work.quantity).collect();
    let (contenders, figures) =
        measured(Place::ALL.into_iter().map(worker).collect(), &quantities, plan, progress);
    Ok(Suite {
        name: name.to_owned(),
        title: title.to_owned(),
        host,
        seed: plan.seed,
        method,
        contenders,
        figures,
    })
}
