//! How starting scales: many machines at once, many vCPUs, much memory. A guest of six instructions on any KVM, and Linux where
//! the KVM runs it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, dx};

use super::super::elf;
use super::super::host::Host;
use super::super::measure::{self, Absent, Contender, Plan, Quantity, span, stats};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::{Place, Setting, Size};
use super::super::work::Step;
use super::places::{LIMIT, shown};
use vmm_monitor::legacy::acpi_pm;
use vmm_monitor::memory::layout;

const fn milliseconds(name: &'static str) -> Quantity {
    Quantity { name, unit: Unit::Milliseconds, better: Better::Lower }
}

/// Contenders that can be compared with each other, and what they are compared in.
struct Group<'a> {
    quantities: &'static [Quantity],
    contenders: Vec<Starts<'a>>,
}

/// One machine's start.
struct Start {
    /// When it was called for.
    at: Instant,
    /// From then to its first output.
    output: Duration,
    /// From then until it was gone.
    exit: Duration,
}

/// What is started.
#[derive(Clone)]
enum What {
    /// The tiny guest's kernel.
    Tiny(PathBuf),
    /// The small Linux, whose first program says that it begins.
    Linux,
}

/// So many machines, started at once.
struct Starts<'a> {
    name: String,
    setting: &'a Setting,
    what: What,
    count: usize,
    size: Size,
    values: fn(&[Start]) -> Vec<f64>,
}

/// The suite.
///
/// # Errors
/// Not even the tiny guest runs.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let kernel = setting.scratch.join("tiny.elf");
    let code = tiny().map_err(|error| format!("assemble the tiny guest: {error}"))?;
    std::fs::write(&kernel, elf::pvh_kernel(&code))
        .map_err(|error| format!("write {}: {error}", kernel.display()))?;
    let groups = groups(setting, &What::Tiny(kernel), host.cpus as u32);

    let (mut entries, mut figures) = (Vec::new(), Vec::new());
    let count = groups.len() as f64;
    for (index, group) in groups.into_iter().enumerate() {
        let (mut present, mut absent): (Vec<Box<dyn Contender + '_>>, Vec<Absent>) = Default::default();
        for starts in group.contenders {
            match starts.command_line() {
                Ok(_) => present.push(Box::new(starts)),
                Err(why) => absent.push(Absent { command: starts.command(), name: starts.name, why }),
            }
        }
        let plan = Plan { seed: plan.seed.wrapping_add(2 * index as u64), ..plan };
        let (who, measured) =
            measure::series(&mut present, &absent, group.quantities, plan, &mut |share, who| {
                progress((index as f64 + share) / count, who);
            });
        entries.extend(who);
        figures.extend(measured.into_iter().filter(|figure| !figure.series.is_empty()));
    }
    match entries.iter().find_map(|entry| entry.failure.as_ref()) {
        Some(why) if figures.is_empty() => return Err(why.clone()),
        _ => {}
    }
    Ok(Suite {
        name: "scale".to_owned(),
        title: "Scale: machines at once, vCPUs, memory".to_owned(),
        host,
        seed: plan.seed,
        method: method(),
        contenders: entries,
        figures,
    })
}

fn method() -> Vec<String> {
    [
        "The tiny guest writes a byte to its serial port and asks for a reset, which ends vmm. Linux: the small kernel to the first \
         line of its first program, which powers off then.",
        "At once: one host thread per machine, all let go together. Starts per second: their number by the time from the first call \
         to the last machine's first output. Slowest tenth and slowest: of one sample's machines, each from its own call to its \
         first output.",
        "Memory is neither touched nor reserved before the guest does so, and its size should not show. Where KVM shadows page \
         tables (no nested paging), the kernel itself makes tables by its size: 10 bytes and more for each 4 KiB.",
    ]
    .map(str::to_owned)
    .to_vec()
}

fn groups<'a>(setting: &'a Setting, tiny: &What, host_cpus: u32) -> Vec<Group<'a>> {
    const AT_ONCE: [&[Quantity]; 2] = [
        &[
            Quantity { name: "tiny guests at once: starts", unit: Unit::PerSecond, better: Better::Higher },
            milliseconds("tiny guests at once: first output, slowest tenth"),
            milliseconds("tiny guests at once: first output, slowest"),
        ],
        &[
            Quantity { name: "Linux at once: starts", unit: Unit::PerSecond, better: Better::Higher },
            milliseconds("Linux at once: first output, slowest tenth"),
            milliseconds("Linux at once: first output, slowest"),
        ],
    ];
    const CPUS: [&[Quantity]; 2] = [
        &[milliseconds("vCPUs: tiny guest to first output"), milliseconds("vCPUs: tiny guest to exit")],
        &[milliseconds("vCPUs: Linux to first output"), milliseconds("vCPUs: Linux to exit")],
    ];
    const MEMORY: &[Quantity] =
        &[milliseconds("memory: tiny guest to first output"), milliseconds("memory: tiny guest to exit")];
    let starts = |name: String, what: &What, count, size, values| Starts {
        name,
        setting,
        what: what.clone(),
        count,
        size,
        values,
    };
    let small = Size { cpus: 1, mib: 128 };
    let mut groups = Vec::new();
    let kinds = [(tiny, ""), (&What::Linux, "Linux, ")];
    // Booting Linux at the pace of a repeatable clock is the boot suite's.
    let kinds = if setting.repeatable_clock { &kinds[..1] } else { &kinds[..] };
    // What is done at once depends on the scheduler, so it does not repeat on any clock.
    let counts: &[usize] = if setting.repeatable_clock { &[1] } else { &[1, 4, 16] };
    for (&(what, prefix), quantities) in kinds.iter().zip(AT_ONCE) {
        let contenders = counts.iter().map(|&count| {
            let name = format!("{prefix}{count} VM{}", if count == 1 { "" } else { "s" });
            starts(name, what, count, small, at_once)
        });
        groups.push(Group { quantities, contenders: contenders.collect() });
    }
    let most = 4 * host_cpus;
    for (&(what, prefix), quantities) in kinds.iter().zip(CPUS) {
        let cpus =
            std::iter::successors(Some(1), |cpus| Some(cpus * 2)).take_while(|cpus| *cpus <= most.min(64));
        let contenders = cpus.map(|cpus| {
            let name = format!("{prefix}{cpus} vCPU{}", if cpus == 1 { "" } else { "s" });
            starts(name, what, 1, Size { cpus, ..small }, alone)
        });
        groups.push(Group { quantities, contenders: contenders.collect() });
    }
    let sizes = [("128M", 128), ("1G", 1 << 10), ("8G", 8 << 10), ("64G", 64 << 10)];
    let contenders =
        sizes.map(|(name, mib)| starts(name.to_owned(), tiny, 1, Size { cpus: 1, mib }, alone)).into();
    groups.push(Group { quantities: MEMORY, contenders });
    groups
}

fn at_once(starts: &[Start]) -> Vec<f64> {
    let milliseconds: Vec<f64> = starts.iter().map(|start| start.output.as_secs_f64() * 1e3).collect();
    let first = starts.iter().map(|start| start.at).min();
    let last = starts.iter().map(|start| start.at + start.output).max();
    let span = first.zip(last).map_or(0.0, |(first, last)| (last - first).as_secs_f64());
    let slowest = milliseconds.iter().copied().fold(0.0, f64::max);
    vec![starts.len() as f64 / span, stats::quantile(&milliseconds, 0.9), slowest]
}

fn alone(starts: &[Start]) -> Vec<f64> {
    starts.iter().flat_map(|start| [start.output, start.exit]).map(|span| span.as_secs_f64() * 1e3).collect()
}

/// Says something, and asks for a reset.
fn tiny() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.mov(dx, layout::COM1 as u32)?;
    a.mov(al, u32::from(MARK[0]))?;
    a.out(dx, al)?;
    a.mov(dx, (layout::ACPI_PM + acpi_pm::RESET) as u32)?;
    a.mov(al, u32::from(acpi_pm::RESET_VALUE))?;
    a.out(dx, al)?;
    a.hlt()?;
    a.assemble(elf::LOAD)
}

/// What the tiny guest says.
const MARK: &[u8] = b"!";

impl Starts<'_> {
    fn command_line(&self) -> Result<Command, String> {
        match &self.what {
            What::Linux => Place::Vm.command(self.setting, &[&Self::step().to_string()], self.size),
            What::Tiny(kernel) => {
                let Size { cpus, mib } = self.size;
                let mut command = Command::new(&self.setting.vmm);
                command.arg("--kernel").arg(kernel).args(["--serial", "stdio"]);
                command.args(["--cpus", &cpus.to_string(), "--mem", &format!("{mib}M")]);
                Ok(command)
            }
        }
    }

    /// As little as a first program can do.
    fn step() -> Step {
        Step::Integer(1)
    }

    fn start(&self, command: Command) -> Result<Start, String> {
        let begin = Self::step().begin();
        let mark = if matches!(self.what, What::Linux) { begin.trim_end().as_bytes() } else { MARK };
        let at = Instant::now();
        let span = span::measure(command, &[mark], LIMIT, &mut |_, _| Ok(()))?;
        if !span.status.success() {
            return Err(format!("{} ended with {}", self.name, span.status));
        }
        Ok(Start { at, output: span.marks[0], exit: span.exit })
    }
}

impl Contender for Starts<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn command(&self) -> String {
        let command = self.command_line();
        let command = command.map_or_else(|_| "vmm --kernel tuned-vmlinux ...".to_owned(), |c| shown(&c));
        if self.count == 1 { command } else { format!("{} at once: {command}", self.count) }
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let gate = Barrier::new(self.count);
        let commands: Result<Vec<Command>, String> = (0..self.count).map(|_| self.command_line()).collect();
        let (this, gate) = (&*self, &gate);
        let starts: Result<Vec<Start>, String> = thread::scope(|scope| {
            let threads = commands?.into_iter().map(|command| {
                scope.spawn(move || {
                    gate.wait();
                    this.start(command)
                })
            });
            let threads: Vec<_> = threads.collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        Ok((self.values)(&starts?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_from_the_first_call_to_the_last_output() {
        let at = Instant::now();
        let start = |offset: u64, output: u64| Start {
            at: at + Duration::from_millis(offset),
            output: Duration::from_millis(output),
            exit: Duration::from_millis(output + 1),
        };
        let values = at_once(&[start(0, 10), start(10, 30)]);
        assert!((values[0] - 2.0 / 0.040).abs() < 1e-9, "{values:?}");
        assert!((values[1] - 28.0).abs() < 1e-9 && values[2] == 30.0, "{values:?}");
        assert_eq!(alone(&[start(0, 7)]), [7.0, 8.0]);
    }

    #[test]
    fn vcpus_double_up_to_four_times_the_hosts() {
        let setting = Setting {
            vmm: "vmm".into(),
            own: "vmm-bench".into(),
            with: Default::default(),
            kernel: None,
            bzimage: None,
            stock: None,
            agent: None,
            scratch: "/tmp".into(),
            instances: 1,
            repeatable_clock: false,
        };
        let groups = groups(&setting, &What::Tiny("tiny".into()), 2);
        let names: Vec<_> = groups[2].contenders.iter().map(|starts| starts.name.as_str()).collect();
        assert_eq!(names, ["1 vCPU", "2 vCPUs", "4 vCPUs", "8 vCPUs"]);
        let command = groups[4].contenders[3].command();
        assert_eq!(command, "vmm --kernel tiny --serial stdio --cpus 1 --mem 65536M");
    }
}
