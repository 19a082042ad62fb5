//! [`SavedMachine`]: a machine at rest as plain values, all of it but its memory and what its devices have on the host.
//!
//! [`Handle::save`] takes it from a paused machine, and [`Machine::restore`] gives it to one that was built of the same
//! configuration and has not run.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::mpsc::channel;

use serde::{Deserialize, Serialize};

use super::handle::{AlreadyEnded, Paused};
use super::{Error, Handle, Machine, kvm_path};
use crate::boot::tables::{self, generation};
use crate::bus::lock;
use crate::kvm::{self, Kvm, SavedClocks, SavedVcpu, SavedVm, Signature};
use crate::recorder::{Step, Steps};
use crate::state::StateError;
use crate::vcpu::gate::VcpuRequest;
use crate::vm::Vm;

/// See the module's text.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedMachine {
    /// Of the host that it was saved on.
    host: Signature,
    vm: SavedVm,
    vcpus: Vec<SavedVcpu>,
    /// By name, in the machine's order.
    devices: Vec<(String, Vec<u8>)>,
}

/// Why a machine does not take what was saved.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// What was saved is another machine's.
    #[error("it was saved with {saved}, and the configuration has {built}")]
    Different {
        /// What it has.
        saved: String,
        /// What it should have.
        built: String,
    },
    /// The guest has seen features that it would not find here.
    #[error("this host's processor, or its KVM, lacks {0}, which the saved machine's has")]
    Processor(String),
    /// A device does not take its state.
    #[error("{device}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: StateError,
    },
    /// The host is out of something that interrupts need.
    #[error("cannot raise its interrupts once more")]
    Interrupts(#[source] io::Error),
    /// It would take itself for the one that was saved.
    #[error("cannot give it a generation ID of its own")]
    Generation(#[source] tables::Error),
    /// This host's KVM does not take its part.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

impl RestoreError {
    /// What to try.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Different { .. } | Self::Device { .. } => {
                Some("restore it with the devices that it was saved with: only their host ends may change")
            }
            Self::Processor(_) => Some(
                "restore it where it was saved; a baseline, `cpu=x86-64-v2`, makes machines that run on more hosts",
            ),
            Self::Kvm(_) => Some("restore it on a host with the same processor and at least as new a kernel"),
            Self::Interrupts(_) | Self::Generation(_) => None,
        }
    }
}

impl Handle {
    /// Copies what the configuration's disk `index` has to `to`, an empty file: that of an overlay, if the disk has one.
    ///
    /// # Errors
    /// It cannot be copied.
    pub fn save_disk(&self, _: &Paused<'_>, index: usize, to: &File) -> io::Result<()> {
        self.0.plugboard.save_disk(index, to)
    }

    /// The machine's state. To save twice gives the same.
    ///
    /// # Errors
    /// The ioctl that failed; a vCPU is gone.
    pub fn save(&self, _: &Paused<'_>) -> Result<SavedMachine, Error> {
        let vm = self.vm()?;
        let list = Kvm::open(&kvm_path())?.state_list()?;
        // Devices first: their last interrupts are in the vCPUs' state then.
        let devices = lock(&self.0.devices);
        let devices =
            devices.iter().map(|(name, device)| (name.clone(), lock(device).save_bytes())).collect();
        let vcpus = (0..self.vcpus()).map(|vcpu| {
            let (told, state) = channel();
            let (vm, list) = (vm.clone(), list.clone());
            // Whoever asked waits below.
            let save = move |vcpu: &mut kvm::Vcpu| _ = told.send(vcpu.save(&vm, &list));
            self.0.vcpus.gate.send(vcpu, VcpuRequest(Box::new(save)));
            Ok(state.recv().map_err(|_| AlreadyEnded)??)
        });
        let vcpus = vcpus.collect::<Result<_, Error>>()?;
        Ok(SavedMachine { host: Signature::of_host(), vm: vm.save()?, vcpus, devices })
    }
}

impl Machine {
    /// Takes over what was saved. Its clocks go on once it [starts](Machine::start).
    ///
    /// # Errors
    /// [`RestoreError`]; the machine is of no use then.
    pub(super) fn restore(&mut self, saved: &SavedMachine) -> Result<(), RestoreError> {
        let devices = lock(&self.shared.devices);
        if saved.vcpus.len() != self.vcpus.len() {
            let vcpus = |count: usize| format!("{count} vCPUs");
            let (saved, built) = (vcpus(saved.vcpus.len()), vcpus(self.vcpus.len()));
            return Err(RestoreError::Different { saved, built });
        }
        let built: Vec<_> = devices.iter().map(|(name, _)| name.as_str()).collect();
        let had: Vec<_> = saved.devices.iter().map(|(name, _)| name.as_str()).collect();
        if built != had {
            let without = |these: &[&str], those: &[&str]| {
                let names: Vec<_> = these.iter().copied().filter(|name| !those.contains(name)).collect();
                if names.is_empty() { "nothing else".to_owned() } else { names.join(", ") }
            };
            let (saved, built) = (without(&had, &built), without(&built, &had));
            return Err(RestoreError::Different { saved, built });
        }
        if saved.host != Signature::of_host()
            && let (Some(vcpu), Some(state)) = (self.vcpus.first(), saved.vcpus.first())
        {
            let lacking = vcpu.lacks(&Kvm::open(&kvm_path())?.processor()?, state)?;
            if !lacking.is_empty() {
                return Err(RestoreError::Processor(lacking.join(", ")));
            }
        }
        self.vm.restore(&saved.vm)?;
        for (vcpu, state) in self.vcpus.iter().zip(&saved.vcpus) {
            vcpu.restore(&self.vm, state)?;
        }
        // Last: what they raise once more must find the vCPUs' local APICs as they were.
        for ((device, at), (_, state)) in devices.iter().zip(&saved.devices) {
            let restored = lock(at).restore_bytes(state);
            restored.map_err(|source| RestoreError::Device { device: device.clone(), source })?;
        }
        if let Some(pci) = &self.shared.pci {
            pci.segment.follow_all();
        }
        // Before any of its vCPUs can ask for a random number.
        generation::renew(self.shared.memory.ram()).map_err(RestoreError::Generation)?;
        lock(&self.shared.power).announce_generation();
        drop(devices);
        self.clocks = Some(SavedClocks::of(&saved.vm, &saved.vcpus));
        self.repeat_interrupts()
    }

    /// Has the clocks go on of a machine that was restored, and whose vCPUs run next.
    ///
    /// # Errors
    /// KVM refuses.
    pub(super) fn start_clocks(&mut self) -> Result<(), RestoreError> {
        let Some(clocks) = self.clocks.take() else { return Ok(()) };
        let mut steps = Steps::begin(&self.shared.vcpus.recorder, "monitor");
        self.vm.start_clocks(&clocks, &self.vcpus)?;
        steps.done(Step::Clocks);
        Ok(())
    }

    /// Raises every interrupt line once. KVM may have been about to deliver an interrupt when the machine was saved (irqfds that
    /// cannot interrupt at once do so from a work queue), and no state tells of that; drivers take one too many. Message-signalled
    /// interrupts are the functions' own.
    fn repeat_interrupts(&self) -> Result<(), RestoreError> {
        let lines: BTreeSet<_> = lock(&self.shared.inventory).iter().filter_map(|slot| slot.gsi).collect();
        for gsi in lines {
            self.vm.irq_line(gsi).map_err(RestoreError::Interrupts)?.trigger();
        }
        Ok(())
    }
}
