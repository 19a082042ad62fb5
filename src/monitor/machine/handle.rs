//! [`Handle`]: a machine as other threads have it, during its run and after.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use super::{Error, Event, Phase, Shared};
use crate::bus::{Busy, Place, Slot, lock};
use crate::kvm::{self, VcpuState};
use crate::memory::{self, Memory, dirty::DirtyPages};
use crate::net::traffic::Network;
use crate::vcpu;
use crate::vcpu::dispatch::Buses;
use crate::vcpu::gate::{NotClosed, VcpuRequest};

/// A pause that takes longer fails, and the machine goes on. Shorter than a client waits for its answer.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// The means to pause, resume and stop a machine from any thread, also after its run is over.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = lock(&self.0.inventory);
        let names: Vec<_> = devices.iter().map(|slot| &slot.name).collect();
        f.debug_struct("Handle").field("devices", &names).finish_non_exhaustive()
    }
}

/// Proof that a machine is paused: while it lives, no one else can resume it. Dropping it leaves the machine paused.
pub struct Paused<'a> {
    _phase: MutexGuard<'a, Phase>,
}

/// The run is over, so the machine can neither be paused nor resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the virtual machine has ended")]
pub struct AlreadyEnded;

/// A device does not come to rest in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device} does not come to rest: {busy}")]
pub struct NotAtRest {
    /// Its name.
    pub device: String,
    /// What it waits for.
    pub busy: Busy,
}

/// Why a machine could not be paused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PauseError {
    /// The run is over.
    #[error(transparent)]
    Ended(#[from] AlreadyEnded),
    /// This vCPU's thread is held up on the host. The machine runs on.
    #[error("vcpu{0} does not stop: the host holds up its thread")]
    Vcpu(usize),
    /// The machine runs on.
    #[error(transparent)]
    Busy(#[from] NotAtRest),
}

/// Why the vCPUs' states are not known.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// They do not stand still, or are gone.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

impl From<AlreadyEnded> for LookError {
    fn from(ended: AlreadyEnded) -> Self {
        Self::Pause(ended.into())
    }
}

impl Handle {
    /// What the machine is doing. It runs while a pause or resume is under way.
    pub fn phase(&self) -> Phase {
        match self.0.phase.try_lock() {
            Ok(phase) => *phase,
            Err(TryLockError::Poisoned(poisoned)) => *poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => Phase::Running,
        }
    }

    /// Parks the vCPUs, then brings the devices to rest. Returns when all stand still, or after 5 seconds.
    ///
    /// # Errors
    /// [`PauseError`]; the machine is as it was.
    pub fn pause(&self) -> Result<Paused<'_>, PauseError> {
        let shared = &self.0;
        let mut phase = lock(&shared.phase);
        if *phase == Phase::Running {
            match shared.vcpus.gate.close(Instant::now() + PAUSE_LIMIT, || shared.kick_all()) {
                Ok(()) => {}
                Err(NotClosed::Shut) => return Err(AlreadyEnded.into()),
                Err(NotClosed::Running(vcpu)) => return Err(PauseError::Vcpu(vcpu)),
            }
            if let Err(busy) = shared.pause_devices(PAUSE_LIMIT) {
                shared.resume_devices();
                shared.vcpus.gate.open();
                return Err(busy.into());
            }
            *phase = Phase::Paused;
        }
        if *phase == Phase::Ended { Err(AlreadyEnded.into()) } else { Ok(Paused { _phase: phase }) }
    }

    /// What each vCPU does or waits for. They stand still for a moment, unless the machine is paused anyway.
    ///
    /// # Errors
    /// [`LookError`]
    pub fn vcpu_states(&self) -> Result<Vec<VcpuState>, LookError> {
        let shared = &self.0;
        let phase = lock(&shared.phase);
        let gate = &shared.vcpus.gate;
        if *phase == Phase::Running {
            match gate.close(Instant::now() + PAUSE_LIMIT, || shared.kick_all()) {
                Ok(()) => {}
                Err(NotClosed::Shut) => return Err(AlreadyEnded.into()),
                Err(NotClosed::Running(vcpu)) => return Err(PauseError::Vcpu(vcpu).into()),
            }
        }
        let states = (0..lock(&shared.threads).len()).map(|vcpu| {
            let (told, state) = channel();
            // Whoever asked waits below.
            gate.send(vcpu, VcpuRequest(Box::new(move |vcpu| _ = told.send(vcpu.state()))));
            Ok(state.recv().map_err(|_| AlreadyEnded)??)
        });
        let states = states.collect();
        if *phase == Phase::Running {
            gate.open();
        }
        states
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

    /// Guest RAM and what is behind it.
    pub fn memory(&self) -> &Memory {
        &self.0.memory
    }

    /// What the machine has, and where: PCI functions' memory where the guest has it now.
    pub fn inventory(&self) -> Vec<Slot> {
        let mut list = lock(&self.0.inventory).clone();
        for slot in &mut list {
            if let (Place::Pci(number), Some(bus)) = (slot.place, &self.0.pci)
                && let Some(at) = bus.segment.place(number)
            {
                slot.base = at.start;
            }
        }
        list
    }

    /// Its network devices, and what they have carried. No device is waited for.
    pub fn networks(&self) -> Vec<Network> {
        lock(&self.0.networks).clone()
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> usize {
        lock(&self.0.threads).len()
    }

    /// The vCPUs that have been recorded, by number: their threads, and KVM's counters of them.
    pub fn observed(&self) -> MutexGuard<'_, BTreeMap<u32, vcpu::ObservedVcpu>> {
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

    /// Waits until the guest has marked that it is ready (`boot_marks=on`), `limit` at most.
    pub fn await_ready_mark(&self, limit: Duration) -> bool {
        self.0.ready.wait(limit)
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

    pub(super) fn vm(&self) -> Result<Arc<kvm::Vm>, AlreadyEnded> {
        self.0.vm.upgrade().ok_or(AlreadyEnded)
    }

    /// Ends the run at once, paused or not.
    pub fn kill(&self) {
        self.0.killed.store(true, Ordering::SeqCst);
        // The receiver is gone only when the run is over.
        let _ = self.0.events.send(Event::Kill);
    }
}
