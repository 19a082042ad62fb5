//! Hosts that are not as one would wish: the folder's file system is full, read-only or gone, or has in it what a guest cannot use.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use tempfile::TempDir;

use crate::mount::{Mounted, USER, available, folder, given};

/// A file system of its own, which is unmounted at the end.
struct Own {
    dir: TempDir,
}

impl Own {
    fn new(kind: &str, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        mount("own", dir.path().join("share"), kind, MountFlags::empty(), &*options).unwrap();
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("share")
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

#[track_caller]
fn fails<T: std::fmt::Debug>(result: io::Result<T>, error: Errno) {
    let found = result.map_err(|error| Errno::from_io_error(&error));
    assert_eq!(found.err(), Some(Some(error)));
}

/// Waits for what comes when the kernel has told the server that a file is closed and forgotten, which it does a little later.
#[track_caller]
fn soon(mut is_so: impl FnMut() -> bool) {
    let mut tries = 0..1000;
    while !is_so() {
        assert!(tries.next().is_some(), "still not so");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn made(path: impl AsRef<Path>) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path)
}

/// By root and by a user.
fn by_each(what: &str, case: impl Fn(bool)) {
    if available(what) {
        case(false);
        case(true);
    }
}

#[test]
fn a_full_file_system_says_so_and_what_is_there_stays() {
    by_each("a_full_file_system_says_so_and_what_is_there_stays", |by_user| {
        let own = Own::new("tmpfs", "size=1M,nr_inodes=20,mode=755");
        given(own.dir.path(), &own.path(), by_user);
        let at = Mounted::new(&own.path(), "", by_user);
        let at = at.path();
        fs::write(at.join("kept"), "kept").unwrap();
        let mut big = made(at.join("big")).unwrap();
        fails((0..).try_for_each(|_| big.write_all(&[7; 10_000])), Errno::NOSPC);
        drop(big);
        fails(fs::write(at.join("more"), "more"), Errno::NOSPC);
        assert_eq!(fs::read_to_string(at.join("kept")).unwrap(), "kept");
        let len = fs::metadata(at.join("big")).unwrap().len();
        assert!((900_000..=1 << 20).contains(&len), "{len}");
        fs::remove_file(at.join("big")).unwrap();
        soon(|| fs::write(at.join("more"), "more").is_ok());
        // No room for names.
        fails((0..40).try_for_each(|n| made(at.join(n.to_string())).map(drop)), Errno::NOSPC);
        fails(fs::create_dir(at.join("d")), Errno::NOSPC);
        fails(symlink("a", at.join("link")), Errno::NOSPC);
        fs::rename(at.join("more"), at.join("kept")).unwrap();
        assert_eq!(fs::read_to_string(own.path().join("kept")).unwrap(), "more");
    });
}

#[test]
fn a_file_system_that_turns_read_only_is_read() {
    by_each("a_file_system_that_turns_read_only_is_read", |by_user| {
        let own = Own::new("tmpfs", "mode=755");
        given(own.dir.path(), &own.path(), by_user);
        let at = Mounted::new(&own.path(), "", by_user);
        let at = at.path();
        fs::write(at.join("kept"), "kept").unwrap();
        soon(|| mount_remount(own.path(), MountFlags::RDONLY, "").is_ok());
        assert_eq!(fs::read_to_string(at.join("kept")).unwrap(), "kept");
        fails(fs::write(at.join("kept"), "x"), Errno::ROFS);
        fails(made(at.join("new")), Errno::ROFS);
        fails(fs::create_dir(at.join("d")), Errno::ROFS);
        fails(fs::remove_file(at.join("kept")), Errno::ROFS);
        fails(fs::rename(at.join("kept"), at.join("b")), Errno::ROFS);
        fails(fs::set_permissions(at.join("kept"), Permissions::from_mode(0o600)), Errno::ROFS);
        mount_remount(own.path(), MountFlags::empty(), "").unwrap();
        fs::write(at.join("kept"), "again").unwrap();
    });
}

#[test]
fn a_folder_that_is_removed_is_empty_and_takes_nothing() {
    by_each("a_folder_that_is_removed_is_empty_and_takes_nothing", |by_user| {
        let (_keep, share) = folder(by_user);
        let at = Mounted::new(&share, ",cache=never", by_user);
        let at = at.path();
        fs::write(at.join("a"), "a").unwrap();
        fs::remove_dir_all(&share).unwrap();
        assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
        fails(fs::read(at.join("a")), Errno::NOENT);
        fails(made(at.join("b")), Errno::NOENT);
        // Another one of that name is not the guest's.
        fs::create_dir(&share).unwrap();
        fs::write(share.join("c"), "c").unwrap();
        fails(fs::read(at.join("c")), Errno::NOENT);
    });
}

#[test]
fn a_file_system_that_is_unmounted_stays_the_guests() {
    by_each("a_file_system_that_is_unmounted_stays_the_guests", |by_user| {
        let own = Own::new("tmpfs", "mode=755");
        given(own.dir.path(), &own.path(), by_user);
        let at = Mounted::new(&own.path(), "", by_user);
        let at = at.path();
        fs::write(at.join("a"), "a").unwrap();
        fails(unmount(own.path(), UnmountFlags::empty()).map_err(io::Error::from), Errno::BUSY);
        unmount(own.path(), UnmountFlags::DETACH).unwrap();
        fs::write(at.join("b"), "b").unwrap();
        assert_eq!(fs::read_to_string(at.join("a")).unwrap(), "a");
        assert_eq!(fs::read_dir(own.path()).unwrap().count(), 0);
    });
}

#[test]
fn fifos_sockets_and_devices_are_seen_and_never_opened_here() {
    by_each("fifos_sockets_and_devices_are_seen_and_never_opened_here", |by_user| {
        let (_keep, share) = folder(by_user);
        let mode = Mode::from_raw_mode(0o666);
        mknodat(CWD, share.join("fifo"), FileType::Fifo, mode, 0).unwrap();
        // One whose opening would be seen: it would take a line of the log's.
        if mknodat(CWD, share.join("kmsg"), FileType::CharacterDevice, mode, makedev(1, 11)).is_err() {
            println!("SKIP: a device in a shared folder: needs the right to make one");
        }
        let _listens = std::os::unix::net::UnixListener::bind(share.join("socket")).unwrap();
        let at = Mounted::new(&share, "", by_user);
        let at = at.path();
        let kind = |name: &str| fs::symlink_metadata(at.join(name)).unwrap().file_type();
        assert!(kind("fifo").is_fifo() && kind("socket").is_socket());
        // The guest's kernel has a FIFO of its own there: nobody on the host is on the other side.
        let mut wrote = OpenOptions::new().read(true).write(true).open(at.join("fifo")).unwrap();
        wrote.write_all(b"to the guest").unwrap();
        let here = rustix::fs::open(share.join("fifo"), nonblocking(), Mode::empty()).unwrap();
        assert_eq!(rustix::io::read(&here, &mut [0; 8][..]), Ok(0), "nobody writes to it here");
        fails(std::os::unix::net::UnixStream::connect(at.join("socket")), Errno::CONNREFUSED);
        for name in ["fifo", "socket"] {
            fs::rename(at.join(name), at.join(format!("{name}2"))).unwrap();
            fs::remove_file(at.join(format!("{name}2"))).unwrap();
        }
    });
}

fn nonblocking() -> rustix::fs::OFlags {
    rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK
}

/// Another share, and an overlay.
#[test]
fn other_file_systems_below_are_part_of_it() {
    by_each("other_file_systems_below_are_part_of_it", |by_user| {
        let (keep, share) = folder(by_user);
        let (_inner, other) = folder(by_user);
        fs::write(other.join("far"), "far").unwrap();
        let layers = ["lower", "upper", "work"].map(|name| keep.path().join(name));
        layers.iter().for_each(|layer| fs::create_dir(layer).unwrap());
        fs::write(layers[0].join("low"), "low").unwrap();
        for name in ["fuse", "overlay"] {
            fs::create_dir(share.join(name)).unwrap();
        }
        given(keep.path(), &layers[0], by_user);
        given(keep.path(), &layers[1], by_user);
        crate::mount::serve_at(
            &other,
            &share.join("fuse"),
            &format!(",uid={0},gid={0}", own(by_user)),
            by_user,
        );
        let [lower, upper, work] = layers.each_ref().map(|layer| layer.display());
        let options =
            std::ffi::CString::new(format!("lowerdir={lower},upperdir={upper},workdir={work}")).unwrap();
        mount("own", share.join("overlay"), "overlay", MountFlags::empty(), &*options).unwrap();
        let at = Mounted::new(&share, "", by_user);
        let at = at.path();
        assert_eq!(fs::read_to_string(at.join("fuse/far")).unwrap(), "far");
        assert_eq!(fs::read_to_string(at.join("overlay/low")).unwrap(), "low");
        fs::write(at.join("fuse/new"), "new").unwrap();
        fs::write(at.join("overlay/new"), "new").unwrap();
        assert_eq!(fs::read_to_string(other.join("new")).unwrap(), "new");
        assert_eq!(fs::read_to_string(layers[1].join("new")).unwrap(), "new");
        fails(fs::rename(at.join("fuse/new"), at.join("overlay/newer")), Errno::XDEV);
        fails(fs::hard_link(at.join("fuse/new"), at.join("new")), Errno::XDEV);
        fails(fs::remove_dir(at.join("fuse")), Errno::BUSY);
        // No two have one number.
        let number = |name: &str| fs::metadata(at.join(name)).unwrap().ino();
        let all = ["", "fuse", "overlay", "fuse/far", "overlay/low", "overlay/new"].map(number);
        let mut different = all.to_vec();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), all.len(), "{all:?}");
        unmount(share.join("overlay"), UnmountFlags::DETACH).unwrap();
        unmount(share.join("fuse"), UnmountFlags::DETACH).unwrap();
    });
}

fn own(by_user: bool) -> u32 {
    if by_user { USER } else { 0 }
}

#[test]
fn what_is_somebody_elses_is_used_as_the_host_lets_one() {
    if !available("what_is_somebody_elses_is_used_as_the_host_lets_one") {
        return;
    }
    // Root's, open to all, and each one's own in it (/tmp).
    let (keep, share) = folder(true);
    chown(&share, Some(0), Some(0)).unwrap();
    fs::set_permissions(&share, Permissions::from_mode(0o1777)).unwrap();
    fs::write(share.join("roots"), "root's").unwrap();
    fs::create_dir(share.join("closed")).unwrap();
    fs::set_permissions(share.join("closed"), Permissions::from_mode(0o700)).unwrap();
    let at = Mounted::new(&share, "", true);
    let at = at.path();
    fs::write(at.join("mine"), "mine").unwrap();
    assert_eq!(fs::metadata(share.join("mine")).unwrap().uid(), USER);
    assert_eq!(fs::metadata(at.join("mine")).unwrap().uid(), 0);
    assert_eq!(fs::metadata(at.join("roots")).unwrap().uid(), 65534);
    assert_eq!(fs::read_to_string(at.join("roots")).unwrap(), "root's");
    // The guest's root may do anything by its own kernel's lights; the host says no.
    fails(fs::write(at.join("roots"), "x"), Errno::ACCESS);
    fails(fs::remove_file(at.join("roots")), Errno::PERM);
    fails(fs::rename(at.join("mine"), at.join("roots")), Errno::PERM);
    fails(fs::set_permissions(at.join("roots"), Permissions::from_mode(0o666)), Errno::PERM);
    fails(fs::read_dir(at.join("closed")), Errno::ACCESS);
    fails(made(at.join("closed/a")), Errno::ACCESS);
    fs::rename(at.join("mine"), at.join("still mine")).unwrap();
    fs::remove_file(at.join("still mine")).unwrap();
    assert_eq!(fs::read_to_string(share.join("roots")).unwrap(), "root's");
    drop(keep);
}

#[test]
fn what_may_not_change_says_so() {
    by_each("what_may_not_change_says_so", |by_user| {
        let (_keep, share) = folder(by_user);
        fs::write(share.join("fixed"), "fixed").unwrap();
        given(share.parent().unwrap(), &share.join("fixed"), by_user);
        let chattr =
            |how: &str| Command::new("chattr").arg(how).arg(share.join("fixed")).output().unwrap().status;
        if !chattr("+i").success() {
            println!("SKIP: a file that may not change: needs a file system with such");
            return;
        }
        let at = Mounted::new(&share, "", by_user);
        let at = at.path();
        fails(fs::write(at.join("fixed"), "x"), Errno::PERM);
        fails(fs::remove_file(at.join("fixed")), Errno::PERM);
        fails(fs::set_permissions(at.join("fixed"), Permissions::from_mode(0o600)), Errno::PERM);
        assert_eq!(fs::read_to_string(at.join("fixed")).unwrap(), "fixed");
        assert!(chattr("-i").success());
        fs::write(at.join("fixed"), "changed").unwrap();
    });
}

/// The host's way of running programs is none of the guest's business: it reads them.
#[test]
fn a_file_system_of_which_nothing_runs_here_has_programs_for_a_guest() {
    by_each("a_file_system_of_which_nothing_runs_here_has_programs_for_a_guest", |by_user| {
        let own = Own::new("tmpfs", "mode=755");
        given(own.dir.path(), &own.path(), by_user);
        let flags = MountFlags::NOEXEC | MountFlags::NODEV | MountFlags::NOSUID;
        mount_remount(own.path(), flags, "").unwrap();
        let at = Mounted::new(&own.path(), "", by_user);
        let at = at.path();
        fs::copy("/bin/true", at.join("true")).unwrap();
        fails(Command::new(own.path().join("true")).status(), Errno::ACCESS);
        assert!(Command::new(at.join("true")).status().unwrap().success());
    });
}
