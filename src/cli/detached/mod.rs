//! `vmm run -d`: a run in a process of its own session, which stays when the terminal goes.
//!
//! [`start`], or a [`Starting`] for each of several, is the command's own process: it starts the same program once more and waits until
//! that says, by its standard output, that the guest runs. Until then errors go to the terminal; from then on there is the [`record`].

pub mod record;

use std::error::Error;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::SIGHUP;

use vmm_command::{Code, Failure, log_output, print};
use vmm_monitor::api::registry::Registry;
use vmm_monitor::api::signals::is_ignored;
use vmm_monitor::config::{CharTarget, Console, OutputFile, Size, VmConfig};
use vmm_monitor::output::Rotating;
use vmm_monitor::pool::{Spare, Wanted};
use vmm_monitor::sandbox::Grant;
use vmm_monitor::session::{Built, End, Keeper, Observer};

use crate::undo;
use record::{Record, Records, set_end};

/// Bytes of the console, and of what the monitor said, that one file keeps; there are two of each.
const KEPT: Size = Size::mib(1);
/// Names are shorter.
const LONGEST_NAME: u64 = 256;

/// Starts what this process was asked to run in another one. Prints the name of the virtual machine when it runs and `ready`, which is
/// given the name, has returned.
///
/// # Errors
/// There can be no process; it does not get ready. Why it does not run is told by the other one.
pub fn start(ready: impl FnOnce(&str) -> Result<(), Failure>) -> Result<Code, Failure> {
    Starting::begin(&[])?.finish(ready)
}

/// A process that starts a virtual machine in the background.
pub struct Starting(Child);

/// The processes whose machines' names are not printed yet. Who ends this process by a signal never hears of them: they end with it.
fn unnamed() -> Result<MutexGuard<'static, Vec<u32>>, Failure> {
    static ALL: OnceLock<Arc<Mutex<Vec<u32>>>> = OnceLock::new();
    let all = match ALL.get() {
        Some(all) => all,
        None => {
            let all = undo::at_signals(|all: &mut Vec<u32>| all.iter().for_each(|child| end(*child)));
            let all = all.map_err(failed)?;
            ALL.get_or_init(|| all)
        }
    };
    Ok(all.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Ends the process `child`, whether it has a machine by now or not.
fn end(child: u32) {
    // It ignores what this process does.
    let signal = if is_ignored(SIGHUP) { Signal::KILL } else { Signal::HUP };
    let _ = Pid::from_raw(child.cast_signed()).map(|child| kill_process(child, signal));
}

impl Starting {
    /// One for what this process was asked to run, with `more` options.
    ///
    /// # Errors
    /// There can be no process.
    pub fn begin(more: &[&str]) -> Result<Self, Failure> {
        let more = [&["--detached"], more].concat();
        let mut unnamed = unnamed()?;
        let child = again(&more).stdout(Stdio::piped()).spawn().map_err(failed)?;
        unnamed.push(child.id());
        Ok(Self(child))
    }

    /// Waits until the virtual machine runs and `ready`, which is given its name, has returned, and prints the name.
    ///
    /// # Errors
    /// It does not get ready; the name cannot be printed. Why the virtual machine does not run is told by its process.
    pub fn finish(self, ready: impl FnOnce(&str) -> Result<(), Failure>) -> Result<Code, Failure> {
        let id = self.0.id();
        let finished = self.await_name(ready);
        unnamed()?.retain(|child| *child != id);
        finished
    }

    fn await_name(mut self, ready: impl FnOnce(&str) -> Result<(), Failure>) -> Result<Code, Failure> {
        let mut name = String::new();
        if let Some(said) = self.0.stdout.take() {
            BufReader::new(said.take(LONGEST_NAME)).read_line(&mut name).map_err(failed)?;
        }
        if name.ends_with('\n') {
            let name = name.trim_end();
            ready(name)?;
            // Who cannot be told the name by one way needs it by the other.
            print(&format!("{name}\n")).map_err(|failure| {
                failure.hint(Some(format!("{name:?} runs all the same; to end it: vmm stop {name}")))
            })?;
            return Ok(Code::Success);
        }
        let status = self.0.wait().map_err(failed)?;
        Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(Code::Host, Code::Other))
    }
}

/// This program once more, for what this process was asked to do, with `more` options.
pub fn again(more: &[&str]) -> Command {
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let words = match arguments.first().and_then(|first| first.to_str()) {
        Some("pool") => 2,
        Some(first) if !first.starts_with('-') => 1,
        _ => 0,
    };
    let rest = arguments.split_off(words.min(arguments.len()));
    let run = (words == 0).then_some("run");
    let mut command = Command::new("/proc/self/exe");
    command.arg0("vmm").args(run).args(arguments).args(more).args(rest);
    command
}

fn failed(error: io::Error) -> Failure {
    let error = anyhow::Error::new(error).context("cannot start a process for the virtual machine");
    Failure::new(Code::Host, error)
}

/// The run in the background, as its own process sees it.
#[derive(Debug)]
pub struct Background {
    records: Records,
    shared: Arc<Shared>,
    /// It has no name yet, and nobody waits for it by standard output.
    is_spare: bool,
}

/// What also the thread knows that ends a process whose machine does not end: it waits for nobody, so there is no lock.
#[derive(Debug)]
struct Shared {
    record: Record,
    /// That of a spare once it is taken.
    taken: OnceLock<Record>,
    /// What is in the record is this run's.
    ours: AtomicBool,
    /// The record goes when the run is over.
    remove: AtomicBool,
    running: AtomicBool,
    /// For how it ends.
    room: OnceLock<File>,
    /// How it ends is known.
    ends: AtomicBool,
}

impl Background {
    /// Leaves the terminal's session, and has the consoles that were to be on the terminal kept in a record.
    ///
    /// # Errors
    /// There is no place for records.
    pub fn new(config: &mut VmConfig, spare: Option<&Spare>, remove: bool) -> Result<Self, Failure> {
        // Fails for who leads one already.
        let _ = rustix::process::setsid();
        // It was started as /proc/self/exe, which says nothing to whoever lists processes.
        let _ = rustix::thread::set_name(c"vmm");
        let records = Records::of_user()?;
        let is_spare = spare.is_some();
        let record = match spare.map(Spare::name).or(config.name.as_deref()) {
            Some(name) => records.of(name),
            None => records.reserve(&Registry::of_user())?,
        };
        let ours = config.name.is_none() && !is_spare;
        if !is_spare {
            config.name = Some(record.name().to_owned());
        }
        let console = || CharTarget::File(OutputFile { path: record.console(), max: Some(KEPT) });
        if config.console() == CharTarget::Stdio {
            config.console = Console(Some(console()));
        } else if config.serial == CharTarget::Stdio {
            // Without a word of its own the console would take the terminal's place.
            config.console = Console(Some(config.console()));
            config.serial = console();
        }
        for port in config.port.iter_mut().filter(|port| port.to == CharTarget::Stdio) {
            port.to = console();
        }
        let [ours, running, remove, ends] = [ours, false, remove, false].map(AtomicBool::new);
        let (taken, room) = (OnceLock::new(), OnceLock::new());
        let shared = Arc::new(Shared { record, taken, ours, remove, running, room, ends });
        Ok(Self { records, shared, is_spare })
    }

    /// Whether it stands ready, or ended before it was taken.
    pub fn is_spare(&self) -> bool {
        self.is_spare
    }

    /// Where it keeps what it says. A spare's record gets another name.
    pub fn messages(&self) -> Option<PathBuf> {
        (!self.is_spare).then(|| self.shared.record.messages())
    }

    /// Who keeps the end of a run that another thread ends.
    pub fn keeper(&self) -> Arc<dyn Keeper> {
        self.shared.clone()
    }

    /// What it names while the machine runs: its record, which may go with the run; all, if it is to get another name.
    pub fn grants(&self) -> Vec<Grant> {
        let all = self.records.path().to_owned();
        let own = Grant::Folder(self.shared.record.folder().to_owned());
        match (self.is_spare, self.shared.remove.load(Ordering::Relaxed)) {
            (true, _) => vec![Grant::Folder(all)],
            (false, true) => vec![own, Grant::Departure(all)],
            (false, false) => vec![own],
        }
    }

    /// The name is ours: an earlier record of it makes room, and goes when the guest runs.
    ///
    /// # Errors
    /// It stays, or there can be no other.
    pub fn named(&mut self) -> Result<(), Failure> {
        // A name that was chosen here has a new record since then.
        if !self.shared.ours.load(Ordering::Relaxed) {
            self.records.begin(&self.shared.record)?;
            self.shared.ours.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The run is over, and this process ends with `code`.
    pub fn over(&self, code: Code) {
        self.shared.set_end(code.number());
    }

    /// Says that the guest runs, and gives the terminal up.
    fn leave(&mut self) -> anyhow::Result<()> {
        let Shared { record, running, room, .. } = &*self.shared;
        let remove = self.shared.remove.load(Ordering::Relaxed);
        if !remove {
            match record.take_end_room() {
                Ok(file) => _ = room.set(file),
                Err(error) => log::warn!("{}: no room to keep how this run ends: {error}", record.name()),
            }
        }
        if !self.is_spare {
            say_name(record.name())?;
        }
        keep_messages(record)?;
        running.store(!self.is_spare, Ordering::Relaxed);
        if remove {
            record.set_transient().context("cannot note that nothing is to be kept")?;
        }
        if record.keep().is_err() {
            log::warn!("{}: the record of an earlier run of this name is still there", record.name());
        }
        Ok(())
    }
}

/// Tells the command that has started this process, and waits for it, that `name` runs.
pub fn say_name(name: &str) -> anyhow::Result<()> {
    let said = writeln!(io::stdout(), "{name}").and_then(|()| io::stdout().flush());
    said.context("the command that started it is gone")
}

/// Has what this process says be kept in `record`, and not be on its terminal.
fn keep_messages(record: &Record) -> anyhow::Result<()> {
    let messages = Rotating::create(&record.messages(), KEPT.bytes());
    log_output::move_to(messages.with_context(|| format!("cannot create {}", record.messages().display()))?);
    leave_terminal()
}

/// Gives the terminal up.
pub fn leave_terminal() -> anyhow::Result<()> {
    let nothing =
        File::options().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    rustix::stdio::dup2_stdout(&nothing)?;
    rustix::stdio::dup2_stderr(&nothing)?;
    Ok(())
}

impl Observer for Background {
    fn built(&mut self, _: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        // A reboot's machine is not news.
        if self.shared.running.load(Ordering::Relaxed) { Ok(()) } else { Ok(self.leave()?) }
    }

    fn taken(&mut self, wanted: &Wanted) -> Result<(), Box<dyn Error + Send + Sync>> {
        let record = self.records.pass_on(&self.shared.record, &wanted.name);
        let record = record.map_err(Failure::into_error)?;
        if wanted.tied {
            record.set_transient().context("cannot note that nothing is to be kept")?;
            self.shared.remove.store(true, Ordering::Relaxed);
        }
        // Nobody else sets it.
        let _ = self.shared.taken.set(record);
        self.shared.running.store(true, Ordering::Relaxed);
        self.is_spare = false;
        Ok(())
    }

    fn ended(&mut self, _: &End<'_>) {}
}

impl Drop for Background {
    fn drop(&mut self) {
        self.shared.tidy();
    }
}

impl Shared {
    fn record(&self) -> &Record {
        self.taken.get().unwrap_or(&self.record)
    }

    fn set_end(&self, code: u8) {
        if self.remove.load(Ordering::Relaxed) || !self.running.load(Ordering::Relaxed) {
            return;
        }
        if let Some(room) = self.room.get()
            && !self.ends.swap(true, Ordering::Relaxed)
            && let Err(error) = set_end(room, code)
        {
            log::warn!("cannot keep how this run ends: {error}");
        }
    }

    /// Removes what is not to stay.
    fn tidy(&self) {
        match self.running.load(Ordering::Relaxed) {
            false if self.ours.load(Ordering::Relaxed) => self.record.give_up(),
            true if self.remove.load(Ordering::Relaxed) => drop(self.record().remove()),
            _ => {}
        }
    }
}

impl Keeper for Shared {
    fn ends(&self, status: u8) {
        self.set_end(status);
        self.tidy();
    }

    fn ends_at_once(&self, status: u8) {
        self.set_end(status);
    }
}
