//! [`Handles`]: what the guest has open, by number.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

/// A file or a folder that is open.
#[derive(Debug, Clone)]
pub struct Handle {
    pub node: u64,
    pub file: Arc<OwnedFd>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Handles {
    open: HashMap<u64, Handle>,
    next: u64,
    most: usize,
}

impl Handles {
    /// `most` at a time.
    pub fn new(most: usize) -> Self {
        Self { open: HashMap::new(), next: 1, most }
    }

    /// There is room for another.
    ///
    /// # Errors
    /// ENFILE: there is none.
    pub fn room(&self) -> Result<(), Errno> {
        if self.open.len() < self.most { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// The number of another.
    ///
    /// # Errors
    /// ENFILE: there are too many.
    pub fn add(&mut self, node: u64, file: OwnedFd) -> Result<u64, Errno> {
        self.room()?;
        let number = self.next;
        self.next += 1;
        self.open.insert(number, Handle { node, file: Arc::new(file) });
        Ok(number)
    }

    /// What number `number` of node `node` is.
    ///
    /// # Errors
    /// EBADF: nothing of that node's.
    pub fn get(&self, number: u64, node: u64) -> Result<Arc<OwnedFd>, Errno> {
        let handle = self.open.get(&number).filter(|handle| handle.node == node);
        handle.map(|handle| handle.file.clone()).ok_or(Errno::BADF)
    }

    /// Closes all.
    pub fn clear(&mut self) {
        self.open.clear();
    }

    /// Closes it.
    pub fn close(&mut self, number: u64) {
        self.open.remove(&number);
    }
}
