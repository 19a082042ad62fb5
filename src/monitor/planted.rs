//! Opens files whose names other users may have planted: links, pipes and files of theirs in a folder such as /tmp.
//!
//! With `fs.protected_symlinks`, `protected_hardlinks`, `protected_fifos` and `protected_regular` the kernel refuses much of that by itself
//! (Documentation/admin-guide/sysctl/fs.rst). They are off on many hosts, so [`open`] and [`open_to_write`] keep the same rules: in a folder that
//! others may write to, only this user, root and the folder's owner are trusted. A file that is written to has no second name
//! either, in any folder. Paths that nobody else could have planted work as with open(2).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, Stat, fstat, fstatfs, mkdirat,
    openat, openat2, readlinkat, statat,
};
use rustix::io::Errno;

use crate::sandbox::started_by;

/// As many links as the kernel follows in one path (path_resolution(7)).
const MOST_LINKS: u32 = 40;
const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Opens the file at `path` with these `flags`, which create nothing. Links are followed, unless another user may have planted them; a
/// pipe or socket that another user may have planted is not opened either.
///
/// # Errors
/// As open(2) has them; another user may have planted it ([`ErrorKind::PermissionDenied`]).
pub fn open(path: &Path, flags: OFlags) -> Result<File> {
    let place = Place::of(path, true)?;
    place.check(|kind| matches!(kind, FileType::Fifo | FileType::Socket))?;
    place.open(flags, Mode::empty())
}

/// Opens the file at `path` with these `flags`, to write to it. With [`OFlags::CREATE`] it is created with `mode` where it is not there, and
/// `path` itself is no link.
///
/// # Errors
/// As open(2) has them; another user may have planted it ([`ErrorKind::PermissionDenied`]); it has another name.
pub fn open_to_write(path: &Path, flags: OFlags, mode: Mode) -> Result<File> {
    let place = Place::of(path, !flags.contains(OFlags::CREATE))?;
    // Before it is opened, which a pipe without a reader is not.
    place.check(|kind| matches!(kind, FileType::Fifo | FileType::Socket))?;
    let file = place.open(flags, mode)?;
    let facts = fstat(&file)?;
    place.judge(&facts, |kind| matches!(kind, FileType::RegularFile | FileType::Fifo))?;
    // Whoever may put a link here may have chosen a file of this user's.
    if FileType::from_raw_mode(facts.st_mode) == FileType::RegularFile && facts.st_nlink > 1 {
        return Err(Error::other(
            "the file has another name, too (a hard link), and would change under both",
        ));
    }
    Ok(file)
}

/// Makes the folder `path`. Links on the way are followed as in [`open`].
///
/// # Errors
/// As mkdir(2) has them; another user may have planted what is there, or a link on the way ([`ErrorKind::PermissionDenied`]).
pub fn make_folder(path: &Path, mode: Mode) -> Result<()> {
    // Without a slash at its end, which would be the folder itself.
    let place = Place::of(path.components().as_path(), false)?;
    let made = mkdirat(&place.folder, &*place.name, mode);
    if made == Err(Errno::EXIST) {
        place.check(|_| true)?;
    }
    Ok(made?)
}

/// Neither `path` nor anything on the way there is a link that another user may have planted: see [`check_way`].
///
/// # Errors
/// One is; or the folder of `path` cannot be found.
pub fn check(path: &Path) -> Result<()> {
    Place::of(path, true).map(drop)
}

/// Nothing on the way to `path` is a link that another user may have planted. For who names it to the kernel otherwise: it may be planted
/// still, between this and that.
///
/// # Errors
/// It is; or the folder of `path` cannot be found.
pub fn check_way(path: &Path) -> Result<()> {
    Place::of(path, false).map(drop)
}

/// Where a file is.
struct Place {
    folder: OwnedFd,
    /// That of an entry there; of a link if that is not to be followed.
    name: OsString,
    /// It is one of the kernel's own links in /proc, which lead to what is open already.
    is_magic: bool,
}

impl Place {
    fn of(path: &Path, follow: bool) -> Result<Self> {
        if path.as_os_str().is_empty() {
            return Err(Errno::NOENT.into());
        }
        match Self::without_links(path, follow) {
            Some(place) => Ok(place),
            None => Self::over_links(path, follow),
        }
    }

    /// Almost every path has no links in it, and is found with one call.
    fn without_links(path: &Path, follow: bool) -> Option<Self> {
        let (above, name) = split(path.as_os_str());
        let folder = openat2(CWD, above, FOLDER, Mode::empty(), ResolveFlags::NO_SYMLINKS).ok()?;
        let is_link = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        if follow && statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_link) {
            return None;
        }
        Some(Self { folder, name: name.to_owned(), is_magic: false })
    }

    /// Step by step, as the kernel would, and looks at each link.
    fn over_links(path: &Path, follow: bool) -> Result<Self> {
        let begin =
            |path: &OsStr| openat(CWD, if is_absolute(path) { "/" } else { "." }, FOLDER, Mode::empty());
        let mut at = begin(path.as_os_str())?;
        // What is still to be gone, the next last.
        let mut way = parts(path.as_os_str());
        let mut links = 0;
        while let Some(name) = way.pop() {
            let is_last = way.is_empty();
            if is_last && !follow {
                return Ok(Self { folder: at, name, is_magic: false });
            }
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let next = match openat(&at, &*name, flags, Mode::empty()) {
                Err(Errno::NOENT) if is_last => return Ok(Self { folder: at, name, is_magic: false }),
                next => next?,
            };
            let facts = fstat(&next)?;
            if FileType::from_raw_mode(facts.st_mode) != FileType::Symlink {
                if is_last {
                    return Ok(Self { folder: at, name, is_magic: false });
                }
                at = next;
                continue;
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(Errno::LOOP.into());
            }
            if fstatfs(&at)?.f_type == PROC_SUPER_MAGIC {
                if is_last {
                    return Ok(Self { folder: at, name, is_magic: true });
                }
                at = openat(&at, &*name, FOLDER, Mode::empty())?;
                continue;
            }
            let target = OsString::from_vec(readlinkat(&next, "", Vec::new())?.into_bytes());
            if !trusts(&at, &facts)? {
                let target = Path::new(&target).display();
                return Err(planted(
                    &format!("{} is a symbolic link to {target}, made by", Path::new(&name).display()),
                    &facts,
                ));
            }
            if is_absolute(&target) {
                at = begin(&target)?;
            }
            way.extend(parts(&target));
        }
        Err(Errno::NOENT.into())
    }

    fn open(&self, flags: OFlags, mode: Mode) -> Result<File> {
        let flags = if self.is_magic { flags } else { flags | OFlags::NOFOLLOW };
        Ok(openat(&self.folder, &*self.name, flags | OFlags::CLOEXEC, mode)?.into())
    }

    /// What is there is trusted, or none of these `kinds`.
    fn check(&self, kinds: impl Fn(FileType) -> bool) -> Result<()> {
        match statat(&self.folder, &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(facts) if !self.is_magic => self.judge(&facts, kinds),
            // Whoever opens it is told.
            _ => Ok(()),
        }
    }

    /// The file with these `facts` is trusted, or none of these `kinds`.
    fn judge(&self, facts: &Stat, kinds: impl Fn(FileType) -> bool) -> Result<()> {
        if !kinds(FileType::from_raw_mode(facts.st_mode)) || trusts(&self.folder, facts)? {
            return Ok(());
        }
        Err(planted("it belongs to", facts))
    }
}

/// What has these `facts` in `folder` is there by the will of somebody who is trusted.
fn trusts(folder: impl AsFd, facts: &Stat) -> Result<bool> {
    let folder = fstat(folder)?;
    // Whoever shares a group without the sticky bit works together.
    let is_shared = folder.st_mode & 0o002 != 0 || folder.st_mode & 0o1020 == 0o1020;
    Ok(!is_shared || [started_by().as_raw(), 0, folder.st_uid].contains(&facts.st_uid))
}

fn planted(what: &str, facts: &Stat) -> Error {
    let whose = format!("{what} user {}, in a folder that all may write to", facts.st_uid);
    Error::new(ErrorKind::PermissionDenied, whose)
}

fn is_absolute(path: &OsStr) -> bool {
    path.as_bytes().starts_with(b"/")
}

/// The folder that `path` is in, and the last name; `.` if it ends in a slash.
fn split(path: &OsStr) -> (&OsStr, &OsStr) {
    let bytes = path.as_bytes();
    let (above, name) = match bytes.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&bytes[..at + 1], &bytes[at + 1..]),
        None => (&b"."[..], bytes),
    };
    (OsStr::from_bytes(above), OsStr::from_bytes(if name.is_empty() { b"." } else { name }))
}

/// The names in `path`, the first last; `.` if it ends in a slash.
fn parts(path: &OsStr) -> Vec<OsString> {
    let (above, name) = split(path);
    let names = above.as_bytes().split(|byte| *byte == b'/').filter(|name| !name.is_empty());
    let names = names.chain([name.as_bytes()]);
    let mut names: Vec<_> = names.map(|name| OsStr::from_bytes(name).to_owned()).collect();
    names.reverse();
    names
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn what_nobody_has_planted_opens_as_ever() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/file"), "x").unwrap();
        symlink("a/b", at("relative")).unwrap();
        symlink(at("a"), at("absolute")).unwrap();
        symlink("../absolute/b/file", at("a/file")).unwrap();
        symlink("nothing", at("dangling")).unwrap();
        symlink("circle", at("circle")).unwrap();
        symlink("/proc/self/fd", at("descriptors")).unwrap();
        let held = File::open(at("a/b/file")).unwrap();
        let number = held.as_raw_fd();
        let paths = [
            "a/b/file",
            "a//b/./file",
            "a/../a/b/file",
            "relative/file",
            "relative/../b/file",
            "absolute/b/file",
            "a/file",
            "a/b",
            "relative",
            "relative/",
            "a/b/file/",
            "a/b/file/x",
            "a/nothing",
            "nothing/x",
            "dangling",
            "dangling/x",
            "circle",
            "circle/x",
            &format!("descriptors/{number}"),
            &format!("/proc/self/fd/{number}"),
            &format!("/dev/fd/{number}"),
            "/dev/null",
            "/",
            "..",
            "",
        ];
        for path in paths {
            // Joined to nothing, an empty one would be the folder.
            let path = if path.is_empty() { path.into() } else { at(path) };
            let same = |file: Result<File>| match file {
                Ok(file) => Ok((file.metadata().unwrap().dev(), file.metadata().unwrap().ino())),
                Err(error) => Err(error.raw_os_error()),
            };
            let (ours, theirs) = (open(&path, OFlags::RDONLY), File::open(&path));
            assert_eq!(same(ours), same(theirs), "{}", path.display());
        }
    }

    #[test]
    fn what_is_written_to_is_no_link_and_has_no_second_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        let write =
            |path: &str, flags| open_to_write(&at(path), flags | OFlags::WRONLY, Mode::RUSR | Mode::WUSR);
        drop(write("file", OFlags::CREATE | OFlags::EXCL).unwrap());
        symlink("file", at("link")).unwrap();
        assert_eq!(write("link", OFlags::CREATE).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        drop(write("link", OFlags::empty()).unwrap());
        fs::hard_link(at("file"), at("second")).unwrap();
        assert!(write("file", OFlags::CREATE).is_err() && write("second", OFlags::empty()).is_err());
        fs::remove_file(at("second")).unwrap();
        drop(write("file", OFlags::CREATE).unwrap());
    }
}
