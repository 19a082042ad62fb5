//! A guest that is a copy is made another one by its agent: `vmm agent renew`, and what `vmm restore` does by itself.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::order::{SEED, hostname_of, nanoseconds, random};
use super::{Guest, Reach, unreachable_agent};
use vmm_agent::client::{Error, Session};
use vmm_agent::port::NAME;
use vmm_agent::protocol::{Exec, Exit, GENERATION, Reason, Renewal, Request};
use vmm_command::{Code, Failure};
use vmm_monitor::api;
use vmm_monitor::api::client::Client;
use vmm_monitor::api::protocol::Command;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::config::VmConfig;
use vmm_monitor::vsock::Dialer;

/// For a guest that was just restored to be another machine: it may be slow at first, as its memory comes from a disk.
const FOR_COPIES: Duration = Duration::from_secs(60);
const REACH: Reach = Reach { timeout: Some(FOR_COPIES.as_secs()) };
/// Between two calls that a guest refuses.
const REFUSED: Duration = Duration::from_millis(2);

/// What else than its seed, its clock and its generation is to be another.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Changes {
    /// Give the guest this host name, until it boots anew
    #[arg(long, value_name = "HOSTNAME", value_parser = hostname_of)]
    hostname: Option<String>,
    /// Give the guest another machine ID: a new /etc/machine-id
    #[arg(long)]
    machine_id: bool,
}

impl Changes {
    /// What the agent is told, now.
    ///
    /// # Errors
    /// This host has no random numbers.
    pub fn renewal(&self) -> Result<Renewal, Failure> {
        let (generation, seed) = (random::<GENERATION>()?, random::<SEED>()?.to_vec());
        let hostname = self.hostname.clone().unwrap_or_default().into_bytes();
        Ok(Renewal { generation, time: nanoseconds(), seed, hostname, machine_id: self.machine_id })
    }

    /// Whether there are any.
    pub fn are_none(&self) -> bool {
        self.hostname.is_none() && !self.machine_id
    }
}

/// The options of `vmm agent renew`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    reach: Reach,
    #[command(flatten)]
    changes: Changes,
    /// The virtual machine's name, as vmm list shows it
    name: String,
}

/// The options of `vmm restore` and `vmm fork`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct CopyOptions {
    /// Fail, and kill it, unless the agent in its guest makes it a machine of its own: seed, clock, programs in
    /// /etc/vmm/generation.d. Without this option that is tried, and a failure is a warning. With -d, its name is printed afterwards
    #[arg(long)]
    renew: bool,
    /// Give its guest this host name; implies --renew
    #[arg(long, value_name = "HOSTNAME", value_parser = hostname_of)]
    hostname: Option<String>,
    /// Give its guest another machine ID: a new /etc/machine-id; implies --renew
    #[arg(long)]
    machine_id: bool,
}

/// `vmm agent renew`.
///
/// # Errors
/// There is no agent, or not all was done.
pub fn renew(options: &Options) -> Result<Code, Failure> {
    let guest = options.reach.guest(&options.name)?;
    tell(&guest, &options.changes)?;
    Ok(Code::Success)
}

impl CopyOptions {
    /// Whether a machine is of no use without it.
    pub fn is_required(&self) -> bool {
        self.renew || self.hostname.is_some() || self.machine_id
    }

    /// What is to be another.
    pub fn into_changes(self) -> Changes {
        Changes { hostname: self.hostname, machine_id: self.machine_id }
    }

    /// Whether there is anything to do for a machine of this configuration: without a way to an agent nobody is there to be told.
    pub fn concern(&self, config: &VmConfig) -> bool {
        self.is_required() || config.vsock.is_some() || config.port.iter().any(|port| port.name == NAME)
    }

    /// Has the agent of `name`, which was just restored, make it another machine. A machine whose agent does not, though that was asked
    /// for, is killed.
    ///
    /// # Errors
    /// There is an agent, or was to be one, and not all was done.
    pub fn apply(&self, name: &str) -> Result<(), Failure> {
        let told = REACH.find(name).and_then(|guest| self.tell(name, guest));
        self.judge(told, || {
            // Unless it has ended meanwhile.
            let client = Client::connect(&Registry::of_user(), name);
            let _ = client.and_then(|mut client| client.ask(Command::Kill));
        })
    }

    /// The same for the machine that this process has by `config`, to whose vsock ports `dialer` leads; `kill` ends it.
    ///
    /// # Errors
    /// As for [`CopyOptions::apply`].
    pub fn apply_here(
        &self,
        name: &str,
        config: &VmConfig,
        dialer: Option<Dialer>,
        kill: impl FnOnce(),
    ) -> Result<(), Failure> {
        self.judge(self.tell(name, REACH.here(name, config, dialer)), kill)
    }

    fn judge(&self, told: Result<(), Failure>, kill: impl FnOnce()) -> Result<(), Failure> {
        match told {
            Err(failure) if self.is_required() => {
                kill();
                Err(failure)
            }
            Err(failure) if is_nobody_there(&failure) => Ok(()),
            told => told,
        }
    }

    /// The same for who waits for what is required alone.
    ///
    /// # Errors
    /// As for [`CopyOptions::apply`].
    pub fn await_required(&self, name: &str) -> Result<(), Failure> {
        if self.is_required() { self.apply(name) } else { Ok(()) }
    }

    fn tell(&self, name: &str, guest: Option<Guest>) -> Result<(), Failure> {
        let guest = match (guest, self.is_required()) {
            (Some(guest), true) => guest,
            // One that has booted has its agent now, or has none.
            (Some(guest), false) => guest.booted(),
            (None, true) => return Err(unreachable_agent(name)),
            (None, false) => return Ok(()),
        };
        tell(&guest, &self.clone().into_changes())
    }
}

/// Has the agent that `dial` reaches make its guest, which goes on from a snapshot, a machine of its own and run `exec`, all in one
/// message.
///
/// # Errors
/// Nobody is there before `deadline`; not all was done.
pub fn renew_and_exec(
    dial: impl Fn() -> Result<UnixStream, Failure>,
    exec: &Exec,
    changes: &Changes,
    deadline: Instant,
) -> Result<Session, Failure> {
    loop {
        let request = Request::RenewAndExec(changes.renewal()?, exec.clone());
        match Session::call(dial()?, request, deadline) {
            // A guest that was restored resets what came before it knows that.
            Err(Error::NobodyListens(_)) if Instant::now() < deadline => thread::sleep(REFUSED),
            Err(error @ Error::Failed { reason: Reason::Protocol, .. }) => {
                let hint = "the agent in the guest may be older than this: vmm agent install";
                return Err(Failure::from(error).hint(Some(hint)));
            }
            Err(error @ (Error::NobodyListens(_) | Error::NoAnswer { .. } | Error::Silent { .. })) => {
                let hint = "it may have had no agent when it was saved: docs/agent.md has how to install it";
                return Err(Failure::from(error).hint(Some(hint)));
            }
            called => return Ok(called?),
        }
    }
}

/// There is no agent, or the machine has ended.
fn is_nobody_there(failure: &Failure) -> bool {
    let has_agent = !matches!(failure.cause(), Some(Error::NobodyListens(_)));
    !has_agent || matches!(failure.cause(), Some(api::Error::NoSuchVm(_)))
}

/// Has the agent of `guest` do it.
fn tell(guest: &Guest, changes: &Changes) -> Result<(), Failure> {
    // So that what was waited for the agent is not missing in the time. The first connection after a restore may meet the reset of those
    // that the saved machine had.
    let facts = guest.facts().or_else(|error| match error {
        Error::Lost(_) => guest.facts(),
        error => Err(error),
    });
    facts.map_err(|error| guest.failure(error))?;
    let session = guest.start(Request::Renew(changes.renewal()?)).map_err(|error| {
        let is_old = matches!(error, Error::Failed { reason: Reason::Protocol, .. });
        guest
            .failure(error)
            .hint(is_old.then_some("the agent in the guest may be older than this: vmm agent install"))
    })?;
    match session.outcome(guest.patience.answer).map_err(|error| guest.failure(error))? {
        (Exit::Code(0), _) => Ok(()),
        (_, complaints) => {
            let complaints = complaints.lines().collect::<Vec<_>>().join("; ");
            let error = anyhow!("the agent could not make the guest a machine of its own: {complaints}");
            let hint = "put that right in the guest: docs/agent.md has what is done there";
            Err(Failure::new(Code::Host, error).hint(Some(hint)))
        }
    }
}
