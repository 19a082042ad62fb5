//! What somebody else has changed in a shared folder, as the guest knows its files.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::Statx;
use rustix::io::Errno;

use super::{Folder, Found, find, stat};

impl Folder {
    /// The folders that the guest knows.
    pub(in crate::share) fn known_folders(&self) -> Vec<u64> {
        self.nodes.folders()
    }

    /// A descriptor that names node `number`.
    pub(in crate::share) fn path(&mut self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        self.nodes.path(number)
    }

    /// The path of entry `name` of `folder` (`.` is that itself) from the shared folder on, if it has at most `most` bytes.
    pub(in crate::share) fn way_to(&self, folder: u64, name: &CStr, most: usize) -> Option<Vec<u8>> {
        let mut way = self.nodes.way(folder, most)?;
        if !way.is_empty() {
            way.push(b'/');
        }
        way.extend(name.to_bytes());
        (way.len() <= most).then_some(way)
    }

    /// What entry `name` of `folder` is now, as the guest would see it, and whether the guest knows it.
    pub(in crate::share) fn there(&mut self, folder: u64, name: &CStr) -> Option<(Statx, bool)> {
        let at = self.nodes.path(folder).ok()?;
        let path = find(&at, name).ok()?;
        let stat = stat(&path).ok()?;
        Some((self.seen(&path, stat), self.nodes.knows(&stat)))
    }

    /// What the guest knows as entry `name` of `folder`, which is there no more.
    pub(in crate::share) fn was_there(&mut self, folder: u64, name: &CStr) -> Option<Found> {
        let at = self.nodes.path(folder).ok()?;
        let now = find(&at, name).and_then(|path| stat(&path)).ok();
        let (number, path) = self.nodes.was(folder, name, now.as_ref())?;
        let stat = stat(&path).ok()?;
        Some(Found { number, stat: self.seen(&path, stat) })
    }

    /// A number that is no node's.
    pub(in crate::share) fn nobody(&mut self) -> u64 {
        self.nodes.nobody()
    }
}
