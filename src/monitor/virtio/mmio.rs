//! virtio over MMIO, version 2 (virtio 1.3, 4.2): decodes registers into calls on [`Core`], and nothing else.
//!
//! One on the MMIO bus per device, each with an interrupt of its own. Kicks come as register writes first, and without an exit
//! once a queue is busy ([`Doorbells`]).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::core::{self, Core};
use super::device::VirtioDevice;
use super::doorbells::Doorbells;
use super::queue::{Notifier, Setup};
use super::transport::Error;
use crate::bus::{Busy, Device, Effect};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::recorder::Recorder;
use crate::state::{StateError, Stateful};
use crate::vm::{Interrupt, IoEventAddress, Vm};

// Registers (4.2.2), by their names there.
const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const SHM_LEN_LOW: u64 = 0x0b0;
const SHM_BASE_HIGH: u64 = 0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
/// Ours: "VMM!".
const VENDOR: u32 = u32::from_le_bytes(*b"VMM!");

/// InterruptStatus: used buffers.
const INTERRUPT_USED: u32 = 1;
/// InterruptStatus: configuration or device status changed.
const INTERRUPT_CONFIG: u32 = 2;

/// The interrupt and its two reasons.
struct Line {
    reasons: AtomicU32,
    /// Reasons that always stand: those who interrupt the driver past this code cannot set them.
    standing: AtomicU32,
    interrupt: Arc<dyn Interrupt>,
}

impl Line {
    fn raise(&self, reason: u32) {
        // Always an edge, even if the reason stands already: an edge that the guest had masked is lost.
        self.reasons.fetch_or(reason, Ordering::SeqCst);
        self.interrupt.trigger();
    }
}

impl Notifier for Line {
    fn used(&self, _queue: usize) {
        self.raise(INTERRUPT_USED);
    }

    fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    fn direct(&self, _queue: usize) -> Option<BorrowedFd<'_>> {
        self.standing.store(INTERRUPT_USED, Ordering::SeqCst);
        self.interrupt.as_eventfd()
    }
}

/// The registers that are the transport's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Selectors {
    device_features: u32,
    driver_features: u32,
    queue: u32,
}

/// A virtio device on the MMIO bus.
pub struct Mmio {
    core: Core,
    line: Arc<Line>,
    select: Selectors,
    base: u64,
    doorbells: Doorbells,
}

impl Mmio {
    /// `device`, called `name`, as it will be at guest address `base`, with interrupt `gsi`.
    ///
    /// # Errors
    /// [`Error`]: the hypervisor or the host refused something.
    pub fn new(
        vm: &Arc<dyn Vm>,
        ram: &Arc<GuestRam>,
        base: u64,
        gsi: u32,
        name: &str,
        device: Box<dyn VirtioDevice>,
        recorder: &Arc<Recorder>,
    ) -> Result<Self, Error> {
        let name = || name.to_owned();
        let interrupt = vm.irq_line(gsi).map_err(|source| Error::Interrupt { name: name(), gsi, source })?;
        let line = Arc::new(Line { reasons: AtomicU32::new(0), standing: AtomicU32::new(0), interrupt });
        let core = Core::new(&name(), ram, device, line.clone(), recorder)
            .map_err(|source| Error::Events { name: name(), source })?;
        let doorbells = Doorbells::new(Arc::downgrade(vm), &core);
        Ok(Self { core, line, select: Selectors::default(), base, doorbells })
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        let queue = self.select.queue as usize;
        Some(match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => 2,
            DEVICE_ID => self.core.traits().kind,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => self.core.offered_features(self.select.device_features),
            QUEUE_SIZE_MAX => self.core.queue_max(queue).map_or(0, u32::from),
            QUEUE_READY => self.core.queue_ready(queue).into(),
            INTERRUPT_STATUS => {
                self.line.reasons.load(Ordering::SeqCst) | self.line.standing.load(Ordering::SeqCst)
            }
            STATUS => self.core.status().into(),
            CONFIG_GENERATION => self.core.config_generation(),
            // No shared memory regions: length and base read as all ones (4.2.2.1).
            SHM_LEN_LOW..=SHM_BASE_HIGH if offset.is_multiple_of(4) => u32::MAX,
            _ => return None,
        })
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => self.select.device_features = value,
            DRIVER_FEATURES_SEL => self.select.driver_features = value,
            DRIVER_FEATURES => self.core.accept_features(self.select.driver_features, value),
            QUEUE_SEL => self.select.queue = value,
            // A size that 16 bits do not hold is none, and the queue cannot be enabled with it.
            QUEUE_SIZE => self.set_up(|queue| queue.size = value.try_into().unwrap_or(0)),
            QUEUE_READY => match value {
                0 | 1 => self.core.set_queue_ready(self.select.queue as usize, value == 1),
                _ => guest_warn!("virtio-mmio QueueReady written with {value:#x}"),
            },
            QUEUE_NOTIFY => {
                self.core.kick(value as usize);
                let at = IoEventAddress::Mmio { address: self.base + QUEUE_NOTIFY, value: Some(value) };
                self.doorbells.kicked(&self.core, value as usize, at);
            }
            INTERRUPT_ACK => {
                self.line.reasons.fetch_and(!value, Ordering::SeqCst);
            }
            STATUS => {
                let reset = self.core.write_status(value);
                if reset {
                    self.line.reasons.store(0, Ordering::SeqCst);
                    self.select = Selectors::default();
                }
            }
            QUEUE_DESC_LOW => self.set_up(|queue| set_low(&mut queue.descriptors, value)),
            QUEUE_DESC_HIGH => self.set_up(|queue| set_high(&mut queue.descriptors, value)),
            QUEUE_DRIVER_LOW => self.set_up(|queue| set_low(&mut queue.available, value)),
            QUEUE_DRIVER_HIGH => self.set_up(|queue| set_high(&mut queue.available, value)),
            QUEUE_DEVICE_LOW => self.set_up(|queue| set_low(&mut queue.used, value)),
            QUEUE_DEVICE_HIGH => self.set_up(|queue| set_high(&mut queue.used, value)),
            // Read-only, reserved, or of features that are not offered (SHMSel, QueueReset).
            _ => {}
        }
    }

    fn set_up(&mut self, change: impl FnOnce(&mut Setup)) {
        self.core.set_up_queue(self.select.queue as usize, change);
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

impl Device for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            return self.core.read_config(offset, data);
        }
        // 4.2.2.2: registers are 32 bits wide, and drivers access them so.
        match (<&mut [u8; 4]>::try_from(data), self.read_register(offset)) {
            (Ok(data), Some(value)) => *data = value.to_le_bytes(),
            (Ok(data), None) => *data = [0; 4],
            (Err(_), _) => guest_warn!("virtio-mmio register {offset:#x} read with the wrong width"),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if self.core.is_resetting() {
            // 4.2.2.2: the driver is to read 0 from the status first. Its old rings may still be written to.
            guest_warn!("virtio-mmio {offset:#x} written before the reset is over: ignored");
        } else if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.write_config(offset, data);
        } else if let Ok(data) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(data));
        } else {
            guest_warn!("virtio-mmio register {offset:#x} written with the wrong width");
        }
        if self.core.wants_worker() { Effect::Serve } else { Effect::None }
    }

    fn finish(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.core.finish(deadline)
    }

    fn pause(&mut self, deadline: Instant) -> Result<(), Busy> {
        self.core.pause(deadline)
    }

    fn resume(&mut self) {
        self.core.resume();
    }
}

/// [`Mmio`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    select: Selectors,
    interrupt: u32,
    core: core::State,
}

/// Only while paused.
impl Stateful for Mmio {
    type State = State;

    fn save(&self) -> State {
        let interrupt = self.line.reasons.load(Ordering::SeqCst);
        State { select: self.select.clone(), interrupt, core: self.core.save() }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if state.interrupt & !(INTERRUPT_USED | INTERRUPT_CONFIG) != 0 {
            return Err(StateError::Invalid(format!("interrupt status {:#x}", state.interrupt)));
        }
        self.core.restore(state.core)?;
        self.line.reasons.store(state.interrupt, Ordering::SeqCst);
        self.select = state.select;
        Ok(())
    }
}
