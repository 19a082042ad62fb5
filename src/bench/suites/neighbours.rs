//! What a quiet machine notices of noisy ones beside it, as they are and limited: containers and VMs in the same way.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use vmm_monitor::sandbox::Limits;
use vmm_monitor::sandbox::limits::Group;

use super::super::host::Host;
use super::super::measure::{self, Absent, Contender, Plan, Quantity, stats};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::idle::await_words;
use super::super::rivals::{Place, Setting, Size};
use super::super::work::Step;
use super::console::talk;
use super::places::{self, LIMIT, shown};

const QUANTITIES: [Quantity; 3] = [
    Quantity { name: "quiet one's work", unit: Unit::Milliseconds, better: Better::Lower },
    Quantity { name: "quiet one's answer, median", unit: Unit::Nanoseconds, better: Better::Lower },
    Quantity {
        name: "quiet one's answer, slowest hundredth",
        unit: Unit::Nanoseconds,
        better: Better::Lower,
    },
];
const SIZE: Size = Size { cpus: 1, mib: 128 };
/// Lines that are answered in a sample.
const LINES: u64 = 300;
/// Work that does not end before it is ended.
const ENDLESS: Step = Step::Integer(u64::MAX / 4);

/// What is done about the noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    /// There is none.
    Alone,
    /// Nothing.
    Unlimited,
    /// It has a tenth of the weight of others.
    Weight,
    /// It has half of the CPU time of all CPUs.
    Max,
    /// It has all CPUs but the first, which the quiet one has.
    Pin,
}

impl Case {
    const ALL: [Self; 5] = [Self::Alone, Self::Unlimited, Self::Weight, Self::Max, Self::Pin];

    fn text(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Unlimited => "beside noise",
            Self::Weight => "noise has a tenth of the weight",
            Self::Max => "noise has half of all CPU time",
            Self::Pin => "noise on the other CPUs",
        }
    }

    /// The option of vmm for the noise.
    fn limit(self, cpus: &[usize]) -> Option<[String; 2]> {
        let (option, value) = match self {
            Self::Weight => ("--cpu-weight", "10".to_owned()),
            Self::Max => ("--cpu-max", format!("{}", cpus.len() as f64 / 2.0)),
            Self::Alone | Self::Unlimited | Self::Pin => return None,
        };
        Some([option.to_owned(), value])
    }
}

/// The suite.
///
/// # Errors
/// The work cannot even be done natively.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let allowed = sched_getaffinity(None).map_err(|error| format!("which CPUs may be used: {error}"))?;
    let cpus: Vec<_> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let work = Step::Integer(places::enough(setting, 10_000, &Step::Integer)?);
    // In pairs of a container and a VM, so that each is beside the one that it is compared with.
    let (mut contenders, mut absent): (Vec<Box<dyn Contender + '_>>, Vec<Absent>) = Default::default();
    for (case, place) in Case::ALL.into_iter().flat_map(|case| [(case, Place::Container), (case, Place::Vm)])
    {
        let mut quiet = Quiet {
            name: format!("{}, {}", places::name(place), case.text()),
            place,
            case,
            setting,
            cpus: &cpus,
            work: work.clone(),
            group: None,
        };
        match quiet.prepare() {
            Ok(()) => contenders.push(Box::new(quiet)),
            Err(why) => absent.push(Absent { command: quiet.command(), name: quiet.name.clone(), why }),
        }
    }
    let (contenders, figures) = measure::series(&mut contenders, &absent, &QUANTITIES, plan, progress);
    Ok(Suite {
        name: "neighbours".to_owned(),
        title: "Neighbours: a quiet machine beside noisy ones, with and without limits".to_owned(),
        host,
        seed: plan.seed,
        method: method(&work, cpus.len()),
        contenders,
        figures,
    })
}

fn method(work: &Step, cpus: usize) -> Vec<String> {
    vec![
        format!(
            "Noise: as many machines as there are CPUs ({cpus}), of one CPU each, that compute without end: VMs beside a VM, containers \
             beside a container. The quiet one is started when all of them compute, does {work}, and then answers {LINES} lines, one \
             after the other. Its start and end are not in any figure."
        ),
        "Work: between the lines that the program writes before and after it, as the host reads them.".to_owned(),
        "Answers: from a line written on the host to its answer read there, by pipes or the virtio console. The process that writes \
         and reads is beside the noise itself, as any client on that host."
            .to_owned(),
        "Limits are those of the noise, together, in one cgroup (version 2), by the same files for both: VMs enter it by vmm \
         --cgroup; containers are started in it. On the other CPUs: by vmm --pin, or the affinity of the container's starter; the \
         quiet one has the first CPU. Only CPU time is contended: no disk, no memory, no caches on purpose."
            .to_owned(),
        "A container is namespaces alone, without a runtime (see the other suites).".to_owned(),
    ]
}

/// A quiet machine, and what is beside it.
struct Quiet<'a> {
    name: String,
    place: Place,
    case: Case,
    setting: &'a Setting,
    cpus: &'a [usize],
    work: Step,
    /// That of the noise.
    group: Option<Group>,
}

/// Machines that run until this is dropped.
struct Noise {
    children: Vec<Child>,
    cgroup: Option<PathBuf>,
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.children.iter_mut().for_each(|child| _ = child.kill());
        self.children.iter_mut().for_each(|child| _ = child.wait());
        // What is inside a container ends a little later, and a cgroup goes only when it is empty.
        let Some(file) = self.cgroup.as_ref().map(|cgroup| cgroup.join("cgroup.procs")) else { return };
        let end = Instant::now() + Duration::from_secs(5);
        while fs::read_to_string(&file).is_ok_and(|left| !left.is_empty()) && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Quiet<'_> {
    /// Makes the cgroup of the noise, and tries whether a machine can be started.
    fn prepare(&mut self) -> Result<(), String> {
        self.quiet()?;
        if self.case == Case::Pin && self.cpus.len() < 2 {
            return Err("there is one CPU".to_owned());
        }
        let Some([_, value]) = self.case.limit(self.cpus) else { return Ok(()) };
        let name = format!("vmm-bench-{}-{:?}-{:?}", std::process::id(), self.case, self.place);
        let mut limits = Limits { cgroup: Some(name.into()), ..Limits::default() };
        let parsed = match self.case {
            Case::Weight => value.parse().map(|weight| limits.cpu_weight = Some(weight)),
            _ => value.parse().map(|most| limits.cpu_max = Some(most)),
        };
        parsed.map_err(|error| error.to_string())?;
        self.group = limits.make().map_err(|error| vmm_monitor::error_chain(&error))?;
        Ok(())
    }

    fn pinned(&self, command: &mut Command, list: &str) {
        if self.place == Place::Vm && self.case == Case::Pin {
            command.args(["--pin", list]);
        }
    }

    fn quiet(&self) -> Result<Command, String> {
        let steps = [self.work.to_string(), Step::Echo(LINES).to_string()];
        let mut command = self.place.command(self.setting, &[&steps[0], &steps[1]], SIZE)?;
        self.pinned(&mut command, &self.cpus[0].to_string());
        Ok(command)
    }

    fn noisy(&self) -> Result<Command, String> {
        let mut command = match (&self.group, self.place) {
            (Some(group), Place::Container) => {
                Place::container_in(self.setting, &[&ENDLESS.to_string()], group.path())?
            }
            _ => self.place.command(self.setting, &[&ENDLESS.to_string()], SIZE)?,
        };
        let others: Vec<_> = self.cpus.iter().skip(1).map(ToString::to_string).collect();
        self.pinned(&mut command, &others.join(","));
        if let (Some(group), Place::Vm) = (&self.group, self.place) {
            command.arg("--cgroup").arg(group.path());
            command.args(self.case.limit(self.cpus).into_iter().flatten());
        }
        Ok(command)
    }

    /// Starts `command`, and if containers are to be pinned, on `cpus`.
    fn spawn(&self, mut command: Command, cpus: &[usize]) -> Result<Child, String> {
        let name = shown(&command);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let pins = self.place == Place::Container && self.case == Case::Pin;
        // A thread's affinity is that of what it starts.
        let start = || {
            if pins {
                let mut set = CpuSet::new();
                cpus.iter().for_each(|cpu| set.set(*cpu));
                sched_setaffinity(None, &set)?;
            }
            command.spawn()
        };
        let started = thread::scope(|scope| scope.spawn(start).join());
        started
            .map_err(|_| "the starter panicked".to_owned())?
            .map_err(|error| format!("start {name}: {error}"))
    }

    fn noise(&self) -> Result<Noise, String> {
        let cgroup = self.group.as_ref().map(|group| group.path().to_owned());
        let mut noise = Noise { children: Vec::new(), cgroup };
        if self.case == Case::Alone {
            return Ok(noise);
        }
        for _ in self.cpus {
            let mut command = self.noisy()?;
            command.stdin(Stdio::null());
            noise.children.push(self.spawn(command, self.cpus.get(1..).unwrap_or_default())?);
        }
        for child in &mut noise.children {
            let output = child.stdout.as_mut().ok_or("no pipe")?;
            await_words(
                output,
                ENDLESS.begin().trim_end().as_bytes(),
                1,
                Instant::now() + LIMIT,
                "a noisy neighbour",
            )?;
        }
        Ok(noise)
    }
}

impl Contender for Quiet<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn command(&self) -> String {
        match if self.case == Case::Alone { self.quiet() } else { self.noisy() } {
            Ok(command) => shown(&command),
            Err(_) => format!("vmm-bench work {} {} ({:?})", self.work, Step::Echo(LINES), self.place),
        }
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let _noise = self.noise()?;
        let mut command = self.quiet()?;
        command.stdin(Stdio::piped());
        let mut child = self.spawn(command, &self.cpus[..1])?;
        let talked = talk(&mut child, LINES, Some(&self.work), &Step::Echo(LINES));
        if talked.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().map_err(|error| format!("wait for {}: {error}", self.name))?;
        let talked = talked.map_err(|why| format!("{why} ({status})"))?;
        if !status.success() {
            return Err(format!("{} ended with {status}", self.name));
        }
        let answers: Vec<_> = talked.answers.iter().map(|answer| answer.as_nanos() as f64).collect();
        let quantile = |share| stats::quantile(&answers, share);
        Ok(vec![talked.work.as_secs_f64() * 1e3, quantile(0.5), quantile(0.99)])
    }
}
