//! Starting by firmware: the ROM in its place, and what it will ask fw_cfg for.
//!
//! The machine calls [`load`] in place of [`boot::load`](super::load). Kernel and initrd stay in their files until firmware
//! has them read, but for a PVH kernel: its segments are put in place here, as QEMU's ABI has it.

use std::io;
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use super::sniff::{self, Format};
use super::tables::{Platform, generation, loader, mp, reset};
use super::{elf, linux};
use crate::boot::error::Error;
use crate::boot::image::{Image, Input};
use crate::boot::initrd::{self, Limits};
use crate::boot::{Payload, cmdline};
use crate::config::{BootProtocol, Firmware};
use crate::error_chain;
use crate::legacy::fw_cfg::{Content, Items, Source};
use crate::memory::{GuestRam, Memory, layout};

/// The monitor's own ROM, assembled from `firmware/`.
pub const BUILT_IN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/firmware"));

/// Numbers of fw_cfg's items (QEMU's include/standard-headers/linux/qemu_fw_cfg.h and hw/i386/fw_cfg.h).
mod item {
    pub const RAM_SIZE: u16 = 0x03;
    pub const NO_GRAPHIC: u16 = 0x04;
    pub const CPUS: u16 = 0x05;
    pub const KERNEL_ADDR: u16 = 0x07;
    pub const KERNEL_SIZE: u16 = 0x08;
    pub const INITRD_ADDR: u16 = 0x0a;
    pub const INITRD_SIZE: u16 = 0x0b;
    pub const MAX_CPUS: u16 = 0x0f;
    pub const KERNEL_ENTRY: u16 = 0x10;
    pub const KERNEL_DATA: u16 = 0x11;
    pub const INITRD_DATA: u16 = 0x12;
    pub const CMDLINE_ADDR: u16 = 0x13;
    pub const CMDLINE_SIZE: u16 = 0x14;
    pub const CMDLINE_DATA: u16 = 0x15;
    pub const SETUP_ADDR: u16 = 0x16;
    pub const SETUP_SIZE: u16 = 0x17;
    pub const SETUP_DATA: u16 = 0x18;
}

/// Where firmware is told to put a kernel's setup code, and its command line.
const SETUP: u64 = 0x1_0000;
const CMDLINE: u64 = 0x2_0000;
/// Left free at the end of low memory, where firmware keeps tables.
const FIRMWARE_MEMORY: u64 = 1 << 20;
/// Bytes of a PVH kernel that go as its setup code: firmware knows it for ELF by them.
const ELF_HEAD: u64 = 64;
/// Loader type "undefined"; CAN_USE_HEAP (Documentation/arch/x86/boot.rst).
const UNDEFINED_LOADER: u8 = 0xff;
const CAN_USE_HEAP: u8 = 0x80;

/// What firmware starts with.
pub struct Start<'a> {
    /// The ROM.
    pub firmware: &'a Firmware,
    /// Programs for it to run: fw_cfg files genroms/NAME.
    pub option_roms: &'a [Input],
    /// The kernel that it is to boot, if any.
    pub payload: Option<&'a Payload>,
}

/// The bytes of a ROM: of `file`, or the built-in one.
///
/// # Errors
/// [`Error`], which names the file and has a hint.
pub fn rom(file: Option<&Input>) -> Result<Vec<u8>, Error> {
    let Some(file) = file else { return Ok(BUILT_IN.to_vec()) };
    let image = file.image()?;
    let len = usize::try_from(image.len()).unwrap_or(usize::MAX);
    if image.len() > layout::ROM_MAX || len < 16 {
        let what = format!("{len} bytes; a ROM has 16 to {}", layout::ROM_MAX);
        return Err(Error::Firmware { path: file.path().to_owned(), what });
    }
    let mut bytes = vec![0; len];
    image.bytes(0, &mut bytes, "the ROM")?;
    Ok(bytes)
}

/// The size of a ROM in bytes, without reading it.
///
/// # Errors
/// There is no such file.
pub fn rom_size(firmware: &Firmware) -> io::Result<u64> {
    match firmware {
        Firmware::BuiltIn => Ok(BUILT_IN.len() as u64),
        Firmware::File(path) => Ok(std::fs::metadata(path)?.len()),
    }
}

/// Fills the memory of a machine that starts by firmware, and gives what fw_cfg has. The ROM is in `memory` already.
///
/// # Errors
/// [`Error`], which names the file and has a hint.
pub fn load(memory: &Memory, start: &Start, platform: &Platform) -> Result<Items, Error> {
    let mp = (*start.firmware == Firmware::BuiltIn).then_some(platform);
    let failed = |what| Error::Firmware { path: start.firmware.to_string().into(), what };
    shadow(memory, mp).map_err(failed)?;
    generation::renew(&memory.all(), platform.generation).map_err(|error| failed(error_chain(&error)))?;

    let mut items = Items::default();
    items.add_bytes(item::RAM_SIZE, memory.size().to_le_bytes());
    items.add_bytes(item::NO_GRAPHIC, 1u16.to_le_bytes());
    items.add_bytes(item::CPUS, (platform.cpus as u16).to_le_bytes());
    items.add_bytes(item::MAX_CPUS, (platform.cpus as u16).to_le_bytes());
    // RAM only, from zero: what firmware and the PC's legacy hole take of it, firmware says.
    let e820 = layout::ram(memory.size()).into_iter().flat_map(|range| {
        [&range.start.to_le_bytes()[..], &(range.end - range.start).to_le_bytes(), &1u32.to_le_bytes()]
            .concat()
    });
    items.add_file("etc/e820", e820.collect::<Vec<_>>());
    loader::files(platform).into_iter().for_each(|(name, bytes)| items.add_file(name, bytes));
    if platform.com1 {
        // Where SeaBIOS shows its text screen, and takes keys from: there is no other.
        items.add_file("etc/sercon-port", (layout::COM1 as u16).to_le_bytes());
    }
    // No waiting for a key.
    items.add_file("etc/show-boot-menu", 0u16.to_le_bytes());
    let mut order = String::new();
    for file in start.option_roms {
        let name =
            file.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let image = file.image()?;
        if image.len() > layout::ROM_SHADOW_MAX {
            let what = format!("{} bytes; an option ROM has {} at most", image.len(), layout::ROM_SHADOW_MAX);
            return Err(Error::Firmware { path: file.path().to_owned(), what });
        }
        let mut bytes = vec![0; image.len() as usize];
        image.bytes(0, &mut bytes, "the option ROM")?;
        order.push_str(&format!("/rom@genroms/{name}\n"));
        items.add_file(&format!("genroms/{name}"), bytes);
    }
    if !order.is_empty() {
        order.push('\0');
        items.add_file("bootorder", order);
    }
    if let Some(payload) = start.payload {
        add_payload(&mut items, memory, start.firmware, payload)?;
    }
    Ok(items)
}

/// Copies the ROM's end to below 1 MiB, where a PC's chipset shows it, too. In the copy the reset vector is ours: a processor
/// starts in the ROM, so whoever comes to the copy's wants a reset. Below the copy go MP tables of the platform `mp`:
/// another's firmware makes its own.
fn shadow(memory: &Memory, mp: Option<&Platform>) -> Result<(), String> {
    let Some((base, _, size)) = memory.rom_slot() else { return Ok(()) };
    let mut end = vec![0; size.min(layout::ROM_SHADOW_MAX) as usize];
    let len = end.len() as u64;
    let (at, ram) = (layout::HIGH_RAM - len, memory.ram());
    memory
        .all()
        .read_slice(&mut end, GuestAddress(base + size - len))
        .and_then(|()| ram.write_slice(&end, GuestAddress(at)))
        .and_then(|()| reset::write(ram))
        .and_then(|()| mp.map_or(Ok(()), |platform| mp::write(ram, platform, at)))
        .map_err(|error| format!("its copy below 1 MiB: {error}"))
}

fn add_payload(
    items: &mut Items,
    memory: &Memory,
    firmware: &Firmware,
    payload: &Payload,
) -> Result<(), Error> {
    let kernel = payload.kernel.image()?;
    let initrd = payload.initrd.as_ref().map(Input::image).transpose()?;
    let size = initrd.as_ref().map_or(0, Image::len);
    let initrd_at = |kernel: &Range<u64>, below: u64| {
        let Some(initrd) = &initrd else { return Ok(0) };
        let below = below.min(memory.size().min(layout::HOLE.start).saturating_sub(FIRMWARE_MEMORY));
        let limits = Limits { below, above_4g: false };
        initrd::place(size, kernel, &layout::ram(memory.size()), limits).ok_or_else(|| {
            let needed = initrd::needed(size, kernel, limits).map(|needed| needed + FIRMWARE_MEMORY);
            Error::InitrdTooBig { path: initrd.path().to_owned(), size, needed }
        })
    };
    let cmdline_max;
    let (mut setup, address);
    let (format, _) = sniff::kernel(&kernel)?;
    match (format, payload.protocol) {
        (Format::BzImage, BootProtocol::Auto | BootProtocol::Linux64) => {
            // The built-in firmware boots by the 64-bit entry point, others as a BIOS does.
            let header = match firmware {
                Firmware::BuiltIn => linux::read_header(&kernel)?,
                Firmware::File(_) => linux::read_16_bit_header(&kernel)?,
            };
            let code = linux::place_code(memory, &kernel, &header)?;
            let room = CMDLINE - SETUP;
            if code.offset > room {
                return Err(
                    kernel.damaged(format!("{} bytes of setup code; there is room for {room}", code.offset))
                );
            }
            // It is loaded to 1 MiB, and goes from there to where it prefers to run.
            let range = layout::HIGH_RAM..code.range.end.max(layout::HIGH_RAM + code.len);
            address = initrd_at(&range, u64::from(header.initrd_addr_max) + 1)?;
            cmdline_max = header.cmdline_size as usize;
            setup = vec![0; code.offset as usize];
            kernel.bytes(0, &mut setup, "the setup code")?;
            let mut patch = |at: usize, bytes: &[u8]| setup[at..at + bytes.len()].copy_from_slice(bytes);
            patch(0x210, &[UNDEFINED_LOADER, header.loadflags | CAN_USE_HEAP]);
            patch(0x218, &(address as u32).to_le_bytes());
            patch(0x21c, &(size as u32).to_le_bytes());
            patch(0x224, &((room - 0x200) as u16).to_le_bytes());
            patch(0x228, &(CMDLINE as u32).to_le_bytes());
            items.add_bytes(item::KERNEL_ADDR, (layout::HIGH_RAM as u32).to_le_bytes());
            items.add_bytes(item::KERNEL_SIZE, (code.len as u32).to_le_bytes());
            let part = Part { image: kernel, offset: code.offset, len: code.len };
            items.add(item::KERNEL_DATA, Content::Source(Box::new(part)));
        }
        (Format::Elf | Format::Elf32, BootProtocol::Auto | BootProtocol::Pvh) => {
            let elf = elf::Elf::parse(&kernel)?;
            let entry = elf
                .pvh_entry
                .ok_or_else(|| no_pvh(payload, "its ELF notes have no XEN_ELFNOTE_PHYS32_ENTRY"))?;
            let range = elf.load(&kernel, memory, u64::from(entry))?;
            address = initrd_at(&range, layout::HOLE.start)?;
            cmdline_max = elf::CMDLINE_MAX;
            setup = vec![0; ELF_HEAD as usize];
            kernel.bytes(0, &mut setup, "the ELF header")?;
            items.add_bytes(item::KERNEL_ENTRY, entry.to_le_bytes());
            items.add_bytes(item::KERNEL_ADDR, (range.start as u32).to_le_bytes());
            items.add_bytes(item::KERNEL_SIZE, ((range.end - range.start) as u32).to_le_bytes());
        }
        (_, BootProtocol::Multiboot) | (Format::Flat, _) => {
            return Err(no_pvh(payload, "it is for Multiboot, which firmware does not speak"));
        }
        (Format::BzImage, BootProtocol::Pvh) => return Err(no_pvh(payload, "it is a bzImage")),
        (Format::Elf | Format::Elf32, BootProtocol::Linux64) => {
            return Err(no_pvh(
                payload,
                "firmware enters an ELF kernel by PVH only, and `boot=linux64` asks for another way",
            ));
        }
    }
    cmdline::check(payload.kernel.path(), &payload.cmdline, cmdline_max)?;
    let cmdline = [payload.cmdline.as_bytes(), &[0]].concat();
    items.add_bytes(item::SETUP_ADDR, (SETUP as u32).to_le_bytes());
    items.add_bytes(item::SETUP_SIZE, (setup.len() as u32).to_le_bytes());
    items.add_bytes(item::SETUP_DATA, setup);
    items.add_bytes(item::CMDLINE_ADDR, (CMDLINE as u32).to_le_bytes());
    items.add_bytes(item::CMDLINE_SIZE, (cmdline.len() as u32).to_le_bytes());
    items.add_bytes(item::CMDLINE_DATA, cmdline);
    items.add_bytes(item::INITRD_ADDR, (address as u32).to_le_bytes());
    items.add_bytes(item::INITRD_SIZE, (size as u32).to_le_bytes());
    if let Some(image) = initrd {
        items.add(item::INITRD_DATA, Content::Source(Box::new(Part { offset: 0, len: image.len(), image })));
    }
    Ok(())
}

fn no_pvh(payload: &Payload, why: &'static str) -> Error {
    let hint =
        "use a bzImage, or an ELF kernel built with CONFIG_PVH=y; without `firmware=` others boot, too";
    Error::NoPvh { path: payload.kernel.path().to_owned(), why, hint }
}

/// A part of a file.
struct Part {
    image: Image,
    offset: u64,
    len: u64,
}

impl Source for Part {
    fn len(&self) -> u64 {
        self.len
    }

    fn byte(&self, offset: u64) -> io::Result<u8> {
        let mut byte = [0];
        self.image.bytes(self.offset + offset, &mut byte, "what firmware reads").map_err(io::Error::other)?;
        Ok(byte[0])
    }

    fn copy(&self, offset: u64, len: u64, ram: &GuestRam, to: u64) -> io::Result<()> {
        let from = self.offset + offset;
        self.image.load(from, len, ram, to, "what firmware reads").map_err(io::Error::other)
    }

    fn bytes(&self) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.len).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.image.bytes(self.offset, &mut bytes, "what firmware reads").map_err(io::Error::other)?;
        Ok(bytes)
    }
}
