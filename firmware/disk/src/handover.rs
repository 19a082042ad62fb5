//! Loads Linux and enters it at its 64-bit entry (Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use crate::entry::own_memory;
use crate::start_info::{MAX_ENTRIES, StartInfo};
use bootdisk::cmdline;
use bootdisk::entries::{self, Entry, MAX_INITRDS};
use bootdisk::linux::{HEAD, HEADER, Setup, place_initrd};
use bootdisk::unified::Part;
use bootdisk::volume::{Node, Volume};
use bootdisk::{Error, Result};
use core::arch::asm;
use core::ops::Range;

// boot_params, beyond the setup header's copy (Documentation/arch/x86/zero-page.rst).
const RSDP: usize = 0x70;
const E820_COUNT: usize = 0x1e8;
const E820: usize = 0x2d0;
const LOADER: usize = 0x210;
const INITRD: usize = 0x218;
const CMDLINE: usize = 0x228;
/// A loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
/// From the kernel's start to its 64-bit entry.
const ENTRY_64: u64 = 0x200;
/// What lies lowest belongs to the monitor's tables.
const LOW: Range<u64> = 0..1 << 20;

#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// What Linux reads after this program has ended; it lies in this program's memory, which Linux takes after that.
struct Handed {
    params: Page,
    cmdline: [u8; 4096],
}
struct Once(core::cell::UnsafeCell<Handed>);
// SAFETY: one processor, no interrupts, and only `load` takes it.
unsafe impl Sync for Once {}
static HANDED: Once =
    Once(core::cell::UnsafeCell::new(Handed { params: Page([0; 4096]), cmdline: [0; 4096] }));

/// A kernel in its place.
pub struct Ready {
    entry: u64,
    params: u64,
}

/// Loads an entry's kernel and initrds.
///
/// # Errors
/// Files that are missing or too large for the memory, and no kernel.
pub fn load(entry: &Entry, volume: &Volume, info: &StartInfo) -> Result<Ready> {
    // SAFETY: the one reference to it; an earlier one ended with the earlier call, which failed.
    let handed = unsafe { &mut *HANDED.0.get() };
    let file = entries::open(volume, entry.linux.bytes())?;
    let kernel = entry.unified.map_or(Part { offset: 0, size: file.size }, |unified| unified.linux);
    let mut head = [0; HEAD];
    volume.read(&file, kernel.offset, &mut head)?;
    let setup = Setup::parse(&head, kernel.size)?;
    let ram: [Range<u64>; MAX_ENTRIES] = info.ram();
    let no_room = Error::TooLarge("the kernel, for this machine's memory");
    let start = setup.place(&ram, &[LOW, own_memory()]).ok_or(no_room)?;
    let body = Part { offset: kernel.offset + setup.start, size: kernel.size - setup.start };
    fill(volume, &file, body, start)?;

    let mut initrds = [const { None::<(Node, Part)> }; MAX_INITRDS + 1];
    let mut free = initrds.iter_mut();
    if let (Some(unified), Some(slot)) = (entry.unified, free.next()) {
        *slot = Some((file, unified.initrd));
    }
    for (path, slot) in entry.initrds().iter().zip(free) {
        let node = entries::open(volume, path.bytes())?;
        *slot = Some((node, Part { offset: 0, size: node.size }));
    }
    let mut total = 0u64;
    for (_, part) in initrds.iter().flatten() {
        let end = total.saturating_add(part.size).checked_next_multiple_of(4);
        total = end.ok_or(Error::TooLarge("the initrd"))?;
    }
    let mut at = 0;
    if total > 0 {
        let taken = [LOW, own_memory(), start..start + setup.init_size];
        let no_room = Error::TooLarge("the initrd, for this machine's memory");
        at = place_initrd(total, setup.initrd_max, &ram, &taken).ok_or(no_room)?;
        let mut next = at;
        for (node, part) in initrds.iter().flatten() {
            fill(volume, node, *part, next)?;
            let end = next + part.size;
            next = end.next_multiple_of(4);
            // SAFETY: at most three bytes, of the range that was found free.
            unsafe { (end as *mut u8).write_bytes(0, (next - end) as usize) };
        }
    }

    let options = cmdline::join(entry.options.bytes(), info.cmdline, setup.cmdline_max)?;
    let cmdline =
        handed.cmdline.get_mut(..options.bytes().len() + 1).ok_or(Error::TooLarge("the command line"))?;
    cmdline.fill(0);
    cmdline[..options.bytes().len()].copy_from_slice(options.bytes());
    let cmdline = cmdline.as_ptr() as u32;

    let params = &mut handed.params.0;
    params.fill(0);
    params[HEADER..setup.header_end].copy_from_slice(&head[HEADER..setup.header_end]);
    params[LOADER] = UNKNOWN_LOADER;
    let mut put = |at: usize, bytes: &[u8]| params[at..at + bytes.len()].copy_from_slice(bytes);
    put(INITRD, &(at as u32).to_le_bytes());
    put(INITRD + 4, &(total as u32).to_le_bytes());
    put(CMDLINE, &cmdline.to_le_bytes());
    put(RSDP, &info.rsdp.to_le_bytes());
    put(E820_COUNT, &[info.map().len() as u8]);
    for (index, memory) in info.map().iter().enumerate() {
        let at = E820 + index * 20;
        put(at, &memory.start.to_le_bytes());
        put(at + 8, &memory.size.to_le_bytes());
        put(at + 16, &memory.kind.to_le_bytes());
    }
    Ok(Ready { entry: start + ENTRY_64, params: params.as_ptr() as u64 })
}

/// Reads a part of a file to `address`, which is free.
fn fill(volume: &Volume, node: &Node, part: Part, address: u64) -> Result<()> {
    // SAFETY: RAM that is mapped and that nothing else uses: it was placed outside of this program.
    let into = unsafe { core::slice::from_raw_parts_mut(address as *mut u8, part.size as usize) };
    if volume.read(node, part.offset, into)? == into.len() { Ok(()) } else { Err(Error::Read) }
}

impl Ready {
    /// Leaves this program for good.
    pub fn enter(self) -> ! {
        // SAFETY: Linux has what it wants: 64-bit mode, identity mapping, its selectors, no interrupts, RSI.
        unsafe {
            asm!("cli", "cld", "jmp {entry}", entry = in(reg) self.entry, in("rsi") self.params,
                options(noreturn, nostack));
        }
    }
}
