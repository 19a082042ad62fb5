//! [`Machine`]: a built virtual machine, its run, and the [`Handle`] by which others pause, resume and stop it.
//!
//! [`inventory`] says what a configuration amounts to, [`load`] builds that and fills it from its [`Origin`]. Knows no command line, control socket or snapshot format.

mod build;
mod debug;
mod handle;
mod inventory;
mod origin;
pub mod outputs;
mod panic;
mod plug;
mod saved;
mod shell;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, TryLockError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::bus::{Busy, Device, Overlap, SharedDevice, Slot, lock};
use crate::config;
use crate::legacy::acpi_pm::AcpiPm;
use crate::legacy::boot_marks::Ready;
use crate::legacy::fw_cfg::FwCfg;
use crate::memory::Memory;
use crate::net::traffic::Network;
use crate::vcpu::dispatch::End;
use crate::vcpu::{self, Ended};
use crate::{boot, chardev, kvm, memory, virtio};

pub use crate::chardev::Ends;
use crate::chardev::LastWords;
pub use build::load;
pub use debug::Debug;
pub use handle::{AlreadyEnded, Handle, LookError, NotAtRest, PauseError, Paused};
pub use inventory::{inventory, platform, spare_functions};
pub use origin::Origin;
pub use plug::{Attached, Attachment, PlugError};
use plug::{PciBus, Plugboard};
pub use saved::{DecodeError, RestoreError, SavedMachine};
pub use shell::{Shell, kvm_path};

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
    Transport(#[from] virtio::transport::Error),
    /// It has ended.
    #[error(transparent)]
    Ended(#[from] AlreadyEnded),
    /// It does not take what was saved.
    #[error("it cannot go on as it was saved")]
    Restore(#[from] RestoreError),
    /// Two devices want the same address: a mistake in the layout.
    #[error(transparent)]
    Layout(#[from] Overlap),
    /// More devices than there is room for.
    #[error("too many virtio devices: {wanted}, with room for {possible}")]
    TooManyDevices {
        /// How many the configuration asks for.
        wanted: usize,
        /// How many there may be.
        possible: usize,
    },
    /// More vCPUs than this host's KVM allows.
    #[error("`cpus={wanted}`: this host's KVM allows {possible}")]
    TooManyCpus {
        /// How many the configuration asks for.
        wanted: u32,
        /// How many there may be.
        possible: usize,
    },
    /// The host is out of something that a device or thread needs.
    #[error("cannot set up {what}")]
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
            Self::Config(e) => Some(e.hint.as_str().into()),
            Self::Kvm(e) => e.hint().map(Cow::from),
            Self::Boot(e) => Some(e.hint()),
            Self::Device(e) => e.hint().map(Cow::from),
            Self::TooManyDevices { possible, .. } => {
                Some(format!("drop some disks: there is room for {possible} devices").into())
            }
            Self::Memory(e) => e.hint().map(Cow::from),
            Self::TooManyCpus { possible, .. } => Some(format!("use at most `cpus={possible}`").into()),
            // Of all devices this is the one whose place the user chooses.
            Self::Layout(_) => Some("move the debug-exit port: `debug_exit=0xf4` is free".into()),
            Self::Host { .. } => None,
            Self::Restore(e) => e.hint().map(Cow::from),
            Self::Transport(_) | Self::Ended(_) => None,
            Self::Chardev(e) => e.hint(),
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        match self {
            Self::Config(_) | Self::Boot(_) | Self::Restore(_) => true,
            Self::TooManyDevices { .. } | Self::TooManyCpus { .. } | Self::Layout(_) => true,
            Self::Device(e) => e.is_bad_argument(),
            Self::Memory(
                memory::Error::OtherSize { .. } | memory::Error::Packed | memory::Error::HugePages { .. },
            ) => true,
            Self::Chardev(e) => e.is_bad_argument(),
            Self::Kvm(_) | Self::Memory(_) | Self::Transport(_) => false,
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
    /// The guest's kernel panicked; a report for a person.
    Panic(String),
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
    memory: Memory,
    threads: Mutex<Vec<vcpu::Thread>>,
    /// What the machine has, and where.
    inventory: Mutex<Vec<Slot>>,
    /// Every device, by name, in the order in which they are paused and saved. It changes only while the phase is locked.
    devices: Mutex<Vec<(String, SharedDevice)>>,
    networks: Mutex<Vec<Network>>,
    /// Where devices come and go, if the machine has a PCI bus.
    pci: Option<PciBus>,
    plugboard: Plugboard,
    power: Arc<Mutex<AcpiPm>>,
    /// Empty without firmware.
    fw_cfg: Arc<Mutex<FwCfg>>,
    ready: Arc<Ready>,
    phase: Mutex<Phase>,
    events: Sender<Event>,
    /// Nobody waits for a device any more.
    killed: AtomicBool,
    /// Weak: the guest goes with the machine, whoever still has a handle.
    vm: Weak<kvm::Vm>,
}

/// A message to the thread of [`Machine::run`].
enum Event {
    /// A device asks for its thread.
    Serve,
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

    /// Starts the devices that are not served yet, unless the machine was paused meanwhile: then they start
    /// when it resumes. False if that cannot be said, because a pause or resume is under way.
    fn start_devices(&self) -> bool {
        let phase = match self.phase.try_lock() {
            Ok(phase) => phase,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        if *phase == Phase::Running {
            self.resume_devices();
        }
        true
    }

    fn resume_devices(&self) {
        lock(&self.devices).iter().for_each(|(_, device)| lock(device).resume());
    }

    /// Brings all devices to rest; gives up after `limit`, or when the machine is killed.
    fn pause_devices(&self, limit: Duration) -> Result<(), NotAtRest> {
        self.each_device(limit, |device, deadline| device.pause(deadline))
    }

    /// Has each device do `what`, one after the other; gives up as [`Shared::pause_devices`].
    fn each_device(
        &self,
        limit: Duration,
        what: fn(&mut dyn Device, Instant) -> Result<(), Busy>,
    ) -> Result<(), NotAtRest> {
        let deadline = Instant::now() + limit;
        let devices = lock(&self.devices);
        let results = devices.iter().map(|(name, device)| self.one_device(name, device, deadline, what));
        results.fold(Ok(()), Result::and)
    }

    fn one_device(
        &self,
        name: &str,
        device: &SharedDevice,
        deadline: Instant,
        what: fn(&mut dyn Device, Instant) -> Result<(), Busy>,
    ) -> Result<(), NotAtRest> {
        /// Between two looks whether the machine was killed.
        const SLICE: Duration = Duration::from_millis(50);
        log::debug!("{name} comes to rest");
        while let Err(busy) = what(&mut *lock(device), deadline.min(Instant::now() + SLICE)) {
            if Instant::now() >= deadline || self.killed.load(Ordering::SeqCst) {
                return Err(NotAtRest { device: name.to_owned(), busy });
            }
        }
        Ok(())
    }
}

/// A built machine that has not run yet.
pub struct Machine {
    shared: Arc<Shared>,
    vcpus: Vec<kvm::Vcpu>,
    /// Threads for the first of them.
    seats: VecDeque<vcpu::Seat>,
    /// What the clocks go on from when it starts, if it was restored.
    clocks: Option<kvm::SavedClocks>,
    /// Whether [`Machine::start`] went well, once it was called.
    started: Option<Result<(), Error>>,
    events: Receiver<Event>,
    last_words: LastWords,
    /// See [`Machine::later`].
    later: Option<(Duration, Box<dyn FnOnce() + Send>)>,
    /// Dropped last: closing the VM's descriptor is what frees the guest.
    vm: Arc<kvm::Vm>,
}

/// So many bytes are mapped before the guest asks for them: 64 MiB, which takes some milliseconds and 256 KiB of page tables.
const MAPPED_AHEAD: u64 = 64 << 20;
/// A run that is shorter needs no thread but its vCPUs'.
const SHORT: Duration = Duration::from_millis(5);
/// What devices owe the host after the run's end is waited for this long.
const LAST_LIMIT: Duration = Duration::from_secs(10);
/// Readers on the host, who may stand still, have so long after the run's end for what the guest sent them.
const READERS_LIMIT: Duration = Duration::from_secs(2);

impl Machine {
    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// The KVM device that it was made with.
    pub fn kvm(&self) -> kvm::Kvm {
        self.vm.kvm().clone()
    }

    /// KVM's counters of each vCPU, by its thread's name; where this KVM has them.
    pub fn counters(&self) -> Vec<(String, kvm::Counters)> {
        let named = |vcpu: &kvm::Vcpu| Some((format!("vcpu{}", vcpu.id()), vcpu.counters().ok()?));
        self.vcpus.iter().filter_map(named).collect()
    }

    /// Has a thread ready for each vCPU, so that [`Machine::start`] makes none, and KVM do what it leaves for the first KVM_RUN: for a
    /// machine that stands ready.
    ///
    /// # Errors
    /// The host is out of threads.
    pub fn take_seats(&mut self) -> Result<(), Error> {
        for vcpu in self.vcpus.iter().skip(self.seats.len()) {
            let id = vcpu.id();
            let (mut seat, _) = vcpu::Seat::new(id, || ()).map_err(|source| thread_of(id, source))?;
            seat.enter();
            self.seats.push_back(seat);
        }
        // What is left is once for the VM. On its own thread: to KVM another would be the vCPU's from then on.
        if let (Some(seat), false) = (self.seats.front(), self.vcpus.is_empty()) {
            let mut first = self.vcpus.remove(0);
            let id = first.id();
            let warmed = seat.meanwhile(move || {
                first.warm_up();
                first
            });
            // Nothing comes only after a panic over there.
            let lost = |_| thread_of(id, io::ErrorKind::Interrupted.into());
            self.vcpus.insert(0, warmed.recv().map_err(lost)?);
        }
        Ok(())
    }

    /// Has KVM map memory that the guest has, as far as `MAPPED_AHEAD`, so that it need not stop at each page: for a machine that
    /// stands ready. Nothing else differs where this KVM cannot.
    pub fn map_ahead(&self) {
        let (memory, Some(vcpu)) = (&self.shared.memory, self.vcpus.first()) else { return };
        let mut left = MAPPED_AHEAD;
        for region in memory.ram().iter() {
            for run in memory.touched(region).unwrap_or_default() {
                let len = left.min(run.end - run.start);
                left -= len;
                let start = region.start_addr().0 + run.start;
                if let Err(error) = vcpu.map_ahead(start..start + len) {
                    log::debug!("no memory is mapped ahead: {error}");
                    return;
                }
            }
        }
    }

    /// Has the vCPUs run, each on a thread of its own, and the devices served. What failed is told by [`Machine::run`], too, which
    /// has to follow.
    pub fn start(&mut self) -> &Result<(), Error> {
        let started = self.start_all();
        self.started.insert(started)
    }

    fn start_all(&mut self) -> Result<(), Error> {
        let clocks = self.start_clocks();
        let mut started = clocks.map_err(Error::Restore);
        for vcpu in self.vcpus.drain(..) {
            let id = vcpu.id();
            let (seat, shared, events) =
                (self.seats.pop_front(), self.shared.vcpus.clone(), self.shared.events.clone());
            let thread = match started {
                Ok(()) => vcpu::Thread::start(vcpu, seat, shared, events),
                Err(_) => {
                    self.shared.vcpus.gate.left(id as usize);
                    continue;
                }
            };
            match thread {
                Ok(thread) => lock(&self.shared.threads).push(thread),
                Err(source) => {
                    self.shared.vcpus.gate.left(id as usize);
                    started = Err(thread_of(id, source));
                }
            }
        }
        if started.is_ok() {
            self.serve_devices();
        }
        started
    }

    /// Runs the guest until it ends, one thread per vCPU. Devices have flushed what they owe the host when it returns.
    /// Calls `meanwhile` once it has run for some milliseconds, or when its end takes long: the place to start what most short
    /// runs need not have. It may be called more than once.
    ///
    /// # Errors
    /// A thread could not be started, or KVM_RUN failed.
    pub fn run(&mut self, meanwhile: &mut dyn FnMut()) -> Result<Outcome, Error> {
        let started = self.started.take().unwrap_or_else(|| self.start_all());
        let event = if started.is_ok() { self.wait(meanwhile) } else { Event::Kill };
        self.shared.vcpus.gate.shut(|| self.shared.kick_all());
        lock(&self.shared.threads).drain(..).for_each(vcpu::Thread::join);
        *lock(&self.shared.phase) = Phase::Ended;
        if let Event::Ended(Ended { end: Err(_) | Ok(End::Stuck(_)), .. }) = &event
            && let Some(lost) = self.handle().memory().lost()
        {
            // Devices would meet it, too.
            return Err(lost.into());
        }
        if !matches!(event, Event::Kill) {
            self.finish_devices(meanwhile);
        }
        let rest = self.shared.pause_devices(SHORT);
        let rest = rest.or_else(|_| {
            // Whoever wants to end what is waited for must be heard.
            meanwhile();
            self.shared.pause_devices(LAST_LIMIT)
        });
        if let Err(busy) = rest {
            log::warn!("{busy}: requests that the guest was not yet told are done may be lost");
        }
        started?;
        outcome(event, &self.last_words)
    }

    /// What the guest sent last goes on to the host: it may have been gone before anybody looked.
    fn finish_devices(&self, meanwhile: &mut dyn FnMut()) {
        let finish = |limit| self.shared.each_device(limit, |device, deadline| device.finish(deadline));
        let rest = finish(SHORT).or_else(|_| {
            // Whoever wants to end what is waited for must be heard.
            meanwhile();
            finish(READERS_LIMIT)
        });
        if let Err(NotAtRest { device, busy }) = rest {
            log::warn!("{device}: {busy}: it is lost");
        }
    }

    fn serve_devices(&self) {
        if !self.shared.start_devices() {
            // Not under a lock that a slow pause holds: an end of the run must be heard meanwhile.
            thread::sleep(Duration::from_millis(1));
            let _ = self.shared.events.send(Event::Serve);
        }
        self.shared.let_go_ejected();
    }

    /// The end of the run; till then this is the thread on which devices get theirs.
    fn wait(&mut self, meanwhile: &mut dyn FnMut()) -> Event {
        let begun = Instant::now();
        let mut later = self.later.take();
        let mut is_long = false;
        loop {
            let after = if is_long { later.as_ref().map(|(after, _)| *after) } else { Some(SHORT) };
            let event = match after {
                None => self.events.recv().map_err(RecvTimeoutError::from),
                Some(after) => self.events.recv_timeout(after.saturating_sub(begun.elapsed())),
            };
            match event {
                Ok(Event::Serve) => self.serve_devices(),
                // The guest is held for somebody to look at it: the machine is paused.
                Ok(Event::Ended(Ended { end: Ok(End::Panic), vcpu, .. }))
                    if self.shared.vcpus.holds_on_panic =>
                {
                    meanwhile();
                    is_long = true;
                    self.hold_after_panic(vcpu);
                }
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) if is_long => {
                    if let Some((_, act)) = later.take() {
                        act();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    is_long = true;
                    meanwhile();
                }
                // `shared` holds a sender, so this does not come.
                Err(RecvTimeoutError::Disconnected) => return Event::Kill,
            }
        }
    }

    /// The guest's kernel panicked on `vcpu`, and is to be looked at.
    fn hold_after_panic(&self, vcpu: u32) {
        let paused = self.handle().pause().map(drop);
        self.shared.vcpus.gate.release(vcpu as usize);
        let report = panic::report(&self.last_words);
        match paused {
            Ok(()) => log::warn!("{report}\nit is paused: vmm resume lets it go on, vmm kill ends it"),
            Err(error) => log::warn!("{report}\nit runs on: {error}"),
        }
    }

    /// Has [`Machine::run`] call `act` if the run lasts longer than `after`: on its own thread, which waits
    /// for the end.
    pub fn later(&mut self, after: Duration, act: impl FnOnce() + Send + 'static) {
        self.later = Some((after, Box::new(act)));
    }
}

fn thread_of(vcpu: u32, source: io::Error) -> Error {
    Error::Host { what: format!("the thread of vCPU {vcpu}"), source }
}

fn outcome(event: Event, words: &LastWords) -> Result<Outcome, Error> {
    let Event::Ended(Ended { end, report, .. }) = event else { return Ok(Outcome::Killed) };
    let report = report.unwrap_or_default();
    Ok(match end? {
        End::Shutdown => Outcome::Shutdown,
        End::Reset if panic::is_told(words) => Outcome::Panic(panic::report(words)),
        End::Reset => Outcome::Reset,
        End::Panic => Outcome::Panic(panic::report(words)),
        End::Exit(status) => Outcome::Exit(status),
        End::NothingToBoot => Outcome::NothingToBoot,
        End::TripleFault => Outcome::Crash(report),
        End::Stuck(_) => Outcome::InternalError(report),
    })
}
