//! The I/O APIC (82093AA data sheet, order number 290566), of 24 pins or fewer, each of which interrupts as its redirection entry
//! says. Kernels program every pin that it says it has, which are exits.
//!
//! For guests that need no 8259s: then KVM has the local APICs alone. An entry that interrupts by edges is a route from the pin to a
//! message, along which an eventfd interrupts without this code. Levels come here ([`Pins`]), and go out as a message each time the
//! pin is found high and the last one is ended.

use std::sync::Weak;

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};
use crate::guest_warn;
use crate::memory::layout;
use crate::state::{StateError, Stateful};
use crate::vm::{Msi, Pins, Vm};

/// Most pins.
const PINS: usize = layout::IO_APIC_PINS as usize;

// Registers of the memory (3.1), and of the window (3.2).
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const IOAPICID: u8 = 0x00;
const IOAPICVER: u8 = 0x01;
const IOAPICARB: u8 = 0x02;
/// The first of two for each pin.
const IOREDTBL: u8 = 0x10;

/// IOAPICVER: the version that KVM's own has, too, and where the last entry's number is.
const VERSION: u32 = 0x11;
const LAST_SHIFT: u32 = 16;
const ID_SHIFT: u32 = 24;
const ID_BITS: u32 = 0xf << ID_SHIFT;

// A redirection entry (3.2.4).
const VECTOR: u64 = 0xff;
const DELIVERY_MODE_SHIFT: u32 = 8;
const DELIVERY_MODE: u64 = 7 << DELIVERY_MODE_SHIFT;
const LOGICAL: u64 = 1 << 11;
const ACTIVE_LOW: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// What a guest can write. The delivery status (bit 12) is always idle: a message is delivered at once.
const WRITABLE: u64 =
    VECTOR | DELIVERY_MODE | LOGICAL | ACTIVE_LOW | LEVEL | MASKED | 0xff << DESTINATION_SHIFT;

// A message (SDM vol. 3, 12.11).
const MESSAGE_ADDRESS: u64 = 0xfee0_0000;
const MESSAGE_DESTINATION_SHIFT: u32 = 12;
const MESSAGE_LOGICAL: u64 = 1 << 2;
const MESSAGE_LEVEL: u32 = 1 << 15 | 1 << 14;

/// The controller.
pub struct IoApic {
    vm: Weak<dyn Vm>,
    pins: usize,
    registers: Registers,
    /// As they were given to the hypervisor last.
    routes: [Option<Msi>; PINS],
}

/// What the guest could tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// IOREGSEL.
    select: u8,
    /// IOAPICID, all of it.
    id: u32,
    /// Those beyond its pins stay masked.
    entries: [u64; PINS],
    /// A bit for each pin that is high.
    high: u32,
}

impl Default for Registers {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS], high: 0 }
    }
}

/// What an entry sends; `None` if nothing.
fn message(entry: u64) -> Option<Msi> {
    let mode = (entry & DELIVERY_MODE) >> DELIVERY_MODE_SHIFT;
    // Modes 3 and 6 are reserved.
    if matches!(mode, 3 | 6) {
        return None;
    }
    let destination = entry >> DESTINATION_SHIFT << MESSAGE_DESTINATION_SHIFT;
    let logical = if entry & LOGICAL != 0 { MESSAGE_LOGICAL } else { 0 };
    let level = if entry & LEVEL != 0 { MESSAGE_LEVEL } else { 0 };
    let data = (entry & (DELIVERY_MODE | VECTOR)) as u32 | level;
    Some(Msi { address: MESSAGE_ADDRESS | destination | logical, data })
}

/// The route that the hypervisor is to have for an entry's pin. A masked level has one: without it the hypervisor would not tell
/// of the end of an interrupt that a handler had masked before. Nobody signals the pin of a level along it.
fn route(entry: u64) -> Option<Msi> {
    message(entry).filter(|_| entry & MASKED == 0 || entry & LEVEL != 0)
}

impl IoApic {
    /// With so many `pins`, 1 to 24. As after a reset: all are masked, and low.
    pub fn new(vm: Weak<dyn Vm>, pins: u32) -> Self {
        Self {
            vm,
            pins: (pins as usize).clamp(1, PINS),
            registers: Registers::default(),
            routes: [None; PINS],
        }
    }

    fn read_register(&self) -> Option<u32> {
        let registers = &self.registers;
        match registers.select {
            // The arbitration ID is loaded with the ID (3.2.3).
            IOAPICID | IOAPICARB => Some(registers.id),
            IOAPICVER => Some(VERSION | (self.pins as u32 - 1) << LAST_SHIFT),
            select => {
                let half = select.checked_sub(IOREDTBL)?;
                let entry = registers.entries[..self.pins].get(usize::from(half / 2))?;
                Some((entry >> (32 * (half % 2))) as u32)
            }
        }
    }

    fn write_register(&mut self, value: u32) {
        match self.registers.select {
            IOAPICID => self.registers.id = value & ID_BITS,
            select => {
                let Some(half) = select.checked_sub(IOREDTBL) else { return };
                let pin = usize::from(half / 2);
                let Some(entry) = self.registers.entries[..self.pins].get_mut(pin) else { return };
                let (shift, value) = (32 * (half % 2), u64::from(value));
                let written = *entry & !(0xffff_ffff << shift) | value << shift;
                *entry = written & WRITABLE | *entry & REMOTE_IRR;
                // Kernels end an interrupt so that no local APIC ended.
                if *entry & LEVEL == 0 {
                    *entry &= !REMOTE_IRR;
                }
                self.publish();
                self.deliver_level(pin);
            }
        }
    }

    /// Has the hypervisor's routes follow the entries.
    fn publish(&mut self) {
        let routes = self.registers.entries.map(route);
        if routes == self.routes {
            return;
        }
        match self.vm.upgrade().map_or(Ok(()), |vm| vm.route_pins(&routes)) {
            Ok(()) => self.routes = routes,
            Err(error) => guest_warn!("the I/O APIC cannot route its pins: {error}"),
        }
    }

    /// Interrupts for `pin`, if it is high and its entry is for levels, open, and not in service.
    fn deliver_level(&mut self, pin: usize) {
        let registers = &mut self.registers;
        let Some(entry) = registers.entries.get_mut(pin) else { return };
        let high = registers.high & 1 << pin != 0;
        if high && *entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL && send(&self.vm, *entry) {
            *entry |= REMOTE_IRR;
        }
    }
}

/// Sends what `entry` says. True if a processor took it.
fn send(vm: &Weak<dyn Vm>, entry: u64) -> bool {
    let (Some(vm), Some(message)) = (vm.upgrade(), message(entry)) else { return false };
    vm.send(message).unwrap_or_else(|error| {
        guest_warn!("the I/O APIC cannot send {message:x?}: {error}");
        false
    })
}

impl Pins for IoApic {
    fn set_level(&mut self, gsi: u32, high: bool) {
        let pin = gsi as usize;
        let Some(entry) = self.registers.entries[..self.pins].get(pin) else { return };
        let (before, bit) = (self.registers.high, 1 << pin);
        self.registers.high = if high { before | bit } else { before & !bit };
        if entry & LEVEL != 0 {
            self.deliver_level(pin);
        } else if high && before & bit == 0 && entry & MASKED == 0 {
            send(&self.vm, *entry);
        }
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..self.pins {
            let entry = &mut self.registers.entries[pin];
            if *entry & (REMOTE_IRR | VECTOR) == REMOTE_IRR | u64::from(vector) {
                *entry &= !REMOTE_IRR;
                self.deliver_level(pin);
            }
        }
    }
}

impl Device for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            IOREGSEL => Some(self.registers.select.into()),
            IOWIN => self.read_register(),
            _ => None,
        };
        if let Some(value) = value {
            data.fill(0);
            data.iter_mut().zip(value.to_le_bytes()).for_each(|(byte, of)| *byte = of);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut value = [0; 4];
        value.iter_mut().zip(data).for_each(|(of, byte)| *of = *byte);
        match offset {
            IOREGSEL => self.registers.select = value[0],
            IOWIN => self.write_register(u32::from_le_bytes(value)),
            _ => {}
        }
        Effect::None
    }
}

impl Stateful for IoApic {
    type State = Registers;

    fn save(&self) -> Registers {
        self.registers
    }

    fn restore(&mut self, state: Registers) -> Result<(), StateError> {
        let possible =
            |entry: &u64| entry & !(WRITABLE | REMOTE_IRR) == 0 && entry & (REMOTE_IRR | LEVEL) != REMOTE_IRR;
        let beyond = &state.entries[self.pins..];
        if state.id & !ID_BITS != 0
            || state.high >> self.pins != 0
            || !state.entries.iter().all(possible)
            || beyond.iter().any(|entry| *entry != MASKED)
        {
            return Err(StateError::Invalid(format!("I/O APIC {state:x?}")));
        }
        self.registers = state;
        self.publish();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
