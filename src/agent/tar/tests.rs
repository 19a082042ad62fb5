//! Round trips, GNU tar as the judge where it is there, and archives that want out.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use rustix::fs::{XattrFlags, getxattr, setxattr};

use super::header::{Entry, Kind};
use super::*;

const ALL: Policy = Policy { owners: false, devices: false, rename: true };

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn packed(path: &Path, name: &str) -> Vec<u8> {
    let mut archive = Vec::new();
    pack(bytes(path), name.as_bytes(), &mut archive).unwrap();
    archive
}

/// A folder with one of everything. Whether its file system has attributes.
fn tree(at: &Path) -> bool {
    fs::create_dir(at).unwrap();
    fs::create_dir(at.join("closed")).unwrap();
    fs::write(at.join("closed/inner"), "inner").unwrap();
    fs::set_permissions(at.join("closed"), fs::Permissions::from_mode(0o500)).unwrap();
    fs::write(at.join("plain"), "x".repeat(100_000)).unwrap();
    fs::set_permissions(at.join("plain"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(at.join("plain"), at.join("same")).unwrap();
    symlink("/nowhere/at/all", at.join("link")).unwrap();
    fs::write(at.join("é".repeat(120)), "long name").unwrap();
    let sparse = File::create(at.join("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    sparse.write_all_at(b"here", 10 << 20).unwrap();
    fs::write(at.join("empty"), "").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at.join("fifo"), rustix::fs::FileType::Fifo, 0o640.into(), 0)
        .unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    File::open(at.join("empty")).unwrap().set_modified(old).unwrap();
    setxattr(at.join("empty"), "user.note", b"a=b\n\0c", XattrFlags::empty()).is_ok()
}

#[track_caller]
fn check(at: &Path, has_xattrs: bool, setuid: bool) {
    assert_eq!(fs::read(at.join("closed/inner")).unwrap(), b"inner");
    assert_eq!(fs::metadata(at.join("closed")).unwrap().mode() & 0o7777, 0o500);
    let plain = fs::metadata(at.join("plain")).unwrap();
    assert_eq!((plain.len(), plain.mode() & 0o7777), (100_000, if setuid { 0o4751 } else { 0o751 }));
    assert_eq!(plain.ino(), fs::metadata(at.join("same")).unwrap().ino());
    assert_eq!(fs::read_link(at.join("link")).unwrap(), Path::new("/nowhere/at/all"));
    assert_eq!(fs::read(at.join("é".repeat(120))).unwrap(), b"long name");
    let sparse = fs::metadata(at.join("sparse")).unwrap();
    assert_eq!(sparse.len(), 50 << 20);
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    let mut here = [0; 6];
    File::open(at.join("sparse")).unwrap().read_exact_at(&mut here, (10 << 20) - 1).unwrap();
    assert_eq!(&here, b"\0here\0");
    assert_eq!(fs::metadata(at.join("fifo")).unwrap().mode(), 0o10640);
    let empty = fs::metadata(at.join("empty")).unwrap();
    assert_eq!((empty.mtime(), empty.mtime_nsec()), (1_000_000_000, 123_456_789));
    if has_xattrs {
        let mut value = [0; 20];
        let count = getxattr(at.join("empty"), "user.note", &mut value[..]).unwrap();
        assert_eq!(&value[..count], b"a=b\n\0c");
    }
}

#[test]
fn everything_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let has_xattrs = tree(&dir.path().join("tree"));
    let archive = packed(&dir.path().join("tree"), "tree");
    assert!(archive.len() < 1 << 20, "holes are not in it: {}", archive.len());
    fs::create_dir(dir.path().join("into")).unwrap();
    unpack(&archive[..], bytes(&dir.path().join("into")), ALL).unwrap();
    check(&dir.path().join("into/tree"), has_xattrs, false);
    // By another name; and over what is there.
    for _ in 0..2 {
        unpack(&packed(&dir.path().join("tree"), ".")[..], bytes(&dir.path().join("other")), ALL).unwrap();
        check(&dir.path().join("other"), has_xattrs, false);
    }
    let all = Policy { owners: true, ..ALL };
    if rustix::process::geteuid().is_root() {
        unpack(&archive[..], bytes(&dir.path().join("third")), all).unwrap();
        check(&dir.path().join("third"), has_xattrs, true);
    }
}

#[test]
fn gnu_tar_reads_what_is_packed_and_writes_what_is_unpacked() {
    if Command::new("tar").arg("--version").output().is_err() {
        eprintln!("SKIP: gnu_tar_reads_what_is_packed_and_writes_what_is_unpacked: no tar");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    tree(&dir.path().join("tree"));
    let mut file = File::create(dir.path().join("a.tar")).unwrap();
    file.write_all(&packed(&dir.path().join("tree"), "tree")).unwrap();
    let tar = |arguments: &str| {
        let output = Command::new("tar").args(arguments.split(' ')).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    fs::create_dir(dir.path().join("theirs")).unwrap();
    tar("--xattrs -xpf a.tar -C theirs");
    check(&dir.path().join("theirs/tree"), false, true);
    for format in ["gnu", "posix --sparse --xattrs"] {
        tar(&format!("-cf b.tar --format={format} tree"));
        let ours = dir.path().join(format!("ours-{}", &format[..3]));
        if format == "gnu" {
            // A format for sparse files of its own is not known; without holes it is.
            unpack(File::open(dir.path().join("b.tar")).unwrap(), bytes(&ours), ALL).unwrap();
            assert_eq!(fs::read(ours.join("é".repeat(120))).unwrap(), b"long name");
        } else {
            unpack(File::open(dir.path().join("b.tar")).unwrap(), bytes(&ours), ALL).unwrap();
            check(&ours, false, false);
        }
    }
}

fn entry(path: &str, kind: Kind, target: &str) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        modified: (0, 0),
        size: 0,
        target: target.into(),
        device: (1, 3),
        xattrs: Vec::new(),
        sparse: None,
    }
}

fn file(path: &str) -> Vec<u8> {
    let mut bytes = Entry { size: 4, ..entry(path, Kind::File, "") }.blocks();
    bytes.extend_from_slice(b"evil");
    bytes.resize(bytes.len() + padding(4), 0);
    bytes
}

#[test]
fn nothing_leads_out_of_the_folder() {
    let all = tempfile::tempdir().unwrap();
    let root = all.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(all.path().join("victim"), "good").unwrap();
    let outside = all.path().to_str().unwrap();
    let link = |path: &str, target: &str| entry(path, Kind::Symlink, target).blocks();
    for archive in [
        file("../victim"),
        file("a/../../victim"),
        [link("out", ".."), file("out/victim")].concat(),
        [link("out", outside), file("out/victim")].concat(),
        [link("victim", "../victim"), file("victim")].concat(),
        [entry("h", Kind::HardLink, "../victim").blocks(), file("h")].concat(),
        [link("out", outside), entry("h", Kind::HardLink, "out/victim").blocks(), file("h")].concat(),
        [link("out", outside), entry("out", Kind::Folder, "").blocks()].concat(),
        file(&format!("{outside}/victim")),
    ] {
        let mode = fs::metadata(all.path()).unwrap().mode();
        let _ = unpack(&archive[..], bytes(&root), ALL);
        assert_eq!(fs::read(all.path().join("victim")).unwrap(), b"good");
        let names: Vec<_> = fs::read_dir(all.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!(fs::metadata(all.path()).unwrap().mode(), mode);
        fs::remove_dir_all(&root).unwrap();
        fs::create_dir(&root).unwrap();
    }
    let device = entry("null", Kind::Char, "").blocks();
    let error = unpack(&device[..], bytes(&root), ALL).unwrap_err().to_string();
    assert!(error.contains("null is a device") && fs::read_dir(&root).unwrap().count() == 0, "{error}");
    // What is left out takes nothing away either.
    fs::write(root.join("null"), "good").unwrap();
    assert!(unpack(&device[..], bytes(&root), ALL).is_err());
    assert_eq!(fs::read(root.join("null")).unwrap(), b"good");
}

#[test]
fn what_is_no_file_is_not_replaced_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    for (name, what) in [("pipe", "named pipe"), ("socket", "socket")] {
        for (archive, target) in [(file(name), dir.path().to_owned()), (file("a"), at(name))] {
            let error = unpack(&archive[..], bytes(&target), ALL).unwrap_err().to_string();
            assert!(error.contains(what) && error.contains(name), "{error}");
        }
        assert!(!fs::symlink_metadata(at(name)).unwrap().is_file());
    }
    let error = unpack(&file("a")[..], b"/dev/full", ALL).unwrap_err().to_string();
    assert!(error.contains("/dev/full") && error.contains("device"), "{error}");
    unpack(&entry("pipe", Kind::Fifo, "").blocks()[..], bytes(dir.path()), ALL).unwrap();
}

#[test]
fn a_link_that_is_named_stands_for_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "good").unwrap();
    std::os::unix::fs::symlink("file", at("link")).unwrap();
    std::os::unix::fs::symlink("none", at("dangling")).unwrap();
    unpack(&file("a")[..], bytes(&at("link")), ALL).unwrap();
    assert!(at("link").is_symlink() && fs::read(at("file")).unwrap() == b"evil");
    let error = unpack(&file("a")[..], bytes(&at("dangling")), ALL).unwrap_err().to_string();
    assert!(error.contains("leads nowhere") && at("dangling").is_symlink(), "{error}");
    // Inside an archive it is a file like any other.
    unpack(&file("link")[..], bytes(dir.path()), ALL).unwrap();
    assert!(!at("link").is_symlink());
}

#[test]
fn an_archive_that_is_cut_leaves_the_old_file_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "good").unwrap();
    let whole = file("a");
    assert!(unpack(&whole[..BLOCK + 2], bytes(dir.path()), ALL).is_err());
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"good");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Notes what is in a folder each time that something is read.
struct Watching<'a> {
    from: &'a [u8],
    folder: &'a Path,
    seen: &'a mut Vec<String>,
}

impl std::io::Read for Watching<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let names = fs::read_dir(self.folder).unwrap().map(|entry| entry.unwrap().file_name());
        self.seen.extend(names.map(|name| name.into_string().unwrap()));
        self.from.read(into)
    }
}

/// So whoever is killed in the middle leaves nothing.
#[test]
fn a_file_has_no_name_until_it_is_whole() {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    let dir = tempfile::tempdir().unwrap();
    if openat(CWD, dir.path(), OFlags::TMPFILE | OFlags::WRONLY, Mode::from_raw_mode(0o600)).is_err() {
        return eprintln!("SKIP: a_file_has_no_name_until_it_is_whole: needs O_TMPFILE in {:?}", dir.path());
    }
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("new"), "n".repeat(1 << 20)).unwrap();
    let archive = packed(&from.path().join("new"), "new");
    fs::write(dir.path().join("target"), "old").unwrap();
    let mut seen = Vec::new();
    let watching = Watching { from: &archive, folder: dir.path(), seen: &mut seen };
    unpack(watching, bytes(&dir.path().join("target")), ALL).unwrap();
    assert!(seen.len() > 10 && seen.iter().all(|name| name == "target"), "{seen:?}");
    assert_eq!(fs::read(dir.path().join("target")).unwrap().len(), 1 << 20);
}

#[test]
fn a_file_that_tells_a_wrong_size_is_read_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    for path in ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/profiling"] {
        let Ok(content) = fs::read(path) else { continue };
        unpack(&packed(Path::new(path), "copy")[..], bytes(dir.path()), ALL).unwrap();
        assert_eq!(fs::read(dir.path().join("copy")).unwrap(), content, "{path}");
    }
}

#[test]
fn what_cannot_be_made_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "good").unwrap();
    fs::create_dir(dir.path().join("folder")).unwrap();
    for archive in [
        entry("a", Kind::HardLink, "none").blocks(),
        entry("a", Kind::HardLink, "a").blocks(),
        entry("folder", Kind::Symlink, "a").blocks(),
        file("folder"),
    ] {
        let _ = unpack(&archive[..], bytes(dir.path()), ALL);
        assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"good");
        assert!(dir.path().join("folder").is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }
}

#[test]
fn where_it_goes_is_what_a_copy_would_do() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let to = |name: &str, policy| {
        unpack(&file("a")[..], format!("{}/{name}", dir.path().display()).as_bytes(), policy)
    };
    to("new", ALL).unwrap();
    to("new", ALL).unwrap();
    assert_eq!(fs::read(at("new")).unwrap(), b"evil");
    fs::create_dir(at("folder")).unwrap();
    to("folder", ALL).unwrap();
    to("folder/", ALL).unwrap();
    assert_eq!(fs::read(at("folder/a")).unwrap(), b"evil");
    for (name, policy) in [("none/", ALL), ("none/none", ALL), ("none", Policy { rename: false, ..ALL })] {
        let error = to(name, policy).unwrap_err().to_string();
        assert!(error.contains("folder"), "{error}");
    }
    let folder = entry("a", Kind::Folder, "").blocks();
    assert!(unpack(&folder[..], bytes(&at("new")), ALL).is_err(), "a folder does not replace a file");
}

proptest! {
    #[test]
    fn headers_come_back_as_they_were(
        path in "[a-z]{1,300}", target in "[a-z]{0,300}", kind in 0usize..7, mode in 0u32..0o10000,
        uid in any::<u32>(), gid in any::<u32>(), seconds in any::<i32>(), nanoseconds in 0u32..1_000_000_000,
        size in any::<u64>(), xattrs in proptest::collection::vec(("[a-z.]{1,20}", any::<Vec<u8>>()), 0..3),
    ) {
        let kind = [Kind::File, Kind::HardLink, Kind::Symlink, Kind::Char, Kind::Block, Kind::Folder, Kind::Fifo][kind];
        let xattrs = xattrs.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect();
        let size = if kind == Kind::File { size } else { 0 };
        let entry = Entry { mode, uid, gid, size, modified: (seconds.into(), nanoseconds), xattrs, ..entry(&path, kind, &target) };
        let blocks = entry.blocks();
        prop_assert_eq!(blocks.len() % BLOCK, 0);
        prop_assert_eq!(Entry::read(&mut &blocks[..]).unwrap(), Some(entry));
    }

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), at in 0usize..1536, byte: u8) {
        let _ = Entry::read(&mut &bytes[..]);
        let mut near = Entry { xattrs: vec![(b"user.a".to_vec(), vec![1; 9])], ..entry("a", Kind::File, "") }.blocks();
        if let Some(place) = near.get_mut(at) {
            *place = byte;
        }
        let _ = Entry::read(&mut &near[..]);
    }
}
