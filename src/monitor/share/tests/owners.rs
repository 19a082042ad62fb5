//! Whom files belong to, and what their modes mean on either side.

use super::*;

/// git makes its objects so, and C++'s copy_file.
#[test]
fn who_makes_a_file_may_write_to_it_whatever_its_mode() {
    let mut guest = Guest::new();
    for mode in [0o444, 0o200, 0] {
        let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR | libc::O_EXCL, mode).unwrap();
        assert_eq!(entry.attr.mode.get() & 0o777, mode);
        assert_eq!(guest.write(entry.node.get(), handle, 0, b"x").unwrap(), 1);
        let again = guest.create(ROOT, "a", libc::O_RDWR | libc::O_EXCL, mode).unwrap_err();
        assert_eq!(again, Errno::EXIST);
        // Its root may open it again, and the mode stays.
        let second = guest.open(entry.node.get(), libc::O_RDWR).unwrap();
        assert_eq!(guest.read(entry.node.get(), second, 0, 9).unwrap(), b"x");
        assert_eq!(fs::metadata(guest.path("a")).unwrap().mode() & 0o777, mode);
        [handle, second].into_iter().for_each(|handle| guest.release(handle));
        guest.ask(Opcode::Unlink, ROOT, &[&name("a")]).unwrap();
    }
}

#[test]
fn its_root_works_in_folders_that_are_closed_to_their_owner() {
    let mut guest = Guest::new();
    let how = MkdirIn { mode: 0o555.into(), ..MkdirIn::new_zeroed() };
    let folder: EntryOut = guest.get(Opcode::Mkdir, ROOT, &[how.as_bytes(), &name("d")]).unwrap();
    let (node, handle) = guest.create(folder.node.get(), "a", libc::O_WRONLY, 0o600).unwrap();
    guest.write(node.node.get(), handle, 0, b"x").unwrap();
    assert_eq!(fs::metadata(guest.path("d")).unwrap().mode() & 0o777, 0o555);
    guest.set(folder.node.get(), SetattrIn { mode: 0.into(), ..changed(set::MODE) }).unwrap();
    guest.lookup(folder.node.get(), "a").unwrap();
    assert_eq!(guest.list(folder.node.get(), 4096, false).len(), 3);
    guest.ask(Opcode::Unlink, folder.node.get(), &[&name("a")]).unwrap();
    assert_eq!(fs::metadata(guest.path("d")).unwrap().mode() & 0o777, 0);
    // For whoever removes all this.
    fs::set_permissions(guest.path("d"), fs::Permissions::from_mode(0o700)).unwrap();
}

/// The header of a request by another user than root.
fn by(mut request: Vec<u8>, uid: u32, gid: u32) -> Vec<u8> {
    request[24..28].copy_from_slice(&uid.to_le_bytes());
    request[28..32].copy_from_slice(&gid.to_le_bytes());
    request
}

#[test]
fn owners_modes_and_devices_are_kept_beside_files_where_that_is_asked_for() {
    let mut guest = Guest::with(false, true, 100);
    let seen = |attr: Attr| (attr.mode.get(), attr.uid.get(), attr.gid.get(), attr.rdev.get());
    let here = |guest: &Guest, name: &str| fs::metadata(guest.path(name)).unwrap().mode();
    fs::write(guest.path("hosts"), "").unwrap();
    fs::set_permissions(guest.path("hosts"), fs::Permissions::from_mode(0o644)).unwrap();
    let hosts = guest.lookup(ROOT, "hosts").unwrap();
    assert_eq!(seen(hosts.attr), (0o100_644, 1000, 1001, 0), "as without");
    let hosts = hosts.node.get();
    let owner = SetattrIn { uid: 5.into(), gid: 6.into(), ..changed(set::UID | set::GID) };
    assert_eq!(seen(guest.set(hosts, owner).unwrap()), (0o100_644, 5, 6, 0));
    let mode = SetattrIn { mode: 0o4511.into(), ..changed(set::MODE) };
    assert_eq!(seen(guest.set(hosts, mode).unwrap()), (0o104_511, 5, 6, 0));
    assert_eq!(here(&guest, "hosts") & 0o7777, 0o711, "nothing runs as its owner here, and it stays ours");
    assert_eq!(seen(guest.stat(hosts).unwrap()), (0o104_511, 5, 6, 0));
    let back = SetattrIn {
        uid: 1000.into(),
        gid: 1001.into(),
        mode: 0o640.into(),
        ..changed(set::UID | set::GID | set::MODE)
    };
    assert_eq!(seen(guest.set(hosts, back).unwrap()), (0o100_640, 1000, 1001, 0));
    assert_eq!(rustix::fs::listxattr(guest.path("hosts"), &mut [0; 64][..]).unwrap(), 0, "nothing is left");

    // Whoever makes a file owns it; the group of a folder may go on.
    let request = |opcode, parts: &[&[u8]]| by(request(opcode, ROOT, parts), 7, 8);
    let how = MkdirIn { mode: 0o2775.into(), ..MkdirIn::new_zeroed() };
    let body = guest.send(&request(Opcode::Mkdir, &[how.as_bytes(), &name("d")])).unwrap().unwrap();
    let folder = EntryOut::read_from_prefix(&body).unwrap().0;
    assert_eq!(seen(folder.attr), (0o042_775, 7, 8, 0));
    let below: EntryOut = guest.get(Opcode::Mkdir, folder.node.get(), &[how.as_bytes(), &name("e")]).unwrap();
    assert_eq!(seen(below.attr), (0o042_775, 0, 8, 0));
    for (mode, rdev, shown) in [
        (libc::S_IFCHR | 0o620, 0x0501, (libc::S_IFCHR | 0o620, 7, 8, 0x0501)),
        (libc::S_IFBLK | 0o600, 0x0801, (libc::S_IFBLK | 0o600, 7, 8, 0x0801)),
        (libc::S_IFIFO | 0o600, 0, (libc::S_IFIFO | 0o600, 7, 8, 0)),
        (libc::S_IFSOCK | 0o600, 0, (libc::S_IFSOCK | 0o600, 7, 8, 0)),
    ] {
        let how = MknodIn { mode: mode.into(), rdev: rdev.into(), ..MknodIn::new_zeroed() };
        let body = guest.send(&request(Opcode::Mknod, &[how.as_bytes(), &name("n")])).unwrap().unwrap();
        assert_eq!(seen(EntryOut::read_from_prefix(&body).unwrap().0.attr), shown);
        assert_eq!(here(&guest, "n") & libc::S_IFMT, libc::S_IFREG);
        guest.ask(Opcode::Unlink, ROOT, &[&name("n")]).unwrap();
    }
    // It is the server's alone.
    let (entry, _) = guest.create(ROOT, "a", libc::O_RDWR, 0o4755).unwrap();
    assert_eq!(seen(entry.attr), (0o104_755, 0, 0, 0));
    let (node, kept) = (entry.node.get(), name("user.containers.override_stat"));
    let size = GetxattrIn { size: 100.into(), ..GetxattrIn::new_zeroed() };
    assert!(guest.ask(Opcode::Getxattr, node, &[size.as_bytes(), &kept]).is_err());
    assert_eq!(guest.ask(Opcode::Listxattr, node, &[size.as_bytes()]).unwrap(), b"");
    let value = SetxattrIn { size: 7.into(), flags: 0.into() };
    assert!(guest.ask(Opcode::Setxattr, node, &[value.as_bytes(), &kept, b"0:0:777"]).is_err());
    assert!(guest.ask(Opcode::Removexattr, node, &[&kept]).is_err());
}

/// Linux leaves that to the server (FUSE_HANDLE_KILLPRIV_V2), so that it need not ask before each write.
fn changes_take_such_bits(keeps: bool) {
    let mut guest = Guest::with(false, keeps, 100);
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let node = entry.node.get();
    let write = |kill: u32| WriteIn {
        handle: handle.into(),
        size: 1.into(),
        write_flags: kill.into(),
        ..WriteIn::new_zeroed()
    };
    let size = |kill| SetattrIn { size: 1.into(), ..changed(set::SIZE | kill) };
    let fallocate = FallocateIn { handle: handle.into(), length: 9.into(), ..FallocateIn::new_zeroed() };
    let copy = CopyFileRangeIn {
        from: handle.into(),
        to_node: node.into(),
        to: handle.into(),
        to_offset: 8.into(),
        len: 1.into(),
        ..CopyFileRangeIn::new_zeroed()
    };
    let how =
        CreateIn { flags: (libc::O_RDWR as u32 | libc::O_TRUNC as u32).into(), ..CreateIn::new_zeroed() };
    let owner = SetattrIn { uid: if keeps { 0 } else { 1000 }.into(), ..changed(set::UID) };
    let of = |opcode, node, parts: &[&[u8]]| request(opcode, node, parts);
    let all = [
        ("its root writes", of(Opcode::Write, node, &[write(0).as_bytes(), b"x"]), true),
        ("another writes", of(Opcode::Write, node, &[write(WRITE_KILL_SUIDGID).as_bytes(), b"x"]), false),
        ("its root cuts it", of(Opcode::Setattr, node, &[size(0).as_bytes()]), true),
        ("another cuts it", of(Opcode::Setattr, node, &[size(set::KILL_SUIDGID).as_bytes()]), false),
        ("it has an owner", of(Opcode::Setattr, node, &[owner.as_bytes()]), false),
        ("it has the same owner", of(Opcode::Setattr, node, &[changed(0).as_bytes()]), false),
        ("its root makes room", of(Opcode::Fallocate, node, &[fallocate.as_bytes()]), true),
        ("another makes room", by(of(Opcode::Fallocate, node, &[fallocate.as_bytes()]), 7, 0), false),
        ("its root copies", of(Opcode::CopyFileRange, node, &[copy.as_bytes()]), true),
        ("another copies", by(of(Opcode::CopyFileRange, node, &[copy.as_bytes()]), 7, 0), false),
        ("another creates it", by(of(Opcode::Create, ROOT, &[how.as_bytes(), &name("a")]), 7, 0), false),
    ];
    // The host itself takes such bits off what is not kept, as this process may not set them.
    for (what, request, stays) in all.into_iter().filter(|(.., stays)| keeps || !stays) {
        // Without a group's right to execute the second bit says something else.
        let third = if keeps { (0o6745, 0o2745) } else { (0o4745, 0o745) };
        for (mode, less) in [(0o6755, 0o755), (0o1755, 0o1755), third] {
            match keeps {
                true => {
                    guest.set(node, SetattrIn { mode: mode.into(), ..changed(set::MODE) }).unwrap();
                }
                false => fs::set_permissions(guest.path("a"), fs::Permissions::from_mode(mode)).unwrap(),
            }
            guest.send(&request).unwrap().unwrap();
            let seen = guest.stat(node).unwrap().mode.get() & 0o7777;
            assert_eq!(seen, if stays { mode } else { less }, "{what}: {mode:o}");
        }
    }
    if keeps {
        // Of somebody who is not in its group either, nothing stays.
        guest.set(node, SetattrIn { mode: 0o6745.into(), ..changed(set::MODE) }).unwrap();
        let request = by(of(Opcode::Fallocate, node, &[fallocate.as_bytes()]), 7, 7);
        guest.send(&request).unwrap().unwrap();
        assert_eq!(guest.stat(node).unwrap().mode.get() & 0o7777, 0o745);
    }
    // A folder's second bit is about something else, whoever owns it.
    let how = MkdirIn { mode: 0o775.into(), ..MkdirIn::new_zeroed() };
    let folder: EntryOut = guest.get(Opcode::Mkdir, ROOT, &[how.as_bytes(), &name("d")]).unwrap();
    let folder = folder.node.get();
    guest.set(folder, SetattrIn { mode: 0o2775.into(), ..changed(set::MODE) }).unwrap();
    assert_eq!(guest.set(folder, owner).unwrap().mode.get() & 0o7777, 0o2775);
}

#[test]
fn a_file_that_somebody_else_changes_runs_as_its_kept_owner_no_more() {
    changes_take_such_bits(true);
}

#[test]
fn a_file_that_somebody_else_changes_runs_as_its_own_owner_no_more() {
    changes_take_such_bits(false);
}
