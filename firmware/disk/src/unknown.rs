//! What lies on a partition, for a person who is told that there is nothing to boot: what can be read, and
//! the names of formats that cannot, by their marks.

use crate::partition::Partition;
use crate::text::Text;
use crate::volume::{Volume, Window};
use crate::{Disk, Error};
use core::fmt;

/// Offset of a mark, the mark, and whose it is. A sector's end alone is no mark: boot code has it, too.
const MARKS: [(u64, &[u8], &str); 21] = [
    (0, b"XFSB", "XFS"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0, b"LUKS\xba\xbe", "LUKS (encrypted)"),
    (0, b"LABELONE", "LVM"),
    (512, b"LABELONE", "LVM"),
    (1024, b"LABELONE", "LVM"),
    (1536, b"LABELONE", "LVM"),
    (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (1024, b"\xe2\xe1\xf5\xe0", "EROFS"),
    (0, b"hsqs", "squashfs"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcachefs"),
    (0x10034, b"ReIsEr", "ReiserFS"),
    (0x8000, b"JFS1", "JFS"),
    (0x8001, b"CD001", "ISO 9660"),
    (3, b"NTFS    ", "NTFS"),
    (3, b"EXFAT   ", "exFAT"),
    (3, b"-FVE-FS-", "BitLocker (encrypted)"),
    (0x2_0000, b"\x0c\xb1\xba\x00\x00\x00\x00\x00", "ZFS"),
    (4086, b"SWAPSPACE2", "swap"),
    (4086, b"SWAP-SPACE", "swap"),
];

/// What lies on a partition; shown with its number before it.
pub struct Inhabitant {
    number: u8,
    what: What,
}

enum What {
    /// It was looked through: kind and UUID.
    Readable(&'static str, Text<36>),
    /// It is known what it is, and no more than that.
    Named(&'static str),
    /// A file system that is not as it should be, or not as this program knows it.
    Wrong(Error),
}

impl Inhabitant {
    /// Looks.
    pub fn of(disk: &dyn Disk, partition: Partition) -> Self {
        let what = match Volume::open(disk, partition) {
            Ok(volume) => What::Readable(volume.kind(), volume.uuid()),
            Err(error) => match (name(&Window::new(disk, partition)), error) {
                (Some(name), _) => What::Named(name),
                (None, Error::Missing) => What::Named("empty, or of a kind that is not known"),
                (None, error) => What::Wrong(error),
            },
        };
        Self { number: partition.number, what }
    }
}

impl fmt::Display for Inhabitant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.number > 0 {
            write!(f, "{}", self.number)?;
        }
        match &self.what {
            What::Readable(kind, uuid) => write!(
                f,
                ": {kind} {uuid}: neither loader/entries, EFI/Linux, grub.cfg, extlinux.conf nor vmlinuz, or \
                 their kernel is not there"
            ),
            What::Named(name) => write!(f, ": {name}: cannot be read here"),
            What::Wrong(error) => write!(f, ": {error}"),
        }
    }
}

/// The name of what is there, if it is known by its mark.
fn name(window: &Window) -> Option<&'static str> {
    let is = |(offset, mark, _): &&(u64, &[u8], &str)| {
        let mut bytes = [0; 16];
        bytes
            .get_mut(..mark.len())
            .is_some_and(|bytes| window.read(*offset, bytes).is_ok() && *bytes == **mark)
    };
    MARKS.iter().find(is).map(|(_, _, name)| *name)
}
