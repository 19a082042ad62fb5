//! [`Line`]: an interrupt line with a level, which several functions hold up together (PCI 3.0, 2.2.6), for drivers that know no
//! messages.

use std::sync::{Mutex, Weak};

use crate::bus::lock;
use crate::vm::Vm;

/// A line into the I/O APIC: high while any of its functions holds it up.
pub struct Line {
    vm: Weak<dyn Vm>,
    gsi: u32,
    /// A bit for each function that holds it up, by its device number.
    held: Mutex<u32>,
}

impl Line {
    /// Global system interrupt `gsi`, which nobody holds up.
    pub fn new(vm: Weak<dyn Vm>, gsi: u32) -> Self {
        Self { vm, gsi, held: Mutex::new(0) }
    }

    /// Its global system interrupt.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Function `device` holds the line up, or lets go of it, as `high` says: asked under the line's lock, so that of two threads
    /// the later one has the last word. From any thread.
    pub fn set(&self, device: u8, high: impl FnOnce() -> bool) {
        let mut held = lock(&self.held);
        let before = *held;
        let bit = 1u32.checked_shl(device.into()).unwrap_or(0);
        *held = if high() { before | bit } else { before & !bit };
        if (before == 0) != (*held == 0)
            && let Some(vm) = self.vm.upgrade()
            && let Err(error) = vm.set_irq_level(self.gsi, *held != 0)
        {
            log::error!("interrupt line {}: {error}", self.gsi);
        }
    }
}
