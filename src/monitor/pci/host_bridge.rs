//! [`HostBridge`]: function 00:00.0, which is there for guests that look for one, and does nothing.

use std::io;

use super::{ConfigSpace, Function, Identity};
use crate::bus::{Device, Effect};
use crate::state::{StateError, Stateful};

/// As QEMU's generic PCI Express host bridge names itself (its docs/specs/pci-ids.rst): kernels know it as one that needs no driver.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    // Base class 06h is a bridge, subclass 00h one to the host.
    class: 0x06_0000,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The function.
#[derive(Debug)]
pub struct HostBridge(ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        Self(ConfigSpace::new(&IDENTITY))
    }
}

impl Function for HostBridge {
    fn read_config(&mut self, register: u8, data: &mut [u8]) {
        self.0.read(register, data);
    }

    fn write_config(&mut self, register: u8, data: &[u8]) -> Effect {
        self.0.write(register, data);
        Effect::None
    }

    fn wants(&self) -> Option<(u64, u64)> {
        None
    }

    fn move_to(&mut self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn leave(&mut self) {}

    fn remove(&mut self) {}
}

/// It has no memory.
impl Device for HostBridge {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, _: &[u8]) -> Effect {
        Effect::None
    }
}

impl Stateful for HostBridge {
    type State = super::config_space::State;

    fn save(&self) -> Self::State {
        self.0.save()
    }

    fn restore(&mut self, state: Self::State) -> Result<(), StateError> {
        self.0.restore(state)
    }
}
