//! The GDT and page tables that a guest starts with, written to guest RAM.
//!
//! The loaders call it; the registers that point there are set by `kvm::regs` from the returned
//! [`Entry`](crate::kvm::regs::Entry).

use crate::boot::error::Error;
use crate::boot::image::Image;
use crate::kvm::regs;
use crate::memory::{GuestRam, layout};

/// Present and writable (Intel SDM volume 3A, 4.5.4).
const TABLE: u64 = 0b11;
/// Present, writable, a 2 MiB page.
const PAGE_2M: u64 = 0b1000_0011;
const PAGE: u64 = 0x1000;
const ENTRIES: u64 = 512;

/// Writes the GDT.
///
/// # Errors
/// [`Error::Write`] if there is no RAM for it.
pub fn write_gdt(kernel: &Image, ram: &GuestRam) -> Result<(), Error> {
    let bytes: Vec<u8> = regs::GDT.iter().flat_map(|e| e.to_le_bytes()).collect();
    kernel.write_bytes(ram, layout::GDT, &bytes, "the GDT")
}

/// Writes page tables that map the first 4 GiB to themselves.
///
/// # Errors
/// [`Error::Write`] if there is no RAM for them.
pub fn write_page_tables(kernel: &Image, ram: &GuestRam) -> Result<(), Error> {
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4 + PAGE;
    let directories = pdpt + PAGE;
    kernel.write(ram, pml4, &(pdpt | TABLE), "page tables")?;
    for gib in 0..4 {
        kernel.write(ram, pdpt + gib * 8, &((directories + gib * PAGE) | TABLE), "page tables")?;
    }
    let entries: Vec<u8> = (0..4 * ENTRIES).flat_map(|i| ((i << 21) | PAGE_2M).to_le_bytes()).collect();
    kernel.write_bytes(ram, directories, &entries, "page tables")
}
