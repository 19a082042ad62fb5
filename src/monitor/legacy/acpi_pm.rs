//! The registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7): sleep control and status, reset, and the event register
//! that tells of the power button, of PCI functions that come and go, and of a new generation ID.
//!
//! A guest finds them through the FADT and the DSDT (`boot::tables::acpi`). [`layout::ACPI_PM_SIZE`] ports at
//! [`layout::ACPI_PM`], each one byte wide.
//!
//! [`layout::ACPI_PM`]: crate::memory::layout::ACPI_PM
//! [`layout::ACPI_PM_SIZE`]: crate::memory::layout::ACPI_PM_SIZE

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};
use crate::guest_warn;
use crate::state::{StateError, Stateful};
use crate::vm::Interrupt;

/// Offset of sleep control: SLP_TYPx in bits 2 to 4, SLP_EN in bit 5.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of sleep status: WAK_STS in bit 7, never set here, since there is no sleep to wake from.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// What must be written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// Offset of the event register of the Generic Event Device: a bit per event, cleared by reading.
pub const EVENT: u64 = 4;
/// Event: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// Event: PCI functions have come, or are to go (`pci::hot_plug`).
pub const EVENT_PCI: u8 = 2;
/// Event: the machine is a copy, and has another generation ID (`boot::tables::generation`).
pub const EVENT_GENERATION: u8 = 4;
/// Offset of a register that ACPI knows nothing of: what boots a disk writes [`GAVE_UP`] to it when it finds
/// nothing to boot.
pub const BOOT: u64 = 5;
/// See [`BOOT`].
pub const GAVE_UP: u8 = 1;
/// SLP_TYPx of S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLP_EN: u8 = 1 << 5;

/// The register block.
pub struct AcpiPm {
    events: u8,
    interrupt: Arc<dyn Interrupt>,
}

/// What the guest could tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The event register.
    pub events: u8,
}

impl AcpiPm {
    /// `interrupt` is the Generic Event Device's ([`layout::ACPI_GSI`](crate::memory::layout::ACPI_GSI)).
    pub fn new(interrupt: Arc<dyn Interrupt>) -> Self {
        Self { events: 0, interrupt }
    }

    /// Presses the power button: a guest that listens shuts itself down.
    pub fn press_power_button(&mut self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// PCI functions have come, or are to go: the guest looks which.
    pub fn announce_pci(&mut self) {
        self.raise(EVENT_PCI);
    }

    /// The machine is a copy: its generation ID is another.
    pub fn announce_generation(&mut self) {
        self.raise(EVENT_GENERATION);
    }

    fn raise(&mut self, event: u8) {
        self.events |= event;
        self.interrupt.trigger();
    }
}

impl Device for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            match at {
                SLEEP_CONTROL | SLEEP_STATUS => *byte = 0,
                EVENT => *byte = std::mem::take(&mut self.events),
                _ => {}
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        // A guest may write several registers with one access; the first that has an effect decides.
        for (at, byte) in (offset..).zip(data) {
            match at {
                SLEEP_CONTROL if byte & SLP_EN != 0 && (byte >> 2) & 7 == SLEEP_TYPE_S5 => {
                    return Effect::Shutdown;
                }
                SLEEP_CONTROL if byte & SLP_EN != 0 => {
                    guest_warn!("wants sleep type {}, which its tables do not have", (byte >> 2) & 7);
                }
                RESET if *byte == RESET_VALUE => return Effect::Reset,
                BOOT if *byte == GAVE_UP => return Effect::NothingToBoot,
                _ => {}
            }
        }
        Effect::None
    }
}

impl Stateful for AcpiPm {
    type State = State;

    fn save(&self) -> State {
        State { events: self.events }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if state.events & !(EVENT_POWER_BUTTON | EVENT_PCI | EVENT_GENERATION) != 0 {
            return Err(StateError::Invalid(format!("ACPI events {:#x}", state.events)));
        }
        self.events = state.events;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Saved;
    use crate::vm::fake::FakeInterrupt;

    fn device() -> (AcpiPm, Arc<FakeInterrupt>) {
        let interrupt = Arc::new(FakeInterrupt::default());
        (AcpiPm::new(interrupt.clone()), interrupt)
    }

    fn read(device: &mut AcpiPm, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let (mut device, _) = device();
        assert_eq!(device.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << 2 | SLP_EN]), Effect::Shutdown);
        for value in [SLEEP_TYPE_S5 << 2, SLP_EN, 3 << 2 | SLP_EN] {
            assert_eq!(device.write(SLEEP_CONTROL, &[value]), Effect::None, "{value:#x}");
        }
        assert_eq!(device.write(SLEEP_STATUS, &[0xff]), Effect::None);
    }

    #[test]
    fn the_reset_register_takes_its_value_only() {
        let (mut device, _) = device();
        assert_eq!(device.write(RESET, &[RESET_VALUE]), Effect::Reset);
        assert_eq!(device.write(BOOT, &[0]), Effect::None);
        assert_eq!(device.write(BOOT, &[GAVE_UP]), Effect::NothingToBoot);
        assert_eq!(device.write(RESET, &[0]), Effect::None);
        assert_eq!(device.write(SLEEP_CONTROL, &[0, 0, RESET_VALUE, 0]), Effect::Reset, "one wide access");
    }

    #[test]
    fn what_came_about_interrupts_and_is_read_once_even_after_a_restore() {
        let (mut pressed, interrupt) = device();
        pressed.press_power_button();
        pressed.announce_generation();
        assert_eq!(interrupt.count(), 2);
        let (mut restored, _) = device();
        restored.restore_bytes(&pressed.save_bytes()).unwrap();
        for device in [&mut pressed, &mut restored] {
            assert_eq!(read(device, EVENT), EVENT_POWER_BUTTON | EVENT_GENERATION);
            assert_eq!(read(device, EVENT), 0);
        }
        assert!(restored.restore_bytes(&[1, 8]).is_err());
        assert_eq!(read(&mut restored, 3), 0xff, "a gap between the registers");
    }
}
