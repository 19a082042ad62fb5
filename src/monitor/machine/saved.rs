//! [`SavedMachine`]: a machine at rest as plain values, all of it but its memory and what its devices have on the host.
//!
//! [`Handle::save`] takes it from a paused machine, and [`Machine::restore`] gives it to one that was built of the same
//! configuration and has not run.

use std::sync::mpsc::channel;

use serde::{Deserialize, Serialize};

use super::handle::{AlreadyEnded, Paused};
use super::{Error, Handle, Machine, kvm_path};
use crate::bus::lock;
use crate::kvm::{self, Kvm, SavedVcpu, SavedVm};
use crate::state::StateError;
use crate::vcpu::gate::VcpuRequest;

/// See the module's text.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedMachine {
    vm: SavedVm,
    vcpus: Vec<SavedVcpu>,
    /// By name, in the machine's order.
    devices: Vec<(String, Vec<u8>)>,
}

/// Why a machine does not take what was saved.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// What was saved is another machine's.
    #[error("it was saved with {saved}, and the configuration beside it has {built}")]
    Different {
        /// What it has.
        saved: String,
        /// What it should have.
        built: String,
    },
    /// A device does not take its state.
    #[error("{device}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: StateError,
    },
    /// This host's KVM does not take its part.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
}

impl Handle {
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
        Ok(SavedMachine { vm: vm.save()?, vcpus, devices })
    }
}

impl Machine {
    /// Takes over what was saved. Its clocks go on from here.
    ///
    /// # Errors
    /// [`RestoreError`]; the machine is of no use then.
    pub(super) fn restore(&mut self, saved: &SavedMachine) -> Result<(), RestoreError> {
        let devices = lock(&self.shared.devices);
        let names = |names: Vec<&str>| names.join(", ");
        let built = devices.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        let has = saved.devices.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        if built != has {
            return Err(RestoreError::Different { saved: names(has), built: names(built) });
        }
        if saved.vcpus.len() != self.vcpus.len() {
            let vcpus = |count: usize| format!("{count} vCPUs");
            let (saved, built) = (vcpus(saved.vcpus.len()), vcpus(self.vcpus.len()));
            return Err(RestoreError::Different { saved, built });
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
        let vcpus: Vec<_> = self.vcpus.iter().zip(&saved.vcpus).collect();
        Ok(self.vm.start_clocks(&saved.vm, &vcpus)?)
    }
}
