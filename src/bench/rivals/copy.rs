//! Contenders start from copies that were made alike: how a program lies in the page cache (in large folios or in single
//! pages, by what wrote it) moves a start by 4 to 14%, and whoever else maps its file takes a part of its memory's weight.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// The folder of the copies, in the scratch folder.
const COPIES: &str = "contenders";
/// In a copy's folder: a link to what was copied.
const ORIGINAL: &str = "original";
/// Folders beside a program's `bin` that it may look for from where it stands: QEMU's firmware, libraries.
const BESIDE: [&str; 3] = ["share", "lib", "libexec"];
/// Written at a time, the same for all.
const PIECE: usize = 128 << 10;

/// The copy of `program` in `scratch`: made at the first call. Variants beside it (`passt.avx2`) are copied with it, and the
/// folders beside its own are linked beside the copy's.
///
/// One that runs with another user's rights by its file (set-user-ID) would lose them, so it is started where it is.
///
/// # Errors
/// It cannot be copied: which file, and why.
pub fn copied(name: &str, program: &Path, scratch: &Path) -> Result<PathBuf, String> {
    let failed = |error: io::Error| format!("copy {}: {error}", program.display());
    // A program may do what the name says by which it is called, so the copy has the link's name.
    let called = program.file_name().ok_or_else(|| format!("{} is no program", program.display()))?;
    let original = fs::canonicalize(program).map_err(failed)?;
    if fs::metadata(&original).map_err(failed)?.permissions().mode() & 0o6000 != 0 {
        return Ok(original);
    }
    let folder = scratch.join(COPIES).join(name);
    let (bin, link) = (folder.join("bin"), folder.join(ORIGINAL));
    let copy = bin.join(called);
    // Linked last: what is linked is whole.
    if fs::read_link(&link).is_ok_and(|known| known == original) {
        return Ok(copy);
    }
    fs::create_dir_all(&bin).map_err(failed)?;
    copy_file(&original, &copy).map_err(failed)?;
    let from = original.parent().unwrap_or(Path::new("/"));
    for variant in variants(&original).map_err(failed)? {
        copy_file(&from.join(&variant), &bin.join(&variant)).map_err(failed)?;
    }
    if from.file_name().is_some_and(|name| name == "bin") {
        for beside in BESIDE.map(|name| from.with_file_name(name)).iter().filter(|folder| folder.is_dir()) {
            let to = folder.join(beside.file_name().unwrap_or_default());
            symlink(beside, to).map_err(failed)?;
        }
    }
    symlink(&original, link).map_err(failed)?;
    Ok(copy)
}

/// A sentence on what was copied so far, for a suite's method; none if nothing was.
pub fn told(scratch: &Path) -> Option<String> {
    let copies = fs::read_dir(scratch.join(COPIES)).ok()?.flatten();
    let mut originals: Vec<_> =
        copies.filter_map(|copy| fs::read_link(copy.path().join(ORIGINAL)).ok()).collect();
    originals.sort();
    originals.dedup();
    let originals: Vec<_> = originals.iter().map(|path| path.display().to_string()).collect();
    (!originals.is_empty()).then(|| {
        format!(
            "Programs are started from copies made for this run, all alike (read, and written in pieces of {} KiB), of: {}. \
             Nobody else runs those files: the measuring process is a program of its own, vmm-bench.",
            PIECE >> 10,
            originals.join(", ")
        )
    })
}

/// Files beside `program` whose names are its own and a suffix: of them it may start the one that fits the processor.
fn variants(program: &Path) -> io::Result<Vec<String>> {
    let (Some(folder), Some(name)) = (program.parent(), program.file_name().and_then(|name| name.to_str()))
    else {
        return Ok(Vec::new());
    };
    let is_program = |path: &Path| {
        fs::metadata(path).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    };
    let names = fs::read_dir(folder)?.flatten().filter(|entry| is_program(&entry.path()));
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|other| other.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'))).collect())
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    // In place of a file that was there: it may be running.
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut target = File::options().write(true).create_new(true).mode(0o755).open(to)?;
    let mut piece = vec![0; PIECE];
    loop {
        let mut filled = 0;
        while filled < PIECE {
            match source.read(&mut piece[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            return Ok(());
        }
        target.write_all(&piece[..filled])?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A script in a `bin` of its own, with a `share` beside it.
    fn program(folder: &Path, name: &str, says: &str) -> PathBuf {
        let bin = folder.join("bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir_all(folder.join("share")).unwrap();
        let path = bin.join(name);
        fs::write(&path, format!("#!/bin/sh\necho {says}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_copy_runs_with_what_it_needs_beside_it_and_is_made_once() {
        let (from, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let original = program(from.path(), "rival", "original");
        program(from.path(), "rival.avx2", "variant");
        program(from.path(), "rival2", "other");
        fs::write(from.path().join("share/firmware"), "bytes").unwrap();
        let copy = copied("rival", &original, scratch.path()).unwrap();
        assert!(copy.starts_with(scratch.path()) && copy.ends_with("bin/rival"), "{}", copy.display());
        assert_eq!(fs::read(&copy).unwrap(), fs::read(&original).unwrap());
        let output = std::process::Command::new(&copy).output().unwrap();
        assert_eq!(output.stdout, b"original\n");
        assert!(copy.with_file_name("rival.avx2").exists() && !copy.with_file_name("rival2").exists());
        assert_eq!(fs::read(copy.parent().unwrap().join("../share/firmware")).unwrap(), b"bytes");
        fs::write(&original, "changed").unwrap();
        assert_eq!(copied("rival", &original, scratch.path()).unwrap(), copy);
        assert_ne!(fs::read(&copy).unwrap(), b"changed");
        let told = told(scratch.path()).unwrap();
        assert!(told.contains(&fs::canonicalize(&original).unwrap().display().to_string()), "{told}");
    }

    #[test]
    fn a_link_keeps_its_name_and_set_user_id_stays_where_it_is() {
        let (from, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let original = program(from.path(), "rival-8.2", "original");
        let link = from.path().join("rival");
        symlink(&original, &link).unwrap();
        let copy = copied("linked", &link, scratch.path()).unwrap();
        assert!(copy.ends_with("bin/rival") && !copy.is_symlink());
        fs::set_permissions(&original, fs::Permissions::from_mode(0o4755)).unwrap();
        let place = copied("set-user-ID", &link, scratch.path()).unwrap();
        assert_eq!(place, fs::canonicalize(&original).unwrap());
    }

    #[test]
    fn what_cannot_be_copied_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        let error = copied("gone", Path::new("/no/such/rival"), scratch.path()).unwrap_err();
        assert!(error.contains("/no/such/rival"), "{error}");
        assert_eq!(told(scratch.path()), None);
    }
}
