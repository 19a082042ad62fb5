//! Multiboot 1 (the Multiboot Specification, version 0.6.96): hobby kernels, test kernels, and others' boot stages.
//!
//! Called by [`load`](super::load). The header says whether the image is ELF32, or a flat file with its addresses in the
//! header (the "a.out kludge", which any file may use, ELF64 too). The kernel is entered in 32-bit protected mode without
//! paging; the information block tells it about memory, command line, the initrd (its first and only module) and us. What it has
//! no word for, a kernel of its time looks for itself: the processors, by the MP tables, which every guest has.
//!
//! An ELF64 image without addresses in its header is refused, as QEMU and the specification's own loader for 32-bit
//! machines do: its entry point is 64-bit code as a rule, and Multiboot enters 32-bit code. A kernel that also has a
//! PVH entry is entered by PVH unless the user asks for Multiboot: PVH tells about ACPI.

use std::path::Path;

use super::elf::{Elf, Segment};
use super::entry;
use super::tables::e820;
use crate::boot::error::Error;
use crate::boot::image::Image;
use crate::boot::initrd::{self, Limits};
use crate::boot::{Boot, cmdline};
use crate::kvm::regs::Entry;
use crate::memory::layout;

/// The header lies within this many bytes of the file's start (3.1.1), on a multiple of 4.
const SEARCHED: usize = 8192;
/// The header's first word.
const MAGIC: u32 = 0x1bad_b002;
/// Header flags (3.1.2): modules on page boundaries; memory information; both are always so here.
const FLAGS_MET: u32 = 0b11;
/// Flags that a loader must know or refuse.
const FLAGS_REQUIRED: u32 = 0xffff;
/// Header flag: the address fields are there.
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Information flags (3.3): mem_lower and mem_upper, command line, modules, memory map, boot loader's name.
const INFO_FLAGS: u32 = 1 | 1 << 2 | 1 << 6 | 1 << 9;
const INFO_MODULES: u32 = 1 << 3;
/// Words of the information block up to vbe_interface_len.
const INFO_WORDS: usize = 22;
/// Where the parts are, in the page of [`layout::BOOT_PARAMS`]: information, module, names. The map has a page of its own.
const MODULE: u64 = layout::BOOT_PARAMS + 0x100;
const LOADER_NAME: u64 = layout::BOOT_PARAMS + 0x200;
const MODULE_NAME: u64 = layout::BOOT_PARAMS + 0x300;
const MEMORY_MAP: u64 = layout::PVH_TABLES;
/// The command line shares the map's page, so that an image may lie below 1 MiB, where real-mode code has to be.
const CMDLINE: u64 = MEMORY_MAP + 0x200;
const CMDLINE_MAX: usize = 0xe00 - 1;
/// Where an image may begin at the lowest: after the page of the information.
const LOWEST: u64 = layout::BOOT_PARAMS + 0x1000;

/// A header that was found in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Where in the file.
    offset: u32,
    flags: u32,
    addresses: Option<Addresses>,
}

/// The address fields: header, start, end of data, end of bss, entry. Physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

impl Header {
    /// The header in `start`, the first bytes of a file, if there is one.
    pub fn find(start: &[u8]) -> Option<Self> {
        let start = &start[..start.len().min(SEARCHED)];
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(start.get(at..at.checked_add(4)?)?.try_into().ok()?))
        };
        (0..start.len()).step_by(4).find_map(|at| {
            if word(at)? != MAGIC {
                return None;
            }
            let flags = word(at + 4)?;
            if MAGIC.wrapping_add(flags).wrapping_add(word(at + 8)?) != 0 {
                return None;
            }
            let addresses = match flags & FLAG_ADDRESSES {
                0 => None,
                _ => Some(Addresses {
                    header: word(at + 12)?,
                    load: word(at + 16)?,
                    load_end: word(at + 20)?,
                    bss_end: word(at + 24)?,
                    entry: word(at + 28)?,
                }),
            };
            Some(Self { offset: u32::try_from(at).ok()?, flags, addresses })
        })
    }

    /// Whether the header itself says where the image goes, so that it need not be ELF.
    pub fn has_addresses(&self) -> bool {
        self.addresses.is_some()
    }
}

/// Loads the image whose header [`Header::find`] has found.
///
/// # Errors
/// See [`Error`].
pub(super) fn load(boot: &Boot, header: Option<&Header>) -> Result<Entry, Error> {
    let (kernel, ram) = (boot.kernel, boot.memory.ram());
    let Some(header) = header else {
        return Err(Error::NoMultiboot {
            path: kernel.path().to_owned(),
            why: "there is no Multiboot header in its first 8 KiB",
            hint: "drop `boot=`: the way in is then chosen by what the kernel offers",
        });
    };
    let unmet = header.flags & FLAGS_REQUIRED & !FLAGS_MET;
    if unmet != 0 {
        return Err(Error::NoMultiboot {
            path: kernel.path().to_owned(),
            why: "its header requires flags other than 0 and 1 (a video mode, most likely)",
            hint: "build it for a console on the serial port, without the video flag",
        });
    }
    let image = match header.addresses {
        Some(addresses) => flat(kernel, header.offset, addresses)?,
        None => elf32(kernel)?,
    };
    let range = image.load_above(kernel, boot.memory, image.entry, LOWEST)?;
    let range = range.start.max(layout::HIGH_RAM)..range.end.max(layout::HIGH_RAM);
    let initrd = initrd::load(boot, &range, Limits { below: layout::HOLE.start, above_4g: false })?;
    // By custom the first word is the kernel's name.
    let text = format!("{} {}", name(kernel.path()), boot.cmdline);
    cmdline::write_to(kernel, ram, CMDLINE, &text, CMDLINE_MAX)?;

    let write = |at, words: &[u32], what| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        kernel.write_bytes(ram, at, &bytes, what)
    };
    let mut map = Vec::new();
    for e820::Entry { range, kind } in e820::map(boot.memory.size()) {
        let (base, length) = (range.start, range.end - range.start);
        // The size does not count itself.
        map.extend([20, base as u32, (base >> 32) as u32, length as u32, (length >> 32) as u32, kind as u32]);
    }
    write(MEMORY_MAP, &map, "the Multiboot memory map")?;
    kernel.write_bytes(ram, LOADER_NAME, b"vmm\0", "the Multiboot loader's name")?;

    let kib = (layout::LOW_END >> 10) as u16;
    kernel.write(ram, layout::BASE_MEMORY, &kib, "the BIOS data area")?;

    let mut info = [0; INFO_WORDS];
    info[0] = INFO_FLAGS;
    info[1] = (layout::LOW_END >> 10) as u32;
    info[2] = ((boot.memory.size().min(layout::HOLE.start) - layout::HIGH_RAM) >> 10) as u32;
    info[4] = CMDLINE as u32;
    if let Some(module) = boot.initrd {
        let module_name = format!("{}\0", name(module.path()));
        kernel.write_bytes(ram, MODULE_NAME, module_name.as_bytes(), "the Multiboot module's name")?;
        let (start, end) = (initrd.start as u32, initrd.end as u32);
        write(MODULE, &[start, end, MODULE_NAME as u32, 0], "the Multiboot module")?;
        info[0] |= INFO_MODULES;
        (info[5], info[6]) = (1, MODULE as u32);
    }
    (info[11], info[12]) = (4 * map.len() as u32, MEMORY_MAP as u32);
    info[16] = LOADER_NAME as u32;
    write(layout::BOOT_PARAMS, &info, "the Multiboot information")?;
    entry::write_gdt(kernel, ram)?;
    let rip = u32::try_from(image.entry).map_err(|_| kernel.damaged("its entry point is above 4 GiB"))?;
    Ok(entry::multiboot(rip, layout::BOOT_PARAMS as u32))
}

/// A file's name for the guest: what the host's folders are called is not its business.
fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).collect()
}

/// The image as the header's addresses describe it.
fn flat(kernel: &Image, offset: u32, at: Addresses) -> Result<Elf, Error> {
    let damaged = |what: &str| kernel.damaged(format!("its Multiboot header's {what}"));
    let before = at.header.checked_sub(at.load).ok_or_else(|| damaged("load address lies above its own"))?;
    let file_offset =
        offset.checked_sub(before).ok_or_else(|| damaged("load address lies before the file's start"))?;
    let in_file = kernel.len().saturating_sub(u64::from(file_offset));
    let file_size = match at.load_end {
        0 => in_file,
        end => u64::from(end.checked_sub(at.load).ok_or_else(|| damaged("end lies below its start"))?),
    };
    let data_end = u64::from(at.load) + file_size;
    let end = match at.bss_end {
        0 => data_end,
        end if u64::from(end) < data_end => return Err(damaged("bss ends inside of the data")),
        end => u64::from(end),
    };
    let segment = Segment { offset: u64::from(file_offset), file_size, address: u64::from(at.load), end };
    Elf::from_segments(kernel, u64::from(at.entry), vec![segment])
}

/// The headers of an ELF32 file for 80386 (System V ABI, Intel386 supplement): to be loaded at physical addresses.
fn elf32(kernel: &Image) -> Result<Elf, Error> {
    const HEADER: usize = 52;
    const PROGRAM: usize = 32;
    const MAX_PROGRAM_HEADERS: usize = 64;
    const EM_386: u16 = 3;
    const PT_LOAD: u32 = 1;
    let mut header = [0; HEADER];
    kernel.bytes(0, &mut header, "the ELF header")?;
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    if !header.starts_with(b"\x7fELF\x01\x01") || half(18) != EM_386 {
        return Err(Error::NoMultiboot {
            path: kernel.path().to_owned(),
            why: "its header gives no addresses, so it must be an ELF file for 32-bit x86, and is not",
            hint: "if its entry point is 32-bit code, convert it: objcopy -O elf32-i386 KERNEL KERNEL32",
        });
    }
    let (entry, table) = (word(&header, 24), word(&header, 28));
    let (size, count) = (usize::from(half(42)), usize::from(half(44)));
    if size != PROGRAM || count > MAX_PROGRAM_HEADERS {
        return Err(kernel.damaged(format!("{count} program headers of {size} bytes")));
    }
    let (mut segments, mut physical) = (Vec::new(), u64::from(entry));
    for i in 0..count {
        let mut program = [0; PROGRAM];
        kernel.bytes(u64::from(table) + (i * PROGRAM) as u64, &mut program, "a program header")?;
        let [kind, offset, virt, phys, file_size, size] = [0, 4, 8, 12, 16, 20].map(|at| word(&program, at));
        if kind != PT_LOAD || size == 0 {
            continue;
        }
        if file_size > size {
            return Err(kernel.damaged(format!("a segment at {phys:#x} with impossible sizes")));
        }
        // The entry point is a virtual address in kernels that are linked high.
        if (virt..virt.saturating_add(file_size)).contains(&entry) {
            physical = u64::from(entry - virt) + u64::from(phys);
        }
        let (offset, file_size, address) = (u64::from(offset), u64::from(file_size), u64::from(phys));
        segments.push(Segment { offset, file_size, address, end: address + u64::from(size) });
    }
    Elf::from_segments(kernel, physical, segments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{Input, Payload, Role, load, tables::Platform};
    use crate::config::BootProtocol;
    use crate::memory::Memory;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u32 = 1 << 20;

    fn put(bytes: &mut [u8], at: usize, words: &[u32]) {
        for (i, word) in words.iter().enumerate() {
            bytes[at + 4 * i..at + 4 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
    }

    fn header(flags: u32) -> [u32; 3] {
        [MAGIC, flags, 0u32.wrapping_sub(MAGIC).wrapping_sub(flags)]
    }

    /// A flat image of 0x800 bytes to be loaded whole at 1 MiB, with its header at 0x100 and its entry at 0x200.
    fn flat_image() -> Vec<u8> {
        let mut image: Vec<u8> = (0..0x800u32).map(|i| i as u8).collect();
        put(&mut image, 0x100, &header(FLAG_ADDRESSES));
        put(&mut image, 0x10c, &[MIB + 0x100, MIB, 0, MIB + 0x1000, MIB + 0x200]);
        image
    }

    /// An ELF32 that is linked at 3 GiB and loaded at 2 MiB.
    fn elf_image() -> Vec<u8> {
        let mut image = vec![0; 0x1800];
        image[..7].copy_from_slice(b"\x7fELF\x01\x01\x01");
        put(&mut image, 16, &[3 << 16 | 2, 1, 0xc000_0010, 52]);
        put(&mut image, 42, &[1 << 16 | 32]);
        put(&mut image, 52, &[1, 0x1000, 0xc000_0000, 2 * MIB, 0x800, 0x4000, 5, 0x1000]);
        put(&mut image, 0x1000, &header(3));
        image
    }

    fn boot(image: &[u8], protocol: BootProtocol, initrd: bool) -> Result<(Entry, Memory), Error> {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kern el");
        std::fs::write(&kernel, image).unwrap();
        let module = folder.path().join("env");
        std::fs::write(&module, b"A=1\n").unwrap();
        let initrd = initrd.then_some(module);
        let payload = Payload::open(&kernel.into(), initrd.as_deref(), "a b".to_owned(), protocol)?;
        let memory = Memory::new(&"32M".parse().unwrap()).unwrap();
        load(&memory, &payload, &Platform { cpus: 1, ..Platform::default() }).map(|entry| (entry, memory))
    }

    fn word(memory: &Memory, at: u32) -> u32 {
        memory.ram().read_obj(GuestAddress(at.into())).unwrap()
    }

    fn text(memory: &Memory, at: u32) -> String {
        let bytes = (at..).map(|at| memory.ram().read_obj::<u8>(GuestAddress(at.into())).unwrap());
        bytes.take_while(|byte| *byte != 0).map(char::from).collect()
    }

    #[test]
    fn a_flat_image_finds_what_the_specification_promises() {
        let (entry, memory) = boot(&flat_image(), BootProtocol::Auto, true).unwrap();
        let (rip, info) = (entry.rip as u32, entry.rbx as u32);
        assert_eq!(entry, entry::multiboot(rip, info));
        assert_eq!(rip, MIB + 0x200);
        assert_eq!(word(&memory, MIB + 0x204), 0x0706_0504, "the image is there");
        let field = |at| word(&memory, info + at);
        assert_eq!((field(0), field(4), field(8)), (0b10_0100_1101, 640, 31 << 10));
        assert_eq!(text(&memory, field(16)), "kern_el a b");
        assert_eq!(field(20), 1);
        let module = field(24);
        let [start, end, name] = [0, 4, 8].map(|at| word(&memory, module + at));
        assert_eq!((end - start, word(&memory, start)), (4, u32::from_le_bytes(*b"A=1\n")));
        assert_eq!((text(&memory, name), text(&memory, field(64))), ("env".to_owned(), "vmm".to_owned()));
        let (len, mut at) = (field(44), field(48));
        let (map_end, mut free) = (at + len, 0);
        while at < map_end {
            if word(&memory, at + 20) == 1 {
                free += word(&memory, at + 12);
            }
            at += word(&memory, at) + 4;
        }
        assert_eq!(free, 32 * MIB - (MIB - 0xa_0000));
        let (entry, memory) = boot(&flat_image(), BootProtocol::Multiboot, false).unwrap();
        let info = entry.rbx as u32;
        assert_eq!(entry, entry::multiboot(entry.rip as u32, info));
        assert_eq!(word(&memory, info) & INFO_MODULES, 0);
    }

    #[test]
    fn an_image_may_lie_below_1_mib() {
        let mut image = flat_image();
        put(&mut image, 0x10c, &[0x8100, 0x8000, 0, 0, 0x8200]);
        let (entry, memory) = boot(&image, BootProtocol::Auto, true).unwrap();
        assert_eq!(entry, entry::multiboot(0x8200, layout::BOOT_PARAMS as u32));
        assert_eq!(word(&memory, 0x8204), 0x0706_0504);
    }

    #[test]
    fn an_elf32_enters_at_its_physical_address() {
        let (entry, _) = boot(&elf_image(), BootProtocol::Auto, false).unwrap();
        assert_eq!(entry, entry::multiboot(2 * MIB + 0x10, layout::BOOT_PARAMS as u32));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let changed = |at: usize, words: &[u32]| {
            let mut image = flat_image();
            put(&mut image, at, words);
            image
        };
        let mut elf64 = elf_image();
        elf64[4] = 2;
        let mut late = vec![0; 0x4000];
        late[SEARCHED..SEARCHED + 0x800].copy_from_slice(&flat_image());
        for (image, protocol, said) in [
            (changed(0x100, &header(FLAG_ADDRESSES | 4)), BootProtocol::Auto, "flags other than"),
            (changed(0x10c, &[MIB - 1]), BootProtocol::Auto, "above its own"),
            (changed(0x10c, &[MIB + 0x101]), BootProtocol::Auto, "before the file's start"),
            (changed(0x114, &[MIB - 1]), BootProtocol::Auto, "below its start"),
            (changed(0x118, &[MIB + 1]), BootProtocol::Auto, "inside of the data"),
            (changed(0x11c, &[0x7000]), BootProtocol::Auto, "in no segment"),
            (changed(0x10c, &[0x7100, 0x7000, 0, 0, 0x7200]), BootProtocol::Auto, "below 0x8000"),
            (
                changed(0x10c, &[0x9f900, 0x9f801, 0, 0xa0002, 0x9fa00]),
                BootProtocol::Auto,
                "hole below 1 MiB",
            ),
            (changed(0x108, &[0]), BootProtocol::Multiboot, "neither a bzImage"),
            (flat_image(), BootProtocol::Pvh, "a Multiboot image"),
            (elf64, BootProtocol::Multiboot, "32-bit x86"),
            (late, BootProtocol::Multiboot, "neither a bzImage"),
        ] {
            let error = boot(&image, protocol, false).unwrap_err();
            assert!(error.to_string().contains(said), "{said}: {error}");
            assert!(!error.hint().is_empty());
        }
        assert!(Input::open(Path::new("/"), Role::Kernel).is_err());
    }

    proptest! {
        /// An entry in RAM or an error, whatever the header says.
        #[test]
        fn damaged_headers_never_harm(elf: bool, at in 0..0x140usize, value: u32, other: u32) {
            let mut image = if elf { elf_image() } else { flat_image() };
            put(&mut image, at, &[value, other]);
            if let Ok((Entry { rip, .. }, _)) = boot(&image, BootProtocol::Multiboot, true) {
                prop_assert!((0x8000..u64::from(32 * MIB)).contains(&rip));
            }
        }
    }
}
