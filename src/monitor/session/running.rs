//! [`Control`] of a real machine, across reboots: the machine is built anew for each, the name and socket stay.
//!
//! What is asked for while there is no machine (before the first, between two) is kept if it is an end, and refused
//! otherwise.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Keeper;
use crate::api::protocol::Refusal;
use crate::api::{Control, PortSocket, Pty, Sample, State, Status, Viewer, Viewers, Watch};
use crate::chardev::terminal;
use crate::config::{CharTarget, Plug, VmConfig};
use crate::error_chain;
use crate::kvm::VcpuState;
use crate::machine::{Attached, Handle, Phase};
use crate::sandbox;
use crate::snapshot::{self, Below, Parts, Saving};

/// A virtual machine that this process runs.
#[derive(Debug)]
pub(super) struct Running {
    started: Instant,
    /// All of the status but what changes.
    status: Status,
    /// The configuration that snapshots record.
    original: VmConfig,
    now: Arc<Mutex<Now>>,
    viewers: Arc<dyn Viewers>,
    /// Times that it was told to end.
    orders: AtomicU32,
    /// The exit status of a process that has to be ended.
    killed_status: u8,
    keeper: Option<Arc<dyn Keeper>>,
}

#[derive(Debug, Default)]
struct Now {
    machine: Option<Handle>,
    /// There has been a machine.
    began: bool,
    button: bool,
    kill: bool,
    over: bool,
    exit_status: Option<u8>,
    ptys: Vec<Pty>,
}

/// The hardest end that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Nothing,
    Stop,
    Kill,
}

impl Running {
    /// One that is called `name` and will be built from `config`, whose snapshots record `original`, and that `viewers` can look at. Its
    /// socket device, if it has one, is at `vsock`, unless the configuration says otherwise.
    pub fn new(
        name: &str,
        config: &VmConfig,
        mut original: VmConfig,
        vsock: &Path,
        viewers: Arc<dyn Viewers>,
        killed_status: u8,
        keeper: Option<Arc<dyn Keeper>>,
    ) -> Self {
        let (kernels, ours): (Vec<_>, Vec<_>) = config.vsock.iter().partition(|config| config.vhost);
        let sockets = ours.first().map(|config| config.path.as_deref().unwrap_or(vsock));
        let ports = config.port.iter().filter_map(|port| match &port.to {
            CharTarget::Socket(path) => Some(PortSocket { name: port.name.clone(), path: absolute(path) }),
            _ => None,
        });
        let ports = ports.collect();
        let status = Status {
            name: name.to_owned(),
            pid: process::id(),
            state: State::Starting,
            uptime_seconds: 0.0,
            cpus: config.cpus.0,
            memory_bytes: config.mem.size.bytes(),
            kernel: config.kernel.as_deref().map(absolute),
            vsock: sockets.map(absolute),
            vsock_cid: kernels.first().map(|config| config.cid()),
            ptys: Vec::new(),
            ports,
            networks: Vec::new(),
            sandbox: String::new(),
            cgroup: sandbox::limits::cgroup().map(Path::to_owned),
        };
        // While this process is where its user is.
        original.make_absolute();
        let orders = AtomicU32::new(0);
        let (started, now) = (Instant::now(), Arc::default());
        Self { started, status, original, now, viewers, orders, killed_status, keeper }
    }

    /// It begins now, under another name, with its socket device at `vsock` unless the configuration says otherwise.
    pub fn renamed(&mut self, name: &str, vsock: &Path, config: &VmConfig) {
        self.started = Instant::now();
        name.clone_into(&mut self.status.name);
        if config.vsock.as_ref().is_some_and(|vsock| !vsock.vhost && vsock.path.is_none()) {
            self.status.vsock = Some(absolute(vsock));
        }
    }

    /// Under which it is registered.
    pub fn name(&self) -> &str {
        &self.status.name
    }

    /// The machine is built: what was asked for meanwhile reaches it now.
    pub fn built(&self, machine: Handle, ptys: Vec<Pty>) {
        let mut now = self.now();
        if now.kill {
            machine.kill();
        } else if now.button {
            machine.power_button();
        }
        now.ptys = ptys;
        now.began = true;
        now.machine = Some(machine);
    }

    /// The machine has ended. Says what was asked for meanwhile.
    pub fn ended(&self) -> Asked {
        let mut now = self.now();
        now.machine = None;
        match () {
            () if now.kill => Asked::Kill,
            () if now.button => Asked::Stop,
            () => Asked::Nothing,
        }
    }

    /// No machine comes after the last; what is left to do may take a moment, and ends with the next order to end.
    pub fn over(&self) {
        self.now().over = true;
    }

    /// The process will end with `status`, whatever is left to do until then.
    pub fn will_exit(&self, status: u8) {
        self.now().exit_status = Some(status);
    }

    /// How often it was told to end, by whatever way. One more ends also what is done after the machine's end.
    pub fn orders(&self) -> u32 {
        self.orders.load(Ordering::Relaxed)
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        lock(&self.now)
    }

    /// The lock is not held by who calls it: the main thread needs it to say that the machine has ended.
    fn machine(&self) -> Result<Handle, String> {
        let now = self.now();
        let why = if now.over { "it has ended" } else { "it is starting" };
        now.machine.clone().ok_or_else(|| why.to_owned())
    }

    fn with_machine<T, E: std::error::Error>(
        &self,
        call: impl Fn(&Handle) -> Result<T, E>,
    ) -> Result<T, String> {
        call(&self.machine()?).map_err(|error| error_chain(&error))
    }
}

fn refusal(error: &dyn std::error::Error, hint: Option<impl Into<String>>) -> Refusal {
    Refusal { reason: error_chain(error), hint: hint.map(Into::into) }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or(path.to_owned())
}

fn lock(now: &Mutex<Now>) -> MutexGuard<'_, Now> {
    // Nothing in here can be left half done.
    now.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A viewer of whatever machine runs at the time.
struct Watching {
    now: Arc<Mutex<Now>>,
    viewer: Box<dyn Viewer>,
}

impl Watch for Watching {
    fn sample(&self) -> Sample {
        let machine = lock(&self.now).machine.clone();
        self.viewer.sample(machine.as_ref())
    }
}

impl Control for Running {
    fn status(&self) -> Status {
        let now = self.now();
        let state = match &now.machine {
            _ if now.kill || now.button || now.over => State::Stopping,
            None => State::Starting,
            Some(machine) => match machine.phase() {
                Phase::Running => State::Running,
                Phase::Paused => State::Paused,
                Phase::Ended => State::Stopping,
            },
        };
        let uptime_seconds = self.started.elapsed().as_millis() as f64 / 1000.0;
        let networks =
            now.machine.iter().flat_map(Handle::networks).map(|network| (&network).into()).collect();
        let (ptys, sandbox) = (now.ptys.clone(), sandbox::layers());
        Status { state, uptime_seconds, ptys, networks, sandbox, ..self.status.clone() }
    }

    fn pause(&self) -> Result<(), String> {
        self.with_machine(|machine| machine.pause().map(drop))
    }

    fn vcpus(&self) -> Result<Vec<VcpuState>, String> {
        self.with_machine(Handle::vcpu_states)
    }

    fn resume(&self) -> Result<(), String> {
        self.with_machine(Handle::resume)
    }

    fn devices(&self) -> Result<Vec<Attached>, String> {
        Ok(self.machine()?.devices())
    }

    fn add_device(&self, device: Plug, files: Vec<OwnedFd>) -> Result<Option<Attached>, Refusal> {
        let machine = self.machine()?;
        let added = match &device {
            Plug::Disk(_) if files.is_empty() => machine.can_add(&device).map(|()| None),
            _ => machine.add_device(device, files).map(Some),
        };
        added.map_err(|error| refusal(&error, error.hint()))
    }

    fn remove_device(&self, name: &str, force: bool) -> Result<Attached, Refusal> {
        self.machine()?.remove_device(name, force).map_err(|error| refusal(&error, error.hint()))
    }

    fn files(&self) -> Vec<PathBuf> {
        snapshot::files(&self.original)
    }

    fn snapshot(&self, parts: &Parts, below: Option<Below>, saving: Saving) -> Result<bool, Refusal> {
        let saved = snapshot::save(&self.machine()?, &self.original, parts, below, saving);
        saved.map_err(|error| refusal(&error, error.hint()))
    }

    fn fork(&self, disks: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Refusal> {
        let parts = snapshot::fork(&self.machine()?, &self.original, disks);
        parts.map(Parts::into_descriptors).map_err(|error| refusal(&error, error.hint()))
    }

    fn power_button(&self) -> Result<bool, String> {
        self.orders.fetch_add(1, Ordering::Relaxed);
        let mut now = self.now();
        if now.over {
            return Err("it has ended".to_owned());
        }
        now.button = true;
        now.machine.iter().for_each(Handle::power_button);
        Ok(now.began)
    }

    fn kill(&self) {
        self.orders.fetch_add(1, Ordering::Relaxed);
        let mut now = self.now();
        now.kill = true;
        now.machine.iter().for_each(Handle::kill);
    }

    fn exit_status(&self) -> Option<u8> {
        let now = self.now();
        now.exit_status.or(now.kill.then_some(self.killed_status))
    }

    fn keep_end(&self) {
        self.keeper.iter().for_each(|keeper| keeper.ends(self.killed_status));
    }

    fn give_up(&self) {
        terminal::restore();
        signal_hook::low_level::exit(self.killed_status.into());
    }

    fn watch(&self) -> Result<Box<dyn Watch>, String> {
        let machine = self.now().machine.clone();
        let viewer = self.viewers.clone().attach(machine.as_ref())?;
        Ok(Box::new(Watching { now: self.now.clone(), viewer }))
    }
}
