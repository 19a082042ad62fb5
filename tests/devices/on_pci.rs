//! [`OnPci`]: a device on a PCI bus behind the register numbers of virtio over MMIO, so that whatever drives the one drives the other.
//!
//! What PCI has no register for does nothing: a queue is not disabled, and interrupts are not acknowledged. What PCI alone has is
//! reached behind those registers, from [`BAR`] on.

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use vmm_monitor::bus::{Busy, Device, Effect};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::pci::{Ecam, Function, Line, Memory, Segment};
use vmm_monitor::state::{Saved, StateError};
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::pci::{Pci, Place, SIZE};
use vmm_monitor::vm::fake::FakeVm;

use crate::guest::BASE;

const NUMBER: u8 = 1;
/// Where the structures are in the BAR.
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
pub const TABLE: u64 = 0x4000;
const PAGE: u64 = 0x1000;
/// The device's memory as PCI has it begins behind virtio-mmio's registers, with the common configuration.
pub const BAR: u64 = 0x1_0000;
/// Its MSI-X pending bits.
pub const PENDING: u64 = 0x5000;
/// Common configuration (virtio 1.3, 4.1.4.3).
pub const QUEUE_SELECT: u64 = 0x16;
pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;

pub struct OnPci {
    function: Arc<Mutex<Pci>>,
    memory: Memory,
    /// The largest size of each queue.
    queues: Vec<u16>,
    kind: u32,
}

impl OnPci {
    /// `device` at [`BASE`], with a message for each queue and for the configuration.
    pub fn new(vm: &Arc<FakeVm>, ram: &Arc<GuestRam>, device: Box<dyn VirtioDevice>) -> Self {
        let traits = device.traits();
        let weak: Weak<FakeVm> = Arc::downgrade(vm);
        let line = Arc::new(Line::new(weak.clone(), 16));
        let place = Place { number: NUMBER, base: BASE, line };
        let function = Pci::new(weak, ram, place, "virtio-test", device, &Arc::default()).unwrap();
        let function = Arc::new(Mutex::new(function));
        let segment = Arc::new(Segment::new([BASE..BASE + SIZE]));
        segment.insert(NUMBER, function.clone(), BASE..BASE + SIZE).unwrap();
        let mut ecam = Ecam(segment.clone());
        let config = u64::from(NUMBER) << 15;
        // Memory and bus master; then MSI-X, whose capability is the first.
        ecam.write(config + 4, &6u16.to_le_bytes());
        let mut at = [0];
        ecam.read(config + 0x34, &mut at);
        ecam.write(config + u64::from(at[0]) + 2, &0x8000u16.to_le_bytes());
        let mut memory = Memory { segment, base: BASE };
        for vector in 0..=traits.queues.len() as u64 {
            memory.write(TABLE + 16 * vector, &0xfee0_0000u64.to_le_bytes());
            memory.write(TABLE + 16 * vector + 8, &vector.to_le_bytes());
        }
        Self { function, memory, queues: traits.queues, kind: traits.kind }
    }

    /// The address that a kick of `queue` is written to.
    pub fn doorbell(queue: u32) -> u64 {
        BASE + NOTIFY + 4 * u64::from(queue)
    }

    fn load(&mut self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.memory.read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn store(&mut self, offset: u64, len: usize, value: u32) -> Effect {
        self.memory.write(offset, &value.to_le_bytes()[..len])
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            0x00 => 0x7472_6976,
            0x04 => 2,
            0x08 => self.kind,
            0x10 => self.load(0x04, 4),
            0x34 => {
                let queue = self.load(0x16, 2) as usize;
                self.queues.get(queue).copied().unwrap_or(0).into()
            }
            0x44 => self.load(0x1c, 2),
            0x70 => self.load(0x14, 1),
            0xfc => self.load(0x15, 1),
            // The ISR status has the configuration's bit, and is cleared as it is read.
            0x60 => self.load(0x1000, 1),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Effect {
        match offset {
            0x14 => self.store(0x00, 4, value),
            0x24 => self.store(0x08, 4, value),
            0x20 => self.store(0x0c, 4, value),
            0x30 => self.store(0x16, 2, value.min(0xffff)),
            0x38 => self.store(0x18, 2, u16::try_from(value).unwrap_or(0).into()),
            0x44 => {
                if value == 1 {
                    let message = self.load(0x16, 2) + 1;
                    self.store(0x1a, 2, message);
                }
                self.store(0x1c, 2, value.min(0xffff))
            }
            0x50 if value < 0x400 => self.store(NOTIFY + 4 * u64::from(value), 2, value),
            0x70 => {
                // After a reset it has to be chosen anew.
                let effect = self.store(0x14, 1, if value > 0xff { value | 1 } else { value });
                if value != 0 {
                    self.store(0x10, 2, 0);
                }
                effect
            }
            0x80 | 0x84 | 0x90 | 0x94 | 0xa0 | 0xa4 => {
                self.store(0x20 + (offset - 0x80) / 2 + (offset & 4) / 2, 4, value)
            }
            _ => Effect::None,
        }
    }
}

impl Device for OnPci {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(BAR) {
            return self.memory.read(offset, data);
        }
        match (offset.checked_sub(0x100), <&mut [u8; 4]>::try_from(&mut *data)) {
            (Some(offset), _) if offset < PAGE => self.memory.read(DEVICE + offset, data),
            (Some(_), _) => {}
            (None, Ok(data)) => *data = self.read_register(offset).to_le_bytes(),
            (None, Err(_)) => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Some(offset) = offset.checked_sub(BAR) {
            return self.memory.write(offset, data);
        }
        match (offset.checked_sub(0x100), data.try_into()) {
            (Some(offset), _) if offset < PAGE => self.memory.write(DEVICE + offset, data),
            (Some(_), _) => Effect::None,
            (None, Ok(data)) => self.write_register(offset, u32::from_le_bytes(data)),
            (None, Err(_)) => Effect::None,
        }
    }

    fn pause(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.function.lock().unwrap().pause(deadline)
    }

    fn resume(&mut self) {
        self.function.lock().unwrap().resume();
    }

    fn finish(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.function.lock().unwrap().finish(deadline)
    }
}

impl Saved for OnPci {
    fn save_bytes(&self) -> Vec<u8> {
        self.function.lock().unwrap().save_bytes()
    }

    fn restore_bytes(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.function.lock().unwrap().restore_bytes(bytes)
    }
}

impl Drop for OnPci {
    fn drop(&mut self) {
        // As a machine that is gone: nothing of it is left at its address.
        self.function.lock().unwrap().leave();
    }
}
