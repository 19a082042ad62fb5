//! Takes the padding out of what a boot loader copies of a vmlinux. Called by `tuned`.
//!
//! The x86-64 kernel aligns its sections to 2 MiB, and its ELF segments contain the gaps: of the 18 MB that such a segment
//! table tells a loader to copy, two thirds are filler, and each page of it is a page of guest memory that somebody has to
//! fault in. The sections stay where they are in the file; only the table of segments is rewritten so that it leaves out
//! runs of filler. A page of `int3` between functions is never executed, and zeros are what fresh guest memory holds (a
//! segment's size in memory still covers them, as for .bss).

use std::ops::Range;

const PAGE: usize = 4096;
/// Shorter runs are not worth a segment of their own.
const SHORTEST_RUN: usize = 8 * PAGE;
/// `int3`, which the kernel's linker script fills code gaps with.
const CODE_FILLER: u8 = 0xcc;

// ELF-64 (System V gABI, chapters 4 and 5).
const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PF_X: u32 = 1;

/// Why a file was left as it is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Not ELF-64, little endian, or its tables lie outside of the file.
    #[error("not a whole 64-bit ELF file")]
    Malformed,
    /// The table of segments would run into the first section.
    #[error("no room for {0} segments")]
    NoRoom(usize),
}

/// One line of the table of segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// Rewrites the table of segments of `file` in place. How many bytes a loader copies before and after.
pub fn leave_out_padding(file: &mut [u8]) -> Result<(u64, u64), Error> {
    let segments = read_segments(file)?;
    let mut slim = Vec::new();
    for segment in &segments {
        match segment.kind {
            PT_LOAD => slim.extend(split(segment, file)?),
            _ => slim.push(*segment),
        }
    }
    let loaded =
        |segments: &[Segment]| segments.iter().filter(|s| s.kind == PT_LOAD).map(|s| s.file_size).sum();
    let sizes = (loaded(&segments), loaded(&slim));

    let table = EHDR_SIZE..EHDR_SIZE + slim.len() * PHDR_SIZE;
    let first_content = segments.iter().filter(|s| s.file_size > 0).map(|s| s.offset).min().unwrap_or(0);
    if table.end as u64 > first_content || table.end > file.len() || slim.len() >= 0xffff {
        return Err(Error::NoRoom(slim.len()));
    }
    for (segment, bytes) in slim.iter().zip(file[table].chunks_exact_mut(PHDR_SIZE)) {
        segment.write(bytes);
    }
    file[32..40].copy_from_slice(&(EHDR_SIZE as u64).to_le_bytes());
    file[56..58].copy_from_slice(&(slim.len() as u16).to_le_bytes());
    Ok(sizes)
}

fn read_segments(file: &[u8]) -> Result<Vec<Segment>, Error> {
    // e_ident: magic, ELFCLASS64, ELFDATA2LSB.
    if file.get(..6) != Some(b"\x7fELF\x02\x01") || file.len() < EHDR_SIZE {
        return Err(Error::Malformed);
    }
    let half = |at: usize| usize::from(u16::from_le_bytes([file[at], file[at + 1]]));
    let start = usize::try_from(u64_at(file, 32)?).map_err(|_| Error::Malformed)?;
    let (size, count) = (half(54), half(56));
    let table = start
        .checked_add(count * PHDR_SIZE)
        .and_then(|end| file.get(start..end))
        .filter(|_| size == PHDR_SIZE)
        .ok_or(Error::Malformed)?;
    table.chunks_exact(PHDR_SIZE).map(Segment::read).collect()
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Error> {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or(Error::Malformed)?;
    Ok(u64::from_le_bytes(*bytes))
}

impl Segment {
    fn read(bytes: &[u8]) -> Result<Self, Error> {
        let kind_and_flags = u64_at(bytes, 0)?;
        Ok(Self {
            kind: kind_and_flags as u32,
            flags: (kind_and_flags >> 32) as u32,
            offset: u64_at(bytes, 8)?,
            vaddr: u64_at(bytes, 16)?,
            paddr: u64_at(bytes, 24)?,
            file_size: u64_at(bytes, 32)?,
            memory_size: u64_at(bytes, 40)?,
            align: u64_at(bytes, 48)?,
        })
    }

    fn write(&self, bytes: &mut [u8]) {
        bytes[0..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_le_bytes());
        let words = [self.offset, self.vaddr, self.paddr, self.file_size, self.memory_size, self.align]
            .map(u64::to_le_bytes);
        bytes[8..].copy_from_slice(words.as_flattened());
    }

    /// The part of it from `start` on, for `file_size` bytes of the file and `memory_size` in memory.
    fn part(&self, start: u64, file_size: u64, memory_size: u64) -> Self {
        Self {
            offset: self.offset + start,
            vaddr: self.vaddr.wrapping_add(start),
            paddr: self.paddr.wrapping_add(start),
            file_size,
            memory_size,
            ..*self
        }
    }
}

/// The segment without its runs of filler. Each part's size in memory reaches to the next part, so that together they
/// cover what the whole did.
fn split(segment: &Segment, file: &[u8]) -> Result<Vec<Segment>, Error> {
    let range = usize::try_from(segment.offset)
        .ok()
        .zip(usize::try_from(segment.file_size).ok())
        .and_then(|(start, size)| file.get(start..start.checked_add(size)?))
        .ok_or(Error::Malformed)?;
    let kept = content(range, segment.flags & PF_X != 0);
    if kept.is_empty() {
        return Ok(vec![segment.part(0, 0, segment.memory_size)]);
    }
    let ends = kept.iter().skip(1).map(|next| next.start as u64).chain([segment.memory_size]);
    let before =
        kept.first().filter(|first| first.start > 0).map(|first| segment.part(0, 0, first.start as u64));
    let parts = kept
        .iter()
        .zip(ends)
        .map(|(r, end)| segment.part(r.start as u64, r.len() as u64, end - r.start as u64));
    Ok(before.into_iter().chain(parts).collect())
}

/// Where `bytes` are not filler for at least [`SHORTEST_RUN`]; whole pages from the beginning of `bytes`.
fn content(bytes: &[u8], code: bool) -> Vec<Range<usize>> {
    let mut kept: Vec<Range<usize>> = Vec::new();
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        let filler = page[0];
        if (filler == 0 || (code && filler == CODE_FILLER)) && page.iter().all(|&byte| byte == filler) {
            continue;
        }
        let (start, end) = (index * PAGE, index * PAGE + page.len());
        match kept.last_mut() {
            Some(last) if start - last.end < SHORTEST_RUN => last.end = end,
            _ => kept.push(start..end),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x100_0000;

    /// A file of one segment with this content, at offset 4096.
    fn elf(content: &[u8], flags: u32, memory_size: u64) -> Vec<u8> {
        let mut file = vec![0; PAGE];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[32..40].copy_from_slice(&64_u64.to_le_bytes());
        file[54..56].copy_from_slice(&(PHDR_SIZE as u16).to_le_bytes());
        file[56..58].copy_from_slice(&1_u16.to_le_bytes());
        let segment = Segment {
            kind: PT_LOAD,
            flags,
            offset: PAGE as u64,
            vaddr: 0xffff_ffff_8100_0000,
            paddr: BASE,
            file_size: content.len() as u64,
            memory_size,
            align: PAGE as u64,
        };
        segment.write(&mut file[64..64 + PHDR_SIZE]);
        file.extend_from_slice(content);
        file
    }

    /// What a loader makes of it: the memory from `BASE` on, untouched bytes as `None`, and where segments reach to.
    fn load(file: &[u8]) -> (Vec<Option<u8>>, u64) {
        let (mut memory, mut end) = (Vec::new(), 0);
        for s in read_segments(file).unwrap() {
            let at = (s.paddr - BASE) as usize;
            assert_eq!(s.vaddr - 0xffff_ffff_8100_0000, s.paddr - BASE);
            memory.resize(memory.len().max(at + s.file_size as usize), None);
            for (to, from) in
                memory[at..].iter_mut().zip(&file[s.offset as usize..(s.offset + s.file_size) as usize])
            {
                *to = Some(*from);
            }
            end = end.max(s.paddr - BASE + s.memory_size);
        }
        (memory, end)
    }

    #[test]
    fn long_runs_go_short_runs_and_content_stay() {
        let mut code = vec![0x90; 2 * PAGE];
        code.extend(vec![CODE_FILLER; 20 * PAGE]);
        code.extend(vec![0x90; PAGE + 5]);
        code.extend(vec![0; 3 * PAGE - 5]);
        code.extend(vec![0x91; 7]);
        let mut file = elf(&code, 5, 100 * PAGE as u64);
        let (before, after) = leave_out_padding(&mut file).unwrap();
        assert_eq!((before, after), (code.len() as u64, (2 * PAGE + 4 * PAGE + 7) as u64));
        let (memory, end) = load(&file);
        assert_eq!(end, 100 * PAGE as u64);
        for (at, (&want, got)) in code.iter().zip(memory).enumerate() {
            assert!(got == Some(want) || (got.is_none() && want == CODE_FILLER), "at {at:#x}");
        }
    }

    #[test]
    fn filler_of_code_is_data_elsewhere() {
        let mut file = elf(&vec![CODE_FILLER; 20 * PAGE], 6, 20 * PAGE as u64);
        assert_eq!(leave_out_padding(&mut file), Ok((20 * PAGE as u64, 20 * PAGE as u64)));
        let mut file = elf(&vec![0; 20 * PAGE], 6, 20 * PAGE as u64);
        assert_eq!(leave_out_padding(&mut file), Ok((20 * PAGE as u64, 0)));
        assert_eq!(load(&file).1, 20 * PAGE as u64);
        // Zeros in front are memory too.
        let content = [&[0; 20 * PAGE][..], &[1]].concat();
        let mut file = elf(&content, 6, 30 * PAGE as u64);
        assert_eq!(leave_out_padding(&mut file), Ok((20 * PAGE as u64 + 1, 1)));
        assert_eq!(read_segments(&file).unwrap()[0].memory_size, 20 * PAGE as u64);
        assert_eq!(load(&file).1, 30 * PAGE as u64);
    }

    #[test]
    fn twice_is_as_once() {
        let mut code = vec![1; PAGE];
        code.extend(vec![0; 50 * PAGE]);
        code.extend(vec![1; PAGE]);
        let mut file = elf(&code, 5, code.len() as u64);
        leave_out_padding(&mut file).unwrap();
        let once = file.clone();
        assert_eq!(leave_out_padding(&mut file), Ok((2 * PAGE as u64, 2 * PAGE as u64)));
        assert!(file == once);
    }

    #[test]
    fn damaged_files_are_refused() {
        assert_eq!(leave_out_padding(&mut []), Err(Error::Malformed));
        assert_eq!(leave_out_padding(&mut [0; 100]), Err(Error::Malformed));
        let mut short = elf(&[1; PAGE], 5, PAGE as u64);
        short.truncate(PAGE + 1);
        assert_eq!(leave_out_padding(&mut short), Err(Error::Malformed));
        let mut far = elf(&[1; PAGE], 5, PAGE as u64);
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(leave_out_padding(&mut far), Err(Error::Malformed));
        // The first section right behind the table.
        let mut tight =
            elf(&[[1; PAGE].as_slice(), &[0; 20 * PAGE], &[1; PAGE]].concat(), 5, 30 * PAGE as u64);
        tight[72..80].copy_from_slice(&120_u64.to_le_bytes());
        assert!(matches!(leave_out_padding(&mut tight), Err(Error::NoRoom(_))));
    }
}
