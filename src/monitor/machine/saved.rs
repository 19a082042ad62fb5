//! [`SavedMachine`]: a machine at rest as plain values, all of it but its memory and what its devices have on the host.
//!
//! [`Handle::save`] takes it from a paused machine, and [`Machine::restore`] gives it to one that was built of the same
//! configuration and has not run.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::mpsc::channel;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::handle::{AlreadyEnded, Paused};
use super::{Error, Handle, Machine, platform};
use crate::boot::tables::{self, generation};
use crate::bus::lock;
use crate::kvm::{self, SavedClocks, SavedVcpu, SavedVm, Signature};
use crate::recorder::{Step, Steps};
use crate::state::{self, StateError};
use crate::vcpu::gate::VcpuRequest;
use crate::vm::Vm;

/// See the module's text.
#[derive(Clone)]
pub struct SavedMachine {
    /// Of the host that it was saved on.
    host: Signature,
    vm: SavedVm,
    vcpus: Vec<SavedVcpu>,
    /// By name, in the machine's order.
    devices: Vec<(String, Vec<u8>)>,
    rom: Option<Vec<u8>>,
}

/// The same as it is written down. Each part has its version in front (`state::encode`).
#[derive(Serialize, Deserialize)]
struct Encoded {
    host: Vec<u8>,
    vm: Vec<u8>,
    vcpus: Vec<Vec<u8>>,
    devices: Vec<(String, Vec<u8>)>,
    rom: Option<Vec<u8>>,
}

/// Of what is no device's: [`Signature`], [`SavedVm`] and [`SavedVcpu`].
const HOST: u8 = 1;
const VM: u8 = 1;
const VCPU: u8 = 1;
/// Bytes of what firmware reads beside its ROM that can be saved: kernel and initrd, above all.
const MAX_READ: u64 = 32 << 20;

/// What is no saved machine.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Nothing of it can be read.
    #[error("not a machine")]
    Whole(#[source] postcard::Error),
    /// One of its parts cannot.
    #[error("{part}")]
    Part {
        /// Which.
        part: String,
        /// Why.
        #[source]
        source: StateError,
    },
}

impl SavedMachine {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let Self { host, vm, vcpus, devices, rom } = self;
        let encoded = Encoded {
            host: state::encode(HOST, host),
            vm: state::encode(VM, vm),
            vcpus: vcpus.iter().map(|vcpu| state::encode(VCPU, vcpu)).collect(),
            devices: devices.clone(),
            rom: rom.clone(),
        };
        // Plain values, in memory.
        postcard::to_stdvec(&encoded).unwrap_or_default()
    }

    /// What [`SavedMachine::encode`] gave, now or in an earlier version. What devices have, they read themselves.
    ///
    /// # Errors
    /// [`DecodeError`]
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Encoded { host, vm, vcpus, devices, rom } =
            postcard::from_bytes(bytes).map_err(DecodeError::Whole)?;
        let vcpus = vcpus.iter().enumerate();
        let vcpus = vcpus.map(|(number, bytes)| part(&format!("vcpu{number}"), bytes, VCPU));
        Ok(Self {
            host: part("the host", &host, HOST)?,
            vm: part("the VM", &vm, VM)?,
            vcpus: vcpus.collect::<Result<_, _>>()?,
            devices,
            rom,
        })
    }

    /// What is in its ROM, if it has one.
    pub(super) fn rom(&self) -> Option<&[u8]> {
        self.rom.as_deref()
    }
}

/// One that has had no other version yet.
fn part<T: DeserializeOwned>(part: &str, bytes: &[u8], version: u8) -> Result<T, DecodeError> {
    let older = |found, _: &[u8]| Err(StateError::Version { found, oldest: version, newest: version });
    let decoded = state::decode(bytes, version..=version, older);
    decoded.map_err(|source| DecodeError::Part { part: part.to_owned(), source })
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
            Self::Device { source: StateError::Version { .. }, .. } => {
                Some("restore it with the vmm that saved it")
            }
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
        let list = vm.kvm().state_list()?;
        let failed = |source| Error::Host { what: "what firmware reads".to_owned(), source };
        lock(&self.0.fw_cfg).take_in(MAX_READ).map_err(failed)?;
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
        let rom = self.0.memory.rom();
        Ok(SavedMachine { host: Signature::of_host(), vm: vm.save()?, vcpus, devices, rom })
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
            let lacking = vcpu.lacks(&self.vm.kvm().processor()?, state)?;
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
        let at = platform(self.vcpus.len() as u32, &lock(&self.shared.inventory)).generation;
        generation::renew(&self.shared.memory.all(), at).map_err(RestoreError::Generation)?;
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
