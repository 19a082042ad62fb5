//! A guest's requests, and what becomes of them in a folder and around it.

use std::ffi::CString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use vm_memory::GuestAddress;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::nodes::ROOT;
use super::wire::*;
use super::{Folder, Outcome, Owners, Server, Terms, Waiting};
use crate::config::ShareCache;
use crate::memory::{Buffers, GuestRam};

mod locks;
mod owners;
mod single;

/// Guest memory: requests in the lower half, replies in the upper.
const HALF: usize = 2 << 20;
const UNIQUE: u64 = 0x1234_5678_9abc_def0;

/// A folder with something beside it that is none of the guest's business, and a guest of it.
struct Guest {
    dir: tempfile::TempDir,
    server: Server,
    ram: Arc<GuestRam>,
    /// What it waits for.
    waiting: Vec<Waiting>,
}

/// A request's bytes, made by the guest's root.
fn request(opcode: Opcode, node: u64, parts: &[&[u8]]) -> Vec<u8> {
    let number = Opcode::ALL.iter().find(|(_, known)| *known == opcode).unwrap().0;
    let body = parts.concat();
    let header = InHeader {
        len: ((40 + body.len()) as u32).into(),
        opcode: number.into(),
        unique: UNIQUE.into(),
        node: node.into(),
        ..InHeader::new_zeroed()
    };
    [header.as_bytes(), &body].concat()
}

fn name(text: &str) -> Vec<u8> {
    CString::new(text).unwrap().into_bytes_with_nul()
}

impl Guest {
    fn with(read_only: bool, keeps: bool, descriptors: usize) -> Self {
        Self::of("share", read_only, keeps, descriptors)
    }

    /// Of what is at `path`, which is a file if there is one.
    fn of(path: &str, read_only: bool, keeps: bool, descriptors: usize) -> Self {
        // As any user is: the host denies root nothing.
        let none = CapabilitySet::empty();
        set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        for folder in ["share", "beside"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        fs::write(dir.path().join("beside/secret"), "secret").unwrap();
        fs::write(dir.path().join("file"), "file").unwrap();
        let path = dir.path().join(path);
        let name = path.is_file().then(|| c"its-name".to_owned());
        let root = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let here = (geteuid().as_raw(), getegid().as_raw());
        let owners = Owners::new(here, (1000, 1001));
        let terms = Terms { read_only, owners, keeps, shares_locks: true, descriptors };
        let folder = Folder::new(root, terms).unwrap();
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 2 * HALF)]).unwrap());
        let server = Server::new(folder, name, ShareCache::Auto);
        let mut guest = Self { dir, server, ram, waiting: Vec::new() };
        let init = InitIn { major: MAJOR.into(), minor: MINOR.into(), ..InitIn::new_zeroed() };
        guest.ask(Opcode::Init, 0, &[init.as_bytes()]).unwrap();
        guest
    }

    fn new() -> Self {
        Self::with(false, false, 100)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join("share").join(path)
    }

    fn buffers(&self, at: usize, len: usize) -> Buffers {
        let mut buffers = Buffers::empty(self.ram.clone());
        buffers.push(at as u64, len).unwrap();
        buffers
    }

    /// What is answered to these bytes. None if nothing is.
    fn send(&mut self, request: &[u8]) -> Option<Result<Vec<u8>, Errno>> {
        self.buffers(0, request.len()).write_all(request).unwrap();
        let (mut request, mut reply) = (self.buffers(0, request.len()), self.buffers(HALF, HALF));
        match self.server.serve(&mut request, &mut reply) {
            Outcome::Replied(0) => None,
            Outcome::Replied(len) => Some(self.reply(len)),
            Outcome::Waits(waiting) => {
                self.waiting.push(waiting);
                None
            }
        }
    }

    /// The reply of `len` bytes that is there.
    fn reply(&self, len: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; len];
        self.buffers(HALF, len).read_exact(&mut bytes).unwrap();
        let (header, body) = OutHeader::read_from_prefix(&bytes).unwrap();
        assert_eq!(header.len.get() as usize, len);
        match header.error.get() {
            0 => Ok(body.to_vec()),
            error => {
                assert!((-4095..0).contains(&error) && body.is_empty(), "{error}");
                Err(Errno::from_raw_os_error(-error))
            }
        }
    }

    fn ask(&mut self, opcode: Opcode, node: u64, parts: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        self.send(&request(opcode, node, parts)).expect("an answer")
    }

    /// The same, where the answer is a structure.
    fn get<T: FromBytes + KnownLayout + Immutable>(
        &mut self,
        opcode: Opcode,
        node: u64,
        parts: &[&[u8]],
    ) -> Result<T, Errno> {
        self.ask(opcode, node, parts).map(|body| T::read_from_prefix(&body).unwrap().0)
    }

    fn lookup(&mut self, folder: u64, text: &str) -> Result<EntryOut, Errno> {
        self.get(Opcode::Lookup, folder, &[&name(text)])
    }

    /// The node at a path of several components.
    fn walk(&mut self, path: &str) -> u64 {
        path.split('/').fold(ROOT, |at, part| self.lookup(at, part).unwrap().node.get())
    }

    fn create(&mut self, folder: u64, text: &str, flags: i32, mode: u32) -> Result<(EntryOut, u64), Errno> {
        let how = CreateIn { flags: (flags as u32).into(), mode: mode.into(), ..CreateIn::new_zeroed() };
        let body = self.ask(Opcode::Create, folder, &[how.as_bytes(), &name(text)])?;
        let (entry, rest) = EntryOut::read_from_prefix(&body).unwrap();
        Ok((entry, OpenOut::read_from_prefix(rest).unwrap().0.handle.get()))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let how = OpenIn { flags: (flags as u32).into(), ..OpenIn::new_zeroed() };
        self.get::<OpenOut>(Opcode::Open, node, &[how.as_bytes()]).map(|open| open.handle.get())
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let what = ReadIn {
            handle: handle.into(),
            offset: offset.into(),
            size: size.into(),
            ..ReadIn::new_zeroed()
        };
        self.ask(Opcode::Read, node, &[what.as_bytes()])
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let size = (data.len() as u32).into();
        let what = WriteIn { handle: handle.into(), offset: offset.into(), size, ..WriteIn::new_zeroed() };
        let written = self.get::<WriteOut>(Opcode::Write, node, &[what.as_bytes(), data])?;
        Ok(written.size.get() as usize)
    }

    fn release(&mut self, handle: u64) {
        let what = ReleaseIn { handle: handle.into(), ..ReleaseIn::new_zeroed() };
        self.ask(Opcode::Release, ROOT, &[what.as_bytes()]).unwrap();
    }

    fn set(&mut self, node: u64, how: SetattrIn) -> Result<Attr, Errno> {
        self.get::<AttrOut>(Opcode::Setattr, node, &[how.as_bytes()]).map(|out| out.attr)
    }

    fn stat(&mut self, node: u64) -> Result<Attr, Errno> {
        let how = GetattrIn::new_zeroed();
        self.get::<AttrOut>(Opcode::Getattr, node, &[how.as_bytes()]).map(|out| out.attr)
    }

    fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> Result<(), Errno> {
        let how = RenameIn { new_folder: to.0.into() };
        self.ask(Opcode::Rename, from.0, &[how.as_bytes(), &name(from.1), &name(to.1)]).map(drop)
    }

    /// The names in a folder, in pieces of `size` bytes, with the nodes that come with them.
    fn list(&mut self, node: u64, size: u32, plus: bool) -> Vec<(String, u64)> {
        let handle = self.get::<OpenOut>(Opcode::Opendir, node, &[OpenIn::new_zeroed().as_bytes()]).unwrap();
        let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
        let (mut all, mut offset) = (Vec::new(), 0);
        loop {
            let what = ReadIn {
                handle: handle.handle,
                size: size.into(),
                offset: offset.into(),
                ..ReadIn::new_zeroed()
            };
            let body = self.ask(opcode, node, &[what.as_bytes()]).unwrap();
            assert!(body.len() <= size as usize);
            let mut rest = &*body;
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let start = rest;
                let mut number = 0;
                if plus {
                    let (entry, after) = EntryOut::read_from_prefix(rest).unwrap();
                    (number, rest) = (entry.node.get(), after);
                }
                let (head, after) = Dirent::read_from_prefix(rest).unwrap();
                let text = &after[..head.name_len.get() as usize];
                all.push((String::from_utf8(text.to_vec()).unwrap(), number));
                rest = &start[entry_size(&CString::new(text).unwrap(), plus)..];
                offset = head.offset.get();
            }
        }
        let what = ReleaseIn { handle: handle.handle, ..ReleaseIn::new_zeroed() };
        self.ask(Opcode::Releasedir, node, &[what.as_bytes()]).unwrap();
        all
    }
}

fn changed(flags: u32) -> SetattrIn {
    SetattrIn { valid: flags.into(), ..SetattrIn::new_zeroed() }
}

#[test]
fn files_are_made_written_read_and_removed() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o640).unwrap();
    let node = entry.node.get();
    assert_eq!((entry.attr.mode.get(), entry.attr.uid.get(), entry.attr.gid.get()), (0o100_640, 1000, 1001));
    assert_eq!(entry.attr_valid.get(), 1);
    assert_eq!(guest.write(node, handle, 0, b"hello").unwrap(), 5);
    assert_eq!(guest.write(node, handle, 5, b" world").unwrap(), 6);
    assert_eq!(guest.read(node, handle, 6, 100).unwrap(), b"world");
    assert_eq!(guest.stat(node).unwrap().size.get(), 11);
    assert_eq!(fs::read(guest.path("a")).unwrap(), b"hello world");
    let large = vec![7; 1 << 20];
    assert_eq!(guest.write(node, handle, 1 << 20, &large).unwrap(), 1 << 20);
    assert_eq!(guest.read(node, handle, 1 << 20, 1 << 20).unwrap(), large);
    // A handle is one of its node's.
    assert_eq!(guest.read(ROOT, handle, 0, 1).unwrap_err(), Errno::BADF);
    guest.set(node, SetattrIn { size: 5.into(), ..changed(set::SIZE) }).unwrap();
    assert_eq!(fs::read(guest.path("a")).unwrap(), b"hello");
    guest.ask(Opcode::Unlink, ROOT, &[&name("a")]).unwrap();
    assert!(!guest.path("a").exists());
    assert_eq!(guest.lookup(ROOT, "a").unwrap_err(), Errno::NOENT);
    // It is there as long as it is open.
    assert_eq!(guest.write(node, handle, 0, b"J").unwrap(), 1);
    assert_eq!(guest.read(node, handle, 0, 9).unwrap(), b"Jello");
    assert_eq!(guest.stat(node).unwrap().nlink.get(), 0);
    guest.release(handle);
    assert_eq!(guest.read(node, handle, 0, 1).unwrap_err(), Errno::BADF);
}

#[test]
fn open_files_stay_what_they_are_when_another_takes_their_name() {
    let mut guest = Guest::new();
    fs::write(guest.path("old"), "old").unwrap();
    fs::write(guest.path("new"), "new").unwrap();
    let (old, new) = (guest.walk("old"), guest.walk("new"));
    let handle = guest.open(old, libc::O_RDWR).unwrap();
    let ino = guest.stat(new).unwrap().ino;
    guest.rename((ROOT, "new"), (ROOT, "old")).unwrap();
    assert_eq!(guest.read(old, handle, 0, 9).unwrap(), b"old");
    assert_eq!(guest.write(old, handle, 0, b"O").unwrap(), 1);
    guest.set(old, SetattrIn { handle: handle.into(), ..changed(set::SIZE | set::FH) }).unwrap();
    assert_eq!(fs::read(guest.path("old")).unwrap(), b"new");
    let found = guest.lookup(ROOT, "old").unwrap();
    assert_eq!((found.node.get(), found.attr.ino), (new, ino), "a file's number goes with it");
    assert_eq!(found.attr.ino.get(), fs::metadata(guest.path("old")).unwrap().ino());
}

#[test]
fn statx_tells_when_a_file_was_made() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o640).unwrap();
    let born =
        rustix::fs::statx(CWD, guest.path("a"), rustix::fs::AtFlags::empty(), rustix::fs::StatxFlags::BTIME)
            .unwrap();
    let how = StatxIn { flags: GETATTR_FH.into(), handle: handle.into(), ..StatxIn::new_zeroed() };
    for how in [StatxIn::new_zeroed(), how] {
        let seen: StatxOut = guest.get(Opcode::Statx, entry.node.get(), &[how.as_bytes()]).unwrap();
        assert_eq!(seen.attr_valid.get(), 1);
        let seen = seen.attr;
        assert_eq!((seen.mode.get(), seen.uid.get(), seen.gid.get()), (0o100_640, 1000, 1001));
        assert_eq!((seen.ino, seen.mtime.seconds), (entry.attr.ino, (entry.attr.mtime.get() as i64).into()));
        let has = born.stx_mask & rustix::fs::StatxFlags::BTIME.bits();
        assert_eq!(seen.mask.get() & rustix::fs::StatxFlags::BTIME.bits(), has);
        assert_eq!(seen.btime.seconds.get(), born.stx_btime.tv_sec);
        assert_eq!(seen.btime.nanoseconds.get(), born.stx_btime.tv_nsec);
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("d")).unwrap();
    symlink("../beside", guest.path("out")).unwrap();
    symlink("/", guest.path("d/top")).unwrap();
    for bad in ["", ".", "..", "/", "a/b", "../beside", "/etc/passwd"] {
        assert_eq!(guest.lookup(ROOT, bad).unwrap_err(), Errno::INVAL, "{bad}");
        assert_eq!(guest.create(ROOT, bad, libc::O_RDWR, 0o600).unwrap_err(), Errno::INVAL, "{bad}");
        let way = [(Opcode::Unlink, vec![]), (Opcode::Mkdir, vec![0; 8]), (Opcode::Mknod, vec![0; 16])];
        for (opcode, arguments) in way {
            assert_eq!(guest.ask(opcode, ROOT, &[&arguments, &name(bad)]).unwrap_err(), Errno::INVAL);
        }
        assert_eq!(guest.rename((ROOT, "d"), (ROOT, bad)).unwrap_err(), Errno::INVAL);
        assert_eq!(guest.rename((ROOT, bad), (ROOT, "d")).unwrap_err(), Errno::INVAL);
    }
    // A link is what it is, and leads nowhere here.
    let link = guest.lookup(ROOT, "out").unwrap();
    assert_eq!(link.attr.mode.get() & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(guest.ask(Opcode::Readlink, link.node.get(), &[]).unwrap(), b"../beside");
    assert!(guest.lookup(link.node.get(), "secret").is_err());
    assert_eq!(guest.open(link.node.get(), libc::O_RDONLY).unwrap_err(), Errno::LOOP);
    assert!(guest.create(link.node.get(), "made", libc::O_RDWR, 0o600).is_err());
    assert!(guest.create(ROOT, "out", libc::O_RDWR, 0o600).is_err());
    assert!(guest.get::<OpenOut>(Opcode::Opendir, link.node.get(), &[&[0; 8]]).is_err());
    // A folder that becomes a link is not the folder that was there.
    let folder = guest.walk("d");
    fs::rename(guest.path("d"), guest.path("e")).unwrap();
    symlink("../beside", guest.path("d")).unwrap();
    assert_eq!(guest.lookup(folder, "secret").unwrap_err(), Errno::NOENT);
    assert_eq!(fs::read_dir(guest.dir.path().join("beside")).unwrap().count(), 1);
}

#[test]
fn what_is_shared_for_reading_does_not_change() {
    let mut guest = Guest::with(true, false, 100);
    fs::write(guest.path("a"), "a").unwrap();
    fs::set_permissions(guest.path("a"), fs::Permissions::from_mode(0o444)).unwrap();
    fs::create_dir(guest.path("d")).unwrap();
    let node = guest.walk("a");
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle, 0, 9).unwrap(), b"a");
    for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags).unwrap_err(), Errno::ROFS);
    }
    // Each that changes something, with arguments that would be right.
    for (_, opcode) in Opcode::ALL.iter().filter(|(_, opcode)| opcode.changes()) {
        let error = guest.ask(*opcode, ROOT, &[&[0; 200], &name("d")]).unwrap_err();
        assert!(error == Errno::ROFS, "{opcode:?}: {error}");
    }
    assert_eq!(fs::read(guest.path("a")).unwrap(), b"a");
    assert_eq!(fs::read_dir(guest.path("")).unwrap().count(), 2);
}

#[test]
fn folders_are_listed_in_pieces_of_any_size() {
    let mut guest = Guest::new();
    let mut names: Vec<_> = (0..300).map(|n| format!("file-{n}{}", "x".repeat(n % 50))).collect();
    for name in &names {
        fs::write(guest.path(name), "").unwrap();
    }
    names.extend([".".to_owned(), "..".to_owned()]);
    names.sort();
    for (size, plus) in [(400, false), (4096, false), (1 << 20, false), (400, true), (1 << 20, true)] {
        let mut listed = guest.list(ROOT, size, plus);
        listed.sort();
        assert_eq!(listed.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), names, "{size}");
        assert!(listed.iter().all(|(name, node)| (*node != 0) == (plus && !name.starts_with('.'))));
    }
}

/// With descriptors for fifty of them.
#[test]
fn more_files_are_known_than_there_are_descriptors() {
    let mut guest = Guest::with(false, false, 100);
    fs::create_dir_all(guest.path("d/e")).unwrap();
    for n in 0..1000 {
        fs::write(guest.path(&format!("d/e/{n}")), format!("{n}")).unwrap();
    }
    let folder = guest.walk("d/e");
    let nodes: Vec<_> = (0..1000).map(|n| guest.lookup(folder, &n.to_string()).unwrap().node.get()).collect();
    // Renamed on the way by the guest, they are found; by the host, they are not others.
    let above = guest.walk("d");
    guest.rename((above, "e"), (ROOT, "f")).unwrap();
    guest.rename((folder, "7"), (folder, "seven")).unwrap();
    fs::rename(guest.path("f/8"), guest.path("f/eight")).unwrap();
    fs::rename(guest.path("f/9"), guest.path("f/10")).unwrap();
    for (n, node) in nodes.iter().enumerate() {
        let opened = guest.open(*node, libc::O_RDONLY);
        match n {
            8..=10 => assert_eq!(opened.unwrap_err(), Errno::STALE, "{n}"),
            _ => {
                let handle = opened.unwrap();
                assert_eq!(guest.read(*node, handle, 0, 9).unwrap(), n.to_string().as_bytes());
                guest.release(handle);
            }
        }
    }
    let open = fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < 600, "{open}");
    // One that has lost its name is still there.
    let node = nodes[20];
    guest.ask(Opcode::Unlink, folder, &[&name("20")]).unwrap();
    (30..300).for_each(|n| _ = guest.lookup(folder, &n.to_string()));
    assert_eq!(guest.stat(node).unwrap().nlink.get(), 0);
    // So is one that never had one, and there can be few.
    let how = CreateIn { flags: (libc::O_RDWR as u32).into(), mode: 0o600.into(), ..CreateIn::new_zeroed() };
    let mut made = 0;
    let full = loop {
        match guest.ask(Opcode::Tmpfile, ROOT, &[how.as_bytes()]) {
            Ok(body) => {
                let (_, rest) = EntryOut::read_from_prefix(&body).unwrap();
                guest.release(OpenOut::read_from_prefix(rest).unwrap().0.handle.get());
                made += 1;
            }
            Err(error) => break error,
        }
        assert!(made < 100, "they are bounded");
    };
    assert!(made == 24 && full == Errno::NFILE || made == 0 && full == Errno::OPNOTSUPP, "{made}: {full}");
    // Those that are open have a limit, too.
    let mut handles = Vec::new();
    let full = loop {
        match guest.open(nodes[30], libc::O_RDONLY) {
            Ok(handle) => handles.push(handle),
            Err(error) => break error,
        }
    };
    assert_eq!((full, handles.len()), (Errno::NFILE, 50));
    handles.into_iter().for_each(|handle| guest.release(handle));
    for node in nodes {
        let how = ForgetIn { lookups: 9.into() };
        let header = InHeader { opcode: 2.into(), node: node.into(), ..InHeader::new_zeroed() };
        assert!(guest.send(&[header.as_bytes(), how.as_bytes()].concat()).is_none());
        assert_eq!(guest.stat(node).unwrap_err(), Errno::STALE);
    }
}

#[test]
fn links_nodes_and_attributes() {
    let mut guest = Guest::new();
    fs::write(guest.path("a"), "a").unwrap();
    let node = guest.walk("a");
    let how = LinkIn { old: node.into() };
    let second: EntryOut = guest.get(Opcode::Link, ROOT, &[how.as_bytes(), &name("b")]).unwrap();
    assert_eq!((second.node.get(), second.attr.nlink.get()), (node, 2));
    let link: EntryOut = guest.get(Opcode::Symlink, ROOT, &[&name("l"), &name("/etc/passwd")]).unwrap();
    assert_eq!(guest.ask(Opcode::Readlink, link.node.get(), &[]).unwrap(), b"/etc/passwd");
    for (text, mode) in [("fifo", libc::S_IFIFO | 0o622), ("socket", libc::S_IFSOCK | 0o777)] {
        let how = MknodIn { mode: mode.into(), ..MknodIn::new_zeroed() };
        let made: EntryOut = guest.get(Opcode::Mknod, ROOT, &[how.as_bytes(), &name(text)]).unwrap();
        assert_eq!(made.attr.mode.get(), mode, "{text}");
        assert_eq!(guest.open(made.node.get(), libc::O_RDONLY).unwrap_err(), Errno::NXIO);
    }
    assert!(fs::metadata(guest.path("fifo")).unwrap().file_type().is_fifo());
    let how = MknodIn { mode: (libc::S_IFBLK | 0o600).into(), rdev: 0x100.into(), ..MknodIn::new_zeroed() };
    assert_eq!(guest.ask(Opcode::Mknod, ROOT, &[how.as_bytes(), &name("dev")]).unwrap_err(), Errno::PERM);

    let attribute = |size: u32| GetxattrIn { size: size.into(), ..GetxattrIn::new_zeroed() };
    let value = |size: u32, flags: u32| SetxattrIn { size: size.into(), flags: flags.into() };
    let put = |guest: &mut Guest, text: &str, size, bytes: &[u8]| {
        guest.ask(Opcode::Setxattr, node, &[value(size, 0).as_bytes(), &name(text), bytes])
    };
    if let Err(error) = put(&mut guest, "user.a", 5, b"value") {
        assert_eq!(error, Errno::OPNOTSUPP);
        return eprintln!("SKIP: extended attributes: the file system of temporary files has none");
    }
    // Not more than was sent, whatever is said.
    assert_eq!(put(&mut guest, "user.b", u32::MAX, b"value").unwrap_err(), Errno::INVAL);
    for other in ["security.capability", "trusted.overlay.opaque", "system.posix_acl_access"] {
        assert_eq!(put(&mut guest, other, 5, b"value").unwrap_err(), Errno::OPNOTSUPP);
        let asked = guest.ask(Opcode::Getxattr, node, &[attribute(100).as_bytes(), &name(other)]);
        assert_eq!(asked.unwrap_err(), Errno::NODATA);
    }
    let get = |guest: &mut Guest, size| {
        guest.ask(Opcode::Getxattr, node, &[attribute(size).as_bytes(), &name("user.a")])
    };
    assert_eq!(get(&mut guest, 0).unwrap()[..4], 5u32.to_le_bytes());
    assert_eq!(get(&mut guest, u32::MAX).unwrap(), b"value");
    assert_eq!(get(&mut guest, 4).unwrap_err(), Errno::RANGE);
    let listed = guest.ask(Opcode::Listxattr, node, &[attribute(100).as_bytes()]).unwrap();
    assert_eq!(listed, b"user.a\0");
    guest.ask(Opcode::Removexattr, node, &[&name("user.a")]).unwrap();
    assert_eq!(get(&mut guest, 100).unwrap_err(), Errno::NODATA);
}

#[test]
fn owners_times_holes_and_copies() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o644).unwrap();
    let node = entry.node.get();
    guest
        .set(node, SetattrIn { uid: 1000.into(), gid: 1001.into(), ..changed(set::UID | set::GID) })
        .unwrap();
    let error = guest.set(node, SetattrIn { uid: 5.into(), ..changed(set::UID) }).unwrap_err();
    assert_eq!(error, Errno::PERM);
    let how = SetattrIn { mtime: 12345.into(), mtime_nsec: 678.into(), ..changed(set::MTIME) };
    let attr = guest.set(node, how).unwrap();
    assert_eq!((attr.mtime.get(), attr.mtime_nsec.get()), (12345, 678));
    assert!(guest.set(node, changed(set::MTIME_NOW)).unwrap().mtime.get() > 1_700_000_000);
    guest.write(node, handle, 1 << 20, b"end").unwrap();
    let seek = |whence: i32, offset: u64| LseekIn {
        handle: handle.into(),
        offset: offset.into(),
        whence: (whence as u32).into(),
        ..LseekIn::new_zeroed()
    };
    let data: LseekOut = guest.get(Opcode::Lseek, node, &[seek(libc::SEEK_DATA, 0).as_bytes()]).unwrap();
    assert!([0, 1 << 20].contains(&data.offset.get()), "{data:?}");
    let (copy, to) = guest.create(ROOT, "b", libc::O_RDWR, 0o644).unwrap();
    let how = CopyFileRangeIn {
        from: handle.into(),
        from_offset: (1 << 20).into(),
        to_node: copy.node,
        to: to.into(),
        len: u64::MAX.into(),
        ..CopyFileRangeIn::new_zeroed()
    };
    let copied: WriteOut = guest.get(Opcode::CopyFileRange, node, &[how.as_bytes()]).unwrap();
    assert_eq!((copied.size.get(), fs::read(guest.path("b")).unwrap()), (3, b"end".to_vec()));
    let how = FallocateIn { handle: to.into(), length: 4096.into(), ..FallocateIn::new_zeroed() };
    guest.ask(Opcode::Fallocate, copy.node.get(), &[how.as_bytes()]).unwrap();
    assert_eq!(fs::metadata(guest.path("b")).unwrap().len(), 4096);
    assert!(guest.get::<StatfsOut>(Opcode::Statfs, ROOT, &[]).unwrap().blocks.get() > 0);
    let how = CreateIn { flags: (libc::O_RDWR as u32).into(), mode: 0o600.into(), ..CreateIn::new_zeroed() };
    match guest.ask(Opcode::Tmpfile, ROOT, &[how.as_bytes()]) {
        Ok(body) => {
            let (entry, rest) = EntryOut::read_from_prefix(&body).unwrap();
            let handle = OpenOut::read_from_prefix(rest).unwrap().0.handle.get();
            guest.write(entry.node.get(), handle, 0, b"nameless").unwrap();
            let how = LinkIn { old: entry.node };
            guest.ask(Opcode::Link, ROOT, &[how.as_bytes(), &name("named")]).unwrap();
            assert_eq!(fs::read(guest.path("named")).unwrap(), b"nameless");
        }
        Err(error) => assert_eq!(error, Errno::OPNOTSUPP),
    }
}

#[test]
fn before_it_is_set_up_and_what_it_does_not_know() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    guest.ask(Opcode::Destroy, ROOT, &[]).unwrap();
    assert_eq!(guest.stat(ROOT).unwrap_err(), Errno::IO);
    for (major, minor) in [(6, 99), (7, 27)] {
        let init = InitIn { major: major.into(), minor: minor.into(), ..InitIn::new_zeroed() };
        assert_eq!(guest.ask(Opcode::Init, 0, &[init.as_bytes()]).unwrap_err(), Errno::PROTO);
    }
    let later = InitIn { major: 8.into(), ..InitIn::new_zeroed() };
    assert_eq!(guest.get::<InitOut>(Opcode::Init, 0, &[later.as_bytes()]).unwrap().major.get(), MAJOR);
    let init =
        InitIn { major: MAJOR.into(), minor: 99.into(), flags: u32::MAX.into(), ..InitIn::new_zeroed() };
    let out: InitOut =
        guest.get(Opcode::Init, 0, &[init.as_bytes(), InitExt::new_zeroed().as_bytes()]).unwrap();
    assert_eq!((out.max_write.get(), out.max_pages.get()), (1 << 20, 256));
    // What was known and open before is not.
    assert_eq!(guest.read(entry.node.get(), handle, 0, 1).unwrap_err(), Errno::BADF);
    assert_eq!(guest.stat(entry.node.get()).unwrap_err(), Errno::STALE);
    guest.stat(ROOT).unwrap();
    let header = InHeader { opcode: 4711.into(), ..InHeader::new_zeroed() };
    assert_eq!(guest.send(header.as_bytes()).unwrap().unwrap_err(), Errno::NOSYS);
    assert!(guest.send(&[0; 39]).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 64 } else { 1024 }))]

    /// Whatever is asked, the answer is a reply, and nothing around the folder changes.
    #[test]
    fn garbage_is_answered_and_stays_inside(
        requests in prop::collection::vec(
            (0u32..60, 0u64..6, prop::collection::vec(any::<u8>(), 0..120),
             prop::sample::select(vec!["a", "b", "d", "..", "../beside", "/etc", "secret", "", "l"])),
            1..60,
        ),
        shared in prop::sample::select(vec!["share", "file"]),
    ) {
        let mut guest = Guest::of(shared, false, false, 40);
        fs::create_dir(guest.path("d")).unwrap();
        fs::write(guest.path("a"), "a").unwrap();
        symlink("../beside", guest.path("l")).unwrap();
        for (opcode, node, arguments, text) in requests {
            let header = InHeader { opcode: opcode.into(), node: node.into(), ..InHeader::new_zeroed() };
            for arguments in [arguments.clone(), vec![0; arguments.len()]] {
                let _ = guest.send(&[header.as_bytes(), &*arguments, &name(text), &name("b")].concat());
            }
            let _ = guest.send(&[header.as_bytes(), &name(text)].concat());
        }
        let beside: Vec<_> = fs::read_dir(guest.dir.path().join("beside")).unwrap().collect();
        prop_assert_eq!(beside.len(), 1);
        prop_assert_eq!(fs::read(guest.dir.path().join("beside/secret")).unwrap(), b"secret");
        prop_assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 3);
    }
}
