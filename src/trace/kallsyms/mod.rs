//! The symbols that a Linux kernel carries in its own memory (CONFIG_KALLSYMS): what /proc/kallsyms is made of.
//!
//! Read from guest RAM, where the kernel lies unpacked and relocated: so a distribution's bzImage has names without any file
//! beside it, at the addresses where KASLR put it. Format: scripts/kallsyms.c and kernel/kallsyms.c of Linux 4.20 (markers of 4
//! bytes) and later. The tables are the guest's, its page tables too, by which one page can stand in a million places: all is
//! checked, and a [`Budget`] bounds the time and the memory of a search.

mod btf;
mod budget;
mod modules;
mod roots;
mod space;
mod tables;
#[cfg(test)]
mod tests;

pub use budget::{Budget, Cut};
pub use modules::END;
pub use roots::Roots;
pub use space::Space;

use std::fmt::Write;
use std::ops::Range;

use vmm_monitor::memory::GuestRam;
use zerocopy::IntoBytes;

/// Where Linux maps its own image (Documentation/arch/x86/x86_64/mm.rst).
pub const IMAGE: Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

/// Guest memory that is looked through at most.
const MOST: u64 = 256 << 20;
/// Places that are looked at closely at most.
const CANDIDATES: usize = 10_000;
/// Bytes that are read at once.
const STEP: usize = 64 << 10;

/// A symbol as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    /// Where it is, in this guest.
    pub address: u64,
    /// As nm has it: `t` and `T` are code.
    pub kind: char,
    /// Its name.
    pub name: String,
}

/// The functions of the kernel that runs in `ram` and of its modules, as lines of address, type and name; by the first of
/// `roots` (CR3 and CR4 of a vCPU in the kernel) that leads to them. Where a module ends, the name is [`END`]. Ends when `budget`
/// does, and [`Budget::cut`] says so: then with as much as there is.
pub fn list(ram: &GuestRam, roots: &[(u64, u64)], budget: &Budget<'_>) -> Option<String> {
    let spaces = roots.iter().map(|(cr3, cr4)| Space::new(ram, *cr3, *cr4, budget));
    let (symbols, modules) = spaces.into_iter().find_map(|space| {
        let symbols = find(&space)?;
        let modules = modules::functions(&space, &symbols);
        Some((symbols, modules))
    })?;
    let mut text = String::new();
    for Symbol { address, kind, name } in symbols.into_iter().chain(modules) {
        if matches!(kind, 't' | 'T' | 'w' | 'W') {
            let _ = writeln!(text, "{address:016x} {kind} {name}");
        }
    }
    Some(text)
}

/// All symbols of the kernel in `space`.
pub fn find(space: &Space<'_>) -> Option<Vec<Symbol>> {
    let (mut left, mut candidates) = (MOST, CANDIDATES);
    let mut words = vec![0u64; STEP / 8];
    for run in space.mapped(IMAGE) {
        let mut at = run.start;
        while at < run.end && left > 0 {
            let len = STEP.min(usize::try_from(run.end - at).unwrap_or(STEP));
            left = left.saturating_sub(len as u64);
            if space.budget().goes_on(len / 8) && space.read(at, &mut words.as_mut_bytes()[..len]) {
                for (number, word) in words[..len / 8].iter().enumerate() {
                    // Most are none by their first number already.
                    if *word as u16 != 0 || !tables::may_begin_index(word.to_ne_bytes()) {
                        continue;
                    }
                    candidates = candidates.checked_sub(1)?;
                    if let Some(symbols) = tables::read(space, at + 8 * number as u64) {
                        return Some(symbols);
                    }
                }
            }
            at += len as u64;
        }
    }
    None
}
