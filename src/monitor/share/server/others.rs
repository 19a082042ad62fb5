//! What others change in the folder, told to a program of the guest's, its agent: so that the guest's own programs hear of it by inotify(7).
//!
//! A guest's kernel tells of what is done by way of itself, and FUSE has no request by which a server could add to that. So the agent asks for
//! the next change, and does what has been done already: it makes the file that is there, removes the one that is gone. Nothing that it asks
//! for so is done here. It is answered as if it had been.

use std::collections::VecDeque;
use std::ffi::CStr;

use nix::sys::fanotify::MaskFlags;
use rustix::fs::FileType;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::{Answer, EMPTY, Reply, Server, bytes};
use crate::share::watch::{Event, Place, Watch};
use crate::share::wire::*;

/// Bytes of a path that is told (PATH_MAX, less the guest's own part).
const PATH_MOST: usize = 3072;

/// Requests between two looks at what happens: each is a handful of events itself.
const LOOK_AFTER: u32 = 1024;

/// What has become of a file: the numbers are the agent's, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data = 1,
    Attributes = 2,
    /// Who had it open for writing has closed it.
    Written = 3,
    Made = 4,
    Removed = 5,
    Moved = 6,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    kind: Kind,
    is_folder: bool,
    at: Place,
    to: Option<Place>,
}

/// Who is told, and what.
#[derive(Debug)]
struct Told {
    watch: Watch,
    /// The thread that asks, and what it asks of: when that is closed, it is nobody any more.
    thread: u32,
    handle: u64,
    next: VecDeque<Change>,
    /// What it does now.
    now: Option<Change>,
    /// Requests since what happens was last looked at.
    requests: u32,
}

/// Nobody is told of anything unless somebody asks.
#[derive(Debug, Default)]
pub(super) struct Others {
    told: Option<Told>,
    /// Why nobody can be has been said.
    is_said: bool,
}

impl Others {
    /// A request is served.
    pub(super) fn keep_up(&mut self) {
        let Some(told) = &mut self.told else { return };
        told.requests += 1;
        if told.requests >= LOOK_AFTER {
            told.requests = 0;
            told.watch.keep_up();
        }
    }

    pub(super) fn clear(&mut self) {
        self.told = None;
    }

    pub(super) fn closed(&mut self, handle: u64) {
        self.told.take_if(|told| told.handle == handle);
    }

    /// Whether `request` is of who is told.
    pub(super) fn are_told(&self, request: &InHeader) -> bool {
        self.told.as_ref().is_some_and(|told| told.thread == request.pid.get())
    }

    fn now(&self) -> Option<&Change> {
        self.told.as_ref()?.now.as_ref()
    }
}

impl Server {
    pub(super) fn ioctl(&mut self, header: &InHeader, node: u64, mut rest: Arguments<'_>) -> Answer {
        let IoctlIn { handle, command, out_size, .. } = rest.take()?;
        if command.get() != NEXT_CHANGE || self.single.is_some() {
            return Err(Errno::NOTTY);
        }
        let (handle, thread) = (handle.get(), header.pid.get());
        // The guest's kernel answers for who it is.
        if header.uid.get() != 0 || thread == 0 {
            return Err(Errno::PERM);
        }
        self.folder.handle(handle, node)?;
        match &self.others.told {
            Some(told) if (told.thread, told.handle) == (thread, handle) => {}
            Some(_) => return Err(Errno::BUSY),
            None => self.begin(thread, handle)?,
        }
        let mut reply = IoctlOut::default().as_bytes().to_vec();
        reply.extend(self.next_change().unwrap_or_else(|| ChangeOut::default().as_bytes().to_vec()));
        match reply.len() - size_of::<IoctlOut>() > out_size.get() as usize {
            true => Err(Errno::RANGE),
            false => Ok(Reply::Bytes(reply)),
        }
    }

    fn begin(&mut self, thread: u32, handle: u64) -> Result<(), Errno> {
        let path = self.folder.path(super::ROOT)?;
        let watch = Watch::new().and_then(|mut watch| watch.add(super::ROOT, &path).map(|()| watch));
        let watch = watch.inspect_err(|error| {
            if !std::mem::replace(&mut self.others.is_said, true) {
                log::warn!("shared folder: the guest is not told of what others change in it: {error}");
            }
        })?;
        self.others.told =
            Some(Told { watch, thread, handle, next: VecDeque::new(), now: None, requests: 0 });
        self.watch_known();
        Ok(())
    }

    fn watch_known(&mut self) {
        for number in self.folder.known_folders() {
            self.watch(number);
        }
    }

    /// If somebody is told of changes, those in the folder `number` are among them from now on.
    pub(super) fn watch(&mut self, number: u64) {
        let Some(told) = &mut self.others.told else { return };
        let Ok(path) = self.folder.path(number) else { return };
        if !told.watch.has_room() && self.folder.known_folders().len() < crate::share::watch::FOLDERS_MOST / 2
        {
            // Most of those that are watched the guest has forgotten.
            told.watch.clear();
            return self.watch_known();
        }
        // One that cannot be watched changes as they all did.
        let _ = told.watch.add(number, &path);
    }

    /// As it is told.
    fn next_change(&mut self) -> Option<Vec<u8>> {
        loop {
            let told = self.others.told.as_mut()?;
            told.now = None;
            match told.next.pop_front() {
                Some(change) => {
                    if let Some(bytes) = self.tell(change) {
                        return Some(bytes);
                    }
                }
                None => {
                    let event = told.watch.next()?;
                    self.note(event);
                }
            }
        }
    }

    /// What has happened, one after the other.
    fn note(&mut self, Event { what, at, to }: Event) {
        let has = |flags| what.intersects(flags);
        let is_folder = has(MaskFlags::FAN_ONDIR);
        let mut kinds = Vec::new();
        if to.is_some() {
            kinds.push(Kind::Moved);
        } else {
            let is_there = self.folder.there(at.0, &at.1).is_some();
            if has(MaskFlags::FAN_DELETE | MaskFlags::FAN_MOVED_FROM) {
                kinds.push(Kind::Removed);
            }
            let others = [
                (MaskFlags::FAN_CREATE | MaskFlags::FAN_MOVED_TO, Kind::Made),
                (MaskFlags::FAN_MODIFY, Kind::Data),
                (MaskFlags::FAN_ATTRIB, Kind::Attributes),
                (MaskFlags::FAN_CLOSE_WRITE, Kind::Written),
            ];
            kinds.extend(others.iter().filter(|(flags, _)| is_there && has(*flags)).map(|(_, kind)| *kind));
        }
        if let Some(told) = &mut self.others.told {
            let change = |kind| Change { kind, is_folder, at: at.clone(), to: to.clone() };
            told.next.extend(kinds.into_iter().map(change));
        }
    }

    /// None if the guest would not understand it by now.
    fn tell(&mut self, mut change: Change) -> Option<Vec<u8>> {
        let (folder, name) = change.to.as_ref().unwrap_or(&change.at);
        let there = self.folder.there(*folder, name);
        match (change.kind, &there) {
            (Kind::Removed, _) => {}
            (Kind::Moved, None) => (change.kind, change.to) = (Kind::Removed, None),
            (_, None) => return None,
            // What the guest works in already is not made once more.
            (Kind::Made, Some((_, true))) if change.is_folder => change.kind = Kind::Attributes,
            _ => {}
        }
        let path = self.folder.way_to(change.at.0, &change.at.1, PATH_MOST)?;
        let to = match &change.to {
            Some((folder, name)) => self.folder.way_to(*folder, name, PATH_MOST)?,
            None => Vec::new(),
        };
        let kind = if change.is_folder { FileType::Directory } else { FileType::RegularFile };
        let mode = there.map_or(kind.as_raw_mode(), |(stat, _)| stat.stx_mode.into());
        let head = ChangeOut {
            kind: (change.kind as u32).into(),
            mode: mode.into(),
            path_len: (path.len() as u32).into(),
            to_len: (to.len() as u32).into(),
        };
        self.others.told.as_mut()?.now = Some(change);
        Some([head.as_bytes(), &path, &to].concat())
    }

    /// The answer to what somebody asks who is told of changes. None if it is that of all others: it changes nothing.
    pub(super) fn replay(
        &mut self,
        opcode: Opcode,
        header: &InHeader,
        rest: &Arguments<'_>,
    ) -> Option<Answer> {
        if !self.others.are_told(header) {
            return None;
        }
        let mut rest = Arguments(rest.0);
        let node = header.node.get();
        Some(match opcode {
            Opcode::Lookup => return rest.name().and_then(|name| self.found_so(node, name)).transpose(),
            Opcode::Setattr => self.folder.stat(node, None).and_then(|stat| bytes(&self.attributes(&stat))),
            Opcode::Open => {
                let by = (header.uid.get(), header.gid.get());
                self.folder.open(node, 0, by).and_then(|handle| bytes(&self.opened(handle)))
            }
            _ if !opcode.changes() => return None,
            _ => match self.has_done(opcode, node, rest) {
                Ok(Some((folder, name))) => {
                    self.folder.lookup(folder, &name).and_then(|found| self.entry(&found))
                }
                Ok(None) => EMPTY,
                Err(error) => Err(error),
            },
        })
    }

    /// An entry as it has to be for what is done now.
    fn found_so(&mut self, folder: u64, name: &CStr) -> Result<Option<Reply>, Errno> {
        let is = |place: &Place| place.0 == folder && *place.1 == *name;
        let Some(Change { kind, is_folder, at, to }) = self.others.now().cloned() else { return Ok(None) };
        match (kind, to) {
            (Kind::Made, _) if is(&at) => Err(Errno::NOENT),
            (Kind::Removed, _) if is(&at) => match self.folder.was_there(folder, name) {
                Some(found) => self.entry(&found).map(Some),
                None => bytes(&self.nobody(is_folder)).map(Some),
            },
            (Kind::Moved, Some((folder, name))) if is(&at) => {
                let found = self.folder.lookup(folder, &name)?;
                self.entry(&found).map(Some)
            }
            (Kind::Moved, Some(to)) if is(&to) => {
                let found = self.folder.was_there(folder, name).ok_or(Errno::NOENT)?;
                self.entry(&found).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Whether that has been done: if it made something, what.
    fn has_done(
        &mut self,
        opcode: Opcode,
        folder: u64,
        mut rest: Arguments<'_>,
    ) -> Result<Option<Place>, Errno> {
        let now = self.others.now().ok_or(Errno::PERM)?;
        let (is_done, made) = match (now.kind, opcode) {
            (Kind::Made, Opcode::Mknod | Opcode::Mkdir | Opcode::Symlink) => {
                match opcode {
                    Opcode::Mknod => drop(rest.take::<MknodIn>()?),
                    Opcode::Mkdir => drop(rest.take::<MkdirIn>()?),
                    _ => {}
                }
                (now.at == (folder, rest.name()?.to_owned()), Some(now.at.clone()))
            }
            (Kind::Removed, Opcode::Unlink | Opcode::Rmdir) => {
                (now.at == (folder, rest.name()?.to_owned()), None)
            }
            (Kind::Moved, Opcode::Rename | Opcode::Rename2) => {
                let new = match opcode {
                    Opcode::Rename => rest.take::<RenameIn>()?.new_folder,
                    _ => rest.take::<Rename2In>()?.new_folder,
                };
                let (from, to) = (rest.name()?.to_owned(), rest.name()?.to_owned());
                (now.at == (folder, from) && now.to == Some((new.get(), to)), None)
            }
            _ => (false, None),
        };
        if is_done { Ok(made) } else { Err(Errno::PERM) }
    }

    /// An entry that the guest has never seen, and will not see again.
    fn nobody(&mut self, is_folder: bool) -> EntryOut {
        let number = self.folder.nobody();
        let mode = match is_folder {
            true => FileType::Directory.as_raw_mode() | 0o755,
            false => FileType::RegularFile.as_raw_mode() | 0o644,
        };
        let attr = Attr { ino: number.into(), mode: mode.into(), nlink: 1.into(), ..Attr::default() };
        EntryOut { node: number.into(), attr, ..EntryOut::default() }
    }
}
