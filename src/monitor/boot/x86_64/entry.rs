//! The registers that each protocol promises a kernel, and the GDT and page tables in guest RAM that they point to.
//!
//! The loaders call it. What it makes is plain data: an [`Entry`], which `kvm` applies to the vCPUs.

use crate::boot::error::Error;
use crate::boot::image::Image;
use crate::kvm::regs::{Entry, Segment};
use crate::memory::{GuestRam, layout};

/// The boot GDT's descriptors.
/// Linux's 64-bit entry wants __BOOT_CS = 0x10 and __BOOT_DS = 0x18; PVH takes any flat ones.
const GDT: [u64; 5] = [
    0,
    0x00cf_9b00_0000_ffff, // 0x08: 32-bit code, flat
    0x00af_9b00_0000_ffff, // 0x10: 64-bit code, flat
    0x00cf_9300_0000_ffff, // 0x18: data, flat
    0x0000_8b00_0000_0067, // 0x20: busy 32-bit TSS, 0x68 bytes at 0
];

/// What firmware leaves behind and kernels rely on: fast string operations, and write-back as the memory type of
/// all that no MTRR covers (SDM vol. 3, 12.11.2.1: E and type 6). All others have their reset values from KVM.
const MSRS: [(u32, u64); 2] = [(0x1a0, 1), (0x2ff, 0x806)];

/// What a Multiboot kernel finds in EAX.
const MULTIBOOT_MAGIC: u64 = 0x2bad_b002;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// 32-bit protected mode, flat segments, paging off. No stack: each protocol's kernels set their own.
const PROTECTED: Entry = Entry {
    msrs: &MSRS,
    rip: 0,
    rax: 0,
    rbx: 0,
    rsi: 0,
    code: segment(0x08),
    data: segment(0x18),
    task: segment(0x20),
    gdt: layout::GDT,
    gdt_limit: (size_of::<[u64; GDT.len()]>() - 1) as u16,
    cr0: CR0_PE | CR0_ET,
    cr3: 0,
    cr4: 0,
    efer: 0,
};

/// Long mode, flat segments, paging on (identity).
const LONG: Entry = Entry {
    code: segment(0x10),
    cr0: PROTECTED.cr0 | CR0_PG,
    cr3: layout::PAGE_TABLES,
    cr4: CR4_PAE,
    efer: EFER_LME | EFER_LMA,
    ..PROTECTED
};

const fn segment(selector: u16) -> Segment {
    Segment { selector, descriptor: GDT[(selector >> 3) as usize] }
}

/// Linux's 64-bit boot protocol: long mode, RSI = boot_params (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
pub fn linux64(rip: u64, boot_params: u64) -> Entry {
    Entry { rip, rsi: boot_params, ..LONG }
}

/// PVH: 32-bit protected mode, EBX = start_info (Xen's x86/HVM direct boot ABI).
pub fn pvh(rip: u32, start_info: u32) -> Entry {
    Entry { rip: rip.into(), rbx: start_info.into(), ..PROTECTED }
}

/// Multiboot 1: 32-bit protected mode, EAX = 0x2badb002, EBX = the information block (3.2).
pub fn multiboot(rip: u32, info: u32) -> Entry {
    Entry { rip: rip.into(), rax: MULTIBOOT_MAGIC, rbx: info.into(), ..PROTECTED }
}

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
    let bytes: Vec<u8> = GDT.iter().flat_map(|e| e.to_le_bytes()).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pvh_enters_with_paging_off_and_linux64_in_long_mode() {
        let entry = pvh(1, 2);
        assert_eq!((entry.cr0 & CR0_PG, entry.cr4, entry.efer), (0, 0, 0));
        let entry = linux64(1, 2);
        assert_eq!(entry.efer, EFER_LME | EFER_LMA);
        assert_ne!(entry.cr0 & CR0_PG, 0);
        assert_eq!((entry.code.selector, entry.data.selector, entry.gdt_limit), (0x10, 0x18, 39));
    }
}
