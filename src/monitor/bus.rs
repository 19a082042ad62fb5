//! Address to device: the one table behind port I/O and memory-mapped I/O.
//!
//! vCPU threads look up under no lock (the table is fixed once the machine is built) and then take the one
//! device's mutex. A device returns an [`Effect`] and holds no handle to the machine.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::state::Saved;

/// What a device's register write asks of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Effect {
    /// Nothing: the vCPU goes on.
    #[default]
    None,
    /// The device wants a thread of its own, which a vCPU must not make, or has let a PCI function go: the vCPU goes on, and the
    /// machine calls [`Device::resume`], or takes the function apart, from another thread soon.
    Serve,
    /// The guest asked for a reset.
    Reset,
    /// The guest powered itself off.
    Shutdown,
    /// The guest's kernel panicked, and says so.
    Panic,
    /// The guest ended the run with a status of its own (an isa-debug-exit style port).
    Exit(u8),
    /// The program that boots a disk (`firmware/disk`) found nothing to boot.
    NothingToBoot,
}

impl Effect {
    /// Whether the run ends by it.
    pub fn ends(self) -> bool {
        !matches!(self, Self::None | Self::Serve)
    }
}

/// A device is not at rest yet: the text says what it waits for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Busy(pub String);

/// A device on a [`Bus`]. One trait for port and memory-mapped I/O.
///
/// Caller: a vCPU thread holding this device's mutex, or the machine while it is paused. `offset` is relative
/// to the device's base; an access never crosses the device's end, and `data` holds 1 to 8 bytes, little
/// endian. Neither call may block on the host or panic, whatever the guest writes. A read of a register that
/// does not exist leaves `data` as it comes: all ones.
pub trait Device: Saved + Send {
    /// The guest reads `data.len()` bytes at `offset`. `data` comes filled with 0xff.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
    /// The guest is gone: passes on what it had handed over before, to those on the host who take it by `deadline`. Comes before the
    /// last [`Device::pause`].
    ///
    /// # Errors
    /// [`Busy`] at `deadline`: somebody has yet to take some of it, which is lost unless this is called again.
    fn finish(&mut self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }
    /// Comes to rest: once it returns `Ok`, no thread or kernel work of this device touches guest memory or
    /// host files until [`Device::resume`]. The vCPUs are parked. Idempotent.
    ///
    /// # Errors
    /// [`Busy`] at `deadline`: work of the device still goes on. Another pause goes on waiting; a
    /// resume takes it back.
    fn pause(&mut self, _deadline: Instant) -> Result<(), Busy> {
        Ok(())
    }
    /// Undoes [`Device::pause`], also one that failed; starts a device after `restore_bytes`, and one that
    /// asked for it by [`Effect::Serve`]. Never called by a vCPU. Idempotent.
    fn resume(&mut self) {}
}

/// What a device is, for whoever builds, describes or names it. Each is explained where it is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the device models")]
pub enum Kind {
    AcpiPm,
    I8042,
    ResetControl,
    PvPanic,
    Serial,
    DebugExit,
    RtcCmos,
    TextScreen,
    BootMarks,
    Rom,
    FwCfg,
    DebugPort,
    TestPorts,
    TestLines,
    TestMemory,
    HypervTest,
    /// The `usize`th virtio device.
    Virtio(usize),
    /// PCI configuration space by ports, with the reset control register between them.
    PciPorts,
    /// PCI configuration space by memory.
    PciEcam,
    /// The registers by which PCI functions come and go.
    PciHotPlug,
    /// A window in which PCI functions' memory is.
    PciMemory,
    IoApic,
    /// KVM's own: it answers without the monitor.
    InKernel,
}

/// Which address space a device is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// I/O ports.
    Pio,
    /// Physical memory.
    Mmio,
    /// Physical memory of a PCI function of this device number: the guest can move it.
    Pci(u8),
}

/// One entry of a machine's inventory: a device, and where the guest finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// A name of its own in the machine.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its address space.
    pub place: Place,
    /// The first address.
    pub base: u64,
    /// Addresses from there on.
    pub size: u64,
    /// The global system interrupt that it raises, if it has one.
    pub gsi: Option<u32>,
}

/// A device as the bus and the machine share it.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// Locks a device or a part of one. A device that panicked must not take the whole monitor with it, so a
/// poisoned mutex is entered all the same.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two devices want the same addresses.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{name} at {base:#x}..{end:#x} overlaps {other}")]
pub struct Overlap {
    name: String,
    base: u64,
    end: u64,
    other: String,
}

struct Entry {
    base: u64,
    size: u64,
    name: String,
    device: SharedDevice,
}

/// A sorted table of address ranges and the devices that answer them.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
}

impl Bus {
    /// Puts `device` at `base..base + size`.
    ///
    /// # Errors
    /// [`Overlap`] with a device that is there already, or a range that is empty or wraps.
    pub fn insert(&mut self, name: &str, base: u64, size: u64, device: SharedDevice) -> Result<(), Overlap> {
        let end = base.saturating_add(size);
        let overlap = |other: &str| Overlap { name: name.to_owned(), base, end, other: other.to_owned() };
        if size == 0 || end - base != size {
            return Err(overlap("the end of the address space"));
        }
        let at = self.entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i)).filter(|e| e.base + e.size > base);
        let after = self.entries.get(at).filter(|e| e.base < end);
        if let Some(other) = before.or(after) {
            return Err(overlap(&other.name));
        }
        self.entries.insert(at, Entry { base, size, name: name.to_owned(), device });
        Ok(())
    }

    /// The device that answers all of `address..address + len`, with the offset into it.
    fn find(&self, address: u64, len: usize) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|e| e.base <= address).checked_sub(1)?;
        let entry = &self.entries[at];
        let offset = address - entry.base;
        let fits = offset.checked_add(len as u64)? <= entry.size;
        fits.then_some((entry, offset))
    }

    /// Reads; `data` is all ones where nobody answers. True if a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((entry, offset)) = self.find(address, data.len()) else { return false };
        lock(&entry.device).read(offset, data);
        true
    }

    /// Writes; `None` if no device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Effect> {
        let (entry, offset) = self.find(address, data.len())?;
        Some(lock(&entry.device).write(offset, data))
    }

    /// The name of the device at `address`.
    pub fn name_at(&self, address: u64) -> Option<&str> {
        self.find(address, 1).map(|(entry, _)| entry.name.as_str())
    }

    /// The ranges, lowest first: base, size, name.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64, &str)> {
        self.entries.iter().map(|e| (e.base, e.size, e.name.as_str()))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{StateError, Stateful};

    struct Latch(u8);
    impl Stateful for Latch {
        type State = u8;
        fn save(&self) -> u8 {
            self.0
        }
        fn restore(&mut self, state: u8) -> Result<(), StateError> {
            self.0 = state;
            Ok(())
        }
    }
    impl Device for Latch {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = self.0 + offset as u8;
        }
        fn write(&mut self, _: u64, data: &[u8]) -> Effect {
            self.0 = data[0];
            Effect::Reset
        }
    }

    fn latch(v: u8) -> SharedDevice {
        Arc::new(Mutex::new(Latch(v)))
    }

    #[test]
    fn finds_the_device_and_refuses_overlap_and_straddling() {
        let mut bus = Bus::default();
        bus.insert("a", 0x10, 4, latch(1)).unwrap();
        bus.insert("b", 0x14, 4, latch(2)).unwrap();
        bus.insert("low", 0, 0x10, latch(3)).unwrap();
        for (base, size) in [(0x12, 1), (0x8, 0x20), (0x17, 9), (0x30, 0), (u64::MAX, 2)] {
            assert!(bus.insert("x", base, size, latch(0)).is_err(), "{base:#x}+{size}");
        }
        let mut byte = [0];
        assert!(bus.read(0x15, &mut byte) && byte == [3]);
        let mut wide = [0; 4];
        assert!(!bus.read(0x16, &mut wide), "crosses the end");
        assert_eq!(wide, [0xff; 4]);
        assert_eq!(bus.write(0x10, &[7]), Some(Effect::Reset));
        assert!(bus.read(0x10, &mut byte) && byte == [7]);
        assert_eq!(bus.write(0x18, &[7]), None);
        assert_eq!(bus.name_at(0x17), Some("b"));
    }
}
