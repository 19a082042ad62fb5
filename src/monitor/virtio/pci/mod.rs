//! virtio over PCI (virtio 1.3, 4.1): decodes registers into calls on [`Core`], and nothing else.
//!
//! A function with one BAR, in which each structure has a page of its own. Kicks come as register writes first, and without an
//! exit once a queue is busy ([`Doorbells`]), by ioeventfds that follow the BAR. Interrupts are messages where the driver
//! asks for MSI-X, and else the function's INTx line.

mod common;
mod interrupts;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use self::common::Selectors;
use self::interrupts::Interrupts;
use super::core::{self, Core};
use super::device::VirtioDevice;
use super::doorbells::Doorbells;
use super::transport::Error;
use crate::bus::{Busy, Device, Effect};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::pci::{self, ConfigSpace, Function, Identity, Line, Msix, msix};
use crate::recorder::Recorder;
use crate::state::{StateError, Stateful};
use crate::vm::{IoEventAddress, Vm};

/// Bytes of the BAR.
pub const SIZE: u64 = 0x8000;

// What is where in it: a page each.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PAGE: u64 = 0x1000;
/// Bytes from one queue's doorbell to the next one's.
const NOTIFY_MULTIPLIER: u32 = 4;

/// 4.1.2: the vendor of all virtio devices, and the device ID to which the type is added.
const VENDOR: u16 = 0x1af4;
const DEVICE_ID: u16 = 0x1040;
/// 4.1.2.1: a device that is no transitional one has revision 1 or higher.
const REVISION: u8 = 1;
/// 4.1.2.1: likewise, a subsystem ID of 0x40 or higher.
const SUBSYSTEM: u16 = 0x40;

// Capabilities (4.1.4), by their names there.
const VENDOR_SPECIFIC: u8 = 0x09;
const CAP_COMMON_CFG: u8 = 1;
const CAP_NOTIFY_CFG: u8 = 2;
const CAP_ISR_CFG: u8 = 3;
const CAP_DEVICE_CFG: u8 = 4;
const CAP_PCI_CFG: u8 = 5;

// The PCI configuration access capability (4.1.4.9): registers from its own on.
const WINDOW_BAR: u8 = 4;
const WINDOW_OFFSET: u8 = 8;
const WINDOW_LENGTH: u8 = 12;
const WINDOW_DATA: u8 = 16;

/// Message Control of MSI-X, from its capability's register on.
const MESSAGE_CONTROL: u8 = 2;

/// A virtio device on the PCI bus.
pub struct Pci {
    core: Core,
    config: ConfigSpace,
    msix: Msix,
    interrupts: Arc<Interrupts>,
    select: Selectors,
    doorbells: Doorbells,
    /// Where the BAR was when it was decoded last: those of the doorbells that are ioeventfds are there.
    doorbells_base: Option<u64>,
    /// The registers of two capabilities.
    msix_capability: u8,
    window: u8,
    /// It is off the bus: it answers nothing.
    removed: bool,
}

/// Where a device is on the bus, and how it interrupts.
pub struct Place {
    /// Its device number.
    pub number: u8,
    /// Guest address of its memory, until the guest moves it: a multiple of [`SIZE`].
    pub base: u64,
    /// The line that its INTA# is wired to.
    pub line: Arc<Line>,
}

impl Pci {
    /// `device`, called `name`, as a function that is to be at `place`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(
        vm: Weak<dyn Vm>,
        ram: &Arc<GuestRam>,
        place: Place,
        name: &str,
        device: Box<dyn VirtioDevice>,
        recorder: &Arc<Recorder>,
    ) -> Result<Self, Error> {
        let (kind, queues) = (device.traits().kind, device.traits().queues.len() as u16);
        let has_config = !device.config().is_empty();
        // One for the configuration, and one for each queue.
        let msix = Msix::new(vm.clone(), queues + 1);
        let failed = |source| Error::Events { name: name.to_owned(), source };
        let interrupts = Interrupts::new(msix.lines(), queues, place.number, place.line.clone());
        let interrupts = Arc::new(interrupts.map_err(failed)?);
        let core = Core::new(name, ram, device, interrupts.clone(), recorder).map_err(failed)?;

        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_ID + kind as u16,
            class: class(kind),
            revision: REVISION,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM + kind as u16,
        });
        config.add_memory(SIZE, place.base);
        config.add_interrupt(place.line.gsi());
        let msix_capability =
            config.add_capability(msix::CAPABILITY, &msix.capability(0, TABLE as u32, PENDING as u32));
        config.allow(msix_capability + MESSAGE_CONTROL, &(msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes());
        add_structure(&mut config, CAP_COMMON_CFG, COMMON, common::SIZE, &[]);
        add_structure(&mut config, CAP_ISR_CFG, ISR, 1, &[]);
        if has_config {
            add_structure(&mut config, CAP_DEVICE_CFG, DEVICE, PAGE, &[]);
        }
        let doorbells = u64::from(queues) * u64::from(NOTIFY_MULTIPLIER);
        add_structure(&mut config, CAP_NOTIFY_CFG, NOTIFY, doorbells, &NOTIFY_MULTIPLIER.to_le_bytes());
        let window = add_structure(&mut config, CAP_PCI_CFG, 0, 0, &[0; 4]);
        config.allow(window + WINDOW_BAR, &[0xff]);
        // Offset, length and data.
        config.allow(window + WINDOW_OFFSET, &[0xff; 12]);

        let select = Selectors::default();
        let doorbells = Doorbells::new(vm, &core);
        let doorbells_base = None;
        Ok(Self {
            core,
            config,
            msix,
            interrupts,
            select,
            doorbells,
            doorbells_base,
            msix_capability,
            window,
            removed: false,
        })
    }

    /// Registers the doorbells that are ioeventfds for a BAR at `base`, or none of them.
    fn add_doorbells(&self, base: u64) -> io::Result<()> {
        let Some(vm) = self.doorbells.vm() else { return Ok(()) };
        for (index, at) in self.doorbells_at(base) {
            if let Err(error) = vm.ioeventfd(at, self.core.doorbells()[index].as_fd()) {
                self.doorbells_at(base).take_while(|(done, _)| *done < index).for_each(|(done, at)| {
                    let _ = vm.remove_ioeventfd(at, self.core.doorbells()[done].as_fd());
                });
                return Err(error);
            }
        }
        Ok(())
    }

    fn remove_doorbells(&self, base: u64) {
        let Some(vm) = self.doorbells.vm() else { return };
        for (index, at) in self.doorbells_at(base) {
            if let Err(error) = vm.remove_ioeventfd(at, self.core.doorbells()[index].as_fd()) {
                log::error!("doorbell at {at:x?}: {error}");
            }
        }
    }

    fn doorbells_at(&self, base: u64) -> impl Iterator<Item = (usize, IoEventAddress)> {
        self.doorbells.earned().map(move |queue| (queue, doorbell_at(base, queue)))
    }

    fn kick(&mut self, queue: usize) {
        self.core.kick(queue);
        if let Some(base) = self.doorbells_base {
            self.doorbells.kicked(&self.core, queue, doorbell_at(base, queue));
        }
    }

    /// What the window of the PCI configuration access capability leads to: the offset in the BAR, and the length. `None` where it
    /// leads nowhere (4.1.4.9.1).
    fn window_target(&self) -> Option<(u64, usize)> {
        let register = |offset| {
            let mut value = [0; 4];
            self.config.read(self.window + offset, &mut value);
            u32::from_le_bytes(value)
        };
        let (bar, offset, length) =
            (register(WINDOW_BAR) & 0xff, register(WINDOW_OFFSET), register(WINDOW_LENGTH));
        let fits = bar == 0 && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length);
        let inside = u64::from(offset) + u64::from(length) <= SIZE;
        (fits && inside).then_some((offset.into(), length as usize))
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % PAGE;
        // What lies past its end stays all ones.
        if offset - within == DEVICE {
            return self.core.read_config(within, data);
        }
        data.fill(0);
        match offset - within {
            COMMON => common::read(self, within, data),
            ISR if within == 0 => data[0] = self.interrupts.take_isr(),
            TABLE => self.msix.read_table(within, data),
            PENDING => self.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) -> Effect {
        let within = offset % PAGE;
        match offset - within {
            TABLE => self.msix.write_table(within, data),
            COMMON..ISR | DEVICE..TABLE if self.core.is_resetting() => {
                // The driver is to read 0 from the status first (4.1.4.3.2). Its old rings may still be written to.
                guest_warn!("virtio-pci {offset:#x} written before the reset is over: ignored");
            }
            COMMON => common::write(self, within, data),
            DEVICE => self.core.write_config(within, data),
            // Which queue it is the place says, and what is written means nothing without NOTIFICATION_DATA.
            NOTIFY => self.kick((within / u64::from(NOTIFY_MULTIPLIER)) as usize),
            _ => {}
        }
        if self.core.wants_worker() { Effect::Serve } else { Effect::None }
    }
}

/// Where the doorbell of `queue` is while the BAR is at `base`.
fn doorbell_at(base: u64, queue: usize) -> IoEventAddress {
    let address = base + NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER);
    IoEventAddress::Mmio { address, value: None }
}

/// Appends a virtio_pci_cap (4.1.4) for a structure at `offset` of the BAR.
fn add_structure(config: &mut ConfigSpace, kind: u8, offset: u64, length: u64, more: &[u8]) -> u8 {
    let size = 16 + more.len() as u8;
    // cap_len, cfg_type, bar, id and padding; then offset and length.
    let head = [size, kind, 0, 0, 0, 0];
    let body = [&head[..], &(offset as u32).to_le_bytes(), &(length as u32).to_le_bytes(), more].concat();
    config.add_capability(VENDOR_SPECIFIC, &body)
}

/// Base class and subclass for a device type (PCI Code and ID Assignment 1.11), which drivers do not look at, but people do.
fn class(kind: u32) -> u32 {
    match kind {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET => 0x02_0000,
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK => 0x01_8000,
        virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE => 0x07_8000,
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK => 0x02_8000,
        _ => 0xff_0000,
    }
}

impl Function for Pci {
    fn read_config(&mut self, register: u8, data: &mut [u8]) {
        if self.removed {
            return;
        }
        self.config.set_interrupt_status(self.interrupts.holds_line());
        if register == self.window + WINDOW_DATA
            && let Some((offset, length)) = self.window_target()
        {
            let mut value = [0; 4];
            self.read_bar(offset, &mut value[..length]);
            self.config.put(self.window + WINDOW_DATA, &value);
        }
        self.config.read(register, data);
    }

    fn write_config(&mut self, register: u8, data: &[u8]) -> Effect {
        if self.removed {
            return Effect::None;
        }
        self.config.write(register, data);
        self.interrupts.allow_line(self.config.may_raise_line());
        let mut control = [0; 2];
        let at = self.msix_capability + MESSAGE_CONTROL;
        self.config.read(at, &mut control);
        // Written as a word of its own, or as the upper half of the capability's first register.
        if (usize::from(register)..usize::from(register) + data.len()).contains(&usize::from(at + 1)) {
            self.msix.set_control(u16::from_le_bytes(control));
            self.interrupts.messages_changed();
            self.core.interrupts_moved();
        }
        if register == self.window + WINDOW_DATA
            && let Some((offset, length)) = self.window_target()
        {
            let mut value = [0; 4];
            self.config.read(self.window + WINDOW_DATA, &mut value);
            return self.write_bar(offset, &value[..length]);
        }
        Effect::None
    }

    fn wants(&self) -> Option<(u64, u64)> {
        self.config.memory()
    }

    fn move_to(&mut self, base: u64) -> io::Result<()> {
        self.add_doorbells(base)?;
        if let Some(before) = self.doorbells_base.replace(base) {
            self.remove_doorbells(before);
        }
        Ok(())
    }

    fn leave(&mut self) {
        if let Some(before) = self.doorbells_base.take() {
            self.remove_doorbells(before);
        }
    }

    fn remove(&mut self) {
        self.removed = true;
        self.leave();
        self.msix.remove();
        // What is in flight comes to its end without a word.
        self.interrupts.allow_line(false);
    }
}

impl Device for Pci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !self.removed {
            self.read_bar(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if self.removed { Effect::None } else { self.write_bar(offset, data) }
    }

    fn pause(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.core.pause(deadline)
    }

    fn resume(&mut self) {
        self.core.resume();
    }

    fn finish(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.core.finish(deadline)
    }
}

/// [`Pci`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    config: pci::config_space::State,
    msix: msix::State,
    interrupts: interrupts::State,
    select: Selectors,
    core: core::State,
}

/// Only while paused.
impl Stateful for Pci {
    type State = State;

    fn save(&self) -> State {
        State {
            config: self.config.save(),
            msix: self.msix.save(),
            interrupts: self.interrupts.save(),
            select: self.select.clone(),
            core: self.core.save(),
        }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        self.config.restore(state.config)?;
        self.msix.restore(state.msix)?;
        self.interrupts.restore(state.interrupts, self.msix.count())?;
        self.interrupts.allow_line(self.config.may_raise_line());
        self.core.restore(state.core)?;
        self.select = state.select;
        Ok(())
    }
}
