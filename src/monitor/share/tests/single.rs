//! A file that is shared alone.

use super::*;

const FILE: u64 = 2;

fn guest(read_only: bool, keeps: bool) -> Guest {
    Guest::of("file", read_only, keeps, 100)
}

#[test]
fn a_file_is_in_a_folder_that_has_nothing_else() {
    let mut guest = guest(false, false);
    let found = guest.lookup(ROOT, "its-name").unwrap();
    let ino = fs::metadata(guest.dir.path().join("file")).unwrap().ino();
    assert_eq!((found.node.get(), found.attr.ino.get(), found.attr.size.get()), (FILE, ino, 4));
    for other in ["file", "secret", "beside", "its-nam"] {
        assert_eq!(guest.lookup(ROOT, other).unwrap_err(), Errno::NOENT, "{other}");
    }
    assert_eq!(guest.lookup(ROOT, "..").unwrap_err(), Errno::INVAL);
    let above = guest.stat(ROOT).unwrap();
    assert_eq!((above.mode.get(), above.nlink.get(), above.uid.get()), (0o040_555, 2, 1000));
    let seen: StatxOut = guest.get(Opcode::Statx, ROOT, &[StatxIn::new_zeroed().as_bytes()]).unwrap();
    assert_eq!((seen.attr.mode.get(), seen.attr.ino.get()), (0o040_555, 1));
    for size in [40, 150, 200, 4096] {
        let names: Vec<_> = guest.list(ROOT, size, false).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [".", "..", "its-name"]);
    }
    let plus = guest.list(ROOT, 4096, true);
    assert_eq!(plus, [(".".to_owned(), 0), ("..".to_owned(), 0), ("its-name".to_owned(), FILE)]);
    // It is no folder itself.
    assert_eq!(guest.lookup(FILE, "secret").unwrap_err(), Errno::NOTDIR);
    assert!(guest.get::<OpenOut>(Opcode::Opendir, FILE, &[&[0; 8]]).is_err());
    for nobody in [0, 3, u64::MAX] {
        assert_eq!(guest.open(nobody, libc::O_RDONLY).unwrap_err(), Errno::STALE);
    }
}

#[test]
fn a_file_alone_is_read_written_cut_and_copied() {
    for keeps in [false, true] {
        let mut guest = guest(false, keeps);
        let path = guest.dir.path().join("file");
        let handle = guest.open(FILE, libc::O_RDWR).unwrap();
        assert_eq!(guest.read(FILE, handle, 0, 9).unwrap(), b"file");
        assert_eq!(guest.write(FILE, handle, 4, b" of ours").unwrap(), 8);
        assert_eq!(fs::read(&path).unwrap(), b"file of ours");
        guest.set(FILE, SetattrIn { size: 4.into(), ..changed(set::SIZE) }).unwrap();
        let copy = CopyFileRangeIn {
            from: handle.into(),
            to_node: FILE.into(),
            to: handle.into(),
            to_offset: 4.into(),
            len: 4.into(),
            ..CopyFileRangeIn::new_zeroed()
        };
        guest.ask(Opcode::CopyFileRange, FILE, &[copy.as_bytes()]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"filefile");
        // Somebody's editor puts another in its place: a bind mount stays with the file that it is of, and so does this.
        fs::rename(&path, guest.dir.path().join("old")).unwrap();
        fs::write(&path, "another").unwrap();
        assert_eq!(guest.read(FILE, handle, 0, 9).unwrap(), b"filefile");
        let again = guest.open(FILE, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(FILE, again, 0, 9).unwrap(), b"filefile");
        // The guest's cache lets go of it and finds it again.
        guest.send(&request(Opcode::Forget, FILE, &[&1000_u64.to_le_bytes()]));
        guest.send(&request(Opcode::Forget, ROOT, &[&1000_u64.to_le_bytes()]));
        assert_eq!(guest.lookup(ROOT, "its-name").unwrap().node.get(), FILE);
        for sync in [Opcode::Syncfs, Opcode::Fsyncdir] {
            guest.ask(sync, ROOT, &[FsyncIn::new_zeroed().as_bytes()]).unwrap();
        }
        // A saved one goes on.
        let state = guest.server.save();
        guest.server.restore(state).unwrap();
        assert_eq!(guest.read(FILE, handle, 0, 9).unwrap(), b"filefile");
    }
}

#[test]
fn nothing_changes_in_its_folder_nor_in_a_file_that_is_shared_for_reading() {
    let mut guest = guest(false, false);
    for (_, opcode) in Opcode::ALL.iter().filter(|(_, opcode)| opcode.changes()) {
        let error = guest.ask(*opcode, ROOT, &[&[0; 200], &name("its-name")]).unwrap_err();
        // What is written to is no folder.
        let right = if *opcode == Opcode::Write { Errno::BADF } else { Errno::ROFS };
        assert_eq!(error, right, "{opcode:?}");
    }
    let mut guest = self::guest(true, false);
    assert_eq!(guest.open(FILE, libc::O_RDWR).unwrap_err(), Errno::ROFS);
    let handle = guest.open(FILE, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(FILE, handle, 0, 9).unwrap(), b"file");
    let mode = SetattrIn { mode: 0o600.into(), ..changed(set::MODE) };
    assert_eq!(guest.set(FILE, mode).unwrap_err(), Errno::ROFS);
    let beside = fs::read_dir(guest.dir.path()).unwrap().count();
    assert_eq!(beside, 3, "the file, and the two folders beside it");
}
