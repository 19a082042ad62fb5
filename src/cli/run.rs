//! `vmm run`: from options to a running machine, and from its end to an exit code.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;

use super::exit::{Code, Failure, print};
use super::options::Options;
use super::plan::plan;
use crate::api::registry::Registry;
use crate::api::running::Running;
use crate::api::server::Server;
use crate::api::signals::Signals;
use crate::api::{self, Control, Pty};
use crate::config::{OnReboot, VmConfig};
use crate::machine::{self, Ends, Outcome};
use crate::trace::file::Header;
use crate::trace::recording::{Recording, Start};

/// `vmm run`.
pub fn run(options: Options) -> Result<Code, Failure> {
    let stop_timeout = Duration::from_secs(options.stop_timeout);
    let dry_run = options.dry_run;
    let trace = options.trace.clone().map(|file| (file, options.trace_registers));
    if options.trace_registers && trace.is_none() {
        let error = anyhow!("--trace-registers: there is no record to put them in");
        return Err(Failure::new(Code::BadArgument, error).hint(Some("name its file: --trace FILE")));
    }
    let config = options.resolve()?;
    if dry_run {
        print(&plan(config)?)?;
        return Ok(Code::Success);
    }
    // Before anything that a signal would have to undo.
    let signals = Signals::take().map_err(api::Error::Thread)?;
    let entry = Registry::of_user().register(config.name.as_deref())?;
    log::info!("{}: control socket registered", entry.name());
    let running = Arc::new(Running::new(entry.name(), &config, trace.is_some()));
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
    let end = live(&config, &mut ends, &running, trace, &mut serve);
    // Why there is no server says more than that the machine was killed for want of it.
    server.transpose()?;
    end
}

/// Runs the machine, and again after each reboot if that is wanted, recording it to the file in `trace` if that is, with the registers
/// at every exit if that says so. Calls `serve`
/// whenever it has begun to run.
fn live(
    config: &VmConfig,
    ends: &mut Ends,
    running: &Running,
    trace: Option<(PathBuf, bool)>,
    serve: &mut dyn FnMut(),
) -> Result<Code, Failure> {
    let mut first = true;
    let recorder = running.recorder().clone();
    // Ends with the last of the machines.
    let mut recording: Option<Recording> = None;
    // The monitor's own steps belong to the record.
    recorder.set_on(trace.is_some());
    recorder.set_all_registers(trace.as_ref().is_some_and(|(_, registers)| *registers));
    let start = Start::now();
    loop {
        let mut machine = machine::build(config, ends, &recorder)?;
        let ptys = ptys(ends);
        if first {
            for pty in &ptys {
                // Not a log line: without it the pseudo-terminal cannot be found.
                let _ = writeln!(std::io::stderr(), "vmm: {} is {}", pty.device, pty.path.display());
            }
        }
        if let (true, Some((path, _))) = (first, &trace) {
            let header = Header::of(config, machine.handle().buses());
            let (recorder, ram) = (recorder.clone(), machine.handle().ram().clone());
            recording = Some(Recording::start(path, header, recorder, start, machine.counters(), ram)?);
        } else if let Some(recording) = &mut recording {
            recording.resume(machine.handle().ram().clone());
        }
        first = false;
        running.built(machine.handle(), ptys);
        let outcome = machine.run(&mut *serve);
        let stopped = running.ended();
        if matches!(outcome, Ok(Outcome::Reset)) && config.on_reboot == OnReboot::Reset && !stopped {
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
        match outcome? {
            Outcome::Shutdown | Outcome::Reset => return Ok(Code::Success),
            Outcome::Exit(code) => return Ok(Code::Guest(code)),
            Outcome::Killed => return Ok(Code::Killed),
            Outcome::Crash(report) => return Err(Failure::new(Code::GuestCrash, anyhow!(report))),
            Outcome::InternalError(report) => return Err(Failure::new(Code::Internal, anyhow!(report))),
        }
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
