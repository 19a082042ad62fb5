//! FAT12, FAT16 and FAT32 with long names, read only (Microsoft's FAT specification, 1.03).

use crate::bytes::{u8_at, u16_at, u32_at};
use crate::text::Text;
use crate::volume::{Each, Handle, Kind, Node, Place, Window};
use crate::{Error, Result};

/// Bytes of a folder's entry.
const ENTRY: usize = 32;
/// The most bytes of a folder, which the specification sets.
const MAX_FOLDER: u64 = 2 << 20;
/// UTF-16 units of a long name's entry, and entries of the longest name.
const UNITS: usize = 13;
const LONGEST: usize = 20;

/// A FAT file system.
pub struct Fat<'d> {
    window: Window<'d>,
    /// Bits of an entry of the table.
    bits: u32,
    /// First byte of the first table.
    table: u64,
    /// First byte and length of the fixed root folder; empty for FAT32.
    fixed: (u64, u64),
    /// FAT32's root folder.
    root: u32,
    /// First byte of cluster 2.
    data: u64,
    cluster_size: u64,
    /// Clusters, which have numbers from 2.
    clusters: u32,
    serial: u32,
    label: [u8; 11],
}

impl<'d> Fat<'d> {
    /// Reads the boot sector.
    ///
    /// # Errors
    /// [`Error::Missing`] if this is no FAT file system.
    pub fn open(window: Window<'d>) -> Result<Self> {
        let mut boot = [0; 512];
        window.read(0, &mut boot)?;
        let sector = u64::from(u16_at(&boot, 11));
        let per_cluster = u64::from(u8_at(&boot, 13));
        let (reserved, tables) = (u64::from(u16_at(&boot, 14)), u64::from(u8_at(&boot, 16)));
        let good = boot[510..] == [0x55, 0xaa]
            && (512..=4096).contains(&sector)
            && sector.is_power_of_two()
            && per_cluster.is_power_of_two()
            && reserved > 0
            && tables > 0;
        if !good {
            return Err(Error::Missing);
        }
        let either = |short: usize, long: usize| match u16_at(&boot, short) {
            0 => u64::from(u32_at(&boot, long)),
            short => u64::from(short),
        };
        let (sectors, table_size) = (either(19, 32), either(22, 36));
        let fixed = u64::from(u16_at(&boot, 17)) * ENTRY as u64;
        let before = reserved + tables * table_size + fixed.div_ceil(sector);
        let clusters = sectors.checked_sub(before).ok_or(Error::Missing)? / per_cluster;
        // No table has entries for more clusters than these.
        let clusters =
            u32::try_from(clusters).ok().filter(|count| *count < 0x0fff_fff5).ok_or(Error::Missing)?;
        let (bits, extended) = match clusters {
            0..4085 => (12, 36),
            4085..65525 => (16, 36),
            _ => (32, 64),
        };
        let label = boot.get(extended + 7..).and_then(|rest| rest.first_chunk()).copied();
        Ok(Self {
            window,
            bits,
            table: reserved * sector,
            fixed: ((reserved + tables * table_size) * sector, fixed),
            root: u32_at(&boot, 44),
            data: before * sector,
            cluster_size: per_cluster * sector,
            clusters,
            serial: u32_at(&boot, extended + 3),
            label: label.unwrap_or_default(),
        })
    }

    /// The serial number, as XXXX-XXXX.
    pub fn uuid(&self) -> Text<36> {
        let mut text = [b'-'; 9];
        for (digit, at) in [0, 1, 2, 3, 5, 6, 7, 8].into_iter().enumerate() {
            let value = (self.serial >> (28 - 4 * digit)) as usize & 15;
            text[at] = b"0123456789ABCDEF"[value];
        }
        Text::clipped(&text)
    }

    /// The label of the boot sector.
    pub fn label(&self) -> Text<16> {
        Text::clipped(self.label.trim_ascii_end())
    }

    /// The root folder.
    pub fn root(&self) -> Node {
        let place = if self.bits == 32 { Place::Cluster(self.root) } else { Place::Fixed };
        Node { kind: Kind::Folder, size: MAX_FOLDER, place }
    }

    /// Reads from a file or folder.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a chain of clusters that leaves the file system or never ends.
    pub fn read(&self, node: &Node, offset: u64, into: &mut [u8]) -> Result<usize> {
        let want = node.size.saturating_sub(offset).min(into.len() as u64) as usize;
        let into = into.get_mut(..want).unwrap_or_default();
        let mut cluster = match node.place {
            Place::Cluster(first) => first,
            _ => {
                let want = self.fixed.1.saturating_sub(offset).min(want as u64) as usize;
                let into = into.get_mut(..want).unwrap_or_default();
                self.window.read(self.fixed.0.saturating_add(offset), into)?;
                return Ok(want);
            }
        };
        let (mut skip, mut done, mut steps) = (offset, 0, 0);
        while done < want {
            // As many clusters as lie one behind the other: one read.
            let first = cluster;
            let mut length = 0;
            while cluster == first.wrapping_add((length / self.cluster_size) as u32) {
                if cluster < 2 || cluster - 2 >= self.clusters {
                    break;
                }
                length += self.cluster_size;
                steps += 1;
                if steps > self.clusters {
                    return Err(Error::Damaged("a FAT chain in a circle"));
                }
                cluster = self.next(cluster)?;
                if length >= skip.saturating_add((want - done) as u64) {
                    break;
                }
            }
            if length == 0 {
                // A folder has no length of its own: its chain's end is its end.
                return if node.kind == Kind::Folder { Ok(done) } else { Err(Error::Damaged("a FAT chain")) };
            }
            if skip >= length {
                skip -= length;
                continue;
            }
            let count = (length - skip).min((want - done) as u64) as usize;
            let at = self.data + u64::from(first - 2) * self.cluster_size + skip;
            self.window.read(at, into.get_mut(done..done + count).unwrap_or_default())?;
            (done, skip) = (done + count, 0);
        }
        Ok(done)
    }

    /// The cluster behind `cluster`, or some number that is none.
    fn next(&self, cluster: u32) -> Result<u32> {
        let mut entry = [0; 4];
        let (offset, bytes) = match self.bits {
            12 => (u64::from(cluster) * 3 / 2, 2),
            16 => (u64::from(cluster) * 2, 2),
            _ => (u64::from(cluster) * 4, 4),
        };
        self.window.read(self.table + offset, entry.get_mut(..bytes).unwrap_or_default())?;
        let entry = u32::from_le_bytes(entry);
        Ok(match (self.bits, cluster & 1) {
            (12, 0) => entry & 0xfff,
            (12, _) => entry >> 4,
            (16, _) => entry,
            _ => entry & 0x0fff_ffff,
        })
    }

    /// Goes through a folder.
    ///
    /// # Errors
    /// As [`Fat::read`].
    pub fn list(&self, folder: &Node, each: Each) -> Result<()> {
        let mut long = LongName::default();
        let mut sector = [0; 16 * ENTRY];
        let mut offset = 0;
        while offset < MAX_FOLDER {
            let count = self.read(folder, offset, &mut sector)?;
            if count == 0 {
                break;
            }
            for entry in sector.get(..count).unwrap_or_default().chunks_exact(ENTRY) {
                match (u8_at(entry, 0), u8_at(entry, 11)) {
                    (0, _) => return Ok(()),
                    (0xe5, _) => long = LongName::default(),
                    (_, attributes) if attributes & 0x3f == 0x0f => long.add(entry),
                    (_, attributes) if attributes & 0x08 != 0 => long = LongName::default(),
                    (_, attributes) => {
                        let name = long.finish(entry);
                        if each(name.bytes(), Handle::Node(self.node(entry, attributes))) {
                            return Ok(());
                        }
                    }
                }
            }
            offset += count as u64;
        }
        Ok(())
    }

    fn node(&self, entry: &[u8], attributes: u8) -> Node {
        let high = if self.bits == 32 { u32::from(u16_at(entry, 20)) } else { 0 };
        let cluster = high << 16 | u32::from(u16_at(entry, 26));
        if attributes & 0x10 == 0 {
            return Node { kind: Kind::File, size: u32_at(entry, 28).into(), place: Place::Cluster(cluster) };
        }
        // The entry ".." of a folder in the root has cluster 0.
        match cluster {
            0 => self.root(),
            _ => Node { kind: Kind::Folder, size: MAX_FOLDER, place: Place::Cluster(cluster) },
        }
    }
}

/// The parts of a long name, which come last part first.
#[derive(Clone, Copy)]
struct LongName {
    units: [u16; LONGEST * UNITS],
    sum: u8,
    /// The part that has to come next, counted down to 0: then it is whole.
    left: Option<usize>,
}

impl Default for LongName {
    fn default() -> Self {
        Self { units: [0xffff; LONGEST * UNITS], sum: 0, left: None }
    }
}

impl LongName {
    fn add(&mut self, entry: &[u8]) {
        let number = usize::from(u8_at(entry, 0) & 0x3f);
        if u8_at(entry, 0) & 0x40 != 0 {
            *self = Self { sum: u8_at(entry, 13), left: Some(number), ..Self::default() };
        }
        let part = number.checked_sub(1).and_then(|part| self.units.chunks_exact_mut(UNITS).nth(part));
        match part {
            Some(part) if self.left == Some(number) && self.sum == u8_at(entry, 13) => {
                let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
                for (unit, at) in part.iter_mut().zip(places) {
                    *unit = u16_at(entry, at);
                }
                self.left = Some(number - 1);
            }
            _ => self.left = None,
        }
    }

    /// The name of `entry`: the long one if it is whole and belongs to it, else the short one.
    fn finish(&mut self, entry: &[u8]) -> Text<{ 4 * LONGEST * UNITS }> {
        let long = core::mem::take(self);
        let short = entry.get(..11).unwrap_or_default();
        let sum = short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        let mut name = Text::EMPTY;
        if long.left == Some(0) && long.sum == sum {
            let units = long.units.into_iter().take_while(|unit| *unit != 0 && *unit != 0xffff);
            for char in char::decode_utf16(units) {
                let char = char.unwrap_or(char::REPLACEMENT_CHARACTER);
                // There is room for every char of the longest name.
                let _ = name.push(char.encode_utf8(&mut [0; 4]).as_bytes());
            }
            return name;
        }
        let (base, extension) = short.split_at_checked(8).unwrap_or_default();
        let _ = name.push(base.trim_ascii_end());
        if !extension.trim_ascii_end().is_empty() {
            let _ = name.push(b".");
            let _ = name.push(extension.trim_ascii_end());
        }
        name
    }
}
