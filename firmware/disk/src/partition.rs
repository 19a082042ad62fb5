//! Partitions: GPT (UEFI 2.10, chapter 5) with its backup, else MBR with logical partitions, else the disk as a whole.

use crate::bytes::{u8_at, u32_at, u64_at};
use crate::{Disk, Error, Result};

/// The unit of both tables. (A GPT with sectors of another size is not found.)
const SECTOR: u64 = 512;
/// The most partitions that are looked at.
pub const MAX: usize = 16;
/// The most bytes of a GPT's entries: as many as UEFI asks for, four times over.
const MAX_ENTRIES: u64 = 64 << 10;
/// The EFI system partition, C12A7328-F81F-11D2-BA4B-00A0C93EC93B.
const ESP: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];

/// A part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Partition {
    /// Its number in the table from 1; 0 is the whole disk.
    pub number: u8,
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// It is the EFI system partition.
    pub esp: bool,
}

/// The partitions, in the table's order.
#[derive(Debug, Clone, Copy, Default)]
pub struct Partitions {
    list: [Partition; MAX],
    count: usize,
}

impl Partitions {
    /// All of them.
    pub fn all(&self) -> &[Partition] {
        self.list.get(..self.count).unwrap_or(&[])
    }

    /// Takes partition `number`, sectors `first` to before `end`, if it lies on a disk of `size` bytes and there is room.
    fn add(&mut self, number: u32, first: u64, end: u64, esp: bool, size: u64) {
        let (Some(start), Some(end)) = (first.checked_mul(SECTOR), end.checked_mul(SECTOR)) else { return };
        if let (true, Some(slot), Ok(number)) =
            (start > 0 && start < end && end <= size, self.list.get_mut(self.count), u8::try_from(number))
        {
            *slot = Partition { number, start, len: end - start, esp };
            self.count += 1;
        }
    }
}

/// Reads the partition table. A disk without one is its own only partition.
///
/// # Errors
/// The disk could not be read.
pub fn find(disk: &dyn Disk) -> Result<Partitions> {
    let mut found = Partitions::default();
    let last = (disk.size() / SECTOR).saturating_sub(1);
    if gpt(disk, 1, &mut found).is_err() {
        found = Partitions::default();
        if gpt(disk, last, &mut found).is_err() {
            found = Partitions::default();
            mbr(disk, &mut found)?;
        }
    }
    if found.count == 0 {
        found.list[0] = Partition { number: 0, start: 0, len: disk.size(), esp: false };
        found.count = 1;
    }
    Ok(found)
}

/// Reads the GPT whose header is in sector `at`.
fn gpt(disk: &dyn Disk, at: u64, found: &mut Partitions) -> Result<()> {
    let mut header = [0; SECTOR as usize];
    disk.read(at.saturating_mul(SECTOR), &mut header)?;
    let damaged = Error::Damaged("the GPT");
    let header_size = u32_at(&header, 12) as usize;
    if header[..8] != *b"EFI PART" || !(92..=header.len()).contains(&header_size) || u64_at(&header, 24) != at
    {
        return Err(damaged);
    }
    let sum = u32_at(&header, 16);
    header[16..20].fill(0);
    if !crc32(!0, &header[..header_size]) != sum {
        return Err(damaged);
    }
    let (first, count, size) =
        (u64_at(&header, 72), u64::from(u32_at(&header, 80)), u64::from(u32_at(&header, 84)));
    let bytes = count * size;
    if size < 128 || !size.is_multiple_of(128) || bytes > MAX_ENTRIES {
        return Err(Error::Unsupported("a GPT with such entries"));
    }
    let start = first.checked_mul(SECTOR).ok_or(damaged)?;
    let (mut sum_of_entries, mut entry) = (!0, [0; 128]);
    for offset in (0..bytes).step_by(entry.len()) {
        disk.read(start.checked_add(offset).ok_or(damaged)?, &mut entry)?;
        sum_of_entries = crc32(sum_of_entries, &entry);
        if offset.is_multiple_of(size) && entry[..16] != [0; 16] {
            let (first, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
            let number = (offset / size) as u32 + 1;
            found.add(number, first, last.saturating_add(1), entry[..16] == ESP, disk.size());
        }
    }
    if !sum_of_entries != u32_at(&header, 88) { Err(damaged) } else { Ok(()) }
}

/// Reads a master boot record and the chain of logical partitions, which have numbers from 5.
fn mbr(disk: &dyn Disk, found: &mut Partitions) -> Result<()> {
    let mut sector = [0; SECTOR as usize];
    if disk.size() < SECTOR {
        return Ok(());
    }
    disk.read(0, &mut sector)?;
    if sector[510..] != [0x55, 0xaa] {
        return Ok(());
    }
    // A boot sector of FAT has the same signature, and code where the table would be.
    let entries = || sector[446..510].chunks_exact(16);
    if entries().any(|entry| u8_at(entry, 0) & 0x7f != 0) {
        return Ok(());
    }
    let mut extended = 0;
    for (number, entry) in (1..).zip(entries()) {
        let (kind, first, count) = of_mbr(entry);
        match kind {
            0 | 0xee => {}
            0x05 | 0x0f | 0x85 => extended = first,
            _ => found.add(number, first, first + count, kind == 0xef, disk.size()),
        }
    }
    let (mut link, mut number) = (0, 5);
    while extended != 0 && number < 5 + MAX as u32 {
        let at = extended + link;
        let mut sector = [0; SECTOR as usize];
        if disk.read(at.saturating_mul(SECTOR), &mut sector).is_err() || sector[510..] != [0x55, 0xaa] {
            break;
        }
        let (kind, first, count) = of_mbr(&sector[446..462]);
        if kind != 0 {
            found.add(number, at + first, at + first + count, kind == 0xef, disk.size());
        }
        (_, link, _) = of_mbr(&sector[462..478]);
        if link == 0 {
            break;
        }
        number += 1;
    }
    Ok(())
}

/// Type, first sector and number of sectors.
fn of_mbr(entry: &[u8]) -> (u8, u64, u64) {
    (u8_at(entry, 4), u32_at(entry, 8).into(), u32_at(entry, 12).into())
}

/// One step of CRC-32 (the one of Ethernet), without the inversions before and after.
fn crc32(sum: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(sum, |sum, byte| {
        (0..8).fold(
            sum ^ u32::from(*byte),
            |sum, _| {
                if sum & 1 != 0 { (sum >> 1) ^ 0xedb8_8320 } else { sum >> 1 }
            },
        )
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(!super::crc32(!0, b"123456789"), 0xcbf4_3926);
    }
}
