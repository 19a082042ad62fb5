//! Locks of the guest's programs on files in a shared folder, where the host's programs and other guests are to see them.

use std::os::fd::OwnedFd;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Folder, regular, stat};
use crate::share::locks::{self, Kind, Lock, Owner};

/// The locks, without what the host has of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedLocks {
    /// Of parts of files (fcntl(2)).
    parts: locks::Saved,
    /// Of what is open, by handle (flock(2)).
    whole: Vec<(u64, Kind)>,
}

impl Folder {
    /// The lock that is in the way of `lock`, for the program `owner` of the guest's, on node `number`.
    pub(in crate::share) fn lock_in_the_way(
        &mut self,
        number: u64,
        owner: u64,
        lock: Lock,
    ) -> Result<Option<Lock>, Errno> {
        let file = self.file_to_lock((number, owner))?;
        self.locks.in_the_way((number, owner), lock, file)
    }

    /// Locks or unlocks a part of node `number`, which is open as `handle`, for the program `owner` of the guest's. EAGAIN: somebody else has it.
    pub(in crate::share) fn lock_part(
        &mut self,
        number: u64,
        handle: u64,
        owner: u64,
        lock: Lock,
    ) -> Result<(), Errno> {
        self.handles.get(handle, number)?;
        let file = if lock.kind.is_some() { self.file_to_lock((number, owner))? } else { None };
        self.locks.set((number, owner), handle, lock, file)
    }

    /// Locks or unlocks what is open as `handle` of node `number`. EAGAIN: somebody else has it.
    pub(in crate::share) fn lock_whole(
        &mut self,
        number: u64,
        handle: u64,
        kind: Option<Kind>,
    ) -> Result<(), Errno> {
        let file = self.handle(handle, number)?;
        flock(
            &*file,
            match kind {
                Some(Kind::Read) => FlockOperation::NonBlockingLockShared,
                Some(Kind::Write) => FlockOperation::NonBlockingLockExclusive,
                None => FlockOperation::Unlock,
            },
        )?;
        self.handles.locked(handle, kind);
        Ok(())
    }

    /// The program `owner` of the guest's closes node `number`: its locks of parts go.
    pub(in crate::share) fn unlock_parts(&mut self, number: u64, owner: u64) {
        self.locks.drop_all((number, owner));
    }

    pub(in crate::share) fn save_locks(&self) -> SavedLocks {
        SavedLocks { parts: self.locks.save(), whole: self.handles.whole() }
    }

    /// Takes again what the guest had locked. What somebody else has by now is lost to it, as is what is gone.
    pub(in crate::share) fn restore_locks(&mut self, saved: SavedLocks) {
        for ((number, owner), handle, ranges) in saved.parts {
            for (start, end, kind) in ranges {
                let taken = (start <= end)
                    .then(|| self.lock_part(number, handle, owner, Lock { start, end, kind: Some(kind) }));
                if taken != Some(Ok(())) {
                    log::warn!(
                        "a lock that the guest had on bytes {start} to {end} of a shared file is lost"
                    );
                }
            }
        }
        for (handle, kind) in saved.whole {
            let node = self.handles.node(handle);
            if node.map(|node| self.lock_whole(node, handle, Some(kind))) != Some(Ok(())) {
                log::warn!("a lock that the guest had on a shared file is lost");
            }
        }
    }

    /// The file of `owner`, if it has none for its locks yet: open for both kinds where that can be.
    fn file_to_lock(&mut self, owner: Owner) -> Result<Option<OwnedFd>, Errno> {
        if self.locks.has(owner) {
            return Ok(None);
        }
        let path = self.nodes.path(owner.0)?;
        regular(&stat(&path)?)?;
        let write = if self.terms.read_only { Err(Errno::ROFS) } else { self.open_path(&path, OFlags::RDWR) };
        write.or_else(|_| self.open_path(&path, OFlags::RDONLY)).map(Some)
    }
}
