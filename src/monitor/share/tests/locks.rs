//! Locks that the guest's programs share with the host's.

use std::fs::File;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, flock};

use super::*;

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const NONE: i32 = libc::F_UNLCK;
const END: u64 = i64::MAX as u64;

fn wanted(handle: u64, owner: u64, (start, end): (u64, u64), kind: i32, flags: u32) -> LkIn {
    LkIn {
        handle: handle.into(),
        owner: owner.into(),
        start: start.into(),
        end: end.into(),
        kind: (kind as u32).into(),
        flags: flags.into(),
        ..LkIn::new_zeroed()
    }
}

impl Guest {
    /// Of a part, by a program.
    fn part(
        &mut self,
        (node, handle): (u64, u64),
        owner: u64,
        part: (u64, u64),
        kind: i32,
    ) -> Result<(), Errno> {
        self.ask(Opcode::Setlk, node, &[wanted(handle, owner, part, kind, 0).as_bytes()]).map(drop)
    }

    /// Of what is open.
    fn whole(&mut self, node: u64, handle: u64, kind: i32) -> Result<(), Errno> {
        self.ask(Opcode::Setlk, node, &[wanted(handle, 0, (0, END), kind, LK_FLOCK).as_bytes()]).map(drop)
    }

    fn in_the_way(&mut self, node: u64, owner: u64, part: (u64, u64), kind: i32) -> (u64, u64, i32) {
        let lock = wanted(0, owner, part, kind, 0);
        let other: LkOut = self.get(Opcode::Getlk, node, &[lock.as_bytes()]).unwrap();
        (other.start.get(), other.end.get(), other.kind.get() as i32)
    }

    fn flush(&mut self, node: u64, owner: u64) {
        let how = FlushIn { owner: owner.into(), ..FlushIn::new_zeroed() };
        self.ask(Opcode::Flush, node, &[how.as_bytes()]).unwrap();
    }

    /// What has had to wait is tried again: what is answered, in order.
    fn again(&mut self) -> Vec<Result<Vec<u8>, Errno>> {
        let mut replies = Vec::new();
        for mut waiting in std::mem::take(&mut self.waiting) {
            match self.server.again(&mut waiting) {
                Some(len) => replies.push(self.reply(len)),
                None => self.waiting.push(waiting),
            }
        }
        replies
    }
}

/// A program of the host's locks bytes 0 to 9.
fn host_locks(file: &File, kind: i32) -> Result<(), Errno> {
    let lock = libc::flock { l_type: kind as i16, l_whence: 0, l_start: 0, l_len: 10, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock))
        .map(drop)
        .map_err(|error| Errno::from_raw_os_error(error as i32))
}

fn opened(guest: &Guest) -> File {
    File::options().read(true).write(true).open(guest.path("a")).unwrap()
}

#[test]
fn programs_of_the_guest_and_of_the_host_lock_parts_of_a_file() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let (node, host) = (entry.node.get(), opened(&guest));
    let file = (node, handle);
    guest.part(file, 1, (0, 99), WRITE).unwrap();
    guest.part(file, 1, (5, 7), WRITE).unwrap();
    assert_eq!(guest.part(file, 2, (0, END), READ), Err(Errno::AGAIN));
    assert_eq!(guest.in_the_way(node, 2, (50, 60), READ), (0, 99, WRITE));
    assert_eq!(guest.in_the_way(node, 2, (100, END), WRITE).2, NONE);
    assert_eq!(guest.in_the_way(node, 1, (0, END), WRITE).2, NONE, "nobody is in one's own way");
    assert_eq!(host_locks(&host, READ), Err(Errno::AGAIN));
    // A part is unlocked, and is another's.
    guest.part(file, 1, (0, 9), NONE).unwrap();
    host_locks(&host, WRITE).unwrap();
    assert_eq!(guest.part(file, 1, (9, 20), WRITE), Err(Errno::AGAIN));
    assert_eq!(guest.in_the_way(node, 1, (0, END), READ), (0, 9, WRITE));
    guest.part(file, 2, (100, END), WRITE).unwrap();
    host_locks(&host, NONE).unwrap();
    // What a program has locked goes when it closes the file.
    guest.flush(node, 1);
    guest.part(file, 3, (0, 99), READ).unwrap();
    guest.part(file, 4, (0, 99), READ).unwrap();
    assert_eq!(host_locks(&host, WRITE), Err(Errno::AGAIN));
    host_locks(&host, READ).unwrap();
    guest.flush(node, 2);
    // As does what belongs to an open file, of whose end nothing else tells.
    let other = guest.open(node, libc::O_RDWR).unwrap();
    guest.part((node, other), 5, (1000, 1000), WRITE).unwrap();
    assert_eq!(guest.in_the_way(node, 6, (1000, 1000), READ).2, WRITE);
    guest.release(other);
    assert_eq!(guest.in_the_way(node, 6, (1000, 1000), READ).2, NONE);
    // And when the guest goes.
    guest.server.reset();
    host_locks(&host, WRITE).unwrap();
}

#[test]
fn what_is_open_is_locked_as_a_whole() {
    let mut guest = Guest::new();
    let (entry, first) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let node = entry.node.get();
    let second = guest.open(node, libc::O_RDONLY).unwrap();
    let host = opened(&guest);
    guest.whole(node, first, WRITE).unwrap();
    assert_eq!(guest.whole(node, second, READ), Err(Errno::AGAIN));
    assert_eq!(flock(&host, FlockOperation::NonBlockingLockShared), Err(Errno::WOULDBLOCK));
    // It is another matter than parts are.
    guest.part((node, first), 9, (0, 9), WRITE).unwrap();
    guest.whole(node, first, READ).unwrap();
    guest.whole(node, second, READ).unwrap();
    flock(&host, FlockOperation::NonBlockingLockShared).unwrap();
    guest.whole(node, second, NONE).unwrap();
    flock(&host, FlockOperation::Unlock).unwrap();
    guest.release(first);
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert_eq!(guest.whole(node, first, READ), Err(Errno::BADF));
}

#[test]
fn who_waits_for_a_lock_gets_it_when_it_is_free() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let (node, host) = (entry.node.get(), opened(&guest));
    let file = (node, handle);
    host_locks(&host, WRITE).unwrap();
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    let part = wanted(handle, 1, (0, 0), WRITE, 0);
    let whole = wanted(handle, 1, (0, END), WRITE, LK_FLOCK);
    for lock in [part, whole] {
        assert!(guest.send(&request(Opcode::Setlkw, node, &[lock.as_bytes()])).is_none());
    }
    assert!(guest.again().is_empty());
    // Others go on meanwhile.
    assert_eq!(guest.write(node, handle, 0, b"x").unwrap(), 1);
    flock(&host, FlockOperation::Unlock).unwrap();
    assert_eq!(guest.again(), [Ok(Vec::new())]);
    assert!(guest.again().is_empty());
    host_locks(&host, NONE).unwrap();
    assert_eq!(guest.again(), [Ok(Vec::new())]);
    assert_eq!(host_locks(&host, READ), Err(Errno::AGAIN));
    // One that has to wait may be told that it cannot.
    guest.part(file, 2, (50, 50), WRITE).unwrap();
    let other = wanted(handle, 1, (50, 60), WRITE, 0);
    assert!(guest.send(&request(Opcode::Setlkw, node, &[other.as_bytes()])).is_none());
    let waiting = guest.waiting.pop().unwrap();
    let len = guest.server.refuse(waiting);
    assert_eq!(guest.reply(len), Err(Errno::NOLCK));
}

#[test]
fn locks_are_held_after_a_restore_but_for_those_that_another_has_by_then() {
    let mut guest = Guest::new();
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let (node, host) = (entry.node.get(), opened(&guest));
    let file = (node, handle);
    guest.part(file, 1, (0, 4), WRITE).unwrap();
    guest.part(file, 1, (100, END), READ).unwrap();
    guest.whole(node, handle, WRITE).unwrap();
    let (state, locks) = (guest.server.save(), guest.server.save_locks());
    guest.server.reset();
    host_locks(&host, WRITE).unwrap();
    guest.server.restore(state.clone()).unwrap();
    guest.server.restore_locks(locks.clone());
    assert_eq!(guest.in_the_way(node, 2, (0, END), WRITE).2, WRITE, "the host's");
    host_locks(&host, NONE).unwrap();
    assert_eq!(guest.in_the_way(node, 2, (0, END), WRITE), (100, END, READ));
    assert_eq!(flock(&host, FlockOperation::NonBlockingLockShared), Err(Errno::WOULDBLOCK));
    let now = guest.server.save_locks();
    assert_ne!(now, locks);
    guest.server.restore(state).unwrap();
    guest.server.restore_locks(now.clone());
    assert_eq!(guest.server.save_locks(), now);
}

#[test]
fn locks_are_bounded_and_those_that_are_none_refused() {
    let mut guest = Guest::with(false, false, 10_000);
    let (entry, handle) = guest.create(ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    let node = entry.node.get();
    let file = (node, handle);
    for at in 0..1024 {
        guest.part(file, 1, (2 * at, 2 * at), READ).unwrap();
    }
    assert_eq!(guest.part(file, 1, (9999, 9999), READ), Err(Errno::NOLCK));
    guest.part(file, 1, (0, END), NONE).unwrap();
    // A descriptor each.
    let room = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    if room > 4096 {
        for owner in 0..1024 {
            guest.part(file, owner, (0, 0), READ).unwrap();
        }
        assert_eq!(guest.part(file, 5000, (0, 0), READ), Err(Errno::NOLCK));
    }
    for bad in [(1, 0), (0, u64::MAX)] {
        assert_eq!(guest.part(file, 1, bad, READ), Err(Errno::INVAL));
    }
    assert_eq!(guest.part(file, 1, (0, 0), 77), Err(Errno::INVAL));
    assert_eq!(guest.part((ROOT, handle), 1, (0, 0), READ), Err(Errno::BADF));
    assert_eq!(guest.part((4711, handle), 1, (0, 0), READ), Err(Errno::BADF));
    assert_eq!(guest.whole(node, handle + 1, READ), Err(Errno::BADF));
}

#[test]
fn what_is_shared_for_reading_is_locked_for_reading() {
    let mut guest = Guest::with(true, false, 100);
    fs::write(guest.path("a"), "a").unwrap();
    let node = guest.walk("a");
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    let file = (node, handle);
    guest.part(file, 1, (0, 9), READ).unwrap();
    assert_eq!(host_locks(&opened(&guest), WRITE), Err(Errno::AGAIN));
    assert_eq!(guest.part(file, 2, (20, 29), WRITE), Err(Errno::BADF));
    guest.whole(node, handle, WRITE).unwrap();
}
