//! Unpacks an archive. All names are resolved by the kernel within the folder that it goes to, as if that were `/`: no link and no
//! `..` of the archive leads out of it.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
    XattrFlags, chmodat, chownat, fchmod, fchown, fsetxattr, ftruncate, futimens, linkat, makedev, mkdirat,
    mknodat, openat, openat2, renameat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::header::{Entry, Kind};
use super::{BLOCK, Error, padding, path_of};

/// How much is written at once.
const PIECE: usize = 64 << 10;

/// The most parts of a sparse file.
const MAX_PARTS: u64 = 1 << 20;

/// What of an archive holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Owners, and what is as good as an owner: set-user-ID bits, capabilities. Else all belongs to who unpacks.
    pub owners: bool,
    /// Device nodes.
    pub devices: bool,
    /// Where the target is no folder: it is what the archive's one file, or folder, is to be called.
    pub rename: bool,
}

/// Unpacks `from` to `path`: into it, if it is a folder, else under that name.
///
/// # Errors
/// `from` is no archive, or something cannot be made.
pub fn unpack(from: impl Read, path: &[u8], policy: Policy) -> Result<(), Error> {
    let mut from = BufReader::with_capacity(PIECE, from);
    let (root, place, name) = target(&path_of(path), policy)?;
    let unfinished = format!(".vmm-cp.{:016x}", RandomState::new().build_hasher().finish());
    let mut unpacker = Unpacker { root, place, name, policy, unfinished, folders: Vec::new(), left: None };
    while let Some(entry) = Entry::read(&mut from)? {
        let mut bytes = (&mut from).take(entry.size);
        unpacker.add(&entry, &mut bytes)?;
        let missing = bytes.limit();
        let rest = missing + padding(entry.size) as u64;
        let skipped = io::copy(&mut (&mut from).take(rest), &mut io::sink());
        if skipped.map_err(|error| Error::Stream("read", error))? < rest {
            return Err(Error::Cut);
        }
    }
    // Whoever writes it may have more to say, and would take a closed pipe for a failure.
    io::copy(&mut from, &mut io::sink()).map_err(|error| Error::Stream("read", error))?;
    unpacker.finish_folders()?;
    unpacker.left.map_or(Ok(()), Err)
}

/// The folder that all goes into, its path, and what the first component of every name is to be.
fn target(path: &Path, policy: Policy) -> Result<(OwnedFd, PathBuf, Option<Vec<u8>>), Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |path: &Path| openat(CWD, path, flags, Mode::empty());
    let wrong = |what| Error::Target { path: path.to_owned(), what };
    match open(path) {
        Ok(root) => return Ok((root, path.to_owned(), None)),
        Err(Errno::NOENT | Errno::NOTDIR) if policy.rename => {}
        Err(Errno::NOENT) => return Err(wrong("there is no such folder")),
        Err(Errno::NOTDIR) => return Err(wrong("it is no folder")),
        Err(error) => return Err(failed("open", path, error)),
    }
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(wrong("there is no such folder"));
    }
    // A link that the user names stands for what it leads to, as it does for cp; one of the archive's own never does.
    let linked = if path.is_symlink() {
        Some(path.canonicalize().map_err(|_| wrong("it is a link that leads nowhere"))?)
    } else {
        None
    };
    let path = linked.as_deref().unwrap_or(path);
    let name = path.file_name().ok_or_else(|| wrong("there is no such folder"))?.to_owned().into_vec();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let root = open(parent).map_err(|error| match error {
        Errno::NOENT | Errno::NOTDIR => wrong("there is no folder to put it in"),
        _ => failed("open", parent, error),
    })?;
    Ok((root, parent.to_owned(), Some(name)))
}

/// A folder below the root, and a name in it.
type Place<'a> = (Vec<u8>, &'a [u8]);

struct Unpacker {
    root: OwnedFd,
    /// The path of that, for errors.
    place: PathBuf,
    name: Option<Vec<u8>>,
    policy: Policy,
    /// What a file is called until it is whole: a name that nobody else thinks of.
    unfinished: String,
    /// Get their modes and times when all is in them.
    folders: Vec<Entry>,
    /// The first that was not made.
    left: Option<Error>,
}

impl Unpacker {
    /// An entry's folder and name in it; none for the root itself.
    fn components<'a>(&'a self, path: &'a [u8]) -> Result<Option<Place<'a>>, Error> {
        let mut parts: Vec<&[u8]> =
            path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
        if let (Some(name), Some(first)) = (&self.name, parts.first_mut()) {
            *first = name;
        }
        parts.retain(|part| *part != b".");
        if parts.contains(&&b".."[..]) {
            return Err(Error::Format("it has a name with .. in it"));
        }
        Ok(parts.pop().map(|last| (parts.join(&b"/"[..]), last)))
    }

    /// The folder at `path` below the root, made if it is not there.
    fn folder(&self, path: &[u8]) -> Result<OwnedFd, Error> {
        match self.open_folder(path) {
            Err(Errno::NOENT) => {}
            result => return result.map_err(|error| self.failed("open", path, error)),
        }
        let mut done = Vec::new();
        for part in path.split(|byte| *byte == b'/') {
            let parent = self.open_folder(&done).map_err(|error| self.failed("open", path, error))?;
            match mkdirat(&parent, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(self.failed("make", path, error)),
            }
            if !done.is_empty() {
                done.push(b'/');
            }
            done.extend_from_slice(part);
        }
        self.open_folder(path).map_err(|error| self.failed("open", path, error))
    }

    fn open_folder(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match openat2(&self.root, path, flags, Mode::empty(), inside) {
                // Something was renamed meanwhile, somewhere.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    fn add(&mut self, entry: &Entry, bytes: &mut impl Read) -> Result<(), Error> {
        let Some((folder, name)) = self.components(&entry.path)? else { return Ok(()) };
        let parent = self.folder(&folder)?;
        let path = &entry.path[..];
        if entry.kind == Kind::Folder {
            self.make_folder(&parent, name, path)?;
            self.folders.push(entry.clone());
            return Ok(());
        }
        if matches!(entry.kind, Kind::Char | Kind::Block) && !self.policy.devices {
            let what = "is a device, and was left out";
            self.left.get_or_insert(Error::Left { path: path_of(path), what });
            return Ok(());
        }
        self.may_replace(&parent, name, entry)?;
        // Under a name of its own until it is whole: whoever is cut off, or fails, leaves what was there.
        let unfinished = self.unfinished.as_bytes();
        let done = self.make(&parent, unfinished, entry, bytes).and_then(|()| {
            renameat(&parent, unfinished, &parent, name).map_err(|error| self.failed("replace", path, error))
        });
        // Also after a rename that did nothing, since both names were the same file's.
        let _ = unlinkat(&parent, unfinished, AtFlags::empty());
        done
    }

    /// Makes what is no folder, as `name`, which nothing has.
    fn make(&self, parent: &OwnedFd, name: &[u8], entry: &Entry, bytes: &mut impl Read) -> Result<(), Error> {
        let path = &entry.path[..];
        let made = match entry.kind {
            Kind::File => return self.make_file(parent, name, entry, bytes),
            Kind::HardLink => {
                let Some((folder, old)) = self.components(&entry.target)? else {
                    return Err(Error::Format("it has a hard link to a folder"));
                };
                let from = self.folder(&folder)?;
                // It has the other one's owner, mode and times.
                return linkat(&from, old, parent, name, AtFlags::empty())
                    .map_err(|error| self.failed("link", path, error));
            }
            Kind::Symlink => symlinkat(&entry.target[..], parent, name),
            Kind::Fifo => mknodat(parent, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0),
            kind => {
                let kind = if kind == Kind::Char { FileType::CharacterDevice } else { FileType::BlockDevice };
                let (major, minor) = entry.device;
                mknodat(parent, name, kind, Mode::from_raw_mode(0o600), makedev(major, minor))
            }
        };
        made.map_err(|error| self.failed("make", path, error))?;
        let set = (|| {
            if self.policy.owners {
                let (uid, gid) = owner(entry);
                chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            // A symbolic link has no mode, and chmod would follow it.
            if entry.kind != Kind::Symlink {
                chmodat(parent, name, self.mode(entry), AtFlags::empty())?;
            }
            utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)
        })();
        set.map_err(|error| self.failed("set the owner and mode of", path, error))
    }

    /// Files and links are replaced; a device, a pipe or a socket only by one of its kind: nobody means those by a copy.
    fn may_replace(&self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), Error> {
        let Ok(there) = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) else { return Ok(()) };
        let what = match (FileType::from_raw_mode(there.st_mode), entry.kind) {
            (FileType::CharacterDevice, Kind::Char)
            | (FileType::BlockDevice, Kind::Block)
            | (FileType::Fifo, Kind::Fifo) => return Ok(()),
            (FileType::CharacterDevice | FileType::BlockDevice, _) => "it is a device",
            (FileType::Fifo, _) => "it is a named pipe",
            (FileType::Socket, _) => "it is a socket",
            (FileType::Directory, _) => return Err(self.failed("replace", &entry.path, Errno::ISDIR)),
            _ => return Ok(()),
        };
        let (folder, name) = self.components(&entry.path)?.unwrap_or_default();
        Err(Error::Target { path: self.place.join(path_of(&folder)).join(path_of(name)), what })
    }

    fn make_folder(&self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<(), Error> {
        match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            // Also a link to one stays: /bin is one in many a system.
            Err(Errno::EXIST) => {
                let (folder, last) = self.components(path)?.unwrap_or_default();
                let whole =
                    if folder.is_empty() { last.to_vec() } else { [&folder[..], b"/", last].concat() };
                self.open_folder(&whole).map(drop).map_err(|error| self.failed("replace", path, error))
            }
            result => result.map_err(|error| self.failed("make", path, error)),
        }
    }

    fn make_file(
        &self,
        parent: &OwnedFd,
        name: &[u8],
        entry: &Entry,
        bytes: &mut impl Read,
    ) -> Result<(), Error> {
        let path = &entry.path[..];
        let (file, nameless) = self.new_file(parent, name, path)?;
        let write = |error: io::Error| self.error("write", path, error);
        match entry.sparse {
            None => copy(&file, 0, entry.size, bytes, &write)?,
            Some(size) => {
                ftruncate(&file, size).map_err(|error| write(error.into()))?;
                for (at, len) in map(bytes)? {
                    if at.checked_add(len).is_none_or(|end| end > size) {
                        return Err(Error::Format("it has a sparse file with data past its end"));
                    }
                    copy(&file, at, len, bytes, &write)?;
                }
            }
        }
        self.set(&file, entry).map_err(|error| self.failed("set the owner and mode of", path, error))?;
        let Some(itself) = nameless else { return Ok(()) };
        linkat(CWD, itself, parent, name, AtFlags::SYMLINK_FOLLOW)
            .map_err(|error| self.failed("make", path, error))
    }

    /// A new file in `parent`: one without a name, and the link by which to give it one, so that nothing is left of it whatever ends
    /// this process; where the file system or the kernel has no such files, or there is no /proc, one that is called `name`.
    fn new_file(&self, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<(File, Option<String>), Error> {
        let (flags, mode) = (OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600));
        if let Ok(file) = openat(parent, ".", flags | OFlags::TMPFILE, mode) {
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            if statat(CWD, &link, AtFlags::empty()).is_ok() {
                return Ok((file.into(), Some(link)));
            }
        }
        let file = openat(parent, name, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode);
        Ok((file.map_err(|error| self.failed("make", path, error))?.into(), None))
    }

    /// Owner, attributes, mode and times of an open file, in the order in which none undoes another.
    fn set(&self, file: &impl AsFd, entry: &Entry) -> Result<(), Errno> {
        if self.policy.owners {
            let (uid, gid) = owner(entry);
            fchown(file, Some(uid), Some(gid))?;
        }
        for (name, value) in &entry.xattrs {
            if !self.policy.owners && !name.starts_with(b"user.") {
                continue;
            }
            match fsetxattr(file, &name[..], value, XattrFlags::empty()) {
                // A file system without them, or a user who may not: the file is worth having all the same.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM | Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
        fchmod(file, self.mode(entry))?;
        futimens(file, &times(entry))
    }

    fn mode(&self, entry: &Entry) -> Mode {
        // Who becomes the owner of a stranger's program does not want it to run as themselves.
        Mode::from_raw_mode(entry.mode & if self.policy.owners { 0o7777 } else { 0o1777 })
    }

    /// From the innermost out: one that may not be written to any more still gets its inner ones done.
    fn finish_folders(&mut self) -> Result<(), Error> {
        while let Some(entry) = self.folders.pop() {
            let Some((folder, name)) = self.components(&entry.path)? else { continue };
            let whole = if folder.is_empty() { name.to_vec() } else { [&folder[..], b"/", name].concat() };
            let set = || {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
                let opened = openat2(&self.root, &whole[..], flags, Mode::empty(), inside)?;
                self.set(&opened, &entry)
            };
            set().map_err(|error| self.failed("set the owner and mode of", &entry.path, error))?;
        }
        Ok(())
    }

    fn failed(&self, what: &'static str, path: &[u8], error: Errno) -> Error {
        self.error(what, path, error.into())
    }

    fn error(&self, what: &'static str, path: &[u8], error: io::Error) -> Error {
        // As it is called here, not in the archive.
        let (folder, name) = self.components(path).ok().flatten().unwrap_or_default();
        Error::File { what, path: self.place.join(path_of(&folder)).join(path_of(name)), error }
    }
}

fn copy(
    file: &File,
    mut at: u64,
    mut size: u64,
    bytes: &mut impl Read,
    write: &impl Fn(io::Error) -> Error,
) -> Result<(), Error> {
    let mut piece = vec![0; PIECE];
    while size > 0 {
        let want = size.min(PIECE as u64) as usize;
        let count = match bytes.read(&mut piece[..want]) {
            Ok(0) => return Err(Error::Cut),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Stream("read", error)),
        };
        file.write_all_at(&piece[..count], at).map_err(write)?;
        at += count as u64;
        size -= count as u64;
    }
    Ok(())
}

/// The map at the beginning of a sparse file's bytes: numbers, one a line, up to the end of a block.
fn map(bytes: &mut impl Read) -> Result<Vec<(u64, u64)>, Error> {
    const BAD: Error = Error::Format("it has a sparse file whose map is none");
    let mut read = 0u64;
    let mut next = || {
        let mut number = None;
        loop {
            let mut byte = [0];
            bytes.read_exact(&mut byte).map_err(|_| BAD)?;
            read += 1;
            number = match (byte[0], number) {
                (b'\n', Some(number)) => return Ok((number, read)),
                (digit @ b'0'..=b'9', number) => {
                    let number = number.unwrap_or(0u64).checked_mul(10).ok_or(BAD)?;
                    Some(number.checked_add(u64::from(digit - b'0')).ok_or(BAD)?)
                }
                _ => return Err(BAD),
            };
        }
    };
    let (count, mut at) = next()?;
    if count > MAX_PARTS {
        return Err(BAD);
    }
    let mut parts = Vec::new();
    for _ in 0..count {
        let (start, _) = next()?;
        let (len, now) = next()?;
        parts.push((start, len));
        at = now;
    }
    let mut rest = [0; BLOCK];
    bytes.read_exact(&mut rest[..padding(at)]).map_err(|_| BAD)?;
    Ok(parts)
}

fn owner(entry: &Entry) -> (Uid, Gid) {
    // The last number is "leave it", which no file has.
    let own = |number: u32| if number == u32::MAX { 0 } else { number };
    (Uid::from_raw(own(entry.uid)), Gid::from_raw(own(entry.gid)))
}

fn times(entry: &Entry) -> Timestamps {
    let (seconds, nanoseconds) = entry.modified;
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
    }
}

fn failed(what: &'static str, path: &Path, error: Errno) -> Error {
    Error::File { what, path: path.to_owned(), error: error.into() }
}
