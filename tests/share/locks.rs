//! Locks that two guests and their host share (`locks=shared`): two kernels' mounts of one folder, each with a server of its own.

use std::fs::{self, File};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, flock};

use crate::mount::{Mounted, available, folder};

fn open(folder: &Path) -> File {
    File::options().read(true).write(true).open(folder.join("file")).unwrap()
}

fn part(start: i64, len: i64, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 }
}

fn locks(file: &File, start: i64, len: i64, kind: i32) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&part(start, len, kind))).map(drop)
}

/// What becomes of `act` when a guest's kernel has told that a file is closed, which it does a moment later.
fn soon<E>(act: impl Fn() -> Result<(), E>) -> Result<(), E> {
    for _ in 0..400 {
        if act().is_ok() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    act()
}

/// A folder with a file, twice as a guest has it.
fn shared(how: &str, by_user: bool) -> (tempfile::TempDir, [Mounted; 2], [File; 3]) {
    let (keep, share) = folder(by_user);
    let mounts = [(); 2].map(|()| Mounted::new(&share, how, by_user));
    let [first, second] = mounts.each_ref().map(Mounted::path);
    fs::write(first.join("file"), "what is in it").unwrap();
    let files = [open(&first), open(&second), open(&share)];
    (keep, mounts, files)
}

#[test]
fn guests_and_their_host_do_not_lock_the_same_part() {
    if !available("guests_and_their_host_do_not_lock_the_same_part") {
        return;
    }
    for (by_user, cache) in [(false, "auto"), (true, "never"), (true, "always")] {
        let (_keep, _mounts, [first, second, host]) =
            shared(&format!(",locks=shared,cache={cache}"), by_user);
        locks(&first, 0, 10, libc::F_WRLCK).unwrap();
        for other in [&second, &host] {
            assert_eq!(locks(other, 5, 1, libc::F_RDLCK), Err(Errno::EAGAIN));
            locks(other, 10, 0, libc::F_RDLCK).unwrap();
            let mut asked = part(0, 0, libc::F_WRLCK);
            fcntl(other, FcntlArg::F_OFD_GETLK(&mut asked)).unwrap();
            assert_ne!(asked.l_type, libc::F_UNLCK as i16);
        }
        assert_eq!(locks(&first, 0, 20, libc::F_WRLCK), Err(Errno::EAGAIN));
        locks(&first, 0, 10, libc::F_UNLCK).unwrap();
        locks(&second, 0, 10, libc::F_WRLCK).unwrap();
        assert_eq!(locks(&host, 0, 1, libc::F_RDLCK), Err(Errno::EAGAIN));
        // What is closed is unlocked.
        drop(second);
        soon(|| locks(&host, 0, 1, libc::F_WRLCK)).unwrap();
    }
}

#[test]
fn guests_and_their_host_do_not_lock_the_same_file() {
    if !available("guests_and_their_host_do_not_lock_the_same_file") {
        return;
    }
    use FlockOperation::{NonBlockingLockExclusive, NonBlockingLockShared, Unlock};
    let (_keep, _mounts, [first, second, host]) = shared(",locks=shared", true);
    flock(&first, NonBlockingLockExclusive).unwrap();
    for other in [&second, &host] {
        assert_eq!(flock(other, NonBlockingLockShared), Err(rustix::io::Errno::WOULDBLOCK));
    }
    flock(&first, NonBlockingLockShared).unwrap();
    flock(&second, NonBlockingLockShared).unwrap();
    flock(&host, NonBlockingLockShared).unwrap();
    assert_eq!(flock(&host, NonBlockingLockExclusive), Err(rustix::io::Errno::WOULDBLOCK));
    flock(&first, Unlock).unwrap();
    drop(second);
    soon(|| flock(&host, NonBlockingLockExclusive)).unwrap();
}

#[test]
fn who_waits_in_one_guest_goes_on_when_another_lets_go_and_holds_nobody_up() {
    if !available("who_waits_in_one_guest_goes_on_when_another_lets_go_and_holds_nobody_up") {
        return;
    }
    let (_keep, mounts, [first, second, host]) = shared(",locks=shared", false);
    locks(&first, 0, 10, libc::F_WRLCK).unwrap();
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    let (tell, told) = mpsc::channel();
    let wait = |what: &'static str, act: Box<dyn FnOnce() + Send>| {
        let tell = tell.clone();
        thread::spawn(move || {
            act();
            tell.send(what).unwrap();
        })
    };
    let (part_of, whole_of) = (second.try_clone().unwrap(), second.try_clone().unwrap());
    let threads = [
        wait(
            "part",
            Box::new(move || {
                fcntl(&part_of, FcntlArg::F_OFD_SETLKW(&part(0, 1, libc::F_WRLCK))).unwrap();
            }),
        ),
        wait("whole", Box::new(move || flock(&whole_of, FlockOperation::LockExclusive).unwrap())),
    ];
    assert!(told.recv_timeout(Duration::from_millis(300)).is_err());
    fs::write(mounts[1].path().join("other"), "goes on").unwrap();
    flock(&host, FlockOperation::Unlock).unwrap();
    assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok("whole"));
    locks(&first, 0, 0, libc::F_UNLCK).unwrap();
    assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok("part"));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(locks(&host, 0, 1, libc::F_RDLCK), Err(Errno::EAGAIN));
}

#[test]
fn a_guest_keeps_its_locks_to_itself_unless_it_is_told() {
    if !available("a_guest_keeps_its_locks_to_itself_unless_it_is_told") {
        return;
    }
    let (_keep, mounts, [first, second, host]) = shared("", false);
    locks(&first, 0, 10, libc::F_WRLCK).unwrap();
    flock(&first, FlockOperation::NonBlockingLockExclusive).unwrap();
    let again = open(&mounts[0].path());
    assert_eq!(locks(&again, 0, 1, libc::F_RDLCK), Err(Errno::EAGAIN));
    for other in [second, host] {
        locks(&other, 0, 10, libc::F_WRLCK).unwrap();
        locks(&other, 0, 10, libc::F_UNLCK).unwrap();
        flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
        flock(&other, FlockOperation::Unlock).unwrap();
    }
}
