//! Controlling a running virtual machine from another process: names, sockets, commands.
//!
//! A session registers a name ([`registry`]) and has commands on it served ([`server`]) by the control thread, which also
//! takes the process's signals ([`signals`]); `vmm status`, `vmm top` and their like are clients ([`client`]) that
//! speak [`protocol`]. The server sees the machine through [`Control`] only; `session` has that of a real one.

pub mod client;
pub(crate) mod passing;
pub mod protocol;
pub mod reception;
pub mod registry;
pub mod server;
pub mod signals;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::Plug;
use crate::config::host_path::{self, quoted};
use crate::kvm::VcpuState;
use crate::machine::{Attached, Handle};
use crate::net::traffic::{self, Counts};
use crate::snapshot::{Below, Parts, Saving};
use protocol::Refusal;

/// What a virtual machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Being built, before its first instruction or on its way through a reboot.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are parked and its devices quiet.
    Paused,
    /// Its power button was pressed, or it is being stopped.
    Stopping,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
        })
    }
}

/// What `vmm status` tells of a virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// The monitor's process.
    pub pid: u32,
    /// What it is doing.
    pub state: State,
    /// Seconds since the monitor took the name.
    pub uptime_seconds: f64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// The kernel that was booted.
    #[serde(default, with = "host_path::optional")]
    pub kernel: Option<PathBuf>,
    /// The unix socket that leads to its socket device.
    #[serde(default, with = "host_path::optional")]
    pub vsock: Option<PathBuf>,
    /// The guest's address, by which the host's programs reach its socket device over AF_VSOCK.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_cid: Option<u32>,
    /// Pseudo-terminals that lead into it.
    pub ptys: Vec<Pty>,
    /// Unix sockets that lead to named ports of its console.
    #[serde(default)]
    pub ports: Vec<PortSocket>,
    /// Its network devices; none while it starts.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// What a guest that breaks out of the monitor finds: `off`, or what the sandbox is made of.
    #[serde(default)]
    pub sandbox: String,
    /// The cgroup that it entered, for its limits.
    #[serde(default, with = "host_path::optional", skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
}

/// A pseudo-terminal that leads to one of the guest's character devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// The device: `console`, `serial`, or a port's name.
    pub device: String,
    /// What to open on the host.
    #[serde(with = "host_path")]
    pub path: PathBuf,
}

/// A unix socket that leads to a named port of the guest's console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSocket {
    /// The port's name.
    pub name: String,
    /// What to connect to: one client at a time.
    #[serde(with = "host_path")]
    pub path: PathBuf,
}

/// A network device, and what it has carried since the machine's first start. Ways are the guest's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The device: `virtio-net0` and so on.
    pub device: String,
    /// Where its frames go: `user`, `tap=NAME` and so on.
    pub to: String,
    /// The guest's address, unless it has chosen another.
    pub mac: String,
    /// Somebody is at the other end.
    pub up: bool,
    /// To the guest.
    pub received: Counts,
    /// From the guest.
    pub sent: Counts,
}

impl From<&traffic::Network> for Network {
    fn from(network: &traffic::Network) -> Self {
        let traffic::Network { device, to, mac, traffic } = network;
        let (received, sent) = (traffic.received.counts(), traffic.sent.counts());
        let (to, mac) = (to.to_string(), mac.to_string());
        Self { device: device.clone(), to, mac, up: traffic.is_up(), received, sent }
    }
}

/// A virtual machine as its control socket and its signals see it.
///
/// Called from the control thread, which none may hold up. What may take its time comes from a thread of its own: `pause`, which waits
/// for vCPUs to leave the guest and for I/O in flight, up to a limit of its own, and what changes devices.
pub trait Control: Send + Sync {
    /// What it is and does.
    fn status(&self) -> Status;
    /// Parks the vCPUs and quiesces the devices. Nothing happens if that is so already.
    ///
    /// # Errors
    /// In words, why it is not paused.
    fn pause(&self) -> Result<(), String>;
    /// What each vCPU does or waits for. From a thread of its own, as `pause`.
    ///
    /// # Errors
    /// In words, why that is not known.
    fn vcpus(&self) -> Result<Vec<VcpuState>, String>;
    /// Lets a paused machine run on. Nothing happens if it runs.
    ///
    /// # Errors
    /// In words, why it does not run.
    fn resume(&self) -> Result<(), String>;
    /// Presses the ACPI power button. Whether the guest does anything about it is up to the guest. False if there has been none yet
    /// that could.
    ///
    /// # Errors
    /// In words, why there is no button to press.
    fn power_button(&self) -> Result<bool, String>;
    /// What virtio devices it has.
    ///
    /// # Errors
    /// In words, why that is not known.
    fn devices(&self) -> Result<Vec<Attached>, String>;
    /// Gives it another device, whose `files` are open. From a thread of its own. None: it takes it, once it has its files.
    ///
    /// # Errors
    /// In words, why it does not have it.
    fn add_device(&self, device: Plug, files: Vec<OwnedFd>) -> Result<Option<Attached>, Refusal>;
    /// Asks the guest to let a device go, or takes it away. From a thread of its own.
    ///
    /// # Errors
    /// In words, why not.
    fn remove_device(&self, name: &str, force: bool) -> Result<Attached, Refusal>;
    /// The names of the files that a snapshot of it has.
    fn files(&self) -> Vec<PathBuf>;
    /// Saves it in those files, which are open, as `parts`: what is not as in `below`. From a thread of its own. Whether it ran, and
    /// stands still since, as `saving` has it.
    ///
    /// # Errors
    /// In words, why it is not saved.
    fn snapshot(&self, parts: &Parts, below: Option<Below>, saving: Saving) -> Result<bool, Refusal>;
    /// Saves it in files without names, for other processes to go on from: configuration, state and memory. From a thread of its own.
    ///
    /// # Errors
    /// In words, why there are none.
    fn fork(&self, disks: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Refusal>;
    /// Ends the machine without asking the guest. Takes effect whatever the machine is doing, paused included.
    fn kill(&self);
    /// The exit status of this process, once it is known what that will be.
    fn exit_status(&self) -> Option<u8>;
    /// The process is about to be ended ([`Control::give_up`]), and its name is still taken: keeps how this run ended, where that is kept.
    fn keep_end(&self);
    /// The machine has not ended although it was killed: ends the process, past everything that holds it up.
    fn give_up(&self);
    /// Attaches a viewer of what the machine does, until the returned value is dropped.
    ///
    /// # Errors
    /// In words, why that cannot be now.
    fn watch(&self) -> Result<Box<dyn Watch>, String>;
}

/// What a machine has been doing: sums that only grow. Made and read by the trace library; here it is only passed on.
pub type Sample = serde_json::Value;

/// A viewer of a run, attached until it is dropped.
pub trait Watch: Send {
    /// The sums so far. Never blocks.
    fn sample(&self) -> Sample;
}

/// Adds up what the machines of a run do while viewers are attached. The trace library has one.
pub trait Viewers: fmt::Debug + Send + Sync {
    /// Attaches a viewer. `machine` is the one that runs now, if any.
    ///
    /// # Errors
    /// Why not, in words.
    fn attach(self: Arc<Self>, machine: Option<&Handle>) -> Result<Box<dyn Viewer>, String>;
}

/// One viewer of [`Viewers`]. Dropping it detaches it.
pub trait Viewer: Send {
    /// The sums so far. `machine` is the one that runs now, if any.
    fn sample(&self, machine: Option<&Handle>) -> Sample;
}

/// Why a virtual machine cannot be controlled, or cannot have its name.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory for control sockets cannot be used.
    #[error("cannot use the runtime directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// The directory for control sockets is open to others.
    #[error("the runtime directory {} {what}", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The name belongs to a virtual machine that is alive.
    #[error("a virtual machine called {0:?} is already running")]
    NameTaken(String),
    /// What has the name is not this user's.
    #[error("{name:?} is not yours to control: {what}")]
    Stranger {
        /// The name.
        name: String,
        /// Whose it is.
        what: &'static str,
    },
    /// Nothing of this name runs.
    #[error("no virtual machine called {0:?} is running")]
    NoSuchVm(String),
    /// The name belongs to a pool that is alive.
    #[error("a pool called {0:?} is there already")]
    PoolTaken(String),
    /// No pool has this name.
    #[error("there is no pool called {0:?}")]
    NoSuchPool(String),
    /// A control socket cannot be made or used.
    #[error("cannot {what} control socket {}", path.display())]
    Socket {
        /// What was tried.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The monitor is there but does not answer in time.
    #[error("{0:?} does not answer")]
    NoAnswer(String),
    /// The monitor's answer makes no sense.
    #[error("{name:?} sent an answer that this vmm does not understand: {reason}")]
    Protocol {
        /// Whom was asked.
        name: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The monitor understood, and refused.
    #[error("{name:?} refused: {reason}")]
    Refused {
        /// Whom was asked.
        name: String,
        /// Its words.
        reason: String,
        /// What to try, in its words.
        hint: Option<String>,
    },
    /// The control thread or its signals cannot be set up.
    #[error("cannot start the control thread")]
    Thread(#[source] io::Error),
}

/// Closes this process to other processes of its user: no ptrace (gdb, strace), no perf, no core dump, /proc/PID belongs to
/// root. What it holds is the guest's; a monitor that was taken over must not take others over by it, nor they it.
///
/// # Errors
/// The kernel refuses: never seen.
pub fn close_to_debuggers() -> io::Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Directory { .. } => {
                "use a directory of your own: export XDG_RUNTIME_DIR=$(mktemp -d)".into()
            }
            Self::Unsafe { path, .. } => {
                let path = quoted(path);
                format!("if it is yours, chmod 700 {path}; if it is not, sudo rm -r {path}").into()
            }
            Self::Stranger { .. } => {
                "see who made it: ls -la $XDG_RUNTIME_DIR/vmm /run/user/$UID/vmm /tmp/vmm-$UID".into()
            }
            Self::NameTaken(name) => {
                format!("choose another name, `name=NAME`, or stop the one that runs: vmm stop {name}").into()
            }
            Self::NoSuchVm(_) => "see what is running: vmm list".into(),
            Self::PoolTaken(name) => format!("choose another name, or end it: vmm pool stop {name}").into(),
            Self::NoSuchPool(_) => "see which there are: vmm pool list".into(),
            Self::NoAnswer(_) => {
                "it may be busy writing a snapshot; or its process is stopped: vmm list shows its PID, and kill -CONT PID wakes it"
                    .into()
            }
            Self::Protocol { .. } => {
                "it may be another version of vmm; vmm list shows its PID, and kill PID stops it".into()
            }
            Self::Socket { source, .. } if source.kind() == io::ErrorKind::InvalidInput => {
                "the path is too long for a socket: choose a shorter `name=NAME` or XDG_RUNTIME_DIR".into()
            }
            Self::Socket { what: "remove stale", path, .. } => {
                format!("see what is there, and remove it: ls -ld {}", quoted(path)).into()
            }
            Self::Refused { hint, .. } => return hint.clone().map(Cow::from),
            Self::Socket { .. } | Self::Thread(_) => return None,
        })
    }
}
