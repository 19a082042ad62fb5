//! Creates the files that a run writes: consoles, ports, traces, pages.
//!
//! They hold the guest's data, so only their owner may read them (0600; [`folder`]: 0700). [`create`] writes to no file that others who
//! may write to the folder have chosen ([`planted`]).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FlockOperation, Mode, OFlags, fcntl_getfl, fcntl_setfl, flock, open, openat, renameat, statat,
};
use rustix::io::Errno;

use crate::config::host_path::quoted;
use crate::planted;
use crate::sandbox::started_by;

/// Creates the file at `path`, or empties the one that is there: 0600 if it is new; an existing one keeps its mode. Terminals,
/// `/dev/null`, and named pipes that somebody reads are taken as they are. `/dev/stdout`, `/dev/stderr` and `/dev/fd/N` are what
/// this process was given; a file there is written to at its end. A file is locked (flock(2)) for as long as it is open: another
/// monitor's is not emptied under its hands.
///
/// # Errors
/// As open(2) has them; `path` is a symbolic link, has another name, or may be planted; a named pipe has no reader (ENXIO); another has the file locked
/// ([`ErrorKind::ResourceBusy`](io::ErrorKind::ResourceBusy)).
pub fn create(path: &Path) -> io::Result<File> {
    let inherited = inherited(path);
    // Without O_NONBLOCK a pipe would be waited for.
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match &inherited {
        Some(path) => planted::open(path, flags | OFlags::APPEND),
        None => planted::open_to_write(path, flags | OFlags::CREATE, Mode::RUSR | Mode::WUSR),
    };
    let file = file.map_err(|error| told(path, error))?;
    if file.metadata()?.is_file() && inherited.is_none() {
        lock(&file)?;
        file.set_len(0)?;
    }
    fcntl_setfl(file.as_fd(), fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

fn lock(file: &File) -> io::Result<()> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, "another virtual machine writes to it"))
        }
        // A file system without locks.
        _ => Ok(()),
    }
}

/// What to try where [`create`] has failed with `error` for `path`, of which `example` is one that would do.
pub fn hint(path: &Path, error: &io::Error, example: &str) -> String {
    let folder = folder_of(path);
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::ResourceBusy, _) => {
            "give each run a file of its own, or end the other one: vmm list".to_owned()
        }
        (io::ErrorKind::IsADirectory, _) => {
            format!("name a file in that folder: {}", quoted(&path.join(example)))
        }
        (io::ErrorKind::NotFound, _) => format!("make the folder first: mkdir -p {}", quoted(folder)),
        (io::ErrorKind::StorageFull, _) => {
            format!("make room, or name a file elsewhere: df {}", quoted(path))
        }
        (_, Some(libc::ENXIO))
            if std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket()) =>
        {
            "an output is no socket; name a file, or have vmm listen on one: socket=PATH".to_owned()
        }
        (_, Some(libc::ENXIO)) => "start the reader of the named pipe first".to_owned(),
        _ if std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.nlink() > 1) => {
            format!("name another file, or remove this name of it: rm {}", quoted(path))
        }
        // Another user's leads where that one wants.
        (kind, _) if kind != io::ErrorKind::PermissionDenied && path.is_symlink() => {
            "name the file that the symbolic link leads to".to_owned()
        }
        _ => format!("see who may write there: ls -ld {} {}", quoted(folder), quoted(path)),
    }
}

/// Makes a folder that nobody but its owner may enter. What is there already is an error.
///
/// # Errors
/// As mkdir(2) has them.
pub fn folder(path: &Path) -> io::Result<()> {
    planted::make_folder(path, Mode::RWXU)
}

/// Makes `path`, and what leads there, for this user alone, where it is not there yet.
///
/// # Errors
/// As mkdir(2) has them; what is there is another user's, or others may write to it.
pub fn own_folder(path: &Path) -> io::Result<()> {
    fn make(path: &Path) -> io::Result<()> {
        let made = match (folder(path), path.parent()) {
            (Err(error), Some(above)) if error.kind() == io::ErrorKind::NotFound => {
                make(above)?;
                folder(path)
            }
            (made, _) => made,
        };
        match made {
            // From before, or by another process that came first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }
    // The folder above is looked at even if it is there.
    path.parent().map_or(Ok(()), make)?;
    make(path)?;
    // Where others may write, somebody else may have been first.
    let found = planted::open(path, OFlags::PATH | OFlags::DIRECTORY)?.metadata()?;
    match found.uid() == started_by().as_raw() && found.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(io::Error::other("it belongs to another user, or others may write to it")),
    }
}

/// The folder that `path` is in, and a hidden name there for what gets its own once it is complete. None if `path` ends in no name.
pub fn hidden(path: &Path) -> Option<(&Path, PathBuf)> {
    let folder = folder_of(path);
    let mut hidden = OsString::from(".");
    hidden.push(path.file_name()?);
    hidden.push(format!(".{}", std::process::id()));
    Some((folder, folder.join(hidden)))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where a descriptor of this process can be opened anew, if `path` names one.
fn inherited(path: &Path) -> Option<PathBuf> {
    let number = match path.to_str()? {
        "/dev/stdout" => "1",
        "/dev/stderr" => "2",
        path => ["/dev/fd/", "/proc/self/fd/"].into_iter().find_map(|folder| path.strip_prefix(folder))?,
    };
    number.parse::<u32>().ok().map(|number| format!("/proc/self/fd/{number}").into())
}

/// The kernel's words for a link are "too many levels of symbolic links", of which there is one.
fn told(path: &Path, error: io::Error) -> io::Error {
    match std::fs::read_link(path) {
        Ok(target) if error.raw_os_error() == Some(libc::ELOOP) => {
            let what =
                format!("it is a symbolic link, and outputs follow none; its target is {}", target.display());
            io::Error::new(error.kind(), what)
        }
        _ => error,
    }
}

/// A file that never grows beyond a size: when it is full it becomes PATH.1, in place of an older one, and begins anew. So there
/// are at most twice as many bytes, the latest of all.
#[derive(Debug)]
pub struct Rotating {
    file: File,
    /// That it is in: whatever the folder is called by now, and wherever this process is.
    folder: OwnedFd,
    name: OsString,
    /// Most bytes of one file.
    max: u64,
    written: u64,
    turns: u64,
}

impl Rotating {
    /// Creates `path` like [`create`].
    ///
    /// # Errors
    /// Those of [`create`]; it is no regular file.
    pub fn create(path: &Path, max: u64) -> io::Result<Self> {
        let file = create(path)?;
        if !file.metadata()?.is_file() || inherited(path).is_some() {
            return Err(io::Error::other("it is no regular file, so it has no size to limit"));
        }
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let folder =
            open(folder_of(path), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { file, folder, name, max: max.max(1), written: 0, turns: 0 })
    }

    /// Whether `len` bytes more fit into the file as it is.
    pub fn has_room(&self, len: usize) -> bool {
        self.written + len as u64 <= self.max
    }

    /// Writes some of `data`. True if that made older output go for the first time.
    ///
    /// # Errors
    /// As write(2) has them.
    pub fn write(&mut self, data: &[u8]) -> io::Result<(usize, bool)> {
        let mut drops = false;
        if self.written > 0 && self.written + data.len() as u64 > self.max {
            // The first time there is nothing older, unless the file had to be emptied.
            let kept = self.turn()?;
            drops = self.turns == if kept { 2 } else { 1 };
        }
        let most = usize::try_from(self.max).unwrap_or(usize::MAX);
        let count = self.file.write(&data[..data.len().min(most)])?;
        self.written += count as u64;
        Ok((count, drops))
    }

    /// Begins anew. True if what was written until now is kept beside it.
    fn turn(&mut self) -> io::Result<bool> {
        self.turns += 1;
        self.written = 0;
        let moved = self.move_away();
        if moved.is_err() {
            // The folder may not be written to, or somebody else moved the file: what we have is all there is.
            self.file.set_len(0)?;
            io::Seek::rewind(&mut self.file)?;
        }
        Ok(moved.is_ok())
    }

    fn move_away(&mut self) -> io::Result<()> {
        let Self { folder, name, .. } = &*self;
        let (ours, there) = (self.file.metadata()?, statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?);
        if (ours.dev(), ours.ino()) != (there.st_dev, there.st_ino) {
            return Err(io::Error::other("another file has its name"));
        }
        renameat(folder, name, folder, older(Path::new(name)))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?);
        // Another may have opened it in between: then it has the name, and this one goes on with what it has.
        lock(&file)?;
        self.file = file;
        Ok(())
    }
}

/// Where what [`Rotating`] has filled of `path` goes.
pub fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn several_may_make_ones_own_folder_at_once() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..100 {
            let path = dir.path().join(format!("{round}/a/b/c"));
            let start = std::sync::Barrier::new(4);
            let make = || {
                start.wait();
                own_folder(&path)
            };
            std::thread::scope(|scope| {
                let all = [(); 4].map(|()| scope.spawn(make));
                all.into_iter().for_each(|made| made.join().unwrap().unwrap());
            });
            assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o700));
        }
    }

    #[test]
    fn outputs_are_their_owners_and_follow_no_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        create(&path("new")).unwrap().write_all(b"x").unwrap();
        folder(&path("folder")).unwrap();
        assert_eq!((mode(&path("new")), mode(&path("folder"))), (0o600, 0o700));
        assert!(folder(&path("folder")).is_err());
        // What is there is emptied, and keeps the mode that its owner gave it.
        fs::set_permissions(path("new"), fs::Permissions::from_mode(0o644)).unwrap();
        create(&path("new")).unwrap();
        assert_eq!((fs::read(path("new")).unwrap(), mode(&path("new"))), (vec![], 0o644));
        fs::write(path("precious"), "precious").unwrap();
        symlink("precious", path("link")).unwrap();
        symlink("nothing", path("dangling")).unwrap();
        for link in ["link", "dangling"] {
            let error = create(&path(link)).unwrap_err().to_string();
            assert!(error.contains("symbolic link"), "{error}");
        }
        assert_eq!(fs::read(path("precious")).unwrap(), b"precious");
        assert!(!path("nothing").exists());
        // A folder on the way may be one.
        symlink("folder", path("way")).unwrap();
        create(&path("way/file")).unwrap();
    }

    #[test]
    fn a_file_that_is_written_to_is_nobody_elses_also_after_it_began_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let busy = |path: &Path| {
            let kind = |result: io::Result<()>| result.err().map(|error| error.kind());
            let kinds = [kind(create(path).map(drop)), kind(Rotating::create(path, 9).map(drop))];
            kinds == [Some(io::ErrorKind::ResourceBusy); 2]
        };
        let mut file = create(&path).unwrap();
        file.write_all(b"precious").unwrap();
        assert!(busy(&path));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        drop(file);
        let mut log = Rotating::create(&path, 10).unwrap();
        log.write(b"01234567").unwrap();
        log.write(b"89abcd").unwrap();
        assert!(older(&path).exists() && busy(&path));
        drop(log);
        create(&path).unwrap();
        // What all may write to is nobody's.
        assert!(!busy(Path::new("/dev/null")));
    }

    #[test]
    fn devices_pipes_and_inherited_descriptors_are_taken_as_they_are() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        create(Path::new("/dev/null")).unwrap().write_all(b"x").unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert_eq!(create(&pipe).unwrap_err().raw_os_error(), Some(libc::ENXIO), "nobody reads it");
        let _reader = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
        let writer = create(&pipe).unwrap();
        assert!(!fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before, ").unwrap();
        let again = format!("/dev/fd/{}", file.as_raw_fd());
        create(Path::new(&again)).unwrap().write_all(b"after").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 13);
        assert!(Rotating::create(Path::new(&again), 10).is_err() && Rotating::create(&pipe, 10).is_err());
    }

    #[test]
    fn a_full_file_begins_anew_and_the_latest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (path, older) = (dir.path().join("log"), dir.path().join("log.1"));
        let mut log = Rotating::create(&path, 10).unwrap();
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let mut drops = Vec::new();
        for word in ["0123", "4567", "89ab", "cdef", "ghij"] {
            drops.push(log.write(word.as_bytes()).unwrap());
        }
        assert_eq!((read(&older), read(&path)), ("89abcdef".to_owned(), "ghij".to_owned()));
        assert_eq!(drops, [(4, false), (4, false), (4, false), (4, false), (4, true)]);
        assert_eq!(log.write(&[b'x'; 25]).unwrap(), (10, false), "as much as there is room for");
        assert_eq!((mode(&path), mode(&older), read(&path).len()), (0o600, 0o600, 10));
        // Its folder may get another name.
        let logs = dir.path().join("logs");
        folder(&logs).unwrap();
        let mut moved = Rotating::create(&logs.join("log"), 4).unwrap();
        fs::rename(&logs, dir.path().join("kept")).unwrap();
        (0..2).for_each(|_| _ = moved.write(b"abcd").unwrap());
        assert_eq!(read(&dir.path().join("kept/log.1")), "abcd");
        // Somebody else's file in its place is not touched.
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "theirs").unwrap();
        log.write(b"yy").unwrap();
        assert_eq!((read(&path), read(&dir.path().join("moved"))), ("theirs".to_owned(), "yy".to_owned()));
    }
}
