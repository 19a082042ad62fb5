//! A start by its steps: what vmm takes for each beside the bare calls of the same kernel, taken in turns.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::floor::{self, Call};
use crate::host::Host;
use crate::measure::{self, Contender, Plan, Quantity, span};
use crate::result::{Better, Suite, Unit};
use crate::rivals::program::{self, BARE_MARKER, Ending, MARKER, Root};
use crate::rivals::{Life, RAM_MIB, Setting};
use vmm_monitor::recorder::{Kind, Step};
use vmm_trace::file::Trace;

/// Nothing here takes longer.
const LIMIT: Duration = Duration::from_secs(30);

/// A figure: its name, the bare calls that it sums, and the step of vmm's that does the same.
type Row = (&'static str, &'static [Call], Option<Step>);

/// All of them, in the order of a start. Those that begin with dots are parts of the one above them.
const ROWS: [Row; 16] = [
    ("open /dev/kvm", &[Call::Open], Some(Step::Open)),
    ("guest memory", &[Call::Memory], Some(Step::Memory)),
    ("VM", &[Call::Vm, Call::Slot, Call::Irqchip], Some(Step::Vm)),
    ("... KVM_CREATE_VM", &[Call::Vm], None),
    ("... memory slot", &[Call::Slot], None),
    ("... irqchip", &[Call::Irqchip], None),
    ("KVM_GET_SUPPORTED_CPUID", &[Call::Supported], Some(Step::Processor)),
    ("kernel and tables", &[], Some(Step::Load)),
    ("devices", &[], Some(Step::Devices)),
    ("vCPU", &[Call::Vcpu, Call::Cpuid, Call::Registers], Some(Step::Vcpus)),
    ("... KVM_CREATE_VCPU", &[Call::Vcpu], None),
    ("... KVM_SET_CPUID2", &[Call::Cpuid], None),
    ("... registers", &[Call::Registers], None),
    ("the record itself", &[], Some(Step::Recorder)),
    ("first KVM_RUN, to its OUT", &[Call::Run], None),
    ("close", &[Call::Close], None),
];

/// The figure behind those.
const WHOLE: &str = "start to first output";

/// Runs the suite.
///
/// # Errors
/// KVM does not open, or the guest cannot be made.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    setting.kvm()?;
    let host = Host::look(setting.repeatable_clock);
    let root = Root::make(&setting.scratch)?;
    let kernel = setting.scratch.join("steps.elf");
    program::write(&kernel, &program::bare_metal(Life::Once, Ending::DebugExit)?)?;
    let vmm = Vmm { program: setting.vmm.clone(), kernel, trace: setting.scratch.join("steps.trace") };
    let mut contenders: Vec<Box<dyn Contender>> = vec![
        Box::new(Who::Bare),
        Box::new(Who::Process(root.folder.join("init"))),
        Box::new(Who::Whole(vmm.clone())),
        Box::new(Who::Traced(vmm)),
    ];
    let names = ROWS.iter().map(|(name, ..)| *name).chain([WHOLE]);
    let quantities: Vec<_> =
        names.map(|name| Quantity { name, unit: Unit::Nanoseconds, better: Better::Lower }).collect();
    let (contenders, mut figures) = measure::series(&mut contenders, &[], &quantities, plan, progress);
    for figure in &mut figures {
        // Who does not take a step has no figure of it.
        figure.series.retain(|series| series.samples.iter().any(|sample| *sample > 0.0));
        figure.baseline = figure.series.first().map(|series| series.who.clone());
    }
    figures.retain(|figure| !figure.series.is_empty());
    Ok(Suite {
        name: "steps".to_owned(),
        title: "A start by its steps, beside the bare calls of the same kernel".to_owned(),
        host,
        seed: plan.seed,
        method: method(),
        contenders,
        figures,
    })
}

fn method() -> Vec<String> {
    vec![
        format!(
            "Bare calls are made by the measuring process, one after the other, for a VM of {RAM_MIB} MiB and a vCPU that runs one \
             OUT. Their first output is that OUT: no process is started for them, and the sum of the calls is all."
        ),
        "vmm's steps are those of its own record (--trace). Keeping one takes a start longer (\"the record itself\", and the steps \
         beside it), so the whole is told of a run without one, too."
            .to_owned(),
        "vmm takes some steps at the same time: the thread of the first vCPU opens KVM, makes the VM and asks for the processor \
         while the main one loads the kernel. Their sum is not the start. What is in no step: exec, the C library, arguments, \
         names, the guest's way to its output."
            .to_owned(),
        "A step has more than the calls beside it: opening asks KVM what it can do, the VM has PICs that are set, vCPUs have MSRs."
            .to_owned(),
    ]
}

/// vmm with the guest of five instructions.
#[derive(Debug, Clone)]
struct Vmm {
    program: PathBuf,
    kernel: PathBuf,
    trace: PathBuf,
}

impl Vmm {
    fn command(&self, trace: Option<&Path>) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kernel").arg(&self.kernel).args(["--mem", &format!("{RAM_MIB}M")]);
        command.args(["--console", "off", "--serial", "stdio", "--debug-exit"]);
        if let Some(trace) = trace {
            command.arg("--trace").arg(trace);
        }
        command
    }

    /// Nanoseconds until its output.
    fn whole(&self, trace: Option<&Path>) -> Result<f64, String> {
        output(self.command(trace), &[BARE_MARKER], 1)
    }

    /// Nanoseconds of each step that it recorded, and of the whole.
    fn steps(&self) -> Result<(Trace, f64), String> {
        let _ = std::fs::remove_file(&self.trace);
        let whole = self.whole(Some(&self.trace))?;
        let trace = Trace::read(&self.trace).map_err(|error| vmm_monitor::error_chain(&error))?;
        Ok((trace, whole))
    }
}

/// Nanoseconds until `command` says `marker`.
fn output(command: Command, marker: &[u8], good_status: i32) -> Result<f64, String> {
    let span = span::measure(command, &[marker], LIMIT, &mut |_, _| Ok(()))?;
    if span.status.code() != Some(good_status) {
        return Err(format!("it said its line, but ended badly: {}", span.status));
    }
    Ok(span.marks[0].as_nanos() as f64)
}

/// Nanoseconds of all that `trace` tells of `step`; 0 if nothing.
fn taken(trace: &Trace, step: Step) -> f64 {
    let steps = trace.events.iter().filter(|(_, event)| event.kind() == Some(Kind::Step));
    let ticks =
        steps.filter(|(_, event)| Step::of(event.address) == Some(step)).map(|(_, event)| event.value);
    trace.ns(ticks.sum())
}

/// Who takes the steps.
enum Who {
    Bare,
    /// The least process: it says its line.
    Process(PathBuf),
    Whole(Vmm),
    Traced(Vmm),
}

impl Contender for Who {
    fn name(&self) -> &str {
        match self {
            Self::Bare => "bare calls",
            Self::Process(_) => "fork + exec",
            Self::Whole(_) => "vmm",
            Self::Traced(_) => "vmm, traced",
        }
    }

    fn command(&self) -> String {
        let shown = |command: Command| {
            let words = std::iter::once(command.get_program()).chain(command.get_args());
            words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
        };
        match self {
            Self::Bare => "the calls themselves, in this process".to_owned(),
            Self::Process(init) => init.display().to_string(),
            Self::Whole(vmm) => shown(vmm.command(None)),
            Self::Traced(vmm) => shown(vmm.command(Some(&vmm.trace))),
        }
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let alone = |whole| ROWS.iter().map(|_| 0.0).chain([whole]).collect();
        match self {
            Self::Bare => {
                let spans = floor::sample(RAM_MIB)?;
                let sum = |calls: &[Call]| {
                    calls.iter().map(|call| spans[*call as usize].as_nanos() as f64).sum::<f64>()
                };
                let until_output: Vec<_> =
                    Call::ALL.into_iter().filter(|call| *call != Call::Close).collect();
                Ok(ROWS.iter().map(|(_, calls, _)| sum(calls)).chain([sum(&until_output)]).collect())
            }
            Self::Process(init) => output(Command::new(init), MARKER, 0).map(alone),
            Self::Whole(vmm) => vmm.whole(None).map(alone),
            Self::Traced(vmm) => {
                let (trace, whole) = vmm.steps()?;
                let steps = ROWS.iter().map(|(.., step)| step.map_or(0.0, |step| taken(&trace, step)));
                Ok(steps.chain([whole]).collect())
            }
        }
    }
}
