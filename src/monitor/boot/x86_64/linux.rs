//! Linux's 64-bit boot protocol, for bzImage and for ELF (Documentation/arch/x86/boot.rst).
//!
//! Called by [`load`](super::load). The kernel is entered in long mode at its 64-bit entry point, with the zero page
//! (boot_params) telling it about memory, command line, initrd and ACPI.

use std::ops::Range;

use linux_loader::bootparam::{
    LOADED_HIGH, XLF_CAN_BE_LOADED_ABOVE_4G, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::ByteValued;

use super::elf::{self, Elf};
use super::entry;
use super::tables::e820;
use crate::boot::error::{Error, Role};
use crate::boot::image::Image;
use crate::boot::initrd::{self, Limits};
use crate::boot::{Boot, cmdline};
use crate::kvm::regs::Entry;
use crate::memory::{Memory, layout};

/// Where the setup header stands in the file and in the zero page.
const SETUP_HEADER: u64 = 0x1f1;
/// Protocol 2.12 brought xloadflags, and with it the word that there is a 64-bit entry point.
const OLDEST_PROTOCOL: u16 = 0x020c;
/// Protocol 2.04 has the fields that a loader cannot do without, up to ramdisk_max's end.
const OLDEST_16_BIT: u16 = 0x0204;
const OLDEST_16_BIT_END: u64 = 0x230;
/// The setup header's length counts from here.
const HEADER_LENGTH_BASE: u64 = 0x202;
/// End of the last field that protocol 2.12 has (handover_offset at 0x264).
const OLDEST_HEADER_END: u64 = 0x268;
/// The 64-bit entry point, from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// Loader type "undefined": no number is assigned to this monitor.
const UNDEFINED_LOADER: u8 = 0xff;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;

/// Loads a bzImage.
///
/// # Errors
/// See [`Error`].
pub fn load_bzimage(boot: &Boot) -> Result<Entry, Error> {
    let kernel = boot.kernel;
    let header = read_header(kernel)?;
    let Code { offset, len, range } = place_code(boot.memory, kernel, &header)?;
    kernel.load(offset, len, boot.memory.ram(), range.start, "the protected-mode code")?;
    let above_4g = header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
    let below = u64::from(header.initrd_addr_max) + 1;
    let initrd = initrd::load(boot, &range, Limits { below, above_4g })?;
    cmdline::write(kernel, boot.memory.ram(), boot.cmdline, header.cmdline_size as usize)?;
    finish(boot, header, &initrd, range.start + ENTRY_64)
}

/// Loads an ELF kernel to be entered at its 64-bit entry point.
///
/// # Errors
/// See [`Error`].
pub fn load_elf(boot: &Boot, elf: &Elf) -> Result<Entry, Error> {
    let range = elf.load(boot.kernel, boot.memory, elf.entry)?;
    // An ELF file carries no setup header; this is the least that the kernel reads from one.
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: OLDEST_PROTOCOL,
        loadflags: LOADED_HIGH,
        ..setup_header::default()
    };
    let initrd = initrd::load(boot, &range, Limits { below: layout::HOLE.start, above_4g: true })?;
    cmdline::write(boot.kernel, boot.memory.ram(), boot.cmdline, elf::CMDLINE_MAX)?;
    finish(boot, header, &initrd, elf.entry)
}

/// Reads and checks the setup header of a kernel with a 64-bit entry point, less what it says of places.
///
/// # Errors
/// No 64-bit kernel, or a damaged one.
pub(super) fn read_header(kernel: &Image) -> Result<setup_header, Error> {
    let header = read_any_header(kernel, OLDEST_PROTOCOL, OLDEST_HEADER_END)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::Only32Bit { path: kernel.path().to_owned() });
    }
    Ok(header)
}

/// [`read_header`] for what firmware enters at its 16-bit entry point: older kernels, and programs that look like one. What
/// their protocol has not got yet is filled in.
///
/// # Errors
/// As there, or older than [`OLDEST_16_BIT`].
pub(super) fn read_16_bit_header(kernel: &Image) -> Result<setup_header, Error> {
    let mut header = read_any_header(kernel, OLDEST_16_BIT, OLDEST_16_BIT_END)?;
    if header.version < 0x0206 {
        header.cmdline_size = 255;
    }
    if header.version < 0x020a {
        (header.relocatable_kernel, header.pref_address, header.init_size) = (0, layout::HIGH_RAM, 0);
    }
    Ok(header)
}

fn read_any_header(kernel: &Image, oldest: u16, oldest_end: u64) -> Result<setup_header, Error> {
    let mut header: setup_header = kernel.header(SETUP_HEADER, "the setup header")?;
    let (version, jump) = (header.version, header.jump);
    if version < oldest {
        return Err(Error::OldProtocol { path: kernel.path().to_owned(), version });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(kernel.damaged("it is a zImage, which is loaded below 1 MiB"));
    }
    // The length is the target of the short jump at 0x200. What comes after the header is not part of it.
    let end = HEADER_LENGTH_BASE + u64::from(jump >> 8);
    if end < oldest_end {
        return Err(kernel.damaged(format!("its setup header ends at {end:#x}")));
    }
    let len = usize::try_from(end - SETUP_HEADER).unwrap_or(usize::MAX);
    if let Some(beyond) = header.as_mut_slice().get_mut(len..) {
        beyond.fill(0);
    }
    Ok(header)
}

/// The protected-mode code: its place in the file, and the memory it runs in.
pub(super) struct Code {
    pub offset: u64,
    pub len: u64,
    pub range: Range<u64>,
}

/// Where a bzImage's code goes.
///
/// # Errors
/// Sizes that the file has not got, and memory that the guest has not.
pub(super) fn place_code(memory: &Memory, kernel: &Image, header: &setup_header) -> Result<Code, Error> {
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = (sectors + 1) * SECTOR;
    let syssize = u64::from(header.syssize) * 16;
    // syssize is rounded up to 16 bytes; builds differ in whether the file is padded to that.
    let part = "the protected-mode code";
    let end = offset + syssize.saturating_sub(15).max(ENTRY_64 + 1);
    if end > kernel.len() {
        let (role, path) = (Role::Kernel, kernel.path().to_owned());
        return Err(Error::Truncated { role, path, part, end, len: kernel.len() });
    }
    let len = kernel.len() - offset;
    let (mut start, alignment) = (header.pref_address, u64::from(header.kernel_alignment));
    if header.relocatable_kernel != 0 {
        if !alignment.is_power_of_two() {
            return Err(kernel.damaged(format!("kernel alignment {alignment:#x}")));
        }
        // The kernel aligns itself up; doing it here keeps the memory that is checked the memory that it uses.
        start = start.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
    }
    // While it decompresses itself the kernel uses init_size bytes from where it lies.
    let end = start.checked_add(u64::from(header.init_size).max(len));
    match end {
        Some(end) if start >= layout::HIGH_RAM => {
            elf::check_fits(kernel, memory, end)?;
            Ok(Code { offset, len, range: start..end })
        }
        _ => Err(kernel.damaged(format!("it wants to be loaded at {start:#x}"))),
    }
}

/// Writes the zero page and what the entry state refers to.
fn finish(boot: &Boot, mut header: setup_header, initrd: &Range<u64>, rip: u64) -> Result<Entry, Error> {
    let (kernel, ram) = (boot.kernel, boot.memory.ram());
    let size = initrd.end - initrd.start;
    header.type_of_loader = UNDEFINED_LOADER;
    header.cmd_line_ptr = layout::CMDLINE as u32;
    // Each address is split in two: the low half in the header, the high half in the zero page.
    header.ramdisk_image = initrd.start as u32;
    header.ramdisk_size = size as u32;
    header.setup_data = 0;
    let mut params = boot_params {
        acpi_rsdp_addr: boot.rsdp,
        ext_ramdisk_image: (initrd.start >> 32) as u32,
        ext_ramdisk_size: (size >> 32) as u32,
        hdr: header,
        ..boot_params::default()
    };
    let map = e820::map(boot.memory.size());
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (to, from) in table.iter_mut().zip(&map) {
        let (addr, size) = (from.range.start, from.range.end - from.range.start);
        *to = boot_e820_entry { addr, size, r#type: from.kind as u32 };
    }
    params.e820_table = table;
    kernel.write(ram, layout::BOOT_PARAMS, &params, "boot_params")?;
    entry::write_gdt(kernel, ram)?;
    entry::write_page_tables(kernel, ram)?;
    Ok(entry::linux64(rip, layout::BOOT_PARAMS))
}
