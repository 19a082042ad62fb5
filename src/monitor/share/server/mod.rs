//! [`Server`]: a FUSE server: a request's bytes in, a reply's out. The bytes are a guest's: each is read once, and whatever they are, the
//! answer is a reply.

mod others;
mod single;

use std::ffi::{CStr, CString};
use std::io::{Read, Write};
use std::mem::{MaybeUninit, size_of};
use std::time::Duration;

use rustix::fs::{FileType, RawDir, SeekFrom, Statx, Timespec, Timestamps, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use self::others::Others;
use super::folder::{self, Changes, Folder, Found, NO_TIMES, NOW, New, SavedLocks};
use super::locks::{Kind, Lock};
use super::nodes::ROOT;
use super::wire::{self, *};
use crate::config::ShareCache;
use crate::memory::Buffers;

/// The most bytes of one read or write: 256 pages.
const DATA_MOST: usize = 1 << 20;
/// The most bytes of any other request: an extended attribute, or names.
const REQUEST_MOST: usize = 160 << 10;
/// The most bytes of a reply that lists something.
const LIST_MOST: usize = 256 << 10;
/// Devices of the host's that are told from each other in the numbers of files.
const DEVICES_MOST: usize = 256;
/// Bytes of a folder that are asked of the host at a time.
const LISTED: usize = 32 << 10;

/// How long the guest believes what it was told.
fn holds(cache: ShareCache) -> Duration {
    match cache {
        ShareCache::Auto => Duration::from_secs(1),
        ShareCache::Always => Duration::from_secs(86400),
        ShareCache::Never => Duration::ZERO,
    }
}

/// Flags of files that are opened.
fn open_flags(cache: ShareCache) -> u32 {
    match cache {
        ShareCache::Auto => 0,
        ShareCache::Always => wire::open::KEEP_CACHE,
        ShareCache::Never => wire::open::DIRECT_IO,
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Server {
    folder: Folder,
    /// If that is a file: its name to the guest.
    single: Option<CString>,
    cache: ShareCache,
    /// INIT has been answered.
    is_ready: bool,
    /// The device of the folder itself; the others have numbers in this order.
    devices: Vec<(u32, u32)>,
    /// What others change.
    others: Others,
}

/// [`Server`] without what the host has of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    folder: folder::Saved,
    is_ready: bool,
    devices: Vec<(u32, u32)>,
}

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// The reply has so many bytes; 0: there is none.
    Replied(usize),
    /// The reply comes [later](Server::again).
    Waits(Waiting),
}

/// A request for a lock that somebody else has.
#[derive(Debug)]
pub struct Waiting {
    header: InHeader,
    /// Where the reply's goes.
    head: Buffers,
    wanted: Wanted,
}

/// A lock.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    /// Of a part of a node, by a program of the guest's.
    Part { node: u64, handle: u64, owner: u64, lock: Lock },
    /// Of what is open.
    Whole { node: u64, handle: u64, kind: Option<Kind> },
}

/// What follows a reply's header.
#[derive(Debug)]
enum Reply {
    /// The answer comes when somebody else lets that go.
    Later(Wanted),
    /// Nothing is answered.
    None,
    Bytes(Vec<u8>),
    /// So many bytes of a file, which are where they belong already.
    Data(usize),
}

type Answer = Result<Reply, Errno>;

fn bytes(value: &(impl IntoBytes + Immutable)) -> Answer {
    Ok(Reply::Bytes(value.as_bytes().to_vec()))
}

const EMPTY: Answer = Ok(Reply::Bytes(Vec::new()));

impl Server {
    /// Serves `folder`, which is a file if it has a name.
    pub fn new(folder: Folder, single: Option<CString>, cache: ShareCache) -> Self {
        Self { folder, single, cache, is_ready: false, devices: Vec::new(), others: Others::default() }
    }

    /// What the guest knows.
    pub fn save(&self) -> State {
        State { folder: self.folder.save(), is_ready: self.is_ready, devices: self.devices.clone() }
    }

    /// Takes over what a guest knew, which may find the files elsewhere by now, or gone: each is an error of its own.
    ///
    /// # Errors
    /// No guest can have known that.
    pub fn restore(&mut self, state: State) -> Result<(), String> {
        if state.devices.len() > DEVICES_MOST {
            return Err(format!("files on {} devices", state.devices.len()));
        }
        (self.is_ready, self.devices) = (state.is_ready, state.devices);
        self.folder.restore(state.folder)
    }

    /// There is no guest, or another one.
    pub fn reset(&mut self) {
        self.is_ready = false;
        self.devices.clear();
        self.others.clear();
        self.folder.clear();
    }

    /// Answers one request.
    pub fn serve(&mut self, request: &mut Buffers, reply: &mut Buffers) -> Outcome {
        let mut header = InHeader::new_zeroed();
        if request.read_exact(header.as_mut_bytes()).is_err() {
            return Outcome::Replied(0);
        }
        self.others.keep_up();
        let mut head = reply.split_off_front(size_of::<OutHeader>());
        let (error, body) = match self.answer(&header, request, reply) {
            Ok(Reply::None) => return Outcome::Replied(0),
            Ok(Reply::Later(wanted)) => return Outcome::Waits(Waiting { header, head, wanted }),
            Ok(Reply::Data(len)) => return Outcome::Replied(write_head(&mut head, &header, 0, len)),
            Ok(Reply::Bytes(body)) if body.len() <= reply.len() => (0, body),
            Ok(Reply::Bytes(_)) => (Errno::RANGE.raw_os_error(), Vec::new()),
            Err(error) => (error.raw_os_error(), Vec::new()),
        };
        let written = reply.write(&body).unwrap_or(0);
        Outcome::Replied(write_head(&mut head, &header, error, written))
    }

    /// Tries once more what had to wait. How many bytes the reply has; None if it has to wait still.
    pub fn again(&mut self, waiting: &mut Waiting) -> Option<usize> {
        let error = match self.lock(waiting.wanted) {
            Err(Errno::AGAIN) => return None,
            Err(error) => error.raw_os_error(),
            Ok(()) => 0,
        };
        Some(write_head(&mut waiting.head, &waiting.header, error, 0))
    }

    /// Has it wait no more: too many do. How many bytes the reply has.
    pub fn refuse(&self, mut waiting: Waiting) -> usize {
        write_head(&mut waiting.head, &waiting.header, Errno::NOLCK.raw_os_error(), 0)
    }

    fn lock(&mut self, wanted: Wanted) -> Result<(), Errno> {
        match wanted {
            Wanted::Part { node, handle, owner, lock } => self.folder.lock_part(node, handle, owner, lock),
            Wanted::Whole { node, handle, kind } => self.folder.lock_whole(node, handle, kind),
        }
    }

    /// Whether a request may have to wait.
    pub fn shares_locks(&self) -> bool {
        self.folder.terms().shares_locks
    }

    /// What the guest has locked.
    pub fn save_locks(&self) -> SavedLocks {
        self.folder.save_locks()
    }

    /// Takes again what a guest had locked, after [`Server::restore`].
    pub fn restore_locks(&mut self, saved: SavedLocks) {
        if self.shares_locks() {
            self.folder.restore_locks(saved);
        }
    }

    fn answer(&mut self, header: &InHeader, request: &mut Buffers, reply: &mut Buffers) -> Answer {
        let opcode = Opcode::of(header.opcode.get()).ok_or(Errno::NOSYS)?;
        if !self.is_ready && opcode != Opcode::Init {
            return Err(Errno::IO);
        }
        if opcode == Opcode::Write {
            if self.others.are_told(header) {
                return Err(Errno::PERM);
            }
            return self.write(self.number(header.node.get()), request);
        }
        if request.len() > REQUEST_MOST {
            return Err(Errno::INVAL);
        }
        let mut rest = vec![0; request.len()];
        request.read_exact(&mut rest).map_err(|_| Errno::IO)?;
        let mut arguments = Arguments(&rest);
        if opcode == Opcode::Read {
            let ReadIn { handle, offset, size, .. } = arguments.take()?;
            let node = self.number(header.node.get());
            return self.read(handle.get(), node, offset.get(), size.get() as usize, reply);
        }
        self.act(opcode, header, arguments, reply.len())
    }

    /// This server's number of what the guest calls `node`.
    fn number(&self, node: u64) -> u64 {
        if self.single.is_some() { single::number(node) } else { node }
    }

    fn act(&mut self, opcode: Opcode, header: &InHeader, mut rest: Arguments<'_>, room: usize) -> Answer {
        let node = self.number(header.node.get());
        if let Some(name) = self.single.clone().filter(|_| node == single::ABOVE) {
            return self.above(opcode, rest, room, &name);
        }
        if let Some(answer) = self.replay(opcode, header, &rest) {
            return answer;
        }
        let by = (header.uid.get(), header.gid.get());
        let new = |mode: U32, umask: U32| New { mode: mode.get(), umask: umask.get(), by };
        let read_only = self.folder.terms().read_only;
        if read_only && opcode.changes() {
            return Err(Errno::ROFS);
        }
        match opcode {
            Opcode::Init => self.init(rest),
            Opcode::Destroy => {
                self.reset();
                EMPTY
            }
            Opcode::Forget => {
                let ForgetIn { lookups } = rest.take()?;
                self.folder.forget(node, lookups.get());
                Ok(Reply::None)
            }
            Opcode::BatchForget => {
                let BatchForgetIn { count, .. } = rest.take()?;
                for _ in 0..count.get() {
                    let Ok(ForgetOne { node, lookups }) = rest.take() else { break };
                    self.folder.forget(node.get(), lookups.get());
                }
                Ok(Reply::None)
            }
            // What is asked for is done by the time that this is read.
            Opcode::Interrupt => Ok(Reply::None),
            Opcode::Lookup => {
                let found = self.folder.lookup(node, rest.name()?)?;
                self.entry(&found)
            }
            Opcode::Getattr => {
                let GetattrIn { flags, handle, .. } = rest.take()?;
                let handle = (flags.get() & GETATTR_FH != 0).then_some(handle.get());
                let stat = self.folder.stat(node, handle)?;
                bytes(&self.attributes(&stat))
            }
            Opcode::Statx => {
                let StatxIn { flags, handle, .. } = rest.take()?;
                let handle = (flags.get() & GETATTR_FH != 0).then_some(handle.get());
                let stat = self.folder.stat(node, handle)?;
                bytes(&self.statx(&stat))
            }
            Opcode::Setattr => {
                let (handle, changes) = changes(&rest.take()?);
                let stat = self.folder.change(node, handle, &changes)?;
                bytes(&self.attributes(&stat))
            }
            Opcode::Readlink => self.folder.read_link(node).map(Reply::Bytes),
            Opcode::Symlink => {
                let (name, target) = (rest.name()?, rest.text()?);
                let found = self.folder.make_link(node, name, target)?;
                self.entry(&found)
            }
            Opcode::Mknod => {
                let MknodIn { mode, rdev, umask, .. } = rest.take()?;
                let device = device_parts(rdev.get());
                let found = self.folder.make_node(node, rest.name()?, new(mode, umask), device)?;
                self.entry(&found)
            }
            Opcode::Mkdir => {
                let MkdirIn { mode, umask } = rest.take()?;
                let found = self.folder.make_folder(node, rest.name()?, new(mode, umask))?;
                self.entry(&found)
            }
            Opcode::Unlink => done(self.folder.remove(node, rest.name()?, false)),
            Opcode::Rmdir => done(self.folder.remove(node, rest.name()?, true)),
            Opcode::Rename => {
                let RenameIn { new_folder } = rest.take()?;
                let (old, new) = (rest.name()?, rest.name()?);
                done(self.folder.rename((node, old), (new_folder.get(), new), 0))
            }
            Opcode::Rename2 => {
                let Rename2In { new_folder, flags, .. } = rest.take()?;
                let (old, new) = (rest.name()?, rest.name()?);
                done(self.folder.rename((node, old), (new_folder.get(), new), flags.get()))
            }
            Opcode::Link => {
                let LinkIn { old } = rest.take()?;
                let found = self.folder.link(old.get(), node, rest.name()?)?;
                self.entry(&found)
            }
            Opcode::Open => {
                let OpenIn { flags, .. } = rest.take()?;
                let handle = self.folder.open(node, flags.get(), by)?;
                bytes(&self.opened(handle))
            }
            Opcode::Create | Opcode::Tmpfile => {
                let CreateIn { flags, mode, umask, .. } = rest.take()?;
                let (found, handle) = match opcode {
                    Opcode::Tmpfile => self.folder.make_nameless(node, flags.get(), new(mode, umask))?,
                    _ => self.folder.create(node, rest.name()?, flags.get(), new(mode, umask))?,
                };
                let mut reply = self.entry_of(&found).as_bytes().to_vec();
                reply.extend(self.opened(handle).as_bytes());
                Ok(Reply::Bytes(reply))
            }
            // They are told from all others before.
            Opcode::Read | Opcode::Write => Err(Errno::IO),
            Opcode::Statfs => bytes(&StatfsOut::from(self.folder.space(node)?)),
            Opcode::Release | Opcode::Releasedir => {
                let ReleaseIn { handle, .. } = rest.take()?;
                self.others.closed(handle.get());
                self.folder.close(handle.get());
                EMPTY
            }
            // Linux keeps locks to itself then, and once told that there is no FLUSH asks for none: data goes to the host with each write.
            Opcode::Flush | Opcode::Getlk | Opcode::Setlk | Opcode::Setlkw if !self.shares_locks() => {
                Err(Errno::NOSYS)
            }
            Opcode::Flush => {
                let FlushIn { owner, .. } = rest.take()?;
                self.folder.unlock_parts(node, owner.get());
                EMPTY
            }
            Opcode::Getlk => {
                let LkIn { owner, start, end, kind, .. } = rest.take()?;
                let lock = Lock::new(start.get(), end.get(), kind.get())?;
                let other = self.folder.lock_in_the_way(node, owner.get(), lock)?;
                let Lock { start, end, .. } = other.unwrap_or(lock);
                let kind = other.unwrap_or(Lock { kind: None, ..lock }).number();
                bytes(&LkOut { start: start.into(), end: end.into(), kind: kind.into(), ..LkOut::default() })
            }
            Opcode::Setlk | Opcode::Setlkw => {
                let LkIn { handle, owner, start, end, kind, flags, .. } = rest.take()?;
                let lock = Lock::new(start.get(), end.get(), kind.get())?;
                let (handle, owner) = (handle.get(), owner.get());
                let wanted = match flags.get() & LK_FLOCK {
                    0 => Wanted::Part { node, handle, owner, lock },
                    _ => Wanted::Whole { node, handle, kind: lock.kind },
                };
                match self.lock(wanted) {
                    Err(Errno::AGAIN) if opcode == Opcode::Setlkw => Ok(Reply::Later(wanted)),
                    result => done(result),
                }
            }
            Opcode::Fsync | Opcode::Fsyncdir => {
                let FsyncIn { handle, flags, .. } = rest.take()?;
                done(self.folder.sync(handle.get(), node, flags.get() & FSYNC_FDATASYNC != 0))
            }
            Opcode::Syncfs => done(self.folder.sync_all(ROOT)),
            Opcode::Setxattr => {
                let SetxattrIn { size, flags } = rest.take()?;
                let name = rest.text()?;
                let value = rest.bytes(size.get() as usize)?;
                done(self.folder.set_attribute(node, name, value, flags.get()))
            }
            Opcode::Getxattr => {
                let GetxattrIn { size, .. } = rest.take()?;
                let value = self.folder.attribute(node, rest.text()?)?;
                sized(size.get(), value)
            }
            Opcode::Listxattr => {
                let GetxattrIn { size, .. } = rest.take()?;
                sized(size.get(), self.folder.attributes(node)?)
            }
            Opcode::Removexattr => done(self.folder.remove_attribute(node, rest.text()?)),
            Opcode::Opendir => {
                let handle = self.folder.open_folder(node)?;
                bytes(&OpenOut { handle: handle.into(), ..OpenOut::default() })
            }
            Opcode::Readdir | Opcode::Readdirplus => {
                let ReadIn { handle, offset, size, .. } = rest.take()?;
                let most = (size.get() as usize).min(room).min(LIST_MOST);
                self.list(handle.get(), node, offset.get(), most, opcode == Opcode::Readdirplus)
            }
            Opcode::Ioctl => self.ioctl(header, node, rest),
            Opcode::Fallocate => {
                let FallocateIn { handle, offset, length, mode, .. } = rest.take()?;
                let range = (offset.get(), length.get());
                done(self.folder.allocate(handle.get(), node, mode.get(), range, by))
            }
            Opcode::Lseek => {
                let LseekIn { handle, offset, whence, .. } = rest.take()?;
                let offset = self.folder.seek(handle.get(), node, offset.get(), whence.get())?;
                bytes(&LseekOut { offset: offset.into() })
            }
            Opcode::CopyFileRange => {
                let CopyFileRangeIn { from, from_offset, to_node, to, to_offset, len, flags } =
                    rest.take()?;
                if flags.get() != 0 {
                    return Err(Errno::INVAL);
                }
                let from = (from.get(), node, from_offset.get());
                let to = (to.get(), self.number(to_node.get()), to_offset.get());
                let copied = self.folder.copy(from, to, len.get(), by)?;
                bytes(&WriteOut { size: (copied as u32).into(), ..WriteOut::default() })
            }
        }
    }

    fn init(&mut self, mut rest: Arguments<'_>) -> Answer {
        let InitIn { major, minor, max_readahead, flags } = rest.take()?;
        if major.get() > MAJOR {
            // It asks again, in ours.
            return bytes(&InitOut { major: MAJOR.into(), minor: MINOR.into(), ..InitOut::default() });
        }
        if major.get() < MAJOR || minor.get() < OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let more = match flags.get() & init::INIT_EXT {
            0 => 0,
            _ => rest.take::<InitExt>()?.flags.get(),
        };
        let wanted = init::ASYNC_READ
            | init::BIG_WRITES
            | init::HAS_IOCTL_DIR
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::HANDLE_KILLPRIV_V2
            | init::INIT_EXT;
        let acls = if self.folder.terms().keeps { init::POSIX_ACL | init::DONT_MASK } else { 0 };
        let locks = if self.shares_locks() { init::POSIX_LOCKS | init::FLOCK_LOCKS } else { 0 };
        self.reset();
        self.is_ready = true;
        bytes(&InitOut {
            major: MAJOR.into(),
            minor: MINOR.into(),
            max_readahead,
            flags: (flags.get() & (wanted | locks | acls)).into(),
            max_background: 64.into(),
            congestion_threshold: 48.into(),
            max_write: (DATA_MOST as u32).into(),
            time_gran: 1.into(),
            max_pages: ((DATA_MOST >> 12) as u16).into(),
            flags2: (more & init::DIRECT_IO_ALLOW_MMAP).into(),
            ..InitOut::default()
        })
    }

    fn read(&mut self, handle: u64, node: u64, offset: u64, size: usize, to: &mut Buffers) -> Answer {
        let to = to.split_off_front(size.min(DATA_MOST));
        Ok(Reply::Data(self.folder.read(handle, node, offset, &to)?))
    }

    fn write(&mut self, node: u64, request: &mut Buffers) -> Answer {
        let mut arguments = WriteIn::new_zeroed();
        request.read_exact(arguments.as_mut_bytes()).map_err(|_| Errno::INVAL)?;
        let WriteIn { handle, offset, size, write_flags, .. } = arguments;
        let size = size.get() as usize;
        if size > DATA_MOST || size > request.len() {
            return Err(Errno::INVAL);
        }
        let from = request.split_off_front(size);
        let drops_set_ids = write_flags.get() & WRITE_KILL_SUIDGID != 0;
        let written = self.folder.write(handle.get(), node, offset.get(), &from, drops_set_ids)?;
        bytes(&WriteOut { size: (written as u32).into(), ..WriteOut::default() })
    }

    /// Entries of a folder from `offset` on, as many as fit into `most` bytes. With `plus`, the guest is told of each file, too.
    fn list(&mut self, handle: u64, node: u64, offset: u64, most: usize, plus: bool) -> Answer {
        let folder = self.folder.handle(handle, node)?;
        seek(&folder, SeekFrom::Start(offset))?;
        let (mut reply, mut room) = (Vec::new(), [MaybeUninit::uninit(); LISTED]);
        let mut entries = RawDir::new(&*folder, &mut room);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if reply.is_empty() => return Err(error),
                Err(_) => break,
            };
            let name = entry.file_name();
            let size = entry_size(name, plus);
            if reply.len() + size > most {
                break;
            }
            let (mut ino, mut kind) = (entry.ino(), entry.file_type());
            // It may be something else to the guest.
            if self.folder.terms().keeps && kind == FileType::RegularFile {
                kind = FileType::Unknown;
            }
            if plus {
                let found = self.listed(node, name);
                if let Some(found) = &found {
                    (ino, kind) =
                        (self.inode(&found.stat), FileType::from_raw_mode(found.stat.stx_mode.into()));
                }
                // An entry without a node tells the name alone.
                let entry = found.map_or_else(EntryOut::default, |found| self.entry_of(&found));
                reply.extend(entry.as_bytes());
            }
            let head = Dirent {
                ino: ino.into(),
                offset: entry.next_entry_cookie().into(),
                name_len: (name.count_bytes() as u32).into(),
                kind: entry_kind(kind).into(),
            };
            reply.extend(head.as_bytes());
            reply.extend(name.to_bytes());
            reply.resize(reply.len().next_multiple_of(8), 0);
        }
        Ok(Reply::Bytes(reply))
    }

    /// The file that an entry of a folder is, unless it is the folder itself or the one above, or gone.
    fn listed(&mut self, folder: u64, name: &CStr) -> Option<Found> {
        match name.to_bytes() {
            b"." | b".." => None,
            _ => self.folder.lookup(folder, name).ok(),
        }
    }

    fn entry(&mut self, found: &Found) -> Answer {
        bytes(&self.entry_of(found))
    }

    fn entry_of(&mut self, found: &Found) -> EntryOut {
        if FileType::from_raw_mode(found.stat.stx_mode.into()) == FileType::Directory {
            self.watch(found.number);
        }
        let (seconds, nanoseconds) = self.holds();
        EntryOut {
            node: found.number.into(),
            generation: 0.into(),
            entry_valid: seconds,
            attr_valid: seconds,
            entry_valid_nsec: nanoseconds,
            attr_valid_nsec: nanoseconds,
            attr: self.attr(&found.stat),
        }
    }

    fn attributes(&mut self, stat: &Statx) -> AttrOut {
        let (attr_valid, attr_valid_nsec) = self.holds();
        AttrOut { attr_valid, attr_valid_nsec, attr: self.attr(stat), ..AttrOut::default() }
    }

    fn statx(&mut self, stat: &Statx) -> StatxOut {
        let (attr_valid, attr_valid_nsec) = self.holds();
        let attr = SxAttr::of(stat, self.inode(stat));
        StatxOut { attr_valid, attr_valid_nsec, attr, ..StatxOut::default() }
    }

    /// Seconds and nanoseconds for which the guest believes what it is told.
    fn holds(&self) -> (U64, U32) {
        let holds = holds(self.cache);
        (holds.as_secs().into(), holds.subsec_nanos().into())
    }

    fn attr(&mut self, stat: &Statx) -> Attr {
        Attr::of(stat, self.inode(stat))
    }

    /// The host's inode number; on another file system below the folder, one that differs from those of the folder's.
    fn inode(&mut self, stat: &Statx) -> u64 {
        let device = (stat.stx_dev_major, stat.stx_dev_minor);
        let index = match self.devices.iter().position(|known| *known == device) {
            Some(index) => index,
            // Beyond that some may have the same number.
            None if self.devices.len() == DEVICES_MOST => DEVICES_MOST,
            None => {
                self.devices.push(device);
                self.devices.len() - 1
            }
        };
        stat.stx_ino ^ (index as u64) << 48
    }

    fn opened(&self, handle: u64) -> OpenOut {
        OpenOut { handle: handle.into(), flags: open_flags(self.cache).into(), ..OpenOut::default() }
    }
}

fn done(result: Result<(), Errno>) -> Answer {
    result.and(EMPTY)
}

/// The value, or how long it is if nothing was to be had.
fn sized(size: u32, value: Vec<u8>) -> Answer {
    match size as usize {
        0 => bytes(&GetxattrOut { size: (value.len() as u32).into(), ..GetxattrOut::default() }),
        size if size < value.len() => Err(Errno::RANGE),
        _ => Ok(Reply::Bytes(value)),
    }
}

/// What SETATTR asks for, and by which handle.
fn changes(wanted: &SetattrIn) -> (Option<u64>, Changes) {
    let has = |flag| wanted.valid.get() & flag != 0;
    let time = |set, now, seconds: u64, nanoseconds: u32, otherwise| match () {
        () if has(now) => NOW,
        () if has(set) => Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.into() },
        () => otherwise,
    };
    let times = Timestamps {
        last_access: time(
            set::ATIME,
            set::ATIME_NOW,
            wanted.atime.get(),
            wanted.atime_nsec.get(),
            NO_TIMES.last_access,
        ),
        last_modification: time(
            set::MTIME,
            set::MTIME_NOW,
            wanted.mtime.get(),
            wanted.mtime_nsec.get(),
            NO_TIMES.last_modification,
        ),
    };
    let has_times = has(set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW);
    let changes = Changes {
        mode: has(set::MODE).then_some(wanted.mode.get()),
        uid: has(set::UID).then_some(wanted.uid.get()),
        gid: has(set::GID).then_some(wanted.gid.get()),
        size: has(set::SIZE).then_some(wanted.size.get()),
        times: has_times.then_some(times),
        // One that sets nothing is what Linux makes of a chown to nobody else.
        drops_set_ids: has(set::KILL_SUIDGID) || !has(set::VALUES),
    };
    (has(set::FH).then_some(wanted.handle.get()), changes)
}

/// Writes a reply's header, with `len` bytes behind it. How many bytes the reply has; 0 if there is no room for it.
fn write_head(to: &mut Buffers, request: &InHeader, error: i32, len: usize) -> usize {
    let len = size_of::<OutHeader>() + len;
    let header = OutHeader { len: (len as u32).into(), error: (-error).into(), unique: request.unique };
    if to.write_all(header.as_bytes()).is_ok() { len } else { 0 }
}
