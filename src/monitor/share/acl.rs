//! [`Acl`]: an access control list (acl(5)) as a guest's kernel writes it, kept beside a file as its owner is: it names users of the guest's.

use std::ffi::CStr;

use rustix::fs::{XattrFlags, getxattr, removexattr, setxattr};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

/// Of the two that a folder may have: who may use it, and what files in it begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Access,
    Default,
}

impl Which {
    /// The one that the guest calls by this name.
    pub fn of(name: &CStr) -> Option<Self> {
        [Self::Access, Self::Default].into_iter().find(|which| which.name() == name)
    }

    pub fn name(self) -> &'static CStr {
        match self {
            Self::Access => c"system.posix_acl_access",
            Self::Default => c"system.posix_acl_default",
        }
    }

    /// What it is kept in. No guest reads or writes it by that name.
    pub fn kept_in(self) -> &'static CStr {
        match self {
            Self::Access => c"user.vmm.posix_acl_access",
            Self::Default => c"user.vmm.posix_acl_default",
        }
    }
}

/// POSIX_ACL_XATTR_VERSION
const VERSION: u32 = 2;
/// The most entries: what extended attributes have room for on ext4, and more.
const ENTRIES_MOST: usize = 512;

/// Whom an entry is about.
mod tag {
    pub const OWNER: u16 = 1;
    pub const USER: u16 = 2;
    pub const OWNING_GROUP: u16 = 4;
    pub const GROUP: u16 = 8;
    pub const MASK: u16 = 0x10;
    pub const OTHER: u16 = 0x20;
}

/// `struct posix_acl_xattr_entry`
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Entry {
    tag: le::U16,
    rights: le::U16,
    id: le::U32,
}

/// See the module's text. None of its rights are more than read, write and execute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

impl Acl {
    /// None if it is none.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (version, entries) = bytes.split_first_chunk()?;
        let entries = <[Entry]>::ref_from_bytes(entries).ok()?.to_vec();
        let count = |tag: u16| entries.iter().filter(|entry| entry.tag == tag).count();
        let is_one = u32::from_le_bytes(*version) == VERSION
            && entries.len() <= ENTRIES_MOST
            && entries.iter().all(|entry| entry.rights.get() <= 7)
            && entries.is_sorted_by_key(|entry| entry.tag.get())
            && [tag::OWNER, tag::OWNING_GROUP, tag::OTHER].iter().all(|tag| count(*tag) == 1)
            && count(tag::MASK) <= 1
            && (count(tag::MASK) == 1 || count(tag::USER) + count(tag::GROUP) == 0)
            && count(tag::USER) + count(tag::GROUP) + count(tag::MASK) + 3 == entries.len();
        is_one.then_some(Self(entries))
    }

    fn bytes(&self) -> Vec<u8> {
        [&VERSION.to_le_bytes()[..], self.0.as_bytes()].concat()
    }

    /// It says nothing that a mode does not.
    pub fn is_plain(&self) -> bool {
        self.0.len() == 3
    }

    /// The entry that a mode's bits for the group are: of the most that anybody has but its owner and all others.
    fn group(&self) -> u16 {
        if self.0.iter().any(|entry| entry.tag == tag::MASK) { tag::MASK } else { tag::OWNING_GROUP }
    }

    /// What a mode's nine bits are of each entry: how far they are shifted there.
    fn shift(&self, entry: &Entry) -> Option<u32> {
        match entry.tag.get() {
            tag::OWNER => Some(6),
            at if at == self.group() => Some(3),
            tag::OTHER => Some(0),
            _ => None,
        }
    }

    /// The nine bits of a mode that it is.
    pub fn mode(&self) -> u32 {
        let bits = |entry: &Entry| Some(u32::from(entry.rights.get()) << self.shift(entry)?);
        self.0.iter().filter_map(bits).fold(0, |all, bits| all | bits)
    }

    /// The same after chmod(2).
    pub fn with_mode(&self, mode: u32) -> Self {
        let changed = |entry: &Entry| match self.shift(entry) {
            Some(shift) => Entry { rights: ((mode >> shift & 7) as u16).into(), ..*entry },
            None => *entry,
        };
        Self(self.0.iter().map(changed).collect())
    }

    /// That of a file which is made with `mode` in a folder where this is the default.
    pub fn inherited(&self, mode: u32) -> Self {
        self.with_mode(self.mode() & mode)
    }

    /// What is kept of the file at `path`, if anything is.
    ///
    /// # Errors
    /// As getxattr(2) has them.
    pub fn read(path: &str, which: Which) -> Result<Option<Self>, Errno> {
        let mut bytes = [0; 4 + 8 * ENTRIES_MOST];
        match getxattr(path, which.kept_in(), &mut bytes[..]) {
            Ok(len) => Ok(bytes.get(..len).and_then(Self::parse)),
            Err(Errno::NODATA) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As the guest's kernel reads it.
    ///
    /// # Errors
    /// ENODATA: there is none. Or as getxattr(2) has them.
    pub fn value(path: &str, which: Which) -> Result<Vec<u8>, Errno> {
        Self::read(path, which)?.map(|acl| acl.bytes()).ok_or(Errno::NODATA)
    }

    /// Keeps it for the file at `path`.
    ///
    /// # Errors
    /// As setxattr(2) has them.
    pub fn write(&self, path: &str, which: Which) -> Result<(), Errno> {
        setxattr(path, which.kept_in(), &self.bytes(), XattrFlags::empty())
    }

    /// Keeps none for the file at `path`.
    ///
    /// # Errors
    /// As removexattr(2) has them.
    pub fn remove(path: &str, which: Which) -> Result<(), Errno> {
        match removexattr(path, which.kept_in()) {
            Err(Errno::NODATA) => Ok(()),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entry = |(tag, rights, id): &(u16, u16, u32)| Entry {
            tag: (*tag).into(),
            rights: (*rights).into(),
            id: (*id).into(),
        };
        Acl(entries.iter().map(entry).collect()).bytes()
    }

    const NOBODY: u32 = u32::MAX;

    #[test]
    fn a_list_is_a_mode_and_more() {
        let plain = Acl::parse(&acl(&[(1, 6, NOBODY), (4, 4, NOBODY), (32, 0, NOBODY)])).unwrap();
        assert!(plain.is_plain());
        assert_eq!((plain.mode(), plain.with_mode(0o751).mode()), (0o640, 0o751));
        let entries =
            [(1, 7, NOBODY), (2, 7, 5), (2, 1, 6), (4, 5, NOBODY), (16, 6, NOBODY), (32, 1, NOBODY)];
        let more = Acl::parse(&acl(&entries)).unwrap();
        assert!(!more.is_plain() && more.mode() == 0o761);
        // Of the group, the mask is all that a mode is about.
        let mut changed = entries;
        (changed[0].1, changed[4].1, changed[5].1) = (6, 4, 0);
        assert_eq!(more.with_mode(0o640).bytes(), acl(&changed));
        assert_eq!(more.inherited(0o664).mode(), 0o660);
    }

    #[test]
    fn what_is_no_list_is_told() {
        let good = [(1, 7, NOBODY), (2, 7, 5), (4, 5, NOBODY), (16, 6, NOBODY), (32, 1, NOBODY)];
        assert!(Acl::parse(&acl(&good)).is_some());
        for at in [0, 2, 3, 4] {
            let without: Vec<_> =
                good.iter().enumerate().filter(|(index, _)| *index != at).map(|(_, it)| *it).collect();
            assert!(Acl::parse(&acl(&without)).is_none(), "{at}");
            let twice: Vec<_> = good
                .iter()
                .enumerate()
                .flat_map(|(index, it)| vec![*it; 1 + usize::from(index == at)])
                .collect();
            assert!(Acl::parse(&acl(&twice)).is_none(), "{at}");
        }
        let mut wrong = good;
        wrong[1].1 = 8;
        assert!(Acl::parse(&acl(&wrong)).is_none());
        wrong = good;
        wrong.swap(1, 2);
        assert!(Acl::parse(&acl(&wrong)).is_none());
        wrong = good;
        wrong[1].0 = 3;
        assert!(Acl::parse(&acl(&wrong)).is_none());
        let mut bytes = acl(&good);
        bytes[0] = 1;
        assert!(Acl::parse(&bytes).is_none());
        for bytes in [&b""[..], &[2, 0, 0], &[2, 0, 0, 0, 1], &[2, 0, 0, 0]] {
            assert!(Acl::parse(bytes).is_none());
        }
    }
}
