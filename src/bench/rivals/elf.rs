//! What must be known of a program file before it is put where there are no shared libraries and little room.
//!
//! The file is one of ours, so a damaged one gets one error and no diagnosis.

use std::fs;
use std::path::Path;

/// Program header types (System V ABI, gABI 4+, "Program Header").
const PT_LOAD: u64 = 1;
const PT_INTERP: u64 = 3;
/// Offsets in the ELF header of a 64-bit file.
const SECTION_HEADERS: usize = 40;
const SECTION_COUNT: usize = 60;
const HEADER_SIZE: usize = 64;

/// A program header: kind, place in the file, size there.
type Segment = (u64, usize, usize);

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
