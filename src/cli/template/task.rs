//! [`Task`]: what is done with a machine that runs, on a thread of its own: its guest is awaited, saved as a template, and given a
//! command, whose end is the machine's.

use std::error::Error;
use std::io::ErrorKind;
use std::path::{Path, PathBuf, absolute};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::super::agent::renewal::{Changes, renew_and_exec};
use super::super::exec::{self, Carrier};
use super::super::flags::with_flags;
use vmm_agent::client::{self, Patience, Session};
use vmm_agent::port::NAME;
use vmm_agent::protocol::{Exec, PORT};
use vmm_command::{Code, Failure};
use vmm_monitor::config::{CharTarget, VmConfig};
use vmm_monitor::machine::{Handle, Phase};
use vmm_monitor::sandbox::Grant;
use vmm_monitor::session::{Built, End, Observer};
use vmm_monitor::snapshot::New;
use vmm_monitor::threads::{self, Role};
use vmm_monitor::vsock::Dialer;

/// For a guest to be ready, and for the agent of one that was ready to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks whether a machine that is waited for is still there.
const AGAIN: Duration = Duration::from_millis(50);
/// For a machine to end whose agent is gone: a guest that goes down ends its agent on the way.
const GOING_DOWN: Duration = Duration::from_secs(5);

/// By what it shows that a guest is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signs {
    /// It writes a mark to port 0x80.
    Mark,
    /// Its agent answers by the socket device.
    Vsock,
    /// Its agent answers by the console port whose socket this is.
    Port(PathBuf),
}

impl Signs {
    /// Of the guest of `config`, which may be there for a command.
    ///
    /// # Errors
    /// It has no way to show it.
    pub fn of(config: &VmConfig, has_command: bool) -> Result<Self, Failure> {
        let port = config.port.iter().find(|port| port.name == NAME).map(|port| &port.to);
        match (&config.vsock, port) {
            (Some(vsock), _) if vsock.vhost && has_command => {
                let error = anyhow!(
                    "a command is reached by the monitor's own sockets, and with vhost=on there are none"
                );
                Err(Failure::new(Code::BadArgument, error).hint(Some("drop vhost=on")))
            }
            _ if config.boot_marks && !has_command => Ok(Self::Mark),
            (Some(vsock), _) if !vsock.vhost => Ok(Self::Vsock),
            (_, Some(CharTarget::Socket(path))) => {
                Ok(Self::Port(absolute(path).unwrap_or_else(|_| path.clone())))
            }
            _ => {
                let error = anyhow!("nothing would show when the guest is ready");
                let hint = "have its agent answer, --vsock (docs/agent.md), or the guest write 123 to port 0x80: --boot-marks";
                Err(Failure::new(Code::BadArgument, error).hint(Some(hint)))
            }
        }
    }
}

/// A command, and what is begun for it.
pub struct Command {
    exec: Exec,
    changes: Changes,
    carrier: Carrier,
    left: Arc<Now>,
}

impl Command {
    /// `exec`, once the agent has made the guest a machine of its own with these `changes`. From now on signals are the command's. To be
    /// called while this process has no other thread.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn begin(mut exec: Exec, changes: Changes) -> Result<Self, Failure> {
        let left = Arc::<Now>::default();
        let now = left.clone();
        let carrier = Carrier::begin(&mut exec, move |signal| now.leave(signal))?;
        Ok(Self { exec, changes, carrier, left })
    }
}

/// What is to be done.
pub struct Work {
    /// A template is to be made.
    pub new: Option<New>,
    /// The guest boots; else it was ready when it was saved.
    pub boots: bool,
    /// By what it is seen to be ready.
    pub signs: Signs,
    /// A command is to be run.
    pub command: Option<Command>,
}

/// The machine of the moment, for whoever ends it.
#[derive(Debug, Default)]
struct Now(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    machine: Option<Handle>,
    /// The signal that was to end it all.
    left: Option<i32>,
    /// It was killed from here.
    killed: bool,
}

impl Now {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A clone keeps the devices of a machine that has ended, and with them the connections: it is to be held for a moment only.
    fn machine(&self) -> Option<Handle> {
        self.state().machine.clone()
    }

    /// Waits for the machine's end, until `deadline` at most.
    fn await_end(&self, deadline: Instant) {
        let is_there = || self.machine().is_some_and(|machine| machine.phase() != Phase::Ended);
        while is_there() && Instant::now() < deadline {
            thread::sleep(AGAIN);
        }
    }

    /// Ends the machine, unless it has ended by itself.
    fn kill(&self) {
        let mut state = self.state();
        if let Some(machine) = state.machine.clone().filter(|machine| machine.phase() != Phase::Ended) {
            state.killed = true;
            machine.kill();
        }
    }

    fn leave(&self, signal: i32) {
        let mut state = self.state();
        state.left = Some(signal);
        if state.machine.is_some() {
            drop(state);
            return self.kill();
        }
        // It is not there yet, or no more, and its output is not taken.
        exec::leave(signal);
    }
}

/// See the module's text.
pub struct Task {
    work: Option<Work>,
    now: Arc<Now>,
    has_command: bool,
    done: Option<Receiver<Result<Option<Code>, Failure>>>,
}

impl Task {
    /// For the first machine of a run.
    pub fn new(work: Work) -> Self {
        let now = work.command.as_ref().map(|command| command.left.clone()).unwrap_or_default();
        Self { has_command: work.command.is_some(), work: Some(work), now, done: None }
    }

    /// What it names while the machine runs: where a template is made.
    pub fn grant(&self) -> Option<Grant> {
        let new = self.work.as_ref()?.new.as_ref()?;
        Some(Grant::Folder(new.folder().to_owned()))
    }

    /// Whether signals are a command's.
    pub fn has_command(&self) -> bool {
        self.has_command
    }

    /// What became of it all, where `run` is what became of the machine.
    ///
    /// # Errors
    /// Whichever says why.
    pub fn result(self, run: Result<Code, Failure>) -> Result<Code, Failure> {
        let Some(done) = self.done else { return run };
        // The machine has ended: so has all that waits for it.
        let Ok(done) = done.recv() else { return run };
        let State { left, killed, .. } = *self.now.state();
        match (done, run, left) {
            (_, _, Some(signal)) => Ok(Code::Command(u8::try_from(128 + signal).unwrap_or(u8::MAX))),
            (Ok(Some(code)), ..) => Ok(code),
            // Why the machine ended says more than that it is gone.
            (_, Err(failure), _) | (Err(failure), Ok(Code::Killed), None) if killed => Err(failure),
            (Ok(None), run, _) => run,
            (Err(_), run, _) if !self.has_command => {
                log::warn!("the guest ended before it was ready: no template was made");
                run
            }
            (Err(_), Err(failure), _) => Err(failure),
            (Err(_), Ok(code), _) => {
                let how = match code {
                    Code::Killed => "was killed",
                    Code::Success => "powered off",
                    _ => "ended",
                };
                let error = anyhow!("the virtual machine {how} before the command had ended");
                Err(Failure::new(Code::Host, error))
            }
        }
    }
}

impl Observer for Task {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.now.state().machine = Some(built.machine.handle());
        if let Some(mut work) = self.work.take() {
            if let Some(new) = &mut work.new
                && let Err(error) = new.begins()
            {
                Failure::from(error).warn(with_flags);
                work.new = None;
            }
            let (give, take) = channel();
            let (now, dialer) = (self.now.clone(), built.dialer.clone());
            self.done = Some(take);
            threads::spawn(Role::Owner("task"), move || {
                let done = work.run(&now, dialer);
                let is_over = !matches!(done, Ok(None));
                let is_lost = done.as_ref().is_err_and(|failure| {
                    matches!(failure.cause::<client::Error>(), Some(client::Error::Lost(_)))
                });
                // Nobody waits for it only where the run could not begin.
                let _ = give.send(done);
                if is_lost {
                    now.await_end(Instant::now() + GOING_DOWN);
                }
                if is_over {
                    now.kill();
                }
            })?;
        }
        Ok(())
    }

    fn ended(&mut self, _: &End<'_>) {
        self.now.state().machine = None;
    }
}

impl Work {
    /// Whether there is anything to do.
    pub fn has_any(&self) -> bool {
        self.new.is_some() || self.command.is_some()
    }

    /// Does it. The command's exit code; none without one.
    fn run(self, now: &Now, dialer: Option<Dialer>) -> Result<Option<Code>, Failure> {
        let Self { new, boots, signs, command } = self;
        if boots {
            await_ready(&signs, now, dialer.as_ref())?;
        }
        if let Some(new) = new {
            let machine = now.machine().ok_or_else(gone)?;
            if let Err(error) = new.save(&machine) {
                Failure::from(error).warn(with_flags);
            }
        }
        let Some(Command { exec, changes, carrier, .. }) = command else { return Ok(None) };
        let dialer = dialer.ok_or_else(gone)?;
        let dial = || dialer.dial().map_err(|_| gone());
        carrier.carry(renew_and_exec(dial, &exec, &changes, Instant::now() + PATIENCE)?).map(Some)
    }
}

fn gone() -> Failure {
    Failure::new(Code::Host, anyhow!("the virtual machine has ended"))
}

fn await_ready(signs: &Signs, now: &Now, dialer: Option<&Dialer>) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    let patience = Patience { boot: deadline, answer: deadline };
    let answered = |connection: Result<_, client::Error>| {
        connection.and_then(|stream| Session::facts(stream, deadline)).map(drop)
    };
    let ready = match signs {
        Signs::Mark => {
            let is_there = || now.machine().filter(|machine| machine.phase() != Phase::Ended);
            loop {
                let machine = is_there().ok_or_else(gone)?;
                match machine.await_ready_mark(AGAIN) {
                    true => return Ok(()),
                    false if Instant::now() >= deadline => break Err(None),
                    false => {}
                }
            }
        }
        Signs::Vsock => {
            let dial = || dialer.ok_or(ErrorKind::NotConnected)?.dial();
            answered(client::dial_with(dial, Path::new("of its own"), PORT, patience)).map_err(Some)
        }
        Signs::Port(path) => answered(client::dial_port(path, patience)).map_err(Some),
    };
    ready.map_err(|error| {
        let seconds = PATIENCE.as_secs();
        let (what, hint) = match error {
            None => ("wrote no 123 to port 0x80", "see how far it came: vmm run -v --boot-marks"),
            Some(_) => (
                "has no agent that answers",
                "put one into it (docs/agent.md), and see its console: --console file=FILE",
            ),
        };
        Failure::new(Code::Host, anyhow!("the guest {what} within {seconds} s")).hint(Some(hint))
    })
}
