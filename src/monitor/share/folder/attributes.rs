//! Extended attributes of files in a shared folder.

use std::ffi::CStr;

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use super::{Folder, by_number};
use crate::share::kept;

/// Extended attributes that the guest's kernel and programs keep; those of namespaces that mean something to this host stay its own.
const XATTR_PREFIX: &[u8] = b"user.";
/// The most bytes of an extended attribute, and of all names of a file's (include/uapi/linux/limits.h).
const XATTR_MOST: usize = 64 << 10;

impl Folder {
    /// The value of an extended attribute.
    pub(in crate::share) fn attribute(&mut self, number: u64, name: &CStr) -> Result<Vec<u8>, Errno> {
        if !is_shared(name) {
            return Err(Errno::NODATA);
        }
        let path = self.nodes.path(number)?;
        self.as_owner(&path, 0o400, || {
            let mut value = vec![0; XATTR_MOST];
            let len = getxattr(by_number(&path), name, &mut *value)?;
            value.truncate(len);
            Ok(value)
        })
    }

    /// The names of a file's extended attributes, each with a zero byte at its end.
    pub(in crate::share) fn attributes(&mut self, number: u64) -> Result<Vec<u8>, Errno> {
        let path = self.nodes.path(number)?;
        let mut all = vec![0; XATTR_MOST];
        let len = listxattr(by_number(&path), &mut *all)?;
        all.truncate(len);
        let names = all.split_inclusive(|byte| *byte == 0);
        let shared = |name: &&[u8]| CStr::from_bytes_with_nul(name).is_ok_and(is_shared);
        Ok(names.filter(shared).flatten().copied().collect())
    }

    pub(in crate::share) fn set_attribute(
        &mut self,
        number: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        self.may_change()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if !is_shared(name) {
            return Err(Errno::OPNOTSUPP);
        }
        if value.len() > XATTR_MOST {
            return Err(Errno::TOOBIG);
        }
        let path = self.nodes.path(number)?;
        self.as_owner(&path, 0o200, || setxattr(by_number(&path), name, value, flags))
    }

    pub(in crate::share) fn remove_attribute(&mut self, number: u64, name: &CStr) -> Result<(), Errno> {
        self.may_change()?;
        if !is_shared(name) {
            return Err(Errno::OPNOTSUPP);
        }
        let path = self.nodes.path(number)?;
        self.as_owner(&path, 0o200, || removexattr(by_number(&path), name))
    }
}

/// The guest may have extended attributes of this name.
fn is_shared(name: &CStr) -> bool {
    name.to_bytes().starts_with(XATTR_PREFIX) && name != kept::NAME
}
