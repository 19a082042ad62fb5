//! What boots x86-64 and no other: a file per protocol, the formats that kernels come in, a PC's firmware and tables.
//!
//! `linux` (64-bit Linux boot protocol, for bzImage and ELF), `pvh` and `multiboot`; `firmware` in their place.

mod clock;
mod elf;
mod entry;
pub mod firmware;
mod linux;
mod multiboot;
mod pvh;
mod sniff;
pub mod tables;

use super::error::Error;
use super::image::Input;
use super::{Boot, Payload};
use crate::config::BootProtocol;
use crate::memory::{self, Memory, layout};
use sniff::Format;

pub use crate::kvm::regs::Entry;
pub use clock::missing_clock;
pub use sniff::is_compressed;

/// Puts the kernel, its initrd, command line, boot structures and the platform's ACPI tables into `memory`, which
/// must read as zeroes where nothing was loaded (a kernel's bss relies on it).
///
/// # Errors
/// [`Error`], which names the file and has a hint. `memory` may have been written to in part.
pub fn load(memory: &Memory, payload: &Payload, platform: &tables::Platform) -> Result<Entry, Error> {
    let kernel = payload.kernel.image()?;
    let (format, multiboot) = sniff::kernel(&kernel)?;
    let initrd = payload.initrd.as_ref().map(Input::image).transpose()?;
    let rsdp = tables::write(memory.ram(), platform)
        .map_err(|source| Error::Tables { path: kernel.path().to_owned(), source })?;
    expect_linux(memory);
    let boot = Boot { memory, kernel: &kernel, initrd: initrd.as_ref(), cmdline: &payload.cmdline, rsdp };
    match (format, payload.protocol) {
        (_, BootProtocol::Multiboot) => multiboot::load(&boot, multiboot.as_ref()),
        (Format::Elf32 | Format::Flat, BootProtocol::Auto) if multiboot.is_some() => {
            multiboot::load(&boot, multiboot.as_ref())
        }
        (Format::Flat, _) => Err(Error::NotAKernel {
            path: kernel.path().to_owned(),
            what: "a Multiboot image",
            hint: "drop `boot=`, or use `boot=multiboot`",
        }),
        (Format::BzImage, BootProtocol::Auto | BootProtocol::Linux64) => linux::load_bzimage(&boot),
        (Format::BzImage, BootProtocol::Pvh) => Err(Error::NoPvh {
            path: kernel.path().to_owned(),
            why: "it is a bzImage",
            hint: "drop `boot=`, or boot the vmlinux inside it: scripts/extract-vmlinux of the kernel's source extracts it",
        }),
        (Format::Elf | Format::Elf32, protocol) => {
            let elf = elf::Elf::parse(&kernel)?;
            match (elf.pvh_entry, protocol) {
                (Some(entry), BootProtocol::Auto | BootProtocol::Pvh) => pvh::load(&boot, &elf, entry),
                (None, BootProtocol::Auto) if multiboot.is_some() => {
                    multiboot::load(&boot, multiboot.as_ref())
                }
                (None, BootProtocol::Pvh) => Err(Error::NoPvh {
                    path: kernel.path().to_owned(),
                    why: "its ELF notes have no XEN_ELFNOTE_PHYS32_ENTRY",
                    hint: "drop `boot=`, or build it with CONFIG_PVH=y",
                }),
                // Only the ways in above are marked as a kernel's.
                (_, _) if elf.interpreted => Err(Error::NotAKernel {
                    path: kernel.path().to_owned(),
                    what: "a program",
                    hint: "use a bzImage or a vmlinux",
                }),
                (_, _) => linux::load_elf(&boot, &elf),
            }
        }
    }
}

/// What Linux uses whole while it starts, beside its own image (seen in traces of kernel 6.1): the array that describes each page of
/// RAM by 64 bytes, which it puts just below the highest 2 MiB.
fn expect_linux(memory: &Memory) {
    const BLOCK: u64 = 2 << 20;
    let Some(highest) = layout::ram(memory.size()).pop() else { return };
    let pages = (memory.size() / 64).next_multiple_of(BLOCK);
    let end = (highest.end / BLOCK).saturating_sub(1) * BLOCK;
    memory::expect(memory.ram(), end.saturating_sub(pages).max(BLOCK)..end);
}

#[cfg(test)]
mod tests;
