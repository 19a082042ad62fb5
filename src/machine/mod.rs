//! [`Machine`]: a built virtual machine, its run, and the [`Handle`] by which others pause, resume and stop it.
//!
//! [`build`] assembles it from a configuration. Knows no command line, control socket or snapshot format.

mod build;
mod debug;
pub mod outputs;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use crate::bus::{Overlap, SharedDevice, lock};
use crate::config;
use crate::legacy::acpi_pm::AcpiPm;
use crate::memory::dirty::DirtyPages;
use crate::vcpu::dispatch::{Buses, End};
use crate::vcpu::{self, Ended};
use crate::{boot, chardev, kvm, memory, virtio};

pub use crate::chardev::Ends;
pub use build::{build, platform};
pub use debug::Debug;

/// Why a machine could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration cannot be.
    #[error(transparent)]
    Config(#[from] config::Invalid),
    /// KVM said no.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// No guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// A host end of a console could not be opened.
    #[error(transparent)]
    Chardev(#[from] chardev::Error),
    /// What a device needs could not be opened.
    #[error(transparent)]
    Device(#[from] virtio::Error),
    /// A device could not be wired up.
    #[error(transparent)]
    Transport(#[from] virtio::mmio::Error),
    /// It has ended.
    #[error(transparent)]
    Ended(#[from] AlreadyEnded),
    /// Two devices want the same address: a mistake in the layout.
    #[error(transparent)]
    Layout(#[from] Overlap),
    /// More devices than there are interrupts for.
    #[error("{wanted} virtio devices, but there are interrupts for {possible}")]
    TooManyDevices {
        /// How many the configuration asks for.
        wanted: usize,
        /// How many there may be.
        possible: usize,
    },
    /// More vCPUs than this host's KVM allows.
    #[error("--cpus {wanted}: this host's KVM allows {possible}")]
    TooManyCpus {
        /// How many the configuration asks for.
        wanted: u32,
        /// How many there may be.
        possible: usize,
    },
    /// The host is out of something that a device or thread needs.
    #[error("set up {what}")]
    Host {
        /// For what.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Config(e) => Some(e.hint.into()),
            Self::Kvm(e) => e.hint().map(Cow::from),
            Self::Boot(e) => Some(e.hint()),
            Self::Device(e) => e.hint().map(Cow::from),
            Self::TooManyDevices { .. } => Some("leave out disks".into()),
            Self::Memory(_) => Some("ask for less with --mem, or free memory on the host".into()),
            Self::TooManyCpus { .. } | Self::Layout(_) | Self::Host { .. } => None,
            Self::Transport(_) | Self::Ended(_) => None,
            Self::Chardev(e) => e.hint().map(Cow::from),
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        match self {
            Self::Config(_) | Self::Boot(_) => true,
            Self::TooManyDevices { .. } | Self::TooManyCpus { .. } => true,
            Self::Device(_) | Self::Chardev(_) => true,
            Self::Kvm(_) | Self::Memory(_) | Self::Transport(_) | Self::Layout(_) => false,
            Self::Host { .. } | Self::Ended(_) => false,
        }
    }
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The guest ended the run with this status.
    Exit(u8),
    /// No disk has anything that can be booted. The guest's console has said what there is.
    NothingToBoot,
    /// The guest crashed; a report for a person.
    Crash(String),
    /// KVM could not go on; a report for a person.
    InternalError(String),
    /// [`Handle::kill`].
    Killed,
}

/// Whether the vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// They run.
    Running,
    /// They are parked and the devices are at rest.
    Paused,
    /// The run is over.
    Ended,
}

/// What outlives the call that started it: shared by the machine and its handles.
struct Shared {
    vcpus: Arc<vcpu::Shared>,
    threads: Mutex<Vec<vcpu::Thread>>,
    /// Every device, by name, in the order in which they are paused and saved.
    devices: Vec<(String, SharedDevice)>,
    power: Arc<Mutex<AcpiPm>>,
    phase: Mutex<Phase>,
    events: Sender<Event>,
    /// Weak: the guest goes with the machine, whoever still has a handle.
    vm: Weak<kvm::Vm>,
}

/// What ends a run.
enum Event {
    /// A vCPU's loop ended.
    Ended(Ended),
    /// [`Handle::kill`].
    Kill,
}

impl From<Ended> for Event {
    fn from(ended: Ended) -> Self {
        Self::Ended(ended)
    }
}

impl Shared {
    fn kick_all(&self) {
        lock(&self.threads).iter().for_each(vcpu::Thread::kick);
    }

    /// Unless the machine was paused meanwhile: then they start when it resumes.
    fn start_devices(&self) {
        let phase = lock(&self.phase);
        if *phase == Phase::Running {
            self.resume_devices();
        }
    }

    fn resume_devices(&self) {
        self.devices.iter().for_each(|(_, device)| lock(device).resume());
    }

    fn pause_devices(&self) {
        for (name, device) in &self.devices {
            log::debug!("pause {name}");
            lock(device).pause();
        }
    }
}

/// A built machine that has not run yet.
pub struct Machine {
    shared: Arc<Shared>,
    vcpus: Vec<kvm::Vcpu>,
    events: Receiver<Event>,
    built: Instant,
    /// See [`Machine::later`].
    later: Option<(Duration, Box<dyn FnOnce() + Send>)>,
    /// Dropped last: closing the VM's descriptor is what frees the guest.
    vm: Arc<kvm::Vm>,
}

/// A VM that was built longer ago than this closes at once (see [`kvm::Vm::close_later`]).
const YOUNG: Duration = Duration::from_millis(50);

impl Machine {
    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// KVM's counters of each vCPU, by its thread's name; where this KVM has them.
    pub fn counters(&self) -> Vec<(String, kvm::Counters)> {
        let named = |vcpu: &kvm::Vcpu| Some((format!("vcpu{}", vcpu.id()), vcpu.counters().ok()?));
        self.vcpus.iter().filter_map(named).collect()
    }

    /// Runs the guest until it ends, one thread per vCPU. Devices have flushed what they owe the host when it returns.
    /// Calls `meanwhile` once the vCPUs run: the place for work that the guest need not wait for.
    ///
    /// # Errors
    /// A thread could not be started, or KVM_RUN failed.
    pub fn run(&mut self, meanwhile: impl FnOnce()) -> Result<Outcome, Error> {
        let mut started = Ok(());
        for vcpu in self.vcpus.drain(..) {
            let id = vcpu.id();
            match vcpu::Thread::start(vcpu, self.shared.vcpus.clone(), self.shared.events.clone()) {
                Ok(thread) => lock(&self.shared.threads).push(thread),
                Err(source) => {
                    self.shared.vcpus.gate.left(id as usize);
                    started = Err(Error::Host { what: format!("the thread of vCPU {id}"), source });
                }
            }
        }
        if started.is_ok() {
            // The guest is on its way meanwhile. Input comes last: a device is locked while its thread is made, and the
            // guest's first output would wait for that.
            meanwhile();
            self.shared.start_devices();
        }
        let event = if started.is_ok() { self.wait() } else { Event::Kill };
        self.shared.vcpus.gate.shut(|| self.shared.kick_all());
        lock(&self.shared.threads).drain(..).for_each(vcpu::Thread::join);
        *lock(&self.shared.phase) = Phase::Ended;
        self.shared.pause_devices();
        started?;
        outcome(event)
    }

    /// Has [`Machine::run`] call `act` if the run lasts longer than `after`: on its own thread, which waits
    /// for the end.
    pub fn later(&mut self, after: Duration, act: impl FnOnce() + Send + 'static) {
        self.later = Some((after, Box::new(act)));
    }

    /// `shared` holds a sender, so there is an event in the end.
    fn wait(&mut self) -> Event {
        if let Some((after, act)) = self.later.take() {
            match self.events.recv_timeout(after) {
                Err(RecvTimeoutError::Timeout) => act(),
                event => return event.unwrap_or(Event::Kill),
            }
        }
        self.events.recv().unwrap_or(Event::Kill)
    }

    /// Gives everything back after the run, without waiting for KVM to take the VM apart: for a process that is about to end.
    pub fn leave(self) {
        if self.built.elapsed() < YOUNG
            && let Err(error) = self.vm.close_later()
        {
            log::debug!("the VM is closed here: {error}");
        }
    }
}

fn outcome(event: Event) -> Result<Outcome, Error> {
    let Event::Ended(Ended { end, report }) = event else { return Ok(Outcome::Killed) };
    let report = report.unwrap_or_default();
    Ok(match end? {
        End::Shutdown => Outcome::Shutdown,
        End::Reset => Outcome::Reset,
        End::Exit(status) => Outcome::Exit(status),
        End::NothingToBoot => Outcome::NothingToBoot,
        End::TripleFault | End::GuestCrash => Outcome::Crash(report),
        End::Stuck(_) => Outcome::InternalError(report),
    })
}

/// The means to pause, resume and stop a machine from any thread, also after its run is over.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices: Vec<_> = self.0.devices.iter().map(|(name, _)| name).collect();
        f.debug_struct("Handle").field("devices", &devices).finish_non_exhaustive()
    }
}

/// Proof that a machine is paused: while it lives nobody can resume it. Dropping it leaves the machine paused.
pub struct Paused<'a>(#[allow(dead_code, reason = "the guard is the proof")] MutexGuard<'a, Phase>);

/// The run is over, so the machine can neither be paused nor resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the virtual machine has ended")]
pub struct AlreadyEnded;

impl Handle {
    /// What the machine is doing. Waits for a pause or resume under way.
    pub fn phase(&self) -> Phase {
        *lock(&self.0.phase)
    }

    /// Parks the vCPUs, then brings the devices to rest. Returns when all stand still.
    ///
    /// # Errors
    /// [`AlreadyEnded`]
    pub fn pause(&self) -> Result<Paused<'_>, AlreadyEnded> {
        let shared = &self.0;
        let mut phase = lock(&shared.phase);
        if *phase == Phase::Running {
            if !shared.vcpus.gate.close(|| shared.kick_all()) {
                return Err(AlreadyEnded);
            }
            shared.pause_devices();
            *phase = Phase::Paused;
        }
        if *phase == Phase::Ended { Err(AlreadyEnded) } else { Ok(Paused(phase)) }
    }

    /// Undoes [`Handle::pause`]. The guest's clocks go on as if it had been asleep.
    ///
    /// # Errors
    /// [`AlreadyEnded`]
    pub fn resume(&self) -> Result<(), AlreadyEnded> {
        let mut phase = lock(&self.0.phase);
        match *phase {
            Phase::Ended => return Err(AlreadyEnded),
            Phase::Running => {}
            Phase::Paused => {
                self.0.resume_devices();
                self.0.vcpus.gate.open();
                *phase = Phase::Running;
            }
        }
        Ok(())
    }

    /// Where exits go: ports, and memory without RAM.
    pub fn buses(&self) -> &Buses {
        &self.0.vcpus.buses
    }

    /// Guest RAM, also after the run.
    pub fn ram(&self) -> &Arc<memory::GuestRam> {
        &self.0.vcpus.ram
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> usize {
        lock(&self.0.threads).len()
    }

    /// The vCPUs that have been recorded, by number: their threads, and KVM's counters of them.
    pub fn observed(&self) -> MutexGuard<'_, BTreeMap<u32, vcpu::Seen>> {
        self.0.vcpus.observed.get()
    }

    /// Brings the vCPUs out of the guest once; they go on at once. Those at rest do so when they run again.
    pub fn kick(&self) {
        self.0.kick_all();
    }

    /// Presses the power button: a guest that listens shuts itself down. A paused guest hears it when it resumes.
    pub fn power_button(&self) {
        lock(&self.0.power).press_power_button();
    }

    /// Has KVM note which pages the guest writes to, from now on, or no longer.
    ///
    /// # Errors
    /// KVM refuses; or the machine is gone.
    pub fn log_dirty(&self, on: bool) -> Result<(), Error> {
        Ok(self.vm()?.log_dirty(on)?)
    }

    /// The pages that the guest's processors have written to since the log was begun or last taken: all of them, if the
    /// machine is paused.
    ///
    /// # Errors
    /// There is no log; or the machine is gone.
    pub fn take_dirty(&self) -> Result<DirtyPages, Error> {
        Ok(self.vm()?.take_dirty()?)
    }

    fn vm(&self) -> Result<Arc<kvm::Vm>, AlreadyEnded> {
        self.0.vm.upgrade().ok_or(AlreadyEnded)
    }

    /// Ends the run at once, paused or not.
    pub fn kill(&self) {
        // The receiver is gone only when the run is over.
        let _ = self.0.events.send(Event::Kill);
    }
}

/// The path of the KVM device: `/dev/kvm`, or what the environment variable `VMM_KVM` says.
pub fn kvm_path() -> PathBuf {
    std::env::var_os("VMM_KVM").map_or_else(|| "/dev/kvm".into(), PathBuf::from)
}
