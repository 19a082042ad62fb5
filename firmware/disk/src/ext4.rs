//! ext2, ext3 and ext4, read only (the kernel's Documentation/filesystems/ext4): block maps and extents,
//! 64-bit, folders read from end to end.
//!
//! The journal is not replayed: what a file system that was not unmounted shows is what had reached its place.

use crate::bytes::{u8_at, u16_at, u32_at};
use crate::text::Text;
use crate::volume::{Each, Handle, Kind, Node, Place, Window};
use crate::{Error, Result};

// Incompatible features: a reader that does not know one must not read. First those that change nothing here.
const FILE_TYPE: u32 = 0x2;
const RECOVER: u32 = 0x4;
const EXTENTS: u32 = 0x40;
const SIXTY_FOUR_BIT: u32 = 0x80;
const MMP: u32 = 0x100;
const FLEX_BG: u32 = 0x200;
const CHECKSUM_SEED: u32 = 0x2000;
const LARGE_DIR: u32 = 0x4000;
// Those that change single files, which are refused by their flags or unlike names.
const EA_INODE: u32 = 0x400;
const INLINE_DATA: u32 = 0x8000;
const ENCRYPT: u32 = 0x1_0000;
const CASEFOLD: u32 = 0x2_0000;
const KNOWN: u32 = FILE_TYPE
    | RECOVER
    | EXTENTS
    | SIXTY_FOUR_BIT
    | MMP
    | FLEX_BG
    | CHECKSUM_SEED
    | LARGE_DIR
    | EA_INODE
    | INLINE_DATA
    | ENCRYPT
    | CASEFOLD;

// An inode's flags.
const ENCRYPTED: u32 = 0x800;
const HAS_EXTENTS: u32 = 0x8_0000;
const HAS_INLINE_DATA: u32 = 0x1000_0000;

/// Features that this program does not know, for the message.
const STRANGE: [(u32, &str); 4] = [
    (0x1, "ext2 with compression"),
    (0x8, "an external journal of ext4"),
    (0x10, "ext4 with meta_bg"),
    (0x1000, "ext4 with dirdata"),
];
// What makes it an ext4, among what is known here; and an ext3, which has a journal (compatible features).
const ONLY_EXT4: u32 = KNOWN & !(FILE_TYPE | RECOVER);
const HAS_JOURNAL: u32 = 0x4;

/// The root folder's inode.
const ROOT: u32 = 2;
/// An extent tree's deepest level, and its nodes' magic number.
const MAX_DEPTH: u16 = 5;
const EXTENT_MAGIC: u16 = 0xf30a;
/// Longer extents than this are that much shorter, and not written yet.
const MAX_EXTENT: u32 = 32768;
/// Blocks that a block map names in the inode itself; behind these are its three trees, each a level deeper.
const DIRECT: u64 = 12;
/// The most pointers of a block map that are read at once.
const POINTERS: usize = 128;
/// The most bytes of a folder that are looked through.
const MAX_FOLDER: u64 = 4 << 20;

/// An ext4 file system.
pub struct Ext4<'d> {
    window: Window<'d>,
    block: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_size: u64,
    /// First byte of the group descriptors.
    groups: u64,
    group_size: u64,
    features: u32,
    compatible: u32,
    uuid: [u8; 16],
    label: [u8; 16],
}

/// Consecutive blocks of a file.
enum Run {
    /// At that byte of the partition, so many bytes.
    Data(u64, u64),
    /// Zeros, so many bytes.
    Hole(u64),
}

impl<'d> Ext4<'d> {
    /// Reads the superblock.
    ///
    /// # Errors
    /// [`Error::Missing`] if this is no ext file system.
    pub fn open(window: Window<'d>) -> Result<Self> {
        let mut superblock = [0; 1024];
        if window.read(1024, &mut superblock).is_err() || u16_at(&superblock, 0x38) != 0xef53 {
            return Err(Error::Missing);
        }
        let features = u32_at(&superblock, 0x60);
        let log = u32_at(&superblock, 0x18);
        let inode_size = match u32_at(&superblock, 0x4c) {
            0 => 128,
            _ => u64::from(u16_at(&superblock, 0x58)),
        };
        let group_size = match features & SIXTY_FOUR_BIT {
            0 => 32,
            _ => u64::from(u16_at(&superblock, 0xfe)),
        };
        let inodes_per_group = u32_at(&superblock, 0x28);
        if features & !KNOWN != 0 {
            let known = STRANGE.iter().find(|(bit, _)| features & bit != 0);
            return Err(Error::Unsupported(known.map_or("ext4 with a newer feature", |(_, name)| name)));
        }
        if log > 6
            || inodes_per_group == 0
            || !(128..=65536).contains(&inode_size)
            || !(32..=1024).contains(&group_size)
        {
            return Err(Error::Damaged("ext4's superblock"));
        }
        let block = 1024 << log;
        let mut ext4 = Self {
            window,
            block,
            inodes: u32_at(&superblock, 0),
            inodes_per_group,
            inode_size,
            groups: (u64::from(u32_at(&superblock, 0x14)) + 1) * block,
            group_size,
            features,
            compatible: u32_at(&superblock, 0x5c),
            uuid: [0; 16],
            label: [0; 16],
        };
        ext4.uuid.copy_from_slice(&superblock[0x68..0x78]);
        ext4.label.copy_from_slice(&superblock[0x78..0x88]);
        Ok(ext4)
    }

    /// Which of the three it is.
    pub fn kind(&self) -> &'static str {
        match (self.features & ONLY_EXT4, self.compatible & HAS_JOURNAL) {
            (0, 0) => "ext2",
            (0, _) => "ext3",
            _ => "ext4",
        }
    }

    /// The UUID as text.
    pub fn uuid(&self) -> Text<36> {
        let mut text = Text::EMPTY;
        for (at, byte) in self.uuid.iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                let _ = text.push(b"-");
            }
            let digit = |value: u8| b"0123456789abcdef"[usize::from(value & 15)];
            let _ = text.push(&[digit(byte >> 4), digit(*byte)]);
        }
        text
    }

    /// The label.
    pub fn label(&self) -> Text<16> {
        Text::clipped(self.label.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    /// Whether the journal holds what has not reached its place.
    pub fn needs_recovery(&self) -> bool {
        self.features & RECOVER != 0
    }

    /// The root folder.
    ///
    /// # Errors
    /// As [`Ext4::node`].
    pub fn root(&self) -> Result<Node> {
        self.node(ROOT)
    }

    /// The file with that inode number.
    ///
    /// # Errors
    /// No such inode, or neither file, folder nor symlink.
    pub fn node(&self, number: u32) -> Result<Node> {
        let damaged = Error::Damaged("an inode number");
        let index = number.checked_sub(1).filter(|index| *index < self.inodes).ok_or(damaged)?;
        let mut group = [0; 64];
        let group_bytes = group.get_mut(..self.group_size.min(64) as usize).unwrap_or_default();
        let group_at = self.groups + u64::from(index / self.inodes_per_group) * self.group_size;
        self.window.read(group_at, group_bytes)?;
        // Beyond a short descriptor there are zeros.
        let table = u64::from(u32_at(&group, 0x28)) << 32 | u64::from(u32_at(&group, 8));
        let inside = u64::from(index % self.inodes_per_group) * self.inode_size;
        let at = table.checked_mul(self.block).and_then(|start| start.checked_add(inside)).ok_or(damaged)?;
        let mut inode = [0; 128];
        self.window.read(at, &mut inode)?;
        let kind = match u16_at(&inode, 0) >> 12 {
            0x4 => Kind::Folder,
            0x8 => Kind::File,
            0xa => Kind::Link,
            _ => return Err(Error::Unsupported("a file that is neither file, folder nor symlink")),
        };
        let size = u64::from(u32_at(&inode, 0x6c)) << 32 | u64::from(u32_at(&inode, 4));
        let mut map = [0; 60];
        map.copy_from_slice(&inode[0x28..0x28 + 60]);
        Ok(Node { kind, size, place: Place::Inode(u32_at(&inode, 0x20), map) })
    }

    /// Reads from a file, a folder or a symlink.
    ///
    /// # Errors
    /// A damaged map of its blocks; encrypted and inline files.
    pub fn read(&self, node: &Node, offset: u64, into: &mut [u8]) -> Result<usize> {
        let Place::Inode(flags, map) = &node.place else { return Err(Error::Missing) };
        let want = node.size.saturating_sub(offset).min(into.len() as u64) as usize;
        let into = into.get_mut(..want).unwrap_or_default();
        if flags & ENCRYPTED != 0 {
            return Err(Error::Unsupported("an encrypted file"));
        }
        if node.kind == Kind::Link && flags & (HAS_EXTENTS | HAS_INLINE_DATA) == 0 && node.size < 60 {
            let from = map.get(offset as usize..).and_then(|rest| rest.get(..want)).ok_or(Error::Read)?;
            into.copy_from_slice(from);
            return Ok(want);
        }
        if flags & HAS_INLINE_DATA != 0 {
            return Err(Error::Unsupported("a file inside of its inode"));
        }
        let mut done = 0;
        while done < want {
            let at = offset.checked_add(done as u64).ok_or(Error::Read)?;
            let block = u32::try_from(at / self.block).map_err(|_| Error::Damaged("a file's length"))?;
            let skip = at % self.block;
            let run = if flags & HAS_EXTENTS == 0 { self.mapped(map, block) } else { self.run(map, block) }?;
            let (Run::Data(_, length) | Run::Hole(length)) = run;
            let count = length.saturating_sub(skip).min((want - done) as u64) as usize;
            // Each run has at least one block, so each turn goes on.
            let part = into.get_mut(done..done + count).ok_or(Error::Read)?;
            match run {
                Run::Data(start, _) => self.window.read(start.saturating_add(skip), part)?,
                Run::Hole(_) => part.fill(0),
            }
            done += count;
        }
        Ok(done)
    }

    /// What is at block `wanted` of the file with the block map `map` (ext2's and ext3's).
    fn mapped(&self, map: &[u8; 60], wanted: u32) -> Result<Run> {
        let per_block = self.block / 4;
        let mut index = u64::from(wanted);
        if index < DIRECT {
            return Ok(self.consecutive(map.get(index as usize * 4..DIRECT as usize * 4).unwrap_or_default()));
        }
        index -= DIRECT;
        // How many blocks lie below one pointer of the level at hand.
        let (mut depth, mut below) = (0, 1);
        while depth < 3 && index >= below * per_block {
            index -= below * per_block;
            (depth, below) = (depth + 1, below * per_block);
        }
        let mut pointer = match depth {
            0..3 => u64::from(u32_at(map, (DIRECT as usize + depth) * 4)),
            _ => return Err(Error::Damaged("a file's length")),
        };
        loop {
            if pointer == 0 {
                return Ok(Run::Hole((below * per_block - index) * self.block));
            }
            let slot = index / below;
            // A pointer has 32 bits, and a block at most 16: there is no overflow.
            let at = pointer * self.block + slot * 4;
            if below == 1 {
                let mut pointers = [0; POINTERS * 4];
                let count = (per_block - slot).min(POINTERS as u64) as usize;
                let pointers = pointers.get_mut(..count * 4).unwrap_or_default();
                self.window.read(at, pointers)?;
                return Ok(self.consecutive(pointers));
            }
            let mut next = [0; 4];
            self.window.read(at, &mut next)?;
            pointer = u32::from_le_bytes(next).into();
            index %= below;
            below /= per_block;
        }
    }

    /// As many of the blocks that `pointers` name as lie one behind the other, or are all holes.
    fn consecutive(&self, pointers: &[u8]) -> Run {
        let first = u32_at(pointers, 0);
        let step = u32::from(first != 0);
        let follows = |(at, pointer): &(u32, &[u8])| first.checked_add(at * step) == Some(u32_at(pointer, 0));
        let count = (0..).zip(pointers.chunks_exact(4)).take_while(follows).count() as u64;
        let length = count.max(1) * self.block;
        if first == 0 { Run::Hole(length) } else { Run::Data(u64::from(first) * self.block, length) }
    }

    /// What is at block `wanted` of the file whose extent tree has its root in `root`.
    fn run(&self, root: &[u8; 60], wanted: u32) -> Result<Run> {
        let damaged = Error::Damaged("an extent tree");
        let mut header = [0; 12];
        header.copy_from_slice(&root[..12]);
        // None: in the inode. Else the first byte of a block.
        let (mut place, mut above) = (None::<u64>, MAX_DEPTH + 1);
        let mut until = u32::MAX;
        loop {
            let (count, depth) = (u64::from(u16_at(&header, 2)), u16_at(&header, 6));
            let room = (if place.is_none() { 60 } else { self.block }) / 12 - 1;
            if u16_at(&header, 0) != EXTENT_MAGIC || depth >= above || count > room {
                return Err(damaged);
            }
            // The last one that begins at or before the block; where the next one begins ends a hole.
            let (mut found, mut entry) = (None, [0; 12]);
            for index in 0..count {
                let at = 12 + index * 12;
                match place {
                    None => entry.copy_from_slice(root.get(at as usize..at as usize + 12).ok_or(damaged)?),
                    Some(start) => self.window.read(start.checked_add(at).ok_or(damaged)?, &mut entry)?,
                }
                if u32_at(&entry, 0) > wanted {
                    until = until.min(u32_at(&entry, 0));
                    break;
                }
                found = Some(entry);
            }
            let hole = Ok(Run::Hole(u64::from(until - wanted).max(1) * self.block));
            let Some(entry) = found else { return hole };
            let first = u32_at(&entry, 0);
            if depth == 0 {
                let (length, written) = match u32::from(u16_at(&entry, 4)) {
                    length if length > MAX_EXTENT => (length - MAX_EXTENT, false),
                    length => (length, true),
                };
                let inside = wanted - first;
                if inside >= length {
                    return hole;
                }
                let left = u64::from(length - inside) * self.block;
                if !written {
                    return Ok(Run::Hole(left));
                }
                let start = u64::from(u16_at(&entry, 6)) << 32 | u64::from(u32_at(&entry, 8));
                let at = (start + u64::from(inside)).checked_mul(self.block).ok_or(damaged)?;
                return Ok(Run::Data(at, left));
            }
            let block = u64::from(u16_at(&entry, 8)) << 32 | u64::from(u32_at(&entry, 4));
            let start = block.checked_mul(self.block).ok_or(damaged)?;
            self.window.read(start, &mut header)?;
            (place, above) = (Some(start), depth);
        }
    }

    /// Goes through a folder.
    ///
    /// # Errors
    /// As [`Ext4::read`]; entries that run over their block.
    pub fn list(&self, folder: &Node, each: Each) -> Result<()> {
        let (mut offset, end) = (0, folder.size.min(MAX_FOLDER));
        let mut entry = [0; 8 + 255];
        while offset < end {
            let head = self.read(folder, offset, entry.get_mut(..8).unwrap_or_default())?;
            let length = u64::from(u16_at(&entry, 4));
            let name_length = usize::from(u8_at(&entry, 6));
            if head < 8 || length < 8 + name_length as u64 || !length.is_multiple_of(4) {
                return Err(Error::Damaged("a folder"));
            }
            let inode = u32_at(&entry, 0);
            if inode != 0 && name_length > 0 {
                let name = entry.get_mut(8..8 + name_length).unwrap_or_default();
                if self.read(folder, offset + 8, name)? == name_length && each(name, Handle::Inode(inode)) {
                    return Ok(());
                }
            }
            offset += length;
        }
        Ok(())
    }
}
