//! `vmm run`: from options to a running machine, and from its end to an exit code.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;

use super::exit::{Code, Failure, print};
use super::options::Options;
use super::plan::plan;
use super::silence::Silence;
use crate::api::registry::Registry;
use crate::api::running::Running;
use crate::api::server::Server;
use crate::api::signals::Signals;
use crate::api::{self, Control, Pty};
use crate::config::{OnReboot, VmConfig};
use crate::debug::Debugger;
use crate::debug::gdb;
use crate::machine::{self, Ends, Outcome};
use crate::trace::file::Header;
use crate::trace::recording::{Recording, Start};

/// What the options say beside the machine.
pub struct Around {
    stop_timeout: Duration,
    record: Option<Record>,
}

/// What to record of a run.
struct Record {
    file: PathBuf,
    /// The registers at every exit.
    registers: bool,
}

impl Around {
    /// Of these.
    ///
    /// # Errors
    /// They contradict each other.
    pub fn of(options: &Options) -> Result<Self, Failure> {
        let registers = options.trace_registers;
        let record = options.trace.clone().map(|file| Record { file, registers });
        if registers && record.is_none() {
            let error = anyhow!("--trace-registers: there is no record to put them in");
            return Err(Failure::new(Code::BadArgument, error).hint(Some("name its file: --trace FILE")));
        }
        Ok(Self { stop_timeout: Duration::from_secs(options.stop_timeout), record })
    }
}

/// `vmm run`.
pub fn run(options: Options) -> Result<Code, Failure> {
    let (around, dry_run) = (Around::of(&options)?, options.dry_run);
    let gdb = options.gdb.clone();
    let config = options.resolve()?;
    if dry_run {
        print(&plan(config)?)?;
        return Ok(Code::Success);
    }
    match gdb {
        Some(place) => {
            let mut server = gdb::Server::listen(&place, config.kernel.as_deref())?;
            live(config, around, Some(&mut server))
        }
        None => live(config, around, None),
    }
}

/// Runs what `config` describes, under `debugger` if there is one.
pub fn live(
    config: VmConfig,
    Around { stop_timeout, record }: Around,
    debugger: Option<&mut dyn Debugger>,
) -> Result<Code, Failure> {
    // Before anything that a signal would have to undo.
    let signals = Signals::take().map_err(api::Error::Thread)?;
    let entry = Registry::of_user().register(config.name.as_deref())?;
    log::info!("{}: control socket registered", entry.name());
    let running = Arc::new(Running::new(entry.name(), &config, record.is_some()));
    // Whoever signals or connects before the control thread is there is kept waiting, not lost; so the guest need not
    // wait for the thread.
    let mut unserved = Some((entry, signals));
    let mut server = None;
    let mut serve = || {
        if let Some((entry, signals)) = unserved.take() {
            let started = Server::start(entry, Some(signals), running.clone(), stop_timeout);
            if started.is_err() {
                running.kill();
            }
            server = Some(started);
        }
    };
    let mut ends = Ends::default();
    let mut watched = Watched { config: &config, record, debugger };
    let end = watched.run(&mut ends, &running, &mut serve);
    // Why there is no server says more than that the machine was killed for want of it.
    server.transpose()?;
    end
}

/// A machine with those who look at its run.
struct Watched<'a, 'd> {
    config: &'a VmConfig,
    record: Option<Record>,
    debugger: Option<&'a mut (dyn Debugger + 'd)>,
}

impl Watched<'_, '_> {
    /// Runs the machine, and again after each reboot if that is wanted. Calls `serve` whenever it has begun to run.
    fn run(&mut self, ends: &mut Ends, running: &Running, serve: &mut dyn FnMut()) -> Result<Code, Failure> {
        let mut first = true;
        let recorder = running.recorder().clone();
        // Ends with the last of the machines.
        let mut recording: Option<Recording> = None;
        // The monitor's own steps belong to the record.
        recorder.set_on(self.record.is_some());
        recorder.set_all_registers(self.record.as_ref().is_some_and(|record| record.registers));
        let start = Start::now();
        loop {
            let mut machine = machine::build(self.config, ends, &recorder)?;
            let ptys = ptys(ends);
            if first {
                for pty in &ptys {
                    // Not a log line: without it the pseudo-terminal cannot be found.
                    let _ = writeln!(std::io::stderr(), "vmm: {} is {}", pty.device, pty.path.display());
                }
            }
            if let (true, Some(record)) = (first, &self.record) {
                let header = Header::of(self.config, machine.handle().buses());
                let (recorder, ram) = (recorder.clone(), machine.handle().ram().clone());
                let counters = machine.counters();
                recording = Some(Recording::start(&record.file, header, recorder, start, counters, ram)?);
            } else if let Some(recording) = &mut recording {
                recording.resume(machine.handle().ram().clone());
            }
            first = false;
            if let Some(debugger) = &mut self.debugger {
                debugger.attach(&machine)?;
            }
            running.built(machine.handle(), ptys);
            let silence = Silence::of(self.config, ends).filter(|_| self.debugger.is_none());
            silence.iter().for_each(|silence| silence.watch(&mut machine));
            let outcome = machine.run(&mut *serve);
            let stopped = running.ended();
            let again =
                matches!(outcome, Ok(Outcome::Reset)) && self.config.on_reboot == OnReboot::Reset && !stopped;
            if let (Some(silence), Ok(outcome), false) = (&silence, &outcome, again) {
                silence.ended(outcome);
            }
            let end = outcome.map_err(Failure::from).and_then(code);
            if let Some(debugger) = &mut self.debugger {
                let code = end.as_ref().map_or_else(|failure| failure.code, |code| *code);
                debugger.ended((!again).then(|| code.number()));
            }
            if again {
                log::info!("the guest rebooted: starting it again");
                if let Some(recording) = &mut recording {
                    recording.pause();
                }
                continue;
            }
            if let Some(recording) = recording.take() {
                recording.finish()?;
            }
            machine.leave();
            return end;
        }
    }
}

fn code(outcome: Outcome) -> Result<Code, Failure> {
    match outcome {
        Outcome::Shutdown | Outcome::Reset => Ok(Code::Success),
        Outcome::Exit(code) => Ok(Code::Guest(code)),
        Outcome::NothingToBoot => {
            let error = anyhow!("no disk has anything that can be booted; its console says what was found");
            let hint = "give a kernel from outside: --kernel FILE --initrd FILE";
            Err(Failure::new(Code::BadArgument, error).hint(Some(hint)))
        }
        Outcome::Killed => Ok(Code::Killed),
        Outcome::Crash(report) => Err(Failure::new(Code::GuestCrash, anyhow!(report))),
        Outcome::InternalError(report) => Err(Failure::new(Code::Internal, anyhow!(report))),
    }
}

fn ptys(ends: &Ends) -> Vec<Pty> {
    let pty = |(role, place): (&str, String)| {
        let path = place.strip_prefix("pty=")?.into();
        Some(Pty { device: role.to_owned(), path })
    };
    ends.list().filter_map(pty).collect()
}

impl From<machine::Error> for Failure {
    fn from(error: machine::Error) -> Self {
        let code = if error.is_bad_argument() { Code::BadArgument } else { Code::Host };
        let hint = error.hint().map(|hint| hint.into_owned());
        Self::new(code, error).hint(hint)
    }
}

impl From<gdb::Error> for Failure {
    fn from(error: gdb::Error) -> Self {
        let hint = error.hint();
        Self::new(Code::Host, error).hint(hint)
    }
}
