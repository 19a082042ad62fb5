//! What the monitor tells: PVH's hvm_start_info (Xen's public/arch-x86/hvm/start_info.h).

use bootdisk::bytes::{u32_at, u64_at};
use core::ops::Range;

const MAGIC: u32 = 0x336e_c578;
/// The most entries of the memory map, as many as boot_params have room for.
pub const MAX_ENTRIES: usize = 128;
/// Type of ordinary memory, in PVH's map as in e820.
pub const RAM: u32 = 1;
/// The longest command line.
const MAX_CMDLINE: usize = 4096;

/// A range of the memory map.
#[derive(Clone, Copy, Default)]
pub struct Memory {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// e820's type.
    pub kind: u32,
}

/// start_info, as far as it is used.
pub struct StartInfo {
    /// ACPI's root pointer.
    pub rsdp: u64,
    /// The command line, without NUL.
    pub cmdline: &'static [u8],
    map: [Memory; MAX_ENTRIES],
    count: usize,
}

impl StartInfo {
    /// Reads start_info at `at`; none if it is not there or has no memory map.
    ///
    /// # Safety
    /// What lies there, and what it points to, is mapped and stays as it is.
    pub unsafe fn read(at: u64) -> Option<Self> {
        // SAFETY: the caller's contract, for all of these.
        let info: &[u8] = unsafe { core::slice::from_raw_parts(at as *const u8, 56) };
        let count = (u32_at(info, 48) as usize).min(MAX_ENTRIES);
        if u32_at(info, 0) != MAGIC || u32_at(info, 4) < 1 || count == 0 {
            return None;
        }
        let mut map = [Memory::default(); MAX_ENTRIES];
        // SAFETY: see above.
        let table = unsafe { core::slice::from_raw_parts(u64_at(info, 40) as *const u8, count * 24) };
        for (to, from) in map.iter_mut().zip(table.chunks_exact(24)) {
            *to = Memory { start: u64_at(from, 0), size: u64_at(from, 8), kind: u32_at(from, 16) };
        }
        let mut cmdline: &[u8] = &[];
        if u64_at(info, 24) != 0 {
            // SAFETY: see above; the monitor's room for it is larger.
            cmdline = unsafe { core::slice::from_raw_parts(u64_at(info, 24) as *const u8, MAX_CMDLINE) };
            cmdline = cmdline.split(|byte| *byte == 0).next().unwrap_or_default();
        }
        Some(Self { rsdp: u64_at(info, 32), cmdline, map, count })
    }

    /// The memory map.
    pub fn map(&self) -> &[Memory] {
        self.map.get(..self.count).unwrap_or_default()
    }

    /// The ranges of RAM that are mapped here: those below 4 GiB. The others are empty.
    pub fn ram(&self) -> [Range<u64>; MAX_ENTRIES] {
        self.map.map(|memory| match (memory.kind, memory.start.checked_add(memory.size)) {
            (RAM, Some(end)) if end <= 1 << 32 => memory.start..end,
            _ => 0..0,
        })
    }
}
