//! What the commands on the agent in a guest share: how they reach it, and the terminal.

pub mod command;
mod install;
mod order;
pub mod renewal;
pub mod terminal;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use vmm_agent::client::{self, Patience, Session};
use vmm_agent::port::NAME;
use vmm_agent::protocol::{Facts, PORT, Request};
use vmm_command::{Code, Failure};
use vmm_monitor::api::State;
use vmm_monitor::api::client::Client;
use vmm_monitor::api::protocol::Command;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::config::{CharTarget, VmConfig};
use vmm_monitor::vsock::Dialer;

/// For an agent to answer, and for a virtual machine that has just started to have one.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whose agent, and how long to wait for it.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Reach {
    /// Wait so many seconds for the agent of a guest that is booting, or does not answer [default: 10, from the VM's start on]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// What leads to the agent.
#[derive(Debug, Clone)]
enum Way {
    /// By the socket device: any number of connections.
    Vsock(PathBuf),
    /// The same, in this process, which may reach no socket by its name any more.
    Here(Dialer),
    /// The same, of a guest that has this address on the host.
    Cid(u32),
    /// By a port of the console: one at a time.
    Port(PathBuf),
}

/// A guest whose agent may be asked, once for each connection.
#[derive(Debug, Clone)]
pub struct Guest {
    way: Way,
    patience: Patience,
    name: String,
    /// Seconds that may do where the time was too short.
    longer: u64,
}

impl Reach {
    /// The guest of the virtual machine called `name`.
    ///
    /// # Errors
    /// There is none, or it is paused, or has no socket device.
    pub fn guest(&self, name: &str) -> Result<Guest, Failure> {
        self.find(name)?.ok_or_else(|| unreachable_agent(name))
    }

    /// The same; none if it has no device by which its agent could be reached.
    ///
    /// # Errors
    /// There is none, or it is paused.
    pub fn find(&self, name: &str) -> Result<Option<Guest>, Failure> {
        let status = Client::connect(&Registry::of_user(), name)?.ask(Command::Status)?;
        if status.state == State::Paused {
            let hint = format!("let it run on: vmm resume {name}");
            return Err(Failure::new(Code::Host, anyhow!("{name:?} is paused")).hint(Some(hint)));
        }
        let port = status.ports.into_iter().find(|port| port.name == NAME).map(|port| Way::Port(port.path));
        let way = status.vsock.map(Way::Vsock).or(status.vsock_cid.map(Way::Cid)).or(port);
        let Some(way) = way else { return Ok(None) };
        let up = Duration::try_from_secs_f64(status.uptime_seconds).unwrap_or_default();
        Ok(Some(self.by(way, name, up)))
    }

    /// The guest of the machine called `name` that this process has by `config`, to whose vsock ports `dialer` leads; none if it has no
    /// device by which its agent could be reached.
    pub fn here(&self, name: &str, config: &VmConfig, dialer: Option<Dialer>) -> Option<Guest> {
        let port = config.port.iter().find(|port| port.name == NAME).and_then(|port| match &port.to {
            CharTarget::Socket(path) => Some(Way::Port(path.clone())),
            _ => None,
        });
        let by_host = config.vsock.as_ref().filter(|vsock| vsock.vhost).map(|vsock| Way::Cid(vsock.cid()));
        let way = dialer.map(Way::Here).or(by_host).or(port)?;
        Some(self.by(way, name, Duration::ZERO))
    }

    /// That of a machine that has been there for `up`.
    fn by(&self, way: Way, name: &str, up: Duration) -> Guest {
        let now = Instant::now();
        let all = self.timeout.map_or(PATIENCE, Duration::from_secs);
        // One that has had its time to boot has no agent, unless the user knows better.
        let boot = if self.timeout.is_some() { all } else { all.saturating_sub(up) };
        let later = |time| now.checked_add(time).unwrap_or(now + PATIENCE);
        let longer = all.as_secs().saturating_mul(2).max(60);
        let patience = Patience { boot: later(boot), answer: later(all) };
        Guest { way, patience, name: name.to_owned(), longer }
    }
}

fn unreachable_agent(name: &str) -> Failure {
    let hint = "start it with one: vmm run --vsock --kernel ...";
    let error = anyhow!("{name:?} has no vsock device, by which its agent is reached");
    Failure::new(Code::Host, error).hint(Some(hint))
}

impl Guest {
    /// Has the agent do `request`.
    ///
    /// # Errors
    /// There is no agent, or it cannot.
    pub fn start(&self, request: Request) -> Result<Session, client::Error> {
        Session::start(self.agent()?, request, self.patience.answer)
    }

    /// Has the agent do what has no streams.
    ///
    /// # Errors
    /// There is no agent, or it cannot.
    pub fn order(&self, request: Request) -> Result<(), client::Error> {
        Session::order(self.agent()?, request, self.patience.answer)
    }

    /// What the agent tells about its guest.
    ///
    /// # Errors
    /// There is no agent.
    pub fn facts(&self) -> Result<Facts, client::Error> {
        Session::facts(self.agent()?, self.patience.answer)
    }

    /// A connection to the agent.
    fn agent(&self) -> Result<UnixStream, client::Error> {
        match &self.way {
            Way::Vsock(_) | Way::Here(_) | Way::Cid(_) => self.dial(PORT),
            Way::Port(path) => client::dial_port(path, self.patience),
        }
    }

    /// A connection to a vsock port of the guest.
    ///
    /// # Errors
    /// Nobody listens there, or it has no vsock.
    pub fn dial(&self, port: u32) -> Result<UnixStream, client::Error> {
        match &self.way {
            Way::Vsock(path) => client::dial(path, port, self.patience),
            Way::Here(dialer) => {
                client::dial_with(|| dialer.dial(), Path::new("of its own"), port, self.patience)
            }
            Way::Cid(cid) => client::dial_cid(*cid, port, self.patience),
            Way::Port(_) => Err(client::Error::NobodyListens(port)),
        }
    }

    /// The same guest, which has booted: what refuses is not there.
    pub fn booted(self) -> Self {
        Self { patience: Patience { boot: Instant::now(), ..self.patience }, ..self }
    }

    /// The same guest for a connection that is made now, by whoever runs on.
    pub fn again(&self) -> Self {
        let now = Instant::now();
        Self { patience: Patience { boot: now, answer: now + PATIENCE }, ..self.clone() }
    }

    /// `error` of its agent, with a hint that knows the guest.
    pub fn failure(&self, error: client::Error) -> Failure {
        let Self { name, longer, .. } = self;
        let hint = match &error {
            client::Error::NobodyListens(_) | client::Error::PortSilent { .. } => format!(
                "install the agent in it (docs/agent.md); if it is still booting, wait for it: --timeout {longer}"
            ),
            client::Error::NoAnswer { .. } | client::Error::Silent { .. } => format!(
                "it may hang (vmm status --vcpus {name}) or have no agent (vmm agent install); to wait longer: --timeout {longer}"
            ),
            _ => return error.into(),
        };
        Failure::new(Code::Host, error).hint(Some(hint))
    }
}

/// Arguments as the agent takes them.
pub fn bytes(arguments: Vec<OsString>) -> Vec<Vec<u8>> {
    arguments.into_iter().map(OsString::into_vec).collect()
}
