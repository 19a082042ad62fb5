//! x86-64 ELF kernels: the headers, the loadable segments, and the note with the PVH entry point.
//!
//! [`load`](super::load) parses, then the protocol's loader calls [`Elf::load`]. The structures are linux-loader's;
//! its loader itself is not used, because it checks neither class nor machine nor bounds and lets a hostile note
//! overflow its arithmetic.

use std::ops::Range;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_386, EM_AARCH64, EM_RISCV, EM_X86_64, ET_EXEC, ET_REL,
    Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_INTERP, PT_LOAD, PT_NOTE,
};

use crate::boot::error::Error;
use crate::boot::image::Image;
use crate::memory::{self, Memory, layout};

/// Note type of the PVH entry point (Xen's public/elfnote.h): a 32-bit physical address.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// What Linux takes of a command line without the final NUL: COMMAND_LINE_SIZE (2048 on x86) less one. A bzImage says it
/// itself, in its setup header's cmdline_size.
pub const CMDLINE_MAX: usize = 2047;
/// More program headers than any kernel has; bounds the work that a hostile file can ask for.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Likewise for the bytes of one note segment. Linux's is less than 1 KiB.
const MAX_NOTES: u64 = 16 << 10;

/// A piece of the file and its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// Where in the file.
    pub offset: u64,
    /// Bytes of the file.
    pub file_size: u64,
    /// Guest physical address.
    pub address: u64,
    /// The first address after it, and after the zeroes that follow.
    pub end: u64,
}

/// A parsed kernel.
#[derive(Debug)]
pub struct Elf {
    /// Entry point: for Linux the physical address of its 64-bit entry.
    pub entry: u64,
    /// The PVH entry point, if it has one.
    pub pvh_entry: Option<u32>,
    /// It names a loader of programs to run it. Programs do; so do FreeBSD's kernel and Solo5's, which nobody loads so.
    pub interpreted: bool,
    segments: Vec<Segment>,
}

impl Elf {
    /// Parses the headers of `kernel`, which begins with ELF's magic number.
    ///
    /// # Errors
    /// Other classes and machines, and headers that contradict themselves.
    pub fn parse(kernel: &Image) -> Result<Self, Error> {
        let header: Elf64_Ehdr = kernel.header(0, "the ELF header")?;
        check_machine(kernel, &header)?;
        if header.e_phnum == 0 || header.e_phnum > MAX_PROGRAM_HEADERS {
            return Err(kernel.damaged(format!("{} program headers", header.e_phnum)));
        }
        if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
            return Err(kernel.damaged(format!("program headers of {} bytes", header.e_phentsize)));
        }
        let (mut pvh_note, mut interpreted, mut segments) = (None, false, Vec::new());
        for i in 0..u64::from(header.e_phnum) {
            let at = header.e_phoff.saturating_add(i * size_of::<Elf64_Phdr>() as u64);
            let program: Elf64_Phdr = kernel.header(at, "a program header")?;
            match program.p_type {
                PT_LOAD if program.p_memsz > 0 => segments.push(segment(kernel, &program)?),
                PT_NOTE => pvh_note = pvh_note.or(pvh_entry(kernel, &program)?),
                PT_INTERP => interpreted = true,
                _ => {}
            }
        }
        Ok(Self {
            pvh_entry: pvh_note,
            interpreted,
            ..Self::from_segments(kernel, header.e_entry, segments)?
        })
    }

    /// What another format describes as ELF does.
    ///
    /// # Errors
    /// There is nothing to load, or more than the file has.
    pub(super) fn from_segments(kernel: &Image, entry: u64, segments: Vec<Segment>) -> Result<Self, Error> {
        if segments.is_empty() {
            return Err(kernel.damaged("it has no segment to load"));
        }
        // Segments of a sane file share no bytes, so reading all of them costs no more than reading the file.
        let total = segments.iter().fold(0u64, |sum, s| sum.saturating_add(s.file_size));
        if total > kernel.len() {
            return Err(kernel.damaged("its segments are longer than the file"));
        }
        Ok(Self { entry, pvh_entry: None, interpreted: false, segments })
    }

    /// The memory that the kernel takes, from its first to its last byte.
    pub fn range(&self) -> Range<u64> {
        let start = self.segments.iter().map(|s| s.address).min().unwrap_or(0);
        let end = self.segments.iter().map(|s| s.end).max().unwrap_or(0);
        start..end
    }

    /// Reads the segments into memory. Their zero-filled ends are left as they are: zero. `entry` is the entry point
    /// that will be used.
    ///
    /// # Errors
    /// A segment or the entry point outside the memory for kernels, and read errors.
    pub fn load(&self, kernel: &Image, memory: &Memory, entry: u64) -> Result<Range<u64>, Error> {
        self.load_above(kernel, memory, entry, layout::HIGH_RAM)
    }

    /// [`Elf::load`] for a kernel that may begin at `lowest`, below 1 MiB, if no part of it lies in the legacy hole.
    ///
    /// # Errors
    /// As [`Elf::load`].
    pub(super) fn load_above(
        &self,
        kernel: &Image,
        memory: &Memory,
        entry: u64,
        lowest: u64,
    ) -> Result<Range<u64>, Error> {
        let range = self.range();
        if range.start < lowest {
            let what = format!("its load address {:#x} is below {lowest:#x}", range.start);
            return Err(kernel.damaged(what));
        }
        let hole = layout::LOW_END..layout::HIGH_RAM;
        if let Some(s) = self.segments.iter().find(|s| s.address < hole.end && hole.start < s.end) {
            let what = format!("its segment at {:#x} lies in the hole below 1 MiB", s.address);
            return Err(kernel.damaged(what));
        }
        check_fits(kernel, memory, range.end)?;
        if !self.segments.iter().any(|s| (s.address..s.address + s.file_size).contains(&entry)) {
            return Err(kernel.damaged(format!("its entry point {entry:#x} is in no segment")));
        }
        // As a whole: a huge page may hold the end of one segment and the start of the next. Not what is zero at the end, which may be
        // a heap of any size.
        let loaded = self.segments.iter().map(|s| s.address + s.file_size).max().unwrap_or(range.start);
        memory::expect(memory.ram(), range.start..loaded);
        for s in &self.segments {
            kernel.load(s.offset, s.file_size, memory.ram(), s.address, "a segment")?;
        }
        Ok(range)
    }
}

/// Whether a kernel that ends at `end` fits into the memory below the hole.
///
/// # Errors
/// [`Error::KernelTooBig`].
pub fn check_fits(kernel: &Image, memory: &Memory, end: u64) -> Result<(), Error> {
    let have = memory.size().min(layout::HOLE.start);
    if end > have {
        let needed = (end <= layout::HOLE.start).then_some(end);
        return Err(Error::KernelTooBig { path: kernel.path().to_owned(), end, have, needed });
    }
    Ok(())
}

fn check_machine(kernel: &Image, header: &Elf64_Ehdr) -> Result<(), Error> {
    let path = || kernel.path().to_owned();
    let little = header.e_ident[EI_DATA] == ELFDATA2LSB;
    let machine = if little { header.e_machine } else { header.e_machine.swap_bytes() };
    match machine {
        EM_386 => return Err(Error::Only32Bit { path: path() }),
        EM_X86_64 if little => {}
        other => {
            let machine = match other {
                EM_AARCH64 => "arm64".to_owned(),
                EM_RISCV => "RISC-V".to_owned(),
                _ => format!("ELF machine {other}"),
            };
            return Err(Error::Foreign { path: path(), machine });
        }
    }
    if header.e_ident[EI_CLASS] != ELFCLASS64 {
        return Err(Error::Only32Bit { path: path() });
    }
    let not = |what| Err(Error::NotAKernel { path: path(), what, hint: "use a bzImage or a vmlinux" });
    match header.e_type {
        ET_EXEC => Ok(()),
        ET_REL => not("an object file or a kernel module"),
        _ => not("an ELF file of another type (a shared object or position-independent program)"),
    }
}

fn segment(kernel: &Image, program: &Elf64_Phdr) -> Result<Segment, Error> {
    let (offset, file_size, address) = (program.p_offset, program.p_filesz, program.p_paddr);
    let end = address.checked_add(program.p_memsz);
    match end {
        Some(end) if file_size <= program.p_memsz => Ok(Segment { offset, file_size, address, end }),
        _ => Err(kernel.damaged(format!("a segment at {address:#x} with impossible sizes"))),
    }
}

/// Looks for the PVH entry point among the notes of one segment. Notes that make no sense end the search: other tools
/// ignore them, and a kernel without the note still has its other entry.
fn pvh_entry(kernel: &Image, program: &Elf64_Phdr) -> Result<Option<u32>, Error> {
    let end = program.p_filesz.min(MAX_NOTES);
    let mut at = 0u64;
    while end.saturating_sub(at) >= size_of::<Elf64_Nhdr>() as u64 {
        let offset = program.p_offset.saturating_add(at);
        let note: Elf64_Nhdr = kernel.header(offset, "a note")?;
        // Name and descriptor are padded to 4 bytes each.
        let name = at + size_of::<Elf64_Nhdr>() as u64;
        let value = name + u64::from(note.n_namesz).next_multiple_of(4);
        let next = value + u64::from(note.n_descsz).next_multiple_of(4);
        if note.n_type == XEN_ELFNOTE_PHYS32_ENTRY && note.n_namesz == 4 && value + 4 <= end {
            let mut owner = [0; 4];
            kernel.bytes(program.p_offset.saturating_add(name), &mut owner, "a note's name")?;
            if owner == *b"Xen\0" {
                if note.n_descsz < 4 {
                    return Err(kernel.damaged("its PVH entry note is too short"));
                }
                let mut entry = [0; 4];
                kernel.bytes(program.p_offset.saturating_add(value), &mut entry, "the PVH entry note")?;
                return Ok(Some(u32::from_le_bytes(entry)));
            }
        }
        at = next;
    }
    Ok(None)
}
