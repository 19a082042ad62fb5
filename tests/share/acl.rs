//! Access control lists of a guest's files (`owners=xattr`), beside those of this host's own: what is done to both comes to the same.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{
    CWD, FileType, Mode, XattrFlags, getxattr, lgetxattr, listxattr, mknodat, removexattr, setxattr,
};
use rustix::io::Errno;

use crate::mount::{Mounted, available, folder};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const ALL: u32 = u32::MAX;

/// As the kernel reads it: tag, rights, user or group.
fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes().iter().chain(&rights.to_le_bytes()).chain(&id.to_le_bytes()));
    }
    bytes
}

/// Mode, lists and their names of a file.
type Seen = (u32, [Result<Vec<u8>, Errno>; 2], Vec<String>);

/// Of all that is in `folder`.
fn seen(folder: &Path) -> BTreeMap<String, Seen> {
    let one = |path: &Path| {
        let value = |name| {
            let mut bytes = vec![0; 4096];
            lgetxattr(path, name, &mut *bytes).map(|len| bytes[..len].to_vec())
        };
        let mut names = vec![0; 4096];
        let len = if path.is_symlink() { 0 } else { listxattr(path, &mut *names).unwrap() };
        let names = String::from_utf8(names[..len].to_vec()).unwrap();
        let mut names: Vec<_> =
            names.split_terminator('\0').filter(|name| name.contains("acl")).map(str::to_owned).collect();
        names.sort();
        let lists = if path.is_symlink() {
            [(); 2].map(|()| Err(Errno::NODATA))
        } else {
            [value(ACCESS), value(DEFAULT)]
        };
        (fs::symlink_metadata(path).unwrap().mode(), lists, names)
    };
    let mut all = BTreeMap::from([(String::new(), one(folder))]);
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (name, path) = (entry.file_name().into_string().unwrap(), entry.path());
        match path.is_dir() && !path.is_symlink() {
            true => all.extend(seen(&path).into_iter().map(|(below, it)| (format!("{name}/{below}"), it))),
            false => drop(all.insert(name, one(&path))),
        }
    }
    all
}

/// What is done, one after the other, in a folder. What was refused.
fn acts(at: &Path) -> Vec<Result<(), Errno>> {
    let set = |name: &str, which, entries: &[(u16, u16, u32)]| {
        setxattr(at.join(name), which, &list(entries), XattrFlags::empty())
    };
    let chmod = |name: &str, mode| fs::set_permissions(at.join(name), Permissions::from_mode(mode)).unwrap();
    fs::set_permissions(at, Permissions::from_mode(0o755)).unwrap();
    for name in ["plain", "named", "masked", "gone"] {
        fs::write(at.join(name), name).unwrap();
    }
    fs::create_dir(at.join("d")).unwrap();
    symlink("plain", at.join("link")).unwrap();
    let named =
        [(1, 6, ALL), (2, 7, 1234), (2, 4, 1235), (4, 5, ALL), (8, 2, 99), (16, 5, ALL), (32, 1, ALL)];
    let mut done = vec![
        set("plain", ACCESS, &[(1, 7, ALL), (4, 5, ALL), (32, 1, ALL)]),
        set("named", ACCESS, &named),
        set("masked", ACCESS, &named),
        set("gone", ACCESS, &named),
        removexattr(at.join("gone"), ACCESS),
        // No list; one of a folder's; of a file.
        set("plain", ACCESS, &[(1, 7, ALL), (2, 7, 5), (4, 5, ALL), (32, 1, ALL)]),
        set("plain", DEFAULT, &named),
        set("d", DEFAULT, &named),
        set("d", ACCESS, &named),
    ];
    chmod("masked", 0o4612);
    chmod("plain", 0o600);
    let inside = |name: &str| at.join("d").join(name);
    fs::write(inside("file"), "x").unwrap();
    fs::create_dir(inside("folder")).unwrap();
    fs::write(inside("folder/file"), "x").unwrap();
    mknodat(CWD, inside("exact"), FileType::RegularFile, Mode::from_raw_mode(0o604), 0).unwrap();
    symlink("file", inside("link")).unwrap();
    done.push(set("d/folder", DEFAULT, &[(1, 7, ALL), (4, 0, ALL), (32, 0, ALL)]));
    fs::create_dir(inside("folder/closed")).unwrap();
    fs::write(inside("folder/closed/file"), "x").unwrap();
    done.push(removexattr(inside("folder"), DEFAULT));
    fs::write(inside("folder/by-mask"), "x").unwrap();
    fs::rename(inside("file"), at.join("moved")).unwrap();
    done
}

#[test]
fn lists_are_those_of_a_file_system_that_has_them() {
    if !available("lists_are_those_of_a_file_system_that_has_them") {
        return;
    }
    for (by_user, how) in
        [(false, ",owners=xattr"), (true, ",owners=xattr,cache=never"), (true, ",owners=xattr,cache=always")]
    {
        let (_keep, share) = folder(by_user);
        let plain = tempfile::tempdir().unwrap();
        let mount = Mounted::new(&share, how, by_user);
        assert_eq!(acts(&mount.path()), acts(plain.path()), "{how}");
        let (ours, theirs) = (seen(&mount.path()), seen(plain.path()));
        assert!(theirs["named"].1[0].is_ok() && theirs["d/folder/file"].1[0].is_ok());
        for (name, expected) in &theirs {
            assert_eq!(ours.get(name), Some(expected), "{name}, {how}");
        }
        assert_eq!(ours.len(), theirs.len());
        // By another mount it is the same, and the host's own list is nobody's.
        let again = Mounted::new(&share, how, by_user);
        assert_eq!(seen(&again.path()), theirs);
        assert_eq!(getxattr(share.join("named"), ACCESS, &mut [0; 64][..]), Err(Errno::NODATA));
    }
}

#[test]
fn a_user_may_what_a_list_says() {
    if !available("a_user_may_what_a_list_says") {
        return;
    }
    let (_keep, share) = folder(true);
    let mount = Mounted::new(&share, ",owners=xattr", true);
    let guest = mount.path();
    fs::set_permissions(&guest, Permissions::from_mode(0o755)).unwrap();
    fs::write(guest.join("a"), "secret").unwrap();
    fs::set_permissions(guest.join("a"), Permissions::from_mode(0o600)).unwrap();
    let reads = |user: u32| {
        use std::os::unix::process::CommandExt;
        let status = Command::new("cat").arg(guest.join("a")).uid(user).gid(user).output().unwrap().status;
        status.success()
    };
    assert_eq!([0, 1234, 1235].map(reads), [true, false, false]);
    let entries = [(1, 6, ALL), (2, 4, 1234), (4, 0, ALL), (16, 4, ALL), (32, 0, ALL)];
    setxattr(guest.join("a"), ACCESS, &list(&entries), XattrFlags::empty()).unwrap();
    assert_eq!([0, 1234, 1235].map(reads), [true, true, false]);
    File::open(guest.join("a")).unwrap();
    fs::set_permissions(guest.join("a"), Permissions::from_mode(0o600)).unwrap();
    assert_eq!([0, 1234, 1235].map(reads), [true, false, false], "the mask is what the group's bits are");
}

/// Where owners are not kept there are no lists, and none of the host's are shown.
#[test]
fn without_owners_there_are_no_lists() {
    if !available("without_owners_there_are_no_lists") {
        return;
    }
    let (_keep, share) = folder(true);
    let mount = Mounted::new(&share, "", true);
    fs::write(share.join("a"), "").unwrap();
    let entries = list(&[(1, 6, ALL), (2, 4, 1234), (4, 0, ALL), (16, 4, ALL), (32, 0, ALL)]);
    setxattr(share.join("a"), ACCESS, &entries, XattrFlags::empty()).unwrap();
    let guest = mount.path().join("a");
    assert_eq!(setxattr(&guest, ACCESS, &entries, XattrFlags::empty()), Err(Errno::OPNOTSUPP));
    assert_eq!(listxattr(&guest, &mut [0; 64][..]), Ok(0));
}
