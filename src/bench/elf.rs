//! The little that measurements need of ELF: a program or kernel of some instructions, and whether a program file can be put
//! where there are no shared libraries. Tests make their guests by it, too.
//!
//! The files are our own, so a damaged one gets one error and no diagnosis.

use std::fs;
use std::path::Path;

/// Program header types (System V ABI, gABI 4+, "Program Header").
const PT_LOAD: u64 = 1;
const PT_INTERP: u64 = 3;
const PT_NOTE: u64 = 4;
/// Offsets in the ELF header of a 64-bit file.
const SECTION_HEADERS: usize = 40;
const SECTION_COUNT: usize = 60;
const HEADER_SIZE: usize = 64;

/// A program header: kind, place in the file, size there.
type Segment = (u64, usize, usize);

/// Where a kernel of a few instructions starts.
pub const LOAD: u64 = 16 << 20;
/// Where the code of a file stands that is made here. Linux maps whole pages, so a program's address ends in it, too.
pub const CODE: u64 = 0x100;

/// A program of a few instructions, which begins at `start`.
pub fn program(code: &[u8], start: u64) -> Vec<u8> {
    debug_assert_eq!(start % 0x1000, CODE);
    image(code, start, &[])
}

/// A kernel of a few instructions, in an ELF file as Linux's vmlinux is one. It starts in 64-bit mode at [`LOAD`].
pub fn kernel(code: &[u8]) -> Vec<u8> {
    image(code, LOAD, &[])
}

/// The same with the note that gives it a PVH entry point (Xen's public/elfnote.h: name size, data size,
/// XEN_ELFNOTE_PHYS32_ENTRY, the name, the entry point): it starts in 32-bit mode, in every monitor that loads ELF files.
pub fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    let note = [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD as u32];
    image(code, LOAD, &note.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>())
}

/// One piece, readable and executable, at `start` in memory; and what the file's notes hold, if anything.
fn image(code: &[u8], start: u64, note: &[u8]) -> Vec<u8> {
    const NOTE: u64 = 0xc0;
    // Kind, flags (4 read, 1 execute), then: place in the file, two addresses, two sizes, alignment.
    let (size, length) = (code.len() as u64, note.len() as u64);
    let load = (PT_LOAD, 5u32, [CODE, start, start, size, size, CODE]);
    let notes = (PT_NOTE, 4u32, [NOTE, 0, 0, length, length, 4]);
    let headers = if note.is_empty() { vec![load] } else { vec![load, notes] };

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&2u16.to_le_bytes()); // ET_EXEC
    put(&62u16.to_le_bytes()); // EM_X86_64
    put(&1u32.to_le_bytes()); // EV_CURRENT
    put(&start.to_le_bytes());
    put(&(HEADER_SIZE as u64).to_le_bytes()); // program headers
    put(&0u64.to_le_bytes()); // section headers
    put(&0u32.to_le_bytes()); // flags
    for half in [HEADER_SIZE as u16, 56, headers.len() as u16, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    for (kind, flags, words) in headers {
        put(&(kind as u32).to_le_bytes());
        put(&flags.to_le_bytes());
        words.iter().for_each(|word| put(&word.to_le_bytes()));
    }
    file.resize(NOTE as usize, 0);
    file.extend_from_slice(note);
    file.resize(CODE as usize, 0);
    file.extend_from_slice(code);
    file
}

/// # Errors
/// The program cannot be read, or needs shared libraries.
pub fn must_be_static(program: &Path) -> Result<(), String> {
    let bytes = fs::read(program).map_err(|error| format!("read {}: {error}", program.display()))?;
    match segments(&bytes) {
        None => Err(format!("{} is not a 64-bit ELF program", program.display())),
        Some(segments) if segments.iter().any(|(kind, ..)| *kind == PT_INTERP) => Err(format!(
            "{} needs shared libraries, which are not there inside: build it static: cargo static",
            program.display()
        )),
        Some(_) => Ok(()),
    }
}

/// The program without what is never loaded: debug information, symbols, section names. `None`: it is no program.
pub fn loaded_part(bytes: &[u8]) -> Option<Vec<u8>> {
    let ends =
        segments(bytes)?.into_iter().filter(|(kind, ..)| *kind == PT_LOAD).map(|(_, at, size)| at + size);
    let mut part = bytes.get(..ends.max()?.max(HEADER_SIZE))?.to_vec();
    part[SECTION_HEADERS..SECTION_HEADERS + 8].fill(0);
    // Their number, and which of them has the names.
    part[SECTION_COUNT..HEADER_SIZE].fill(0);
    Some(part)
}

fn segments(bytes: &[u8]) -> Option<Vec<Segment>> {
    let number = |at: usize, size: usize| {
        let field = bytes.get(at..at.checked_add(size)?)?;
        Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    if bytes.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (start, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    (0..count)
        .map(|index| {
            let at = start.checked_add(index * size)?;
            Some((number(at, 4)?, number(at + 8, 8)? as usize, number(at + 32, 8)? as usize))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_loaded_is_left_out_and_the_rest_runs() {
        use std::os::unix::fs::PermissionsExt;
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        let part = loaded_part(&own).unwrap();
        assert!(part.len() < own.len());
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("part");
        fs::write(&file, part).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        let listed = std::process::Command::new(&file).arg("--list").output().unwrap();
        assert!(String::from_utf8_lossy(&listed.stdout).contains("what_is_not_loaded"), "{listed:?}");
    }

    #[test]
    fn what_is_no_program_is_told() {
        assert_eq!(loaded_part(b"#!/bin/sh"), None);
        assert_eq!(loaded_part(b"\x7fELF\x02"), None);
        let error = must_be_static(Path::new("/no/such")).unwrap_err();
        assert!(error.contains("/no/such"), "{error}");
    }
}
