//! What firmware would tell the guest about the platform: memory map, ACPI and MP tables; and what it has for a reset.
//!
//! The machine makes [`Platform`] from its inventory, before there is any device; [`boot::load`](super::load) writes the tables.

pub mod acpi;
pub mod e820;
pub mod generation;
pub mod loader;
pub mod mp;
pub mod reset;

use std::io;
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestRam, layout};

/// The platform as the tables describe it. Sleep, reset and event registers (`legacy::acpi_pm`), power button, pvpanic, local
/// APICs and the I/O APIC are always there; there is no PIC, PIT, RTC, VGA or keyboard controller to speak of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Platform {
    /// Virtual CPUs; their APIC ids are 0, 1, 2 ...
    pub cpus: u32,
    /// Pins of the I/O APIC.
    pub io_apic_pins: u32,
    /// The virtio-mmio devices.
    pub virtio_mmio: Vec<VirtioMmio>,
    /// There is a 16550 at [`layout::COM1`].
    pub com1: bool,
    /// Where the generation ID is.
    pub generation: u64,
    /// There is a PCI bus.
    pub pci: Option<Pci>,
}

/// The PCI bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pci {
    /// Device numbers of the functions that are there or may come while the machine runs, and the global system interrupts that
    /// their INTA# are wired to.
    pub lines: Vec<(u8, u32)>,
    /// Where their memory may be.
    pub memory: Vec<Range<u64>>,
}

/// A virtio-mmio device: [`layout::VIRTIO_MMIO_SIZE`] bytes of registers and an edge-triggered interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Guest physical address of its registers.
    pub base: u32,
    /// Its global system interrupt.
    pub gsi: u32,
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// They do not fit.
    #[error("{size} bytes of tables do not fit into {}", layout::ACPI_SIZE)]
    TooBig {
        /// Bytes of all tables.
        size: usize,
    },
    /// Guest memory does not reach to their place.
    #[error("write to guest memory below 1 MiB")]
    Write(#[source] vm_memory::GuestMemoryError),
    /// The host has no random bytes.
    #[error("read random bytes")]
    Random(#[source] io::Error),
}

/// Writes the ACPI tables, the MP tables and what is for resets, and gives the guest physical address of the RSDP.
///
/// # Errors
/// [`Error`].
pub fn write(ram: &GuestRam, platform: &Platform) -> Result<u64, Error> {
    let bytes = acpi::tables(platform, layout::ACPI);
    if bytes.len() as u64 > layout::ACPI_SIZE {
        return Err(Error::TooBig { size: bytes.len() });
    }
    ram.write_slice(&bytes, GuestAddress(layout::ACPI)).map_err(Error::Write)?;
    generation::renew(ram, platform.generation)?;
    mp::write(ram, platform, layout::MP_TABLES_END).map_err(Error::Write)?;
    reset::write(ram).map_err(Error::Write)?;
    Ok(layout::ACPI)
}
