//! [`Watch`]: what others do in folders (fanotify(7)), without what this process does there itself.
//!
//! The host's kernel tells an ordinary user who listens of each change by a folder's file handle and a name, and of a change of this
//! process's own by its number: those are the guest's, which knows of them already.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use rustix::fs::{CWD, fstatvfs};
use rustix::io::{Errno, read};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::guest_warn;

/// The most folders that are watched: the host's kernel lets a user have some thousands more in all (`fanotify/max_user_marks`).
pub const FOLDERS_MOST: usize = 8192;
/// The most events that wait for who is told of them: as many as the host's kernel keeps.
const EVENTS_MOST: usize = 16384;
/// Bytes of events that are read at a time.
const READ: usize = 16 << 10;
/// Bytes of a file handle (MAX_HANDLE_SZ).
const HANDLE_MOST: usize = 128;

/// An entry of a folder, which is called by the number that it was added under.
pub type Place = (u64, CString);

/// What has happened, and to which entry: `.` is the folder itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// All of it; the order is not told.
    pub what: MaskFlags,
    pub at: Place,
    /// Where it is now, if it was moved into a folder that is watched.
    pub to: Option<Place>,
}

/// A folder, as events name it.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Handle {
    file_system: u64,
    kind: i32,
    bytes: Vec<u8>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Watch {
    group: Fanotify,
    mask: MaskFlags,
    folders: HashMap<Handle, u64>,
    /// What was read, and not told yet.
    events: VecDeque<Event>,
    /// This process.
    own: i32,
}

/// `struct fanotify_event_metadata`
#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Metadata {
    event_len: u32,
    version: u8,
    _reserved: u8,
    metadata_len: u16,
    mask: u64,
    fd: i32,
    pid: i32,
}

/// `struct fanotify_event_info_fid`, without the handle's bytes and the name that follow.
#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Info {
    kind: u8,
    _padding: u8,
    len: u16,
    file_system: [u32; 2],
    handle_bytes: u32,
    handle_kind: i32,
}

fn host(error: nix::Error) -> Errno {
    Errno::from_raw_os_error(error as i32)
}

impl Watch {
    /// Of nothing yet.
    ///
    /// # Errors
    /// The host's kernel is older than 5.13, or this user watches too much already.
    pub fn new() -> Result<Self, Errno> {
        let by_name = InitFlags::from_bits_retain(libc::FAN_REPORT_DFID_NAME);
        let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK | by_name;
        let group = Fanotify::init(flags, EventFFlags::O_RDONLY).map_err(host)?;
        let mask = MaskFlags::FAN_MODIFY
            | MaskFlags::FAN_ATTRIB
            | MaskFlags::FAN_CLOSE_WRITE
            | MaskFlags::FAN_CREATE
            | MaskFlags::FAN_DELETE
            | MaskFlags::FAN_RENAME
            | MaskFlags::FAN_ONDIR
            | MaskFlags::FAN_EVENT_ON_CHILD;
        let own = std::process::id().cast_signed();
        Ok(Self { group, mask, folders: HashMap::new(), events: VecDeque::new(), own })
    }

    /// Whether another folder can be watched.
    pub fn has_room(&self) -> bool {
        self.folders.len() < FOLDERS_MOST
    }

    /// Watches nothing any more.
    pub fn clear(&mut self) {
        // What is told of the folders all the same, nobody knows.
        let _ = self.group.mark(MarkFlags::FAN_MARK_FLUSH, MaskFlags::empty(), CWD, Some(c"/"));
        self.folders.clear();
    }

    /// Watches the folder `path`, too, and calls it `number`.
    ///
    /// # Errors
    /// Its file system tells nobody of what happens there; or this user watches too much.
    pub fn add(&mut self, number: u64, path: &OwnedFd) -> Result<(), Errno> {
        let handle = Handle::of(path)?;
        if let Some(known) = self.folders.get_mut(&handle) {
            *known = number;
            return Ok(());
        }
        if !self.has_room() {
            return Err(Errno::NOSPC);
        }
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_ONLYDIR;
        let mark = |mask| self.group.mark(flags, mask, path, Some(c"."));
        if let Err(error) = mark(self.mask) {
            if error != nix::Error::EINVAL || !self.mask.contains(MaskFlags::FAN_RENAME) {
                return Err(host(error));
            }
            // Before 5.17 only half of a move is told at a time.
            let halves = MaskFlags::FAN_MOVED_FROM | MaskFlags::FAN_MOVED_TO;
            self.mask = self.mask.difference(MaskFlags::FAN_RENAME).union(halves);
            mark(self.mask).map_err(host)?;
        }
        self.folders.insert(handle, number);
        Ok(())
    }

    /// The next, if anything has happened.
    pub fn next(&mut self) -> Option<Event> {
        while self.events.is_empty() && self.read() {}
        self.events.pop_front()
    }

    /// Takes in what the host's kernel has to tell, so that it does not have to keep too much: all that this process does is among it.
    pub fn keep_up(&mut self) {
        while self.read() {}
    }

    fn read(&mut self) -> bool {
        let mut room = [0; READ];
        let len = read(self.group.as_fd(), &mut room[..]).unwrap_or(0);
        room.get(..len).into_iter().for_each(|bytes| self.take_in(bytes));
        len > 0
    }

    fn take_in(&mut self, mut bytes: &[u8]) {
        while let Ok((head, _)) = Metadata::read_from_prefix(bytes) {
            let Some((event, rest)) = bytes.split_at_checked(head.event_len as usize) else { return };
            let Some(info) = event.get(usize::from(head.metadata_len).max(size_of::<Metadata>())..) else {
                return;
            };
            bytes = rest;
            let what = MaskFlags::from_bits_retain(head.mask);
            let is_lost = what.contains(MaskFlags::FAN_Q_OVERFLOW) || self.events.len() >= EVENTS_MOST;
            if is_lost {
                guest_warn!("shared folder: more has been changed than the guest can be told of");
            } else if head.pid != self.own {
                self.events.extend(self.event(what, info));
            }
        }
    }

    /// None if it is not about an entry of a folder that is watched.
    fn event(&self, what: MaskFlags, mut rest: &[u8]) -> Option<Event> {
        let (mut at, mut to) = (None, None);
        while let Ok((head, body)) = Info::read_from_prefix(rest) {
            let (record, others) = rest.split_at_checked(usize::from(head.len))?;
            let body = body.get(..record.len().checked_sub(size_of::<Info>())?)?;
            rest = others;
            let (bytes, name) = body.split_at_checked(head.handle_bytes as usize)?;
            let [low, high] = head.file_system.map(u64::from);
            let handle =
                Handle { file_system: high << 32 | low, kind: head.handle_kind, bytes: bytes.to_vec() };
            let name = CStr::from_bytes_until_nul(name).ok()?;
            let place = self.folders.get(&handle).map(|number| (*number, name.to_owned()));
            match head.kind {
                libc::FAN_EVENT_INFO_TYPE_DFID_NAME | libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => at = place,
                libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => to = place,
                _ => {}
            }
        }
        // Half of a move is the other half's end.
        let half = what & MaskFlags::FAN_ONDIR;
        Some(match (at, to) {
            (None, Some(to)) => Event { what: half | MaskFlags::FAN_MOVED_TO, at: to, to: None },
            (Some(at), None) if what.contains(MaskFlags::FAN_RENAME) => {
                Event { what: half | MaskFlags::FAN_MOVED_FROM, at, to: None }
            }
            (at, to) => Event { what, at: at?, to },
        })
    }
}

impl Handle {
    fn of(path: &OwnedFd) -> Result<Self, Errno> {
        /// `struct file_handle`
        #[repr(C)]
        struct Raw {
            bytes: libc::c_uint,
            kind: libc::c_int,
            data: [u8; HANDLE_MOST],
        }
        let mut raw = Raw { bytes: HANDLE_MOST as u32, kind: 0, data: [0; HANDLE_MOST] };
        let mut mount = 0;
        // SAFETY: name_to_handle_at(2) writes at most as many bytes behind the head as that says that there are; the path is a C string.
        let result = unsafe {
            libc::name_to_handle_at(
                path.as_raw_fd(),
                c"".as_ptr(),
                (&raw mut raw).cast(),
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if result < 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        let bytes = raw.data.get(..raw.bytes as usize).ok_or(Errno::IO)?.to_vec();
        Ok(Self { file_system: fstatvfs(path)?.f_fsid, kind: raw.kind, bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;
    use std::process::Command;

    use rustix::fs::{Mode, OFlags, openat};

    use super::*;

    fn folder(path: &Path) -> OwnedFd {
        openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    /// Has another process run `script` in `dir`.
    fn other(dir: &Path, script: &str) {
        assert!(Command::new("sh").args(["-ec", script]).current_dir(dir).status().unwrap().success());
    }

    type Told = (MaskFlags, u64, String, Option<(u64, String)>);

    fn all(watch: &mut Watch) -> Vec<Told> {
        let text = |name: CString| name.into_string().unwrap();
        std::iter::from_fn(|| watch.next())
            .map(|Event { what, at, to }| (what, at.0, text(at.1), to.map(|(to, name)| (to, text(name)))))
            .collect()
    }

    #[test]
    fn others_changes_are_told_and_not_this_processs_own() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        fs::create_dir_all(at.join("inner/more")).unwrap();
        let mut watch = Watch::new().unwrap();
        watch.add(1, &folder(at)).unwrap();
        watch.add(2, &folder(&at.join("inner"))).unwrap();
        // The same once more is no other.
        watch.add(3, &folder(&at.join("inner"))).unwrap();

        File::create(at.join("own")).unwrap();
        fs::remove_file(at.join("own")).unwrap();
        assert_eq!(all(&mut watch), []);

        other(at, "echo a >a");
        let mut told = all(&mut watch);
        let mask = told.iter().fold(MaskFlags::empty(), |all, (what, ..)| all | *what);
        assert_eq!(mask, MaskFlags::FAN_CREATE | MaskFlags::FAN_MODIFY | MaskFlags::FAN_CLOSE_WRITE);
        assert!(told.iter().all(|(_, folder, name, to)| (*folder, &**name) == (1, "a") && to.is_none()));

        other(at, "mv a inner/b");
        assert_eq!(all(&mut watch), [(MaskFlags::FAN_RENAME, 1, "a".into(), Some((3, "b".into())))]);
        other(at, "mv inner/b inner/more/; mv inner/more/b c; rmdir inner/more; touch inner");
        told = all(&mut watch);
        let on_folder = MaskFlags::FAN_ONDIR;
        let expected = [
            (MaskFlags::FAN_MOVED_FROM, 3, "b".into(), None),
            (MaskFlags::FAN_MOVED_TO, 1, "c".into(), None),
            (MaskFlags::FAN_DELETE | on_folder, 3, "more".into(), None),
            (MaskFlags::FAN_ATTRIB | on_folder, 3, ".".into(), None),
        ];
        assert_eq!(told, expected);

        watch.clear();
        other(at, "rm c");
        assert_eq!(all(&mut watch), []);
    }

    #[test]
    fn what_makes_no_sense_is_nothing() {
        let mut watch = Watch::new().unwrap();
        for bytes in [&[0; 0][..], &[0; 7], &[0; 24], &[0xff; 64], &[24, 0, 0, 0, 3, 0, 24, 0]] {
            watch.take_in(bytes);
            assert_eq!(watch.event(MaskFlags::FAN_CREATE, bytes), None);
        }
        assert!(watch.events.is_empty());
    }
}
