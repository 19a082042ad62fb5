//! [`HotPlug`]: the registers by which a guest's ACPI hears that devices come and are to go, and lets them go.
//!
//! A window of [`SIZE`] ports of our own, known to the guest by its DSDT alone (`boot::tables::acpi`), whose methods tell the system of
//! what they read here (ACPI 6.5, 5.6.6), and write here what it has let go (6.3.3, _EJ0). A device goes with the guest's
//! consent in three steps: it is there, it is asked for, it is off the bus; who put it there then takes it apart. A guest cannot
//! take a device away that was not asked for.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Segment;
use crate::bus::{Device, Effect};
use crate::guest_warn;
use crate::state::{StateError, Stateful};

/// Ports: three registers of 4 bytes each, with a bit for each device number.
pub const SIZE: u64 = 12;
/// Register: devices that have come since this was last read.
pub const ARRIVED: u64 = 0;
/// Register: devices that are asked for since this was last read.
pub const WANTED: u64 = 4;
/// Register: the guest has let go of the devices whose bits it writes.
pub const EJECT: u64 = 8;

/// See the module's text.
pub struct HotPlug {
    segment: Arc<Segment>,
    arrived: u32,
    wanted: u32,
    /// Asked for, and not let go.
    asked: u32,
    /// Let go, and not taken apart.
    ejected: u32,
}

fn bit(device: u8) -> u32 {
    1u32.checked_shl(device.into()).unwrap_or(0)
}

impl HotPlug {
    /// For the devices of `segment`.
    pub fn new(segment: Arc<Segment>) -> Self {
        Self { segment, arrived: 0, wanted: 0, asked: 0, ejected: 0 }
    }

    /// A device is there now. The guest hears of it when it is interrupted.
    pub fn announce(&mut self, device: u8) {
        // Whatever was said of the one before it.
        self.forget(bit(device));
        self.arrived |= bit(device);
    }

    /// Asks the guest to let go of a device: again, if it was asked already.
    pub fn ask_for(&mut self, device: u8) {
        self.wanted |= bit(device);
        self.asked |= bit(device);
    }

    /// Takes a device off the bus, whatever the guest does with it, which is not told: drivers of virtio wait for ever for the reset
    /// of a device that is not there.
    pub fn take_away(&mut self, device: u8) {
        self.segment.remove(device);
        self.forget(bit(device));
    }

    fn forget(&mut self, devices: u32) {
        for register in [&mut self.arrived, &mut self.wanted, &mut self.asked] {
            *register &= !devices;
        }
    }

    /// The devices that the guest has let go since this was last asked. They are off the bus.
    pub fn take_ejected(&mut self) -> Vec<u8> {
        let ejected = std::mem::take(&mut self.ejected);
        (0..32).filter(|device| ejected & bit(*device) != 0).collect()
    }

    fn eject(&mut self, devices: u32) -> Effect {
        let unasked = devices & !self.asked;
        if unasked != 0 {
            guest_warn!("PCI devices {unasked:#x} ejected, which nobody asked for: they stay");
        }
        let devices = devices & self.asked;
        for device in (0..32).filter(|device| devices & bit(*device) != 0) {
            self.segment.remove(device);
        }
        self.forget(devices);
        self.ejected |= devices;
        if devices == 0 { Effect::None } else { Effect::Serve }
    }
}

impl Device for HotPlug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let register = match offset {
            ARRIVED => &mut self.arrived,
            WANTED => &mut self.wanted,
            _ => return,
        };
        if let [_, _, _, _] = data {
            data.copy_from_slice(&std::mem::take(register).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (EJECT, &[a, b, c, d]) => self.eject(u32::from_le_bytes([a, b, c, d])),
            _ => Effect::None,
        }
    }
}

/// [`HotPlug`]'s saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    arrived: u32,
    wanted: u32,
    asked: u32,
}

/// What the guest has let go is taken apart before.
impl Stateful for HotPlug {
    type State = State;

    fn save(&self) -> State {
        State { arrived: self.arrived, wanted: self.wanted, asked: self.asked }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if state.wanted & !state.asked != 0 {
            return Err(StateError::Invalid(format!("{state:x?}")));
        }
        (self.arrived, self.wanted, self.asked) = (state.arrived, state.wanted, state.asked);
        Ok(())
    }
}
