//! Extended attributes of files in a shared folder, access control lists among them where such things are kept.

use std::ffi::CStr;

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use super::{Acl, Folder, Kept, Which, by_number, is_folder, may_keep, stat};
use crate::share::kept;

/// Extended attributes that the guest's kernel and programs keep; those of namespaces that mean something to this host stay its own.
const XATTR_PREFIX: &[u8] = b"user.";
/// The most bytes of an extended attribute, and of all names of a file's (include/uapi/linux/limits.h).
const XATTR_MOST: usize = 64 << 10;

impl Folder {
    /// The value of an extended attribute.
    pub(in crate::share) fn attribute(&mut self, number: u64, name: &CStr) -> Result<Vec<u8>, Errno> {
        let acl = self.list_called(name);
        if acl.is_none() && !is_shared(name) {
            return Err(Errno::NODATA);
        }
        let path = self.nodes.path(number)?;
        if let Some(which) = acl {
            return if may_keep(&stat(&path)?) {
                Acl::value(&by_number(&path), which)
            } else {
                Err(Errno::NODATA)
            };
        }
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
        let names = names.filter_map(|name| CStr::from_bytes_with_nul(name).ok());
        let lists = [Which::Access, Which::Default];
        let called =
            |name: &CStr| lists.iter().find(|which| which.kept_in() == name).map(|which| which.name());
        let seen = names.filter_map(|name| match called(name) {
            None => Some(name).filter(|name| is_shared(name)),
            called => called.filter(|_| self.terms.keeps),
        });
        Ok(seen.flat_map(CStr::to_bytes_with_nul).copied().collect())
    }

    pub(in crate::share) fn set_attribute(
        &mut self,
        number: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        self.may_change()?;
        if let Some(which) = self.list_called(name) {
            return self.set_list(number, which, value);
        }
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
        let acl = self.list_called(name);
        if acl.is_none() && !is_shared(name) {
            return Err(Errno::OPNOTSUPP);
        }
        let path = self.nodes.path(number)?;
        match acl {
            Some(which) => Acl::remove(&by_number(&path), which),
            None => self.as_owner(&path, 0o200, || removexattr(by_number(&path), name)),
        }
    }

    /// The access control list of this name, where such are kept.
    fn list_called(&self, name: &CStr) -> Option<Which> {
        Which::of(name).filter(|_| self.terms.keeps)
    }

    /// The guest's kernel has seen to who may do that.
    fn set_list(&mut self, number: u64, which: Which, value: &[u8]) -> Result<(), Errno> {
        let acl = Acl::parse(value).ok_or(Errno::INVAL)?;
        let path = self.nodes.path(number)?;
        let here = stat(&path)?;
        if !may_keep(&here) || which == Which::Default && !is_folder(&here) {
            return Err(Errno::ACCESS);
        }
        if which == Which::Access {
            let kept = Kept::of(&self.seen(&path, here));
            self.keep(&path, &here, &Kept { mode: kept.mode & !0o777 | acl.mode(), ..kept })?;
            if acl.is_plain() {
                return Acl::remove(&by_number(&path), which);
            }
        }
        acl.write(&by_number(&path), which)
    }
}

/// The guest may have extended attributes of this name.
fn is_shared(name: &CStr) -> bool {
    let ours = [kept::NAME, Which::Access.kept_in(), Which::Default.kept_in()];
    name.to_bytes().starts_with(XATTR_PREFIX) && !ours.contains(&name)
}
