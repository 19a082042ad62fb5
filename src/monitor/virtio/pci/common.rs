//! The common configuration structure (virtio 1.3, 4.1.4.3).

use serde::{Deserialize, Serialize};

use super::Pci;
use super::interrupts::NO_VECTOR;
use crate::guest_warn;
use crate::virtio::queue::Setup;

/// Bytes of it: without the fields for features that are not offered (notification data, queue reset).
pub const SIZE: u64 = 0x38;

// Its fields, by their names there.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// The fields that are the transport's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selectors {
    device_features: u32,
    driver_features: u32,
    queue: u16,
}

/// Reads any part of it. What lies behind it leaves `data` as it is.
pub fn read(pci: &Pci, offset: u64, data: &mut [u8]) {
    let Some(wanted) = part(offset, data.len()) else { return };
    let all = bytes(pci);
    data.copy_from_slice(&all[wanted]);
}

fn part(offset: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(len)?;
    (end <= SIZE as usize).then_some(start..end)
}

/// All of it.
fn bytes(pci: &Pci) -> [u8; SIZE as usize] {
    let Pci { core, select, interrupts, .. } = pci;
    let queue = usize::from(select.queue);
    // Of a queue that there is not, the size is 0 (4.1.4.3.1), and so is the rest.
    let setup = core.queue_setup(queue).copied().unwrap_or_default();
    let there = core.queue_setup(queue).is_some();
    let mut bytes = [0; SIZE as usize];
    let mut put =
        |at: u64, value: &[u8]| bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
    put(DEVICE_FEATURE_SELECT, &select.device_features.to_le_bytes());
    put(DEVICE_FEATURE, &core.offered_features(select.device_features).to_le_bytes());
    put(DRIVER_FEATURE_SELECT, &select.driver_features.to_le_bytes());
    put(DRIVER_FEATURE, &core.accepted_features(select.driver_features).to_le_bytes());
    put(CONFIG_MSIX_VECTOR, &interrupts.config_vector().to_le_bytes());
    put(NUM_QUEUES, &(core.traits().queues.len() as u16).to_le_bytes());
    put(DEVICE_STATUS, &[core.status()]);
    put(CONFIG_GENERATION, &[core.config_generation() as u8]);
    put(QUEUE_SELECT, &select.queue.to_le_bytes());
    put(QUEUE_SIZE, &setup.size.to_le_bytes());
    put(QUEUE_MSIX_VECTOR, &interrupts.queue_vector(queue).unwrap_or(NO_VECTOR).to_le_bytes());
    put(QUEUE_ENABLE, &u16::from(core.queue_ready(queue)).to_le_bytes());
    put(QUEUE_NOTIFY_OFF, &(if there { select.queue } else { 0 }).to_le_bytes());
    put(QUEUE_DESC, &setup.descriptors.to_le_bytes());
    put(QUEUE_DRIVER, &setup.available.to_le_bytes());
    put(QUEUE_DEVICE, &setup.used.to_le_bytes());
    bytes
}

/// Writes a field: by an access of its width, the 64-bit ones in halves, too (4.1.3.1). Anything else is ignored.
pub fn write(pci: &mut Pci, offset: u64, data: &[u8]) {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    let value = u64::from_le_bytes(bytes);
    let queue = usize::from(pci.select.queue);
    match (offset, data.len()) {
        (DEVICE_FEATURE_SELECT, 4) => pci.select.device_features = value as u32,
        (DRIVER_FEATURE_SELECT, 4) => pci.select.driver_features = value as u32,
        (DRIVER_FEATURE, 4) => pci.core.accept_features(pci.select.driver_features, value as u32),
        (CONFIG_MSIX_VECTOR, 2) => pci.interrupts.set_config_vector(value as u16, pci.msix.count()),
        (DEVICE_STATUS, 1) if pci.core.write_status(value as u32) => {
            pci.interrupts.reset();
            pci.select = Selectors::default();
        }
        (QUEUE_SELECT, 2) => pci.select.queue = value as u16,
        (QUEUE_SIZE, 2) => set_up(pci, |queue| queue.size = value as u16),
        (QUEUE_MSIX_VECTOR, 2) => {
            pci.interrupts.set_queue_vector(queue, value as u16, pci.msix.count());
            pci.core.interrupts_moved();
        }
        (QUEUE_ENABLE, 2) => match value {
            1 => pci.core.set_queue_ready(queue, true),
            // Only a reset of the queue takes it back, which is not offered (4.1.4.3.2).
            _ => guest_warn!("virtio-pci queue_enable written with {value:#x}"),
        },
        (QUEUE_DESC..SIZE, 4 | 8) if offset.is_multiple_of(data.len() as u64) => {
            let (field, high) = (offset & !7, offset & 4 != 0);
            set_up(pci, |queue| {
                let address = match field {
                    QUEUE_DESC => &mut queue.descriptors,
                    QUEUE_DRIVER => &mut queue.available,
                    _ => &mut queue.used,
                };
                *address = match (data.len(), high) {
                    (8, _) => value,
                    (_, false) => *address & !0xffff_ffff | value,
                    (_, true) => *address & 0xffff_ffff | value << 32,
                };
            });
        }
        // Read-only, or of another width.
        _ => {}
    }
}

fn set_up(pci: &mut Pci, change: impl FnOnce(&mut Setup)) {
    pci.core.set_up_queue(pci.select.queue.into(), change);
}
