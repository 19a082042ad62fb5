//! [`Handles`]: what the guest has open, by number.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::locks::Kind;

/// A file or a folder that the guest has open.
#[derive(Debug, Clone)]
pub struct Handle {
    pub node: u64,
    /// How it was opened, so that it can be once more.
    pub flags: OFlags,
    /// None until it is first used, if it is a saved one.
    pub file: Option<Arc<OwnedFd>>,
    /// How it is locked (flock(2)).
    pub locked: Option<Kind>,
}

/// [`Handles`] without what the host has of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    next: u64,
    /// By number: node and flags.
    open: Vec<(u64, u64, u32)>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Handles {
    open: BTreeMap<u64, Handle>,
    next: u64,
    most: usize,
}

impl Handles {
    /// `most` at a time.
    pub fn new(most: usize) -> Self {
        Self { open: BTreeMap::new(), next: 1, most }
    }

    /// There is room for another.
    ///
    /// # Errors
    /// ENFILE: there is none.
    pub fn room(&self) -> Result<(), Errno> {
        if self.open.len() < self.most { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// The number of another, which was opened with `flags`.
    ///
    /// # Errors
    /// ENFILE: there are too many.
    pub fn add(&mut self, node: u64, flags: OFlags, file: OwnedFd) -> Result<u64, Errno> {
        self.room()?;
        let number = self.next;
        self.next += 1;
        self.open.insert(number, Handle { node, flags, file: Some(Arc::new(file)), locked: None });
        Ok(number)
    }

    /// What number `number` of node `node` is.
    ///
    /// # Errors
    /// EBADF: nothing of that node's.
    pub fn get(&self, number: u64, node: u64) -> Result<&Handle, Errno> {
        self.open.get(&number).filter(|handle| handle.node == node).ok_or(Errno::BADF)
    }

    /// The node of number `number`.
    pub fn node(&self, number: u64) -> Option<u64> {
        self.open.get(&number).map(|handle| handle.node)
    }

    /// It is locked so.
    pub fn locked(&mut self, number: u64, kind: Option<Kind>) {
        if let Some(handle) = self.open.get_mut(&number) {
            handle.locked = kind;
        }
    }

    /// Those that are locked.
    pub fn whole(&self) -> Vec<(u64, Kind)> {
        self.open.iter().filter_map(|(number, handle)| Some((*number, handle.locked?))).collect()
    }

    /// A saved one is open again.
    pub fn opened(&mut self, number: u64, file: Arc<OwnedFd>) {
        if let Some(handle) = self.open.get_mut(&number) {
            handle.file = Some(file);
        }
    }

    /// Closes all.
    pub fn clear(&mut self) {
        *self = Self::new(self.most);
    }

    /// Closes it.
    pub fn close(&mut self, number: u64) {
        self.open.remove(&number);
    }

    pub fn save(&self) -> Saved {
        let open = self.open.iter().map(|(number, handle)| (*number, handle.node, handle.flags.bits()));
        Saved { next: self.next, open: open.collect() }
    }

    /// Takes them over. Each is opened when the guest uses it.
    ///
    /// # Errors
    /// The guest cannot have had such; `allowed` is what they may have been opened with.
    pub fn restore(&mut self, saved: Saved, allowed: OFlags) -> Result<(), String> {
        self.clear();
        if saved.open.len() > self.most {
            return Err(format!("{} open files", saved.open.len()));
        }
        for (number, node, flags) in saved.open {
            let flags = OFlags::from_bits_retain(flags);
            let handle = Handle { node, flags, file: None, locked: None };
            let is_one = (1..saved.next).contains(&number) && allowed.contains(flags);
            if !is_one || self.open.insert(number, handle).is_some() {
                return Err(format!("open file {number}, with {:#x}", flags.bits()));
            }
        }
        self.next = saved.next;
        Ok(())
    }
}
