//! PVH, Xen's direct boot ABI for hardware-virtualized guests (Xen's docs/misc/pvh.pandoc), as Linux and others take it.
//!
//! Called by [`load`](super::load) for an ELF kernel with the entry note. The kernel is entered in 32-bit protected
//! mode without paging; hvm_start_info tells it about memory, command line, initrd (the first module) and ACPI.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use super::elf::{self, Elf};
use super::entry;
use super::tables::e820;
use crate::boot::error::Error;
use crate::boot::initrd::{self, Limits};
use crate::boot::{Boot, cmdline};
use crate::kvm::regs::Entry;
use crate::memory::layout;

/// The memory map came with version 1.
const VERSION: u32 = 1;

/// Loads an ELF kernel to be entered at its PVH entry point `rip`.
///
/// # Errors
/// See [`Error`].
pub fn load(boot: &Boot, elf: &Elf, rip: u32) -> Result<Entry, Error> {
    let (kernel, ram) = (boot.kernel, boot.memory.ram());
    let range = elf.load(kernel, boot.memory, u64::from(rip))?;
    // Linux keeps only the low half of a module's address, so it must lie below 4 GiB.
    let initrd = initrd::load(boot, &range, Limits { below: layout::HOLE.start, above_4g: false })?;
    cmdline::write(kernel, ram, boot.cmdline, elf::CMDLINE_MAX)?;

    let modules = layout::PVH_TABLES;
    let memory_map = modules + size_of::<hvm_modlist_entry>() as u64;
    let module = hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.end - initrd.start,
        cmdline_paddr: 0,
        reserved: 0,
    };
    kernel.write(ram, modules, &module, "the PVH module list")?;
    let map = e820::map(boot.memory.size());
    for (i, from) in map.iter().enumerate() {
        let (addr, size) = (from.range.start, from.range.end - from.range.start);
        let entry = hvm_memmap_table_entry { addr, size, type_: from.kind as u32, reserved: 0 };
        let at = memory_map + (i * size_of::<hvm_memmap_table_entry>()) as u64;
        kernel.write(ram, at, &entry, "the PVH memory map")?;
    }
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        flags: 0,
        nr_modules: u32::from(boot.initrd.is_some()),
        modlist_paddr: if boot.initrd.is_some() { modules } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: boot.rsdp,
        memmap_paddr: memory_map,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    kernel.write(ram, layout::BOOT_PARAMS, &start_info, "start_info")?;
    entry::write_gdt(kernel, ram)?;
    Ok(entry::pvh(rip, layout::BOOT_PARAMS as u32))
}
