//! `vmm run`: from options to a session, and from its end to an exit code.

use std::env::current_dir;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use vmm_command::{Code, Failure, log_output, print};
use vmm_monitor::api;
use vmm_monitor::config::{OutputFile, VmConfig};
use vmm_monitor::machine::{self, Outcome};
use vmm_monitor::memory::{self, Pagemap};
use vmm_monitor::pool::Spare;
use vmm_monitor::recorder::Recorder;
use vmm_monitor::sandbox::{self, Grant, Jail, Limits, Needs, Refused};
use vmm_monitor::session::{Built, Controls, End, Observer, Session};
use vmm_monitor::snapshot::Snapshot;
use vmm_trace::debug::gdb;
use vmm_trace::kernel;
use vmm_trace::live::watch::Live;
use vmm_trace::recorded::Recorded;
use vmm_trace::saved_memory::SavedMemory;

use super::agent::renewal::CopyOptions;
use super::detached::{self, Background};
use super::flags;
use super::limits::care;
use super::options::Options;
use super::plan::plan;
use super::restore::Renewer;
use super::silence::Silence;
use super::slack;
use super::template::Task;
use super::working_set::FirstStart;

/// How to run: what the options say about the run and not about the machine.
pub struct RunOptions {
    stop_timeout: Duration,
    record: Option<Record>,
    dumpable: bool,
    sandbox: (sandbox::Mode, bool, Option<sandbox::User>),
    limits: Limits,
    background: Option<Background>,
    /// What it goes on from.
    snapshot: Option<Snapshot>,
    /// The pool that it stands ready for.
    spare: Option<Spare>,
    /// What its agent is to do then.
    renewal: Option<CopyOptions>,
    /// The configuration before it was fitted to this process, if that changed it.
    original: Option<VmConfig>,
    /// What is to be done with the machine that runs.
    task: Option<Task>,
    /// What is named while the machine runs, beyond what follows from all this.
    grants: Vec<Grant>,
}

/// Where a run is: on the terminal, or in the background, and then whether nothing is to be kept of it.
#[derive(Debug, Clone, Copy)]
pub struct Place(Option<bool>);

impl Place {
    /// As `options` have it.
    pub fn of(options: &Options) -> Self {
        Self(options.detached.then_some(options.rm))
    }

    fn is_terminal(self) -> bool {
        self.0.is_none()
    }
}

/// What to record of a run.
struct Record {
    file: OutputFile,
    /// The registers at every exit.
    registers: bool,
}

impl RunOptions {
    /// Of these.
    ///
    /// # Errors
    /// They contradict each other.
    pub fn of(options: &Options) -> Result<Self, Failure> {
        let registers = options.trace_registers;
        let record = options.trace.clone().map(|file| Record { file, registers });
        if registers && record.is_none() {
            let error = anyhow!("--trace-registers needs a trace to write to");
            return Err(Failure::new(Code::BadArgument, error).hint(Some("add --trace FILE")));
        }
        let (stop_timeout, dumpable) = (Duration::from_secs(options.stop_timeout), options.dumpable);
        Ok(Self {
            stop_timeout,
            record,
            dumpable,
            sandbox: (options.sandbox, options.sandbox_log, options.sandbox_user),
            limits: options.limits.limits(),
            background: None,
            snapshot: None,
            spare: None,
            renewal: None,
            original: None,
            task: None,
            grants: Vec::new(),
        })
    }

    /// This process is the one in the background, if `place` says so: fits `config` to that, which is that of a `spare` or of a run.
    ///
    /// # Errors
    /// There is no place for records.
    pub fn fit(
        &mut self,
        config: &mut VmConfig,
        spare: Option<&Spare>,
        place: &Place,
    ) -> Result<(), Failure> {
        if let Some(remove) = place.0 {
            self.original = Some(config.clone());
            self.background = Some(Background::new(config, spare, remove)?);
        }
        Ok(())
    }

    /// The run goes on from `snapshot`, whose guest's agent is to do what `renewal` says.
    pub fn go_on_from(&mut self, snapshot: Snapshot, renewal: Option<CopyOptions>) {
        (self.snapshot, self.renewal) = (Some(snapshot), renewal);
    }

    /// `task` is to be done.
    pub fn set_task(&mut self, task: Task) {
        self.task = Some(task);
    }
}

/// `vmm run`.
pub fn run(mut options: Options) -> Result<Code, Failure> {
    let renewal = options.renewal.take();
    if options.detach && !options.detached {
        options.limits.make_way()?;
        return detached::start(|name| renewal.map_or(Ok(()), |renewal| renewal.await_required(name)));
    }
    let (mut run_options, dry_run) = (RunOptions::of(&options)?, options.dry_run);
    let gdb = options.gdb.clone();
    let place = Place::of(&options);
    let (snapshot, spare) = (options.snapshot.take(), options.spare.take());
    let mut config = match &snapshot {
        Some(snapshot) => options.resolve_saved(&snapshot.config),
        None => options.resolve(),
    }?;
    run_options.fit(&mut config, spare.as_ref(), &place)?;
    (run_options.snapshot, run_options.spare) = (snapshot, spare);
    // What is required is waited for by the process that started this one.
    run_options.renewal = renewal.filter(|renewal| place.is_terminal() || !renewal.is_required());
    if dry_run {
        print(&plan(config)?)?;
        return Ok(Code::Success);
    }
    match gdb {
        Some(place) => {
            run_options.grants.extend(place.socket().map(Grant::removal));
            let mut server = gdb::Server::listen(&place, config.kernel.as_deref(), status, log_output::say)?;
            live(config, run_options, Some(&mut server))
        }
        None => live(config, run_options, None),
    }
}

/// Runs what `config` describes, under `debugger` if there is one.
pub fn live(
    config: VmConfig,
    RunOptions {
        stop_timeout,
        record,
        dumpable,
        sandbox: (mode, goes_on, user),
        limits,
        mut background,
        mut snapshot,
        spare,
        renewal,
        original,
        mut task,
        mut grants,
    }: RunOptions,
    debugger: Option<&mut dyn Observer>,
) -> Result<Code, Failure> {
    limits.check(&config)?;
    let messages = background.as_ref().and_then(Background::messages);
    limits.begin(&care(background.is_some(), messages))?;
    let pagemap = Pagemap::open().ok();
    let recorder = Arc::<Recorder>::default();
    recorder.set_all_registers(record.as_ref().is_some_and(|record| record.registers));
    let viewers = Live::new(config.clone(), recorder.clone(), record.is_some());
    let killed_status = Code::Killed.number();
    let outputs = record.iter().map(|record| record.file.path.clone()).collect();
    let original = original.unwrap_or_else(|| config.clone());
    let keeper = background.as_ref().map(Background::keeper);
    let (serving, lasting) = (log_output::serve, slack::give_back);
    grants.extend(background.iter().flat_map(Background::grants));
    grants.extend(task.iter().filter_map(Task::grant));
    grants.extend(record.iter().flat_map(|record| {
        let rotates = record.file.max.map(|_| Grant::rotation(&record.file.path));
        rotates.into_iter().chain(kernel::instances().map(Grant::Folder))
    }));
    // Where the kernel puts a core.
    grants.extend(current_dir().ok().filter(|_| dumpable).map(Grant::Rotation));
    let is_spare = spare.is_some();
    let takes_signals = task.as_ref().is_none_or(|task| !task.has_command());
    let controls = Controls {
        stop_timeout,
        takes_signals,
        viewers,
        serving,
        lasting,
        lost,
        killed_status,
        keeper,
        outputs,
        original,
        spare,
        jail: Jail { mode, goes_on, user, needs: Needs::of(&config) | limits.needs(), grants, refused },
    };
    let mut recorded = record.map(|record| Recorded::new(&config, record.file, recorder.clone()));
    if let (Some(recorded), Some(pagemap), true) = (&mut recorded, pagemap, snapshot.is_some()) {
        recorded.goes_on(SavedMemory::new(pagemap));
    }
    // Under a debugger a start is as long as somebody likes.
    let unrecorded =
        snapshot.as_mut().and_then(|snapshot| snapshot.unrecorded(&config)).filter(|_| debugger.is_none());
    let mut first_start = unrecorded.map(FirstStart::new);
    let origin = snapshot.map(|snapshot| snapshot.into_origin(&config)).transpose()?;
    let goes_on = origin.is_some();
    let mut session = Session::controlled(&config, origin, recorder, controls)?;
    // Files in /proc that tell of this process are root's from now on.
    if !dumpable {
        api::close_to_debuggers().map_err(api::Error::Thread)?;
    }
    if let Some(background) = &mut background {
        background.named()?;
    }
    let mut ptys = Announcer::default();
    let renewal = renewal.filter(|options| options.concern(&config));
    let mut renewer = renewal
        .zip(session.name())
        .map(|(options, name)| Renewer::new(options, (!is_spare).then_some(name), &config));
    // Under a debugger a guest may be silent for as long as it likes, and one that goes on has opened its consoles before.
    let mut silence = (debugger.is_none() && !goes_on).then(|| Silence::of(&config)).flatten();
    let mut observers: Vec<&mut dyn Observer> = vec![&mut ptys];
    observers.extend(renewer.as_mut().map(|renewer| renewer as &mut dyn Observer));
    observers.extend(silence.as_mut().map(|silence| silence as &mut dyn Observer));
    observers.extend(first_start.as_mut().map(|first| first as &mut dyn Observer));
    observers.extend(recorded.as_mut().map(|recorded| recorded as &mut dyn Observer));
    observers.extend(task.as_mut().map(|task| task as &mut dyn Observer));
    observers.extend(background.as_mut().map(|background| background as &mut dyn Observer));
    if let Some(debugger) = debugger {
        observers.push(debugger);
    }
    let outcome = session.run(&mut observers);
    let result = finish(&mut session, recorded).and_then(|()| code(outcome?));
    let result = match task {
        Some(task) => task.result(result),
        None => result,
    };
    let status = result.as_ref().map_or_else(|failure| failure.code, |code| *code);
    if let Some(background) = background {
        if background.is_spare() {
            // Its pool is told why.
            return result;
        }
        if let Err(failure) = &result {
            failure.print(flags::with_flags);
        }
        // Before the name is free: whoever finds nobody there finds how it ended.
        background.over(status);
        session.will_exit(status.number());
        return Ok(status);
    }
    session.will_exit(status.number());
    result
}

/// Completes the recording of a run that is over.
fn finish(session: &mut Session<'_>, recorded: Option<Recorded>) -> Result<(), Failure> {
    if let Some(recorded) = recorded {
        session.linger()?;
        recorded.finish(&|| session.interrupted())?;
    }
    Ok(())
}

/// Says where the pseudo-terminals are, once: without that they cannot be found.
#[derive(Default)]
struct Announcer {
    done: bool,
}

impl Observer for Announcer {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        if !std::mem::replace(&mut self.done, true) {
            for pty in built.ptys {
                log_output::say(&format!("vmm: {} is {}\n", pty.device, pty.path.display()));
            }
        }
        Ok(())
    }

    fn ended(&mut self, _: &End<'_>) {}
}

fn code(outcome: Outcome) -> Result<Code, Failure> {
    match outcome {
        Outcome::Crash(report) => Err(Failure::new(Code::GuestCrash, anyhow!(report))),
        Outcome::Panic(report) => Err(Failure::new(Code::GuestPanic, anyhow!(report))),
        Outcome::InternalError(report) => Err(Failure::new(Code::Internal, anyhow!(report))),
        Outcome::NothingToBoot => {
            let error = anyhow!("no disk has anything that can be booted; its console says what was found");
            let hint = "give a kernel from outside: --kernel FILE --initrd FILE";
            Err(Failure::new(Code::BadArgument, error).hint(Some(hint)))
        }
        other => Ok(Code::of(&Ok(other))),
    }
}

/// Says that the sandbox has refused something, and gives the exit status for that.
fn refused(call: &Refused) -> u8 {
    let error = anyhow!("{call}");
    let hint =
        "tell us what the guest did: this is a defect, or somebody is in the monitor who should not be";
    let failure = Failure::new(Code::Sandbox, error).hint(Some(hint));
    failure.print(flags::with_flags);
    failure.code.number()
}

/// Says that memory is lost, and gives the exit status for that.
fn lost(error: memory::Error) -> u8 {
    let failure = Failure::from(machine::Error::from(error));
    failure.print(flags::with_flags);
    failure.code.number()
}

fn status(outcome: &Result<Outcome, machine::Error>) -> u8 {
    Code::of(outcome).number()
}
