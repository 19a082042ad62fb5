//! A partition with a file system on it: names to files, whichever file system it is.

use crate::ext4::Ext4;
use crate::fat::Fat;
use crate::partition::Partition;
use crate::text::Text;
use crate::{Disk, Error, Result};

/// The longest path, symlinks' targets put in.
pub const MAX_PATH: usize = 512;
/// The most symlinks on the way to a file.
const MAX_LINKS: usize = 8;

/// A partition's bytes: nothing outside can be read through it.
#[derive(Clone, Copy)]
pub struct Window<'d> {
    disk: &'d dyn Disk,
    partition: Partition,
}

impl<'d> Window<'d> {
    /// That part of the disk.
    pub fn new(disk: &'d dyn Disk, partition: Partition) -> Self {
        Self { disk, partition }
    }

    /// Fills `into` from `offset` in the partition.
    ///
    /// # Errors
    /// [`Error::Read`], also for what lies behind the end.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(into.len() as u64).ok_or(Error::Read)?;
        if end > self.partition.len {
            return Err(Error::Read);
        }
        self.disk.read(self.partition.start.checked_add(offset).ok_or(Error::Read)?, into)
    }
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    File,
    /// Names.
    Folder,
    /// Another path.
    Link,
}

/// A file or folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Its length in bytes (a FAT folder's: as long as its clusters).
    pub size: u64,
    /// Where it lies, as its file system says it.
    pub place: Place,
}

/// Where a [`Node`] lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// FAT12's and FAT16's root folder.
    Fixed,
    /// FAT: its first cluster.
    Cluster(u32),
    /// ext4: its inode's flags and block map (or a short symlink's target).
    Inode(u32, [u8; 60]),
}

/// What [`Volume::list`] calls: the name, and a number to open it by. True ends the listing.
pub type Each<'a> = &'a mut dyn FnMut(&[u8], Handle) -> bool;

/// A name's node, before it is read.
#[derive(Debug, Clone, Copy)]
pub enum Handle {
    /// FAT has it in the folder.
    Node(Node),
    /// ext4's inode number.
    Inode(u32),
}

enum Format<'d> {
    Fat(Fat<'d>),
    Ext4(Ext4<'d>),
}

/// A file system.
pub struct Volume<'d> {
    format: Format<'d>,
    /// Where it lies.
    pub partition: Partition,
}

impl<'d> Volume<'d> {
    /// Recognises the file system.
    ///
    /// # Errors
    /// None that is known here, or a damaged one.
    pub fn open(disk: &'d dyn Disk, partition: Partition) -> Result<Self> {
        let window = Window::new(disk, partition);
        let format = match Ext4::open(window) {
            Ok(ext4) => Format::Ext4(ext4),
            Err(Error::Missing) => Format::Fat(Fat::open(window)?),
            Err(error) => return Err(error),
        };
        Ok(Self { format, partition })
    }

    /// How it is called.
    pub fn kind(&self) -> &'static str {
        match &self.format {
            Format::Fat(_) => "FAT",
            Format::Ext4(ext4) => ext4.kind(),
        }
    }

    /// Its UUID as text (FAT: XXXX-XXXX), as `root=UUID=` and grub's `search` take it.
    pub fn uuid(&self) -> Text<36> {
        match &self.format {
            Format::Fat(fat) => fat.uuid(),
            Format::Ext4(ext4) => ext4.uuid(),
        }
    }

    /// Its label.
    pub fn label(&self) -> Text<16> {
        match &self.format {
            Format::Fat(fat) => fat.label(),
            Format::Ext4(ext4) => ext4.label(),
        }
    }

    /// Whether its journal holds what is not in place yet, so that files may be older than they should be.
    pub fn needs_recovery(&self) -> bool {
        matches!(&self.format, Format::Ext4(ext4) if ext4.needs_recovery())
    }

    /// The file or folder at `path`, through symlinks. Every path begins at the root.
    ///
    /// # Errors
    /// [`Error::Missing`], and what the file system says.
    pub fn find(&self, path: &[u8]) -> Result<Node> {
        self.resolve(path, true)
    }

    /// The target of the symlink at `path`; [`Error::Missing`] if it is none.
    ///
    /// # Errors
    /// As [`Volume::find`].
    pub fn link(&self, path: &[u8]) -> Result<Text<MAX_PATH>> {
        let node = self.resolve(path, false)?;
        if node.kind == Kind::Link { self.target(&node) } else { Err(Error::Missing) }
    }

    /// Reads `node`'s bytes from `offset`; how many there were.
    ///
    /// # Errors
    /// What the file system says.
    pub fn read(&self, node: &Node, offset: u64, into: &mut [u8]) -> Result<usize> {
        match &self.format {
            Format::Fat(fat) => fat.read(node, offset, into),
            Format::Ext4(ext4) => ext4.read(node, offset, into),
        }
    }

    /// Reads the file at `path`, if it is no longer than `into`.
    ///
    /// # Errors
    /// As [`Volume::find`], and [`Error::TooLarge`].
    pub fn read_file<'b>(&self, path: &[u8], into: &'b mut [u8]) -> Result<&'b [u8]> {
        let node = self.find(path)?;
        if node.kind != Kind::File {
            return Err(Error::Missing);
        }
        if node.size > into.len() as u64 {
            return Err(Error::TooLarge("the file"));
        }
        let count = self.read(&node, 0, into)?;
        into.get(..count).ok_or(Error::Read)
    }

    /// Goes through the folder `node`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn list(&self, node: &Node, each: Each) -> Result<()> {
        match &self.format {
            Format::Fat(fat) => fat.list(node, each),
            Format::Ext4(ext4) => ext4.list(node, each),
        }
    }

    /// The node of what [`Volume::list`] told.
    ///
    /// # Errors
    /// What the file system says.
    pub fn node(&self, handle: Handle) -> Result<Node> {
        match (handle, &self.format) {
            (Handle::Node(node), _) => Ok(node),
            (Handle::Inode(number), Format::Ext4(ext4)) => ext4.node(number),
            (Handle::Inode(_), Format::Fat(_)) => Err(Error::Missing),
        }
    }

    fn root(&self) -> Result<Node> {
        match &self.format {
            Format::Fat(fat) => Ok(fat.root()),
            Format::Ext4(ext4) => ext4.root(),
        }
    }

    fn resolve(&self, path: &[u8], follow_last: bool) -> Result<Node> {
        let root = self.root()?;
        let (mut rest, mut here, mut links) = (Text::<MAX_PATH>::whole(path)?, root, 0);
        loop {
            let bytes = rest.bytes();
            let Some(start) = bytes.iter().position(|byte| *byte != b'/') else { return Ok(here) };
            let path = bytes.get(start..).unwrap_or(&[]);
            let end = path.iter().position(|byte| *byte == b'/').unwrap_or(path.len());
            let (name, after) = path.split_at(end);
            let next = self.lookup(&here, name)?;
            if next.kind != Kind::Link || (!follow_last && after.is_empty()) {
                (here, rest) = (next, Text::whole(after)?);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Error::Damaged("symlinks in a circle"));
            }
            let mut target = self.target(&next)?;
            if target.bytes().starts_with(b"/") {
                here = root;
            }
            target.push(after)?;
            rest = target;
        }
    }

    fn target(&self, link: &Node) -> Result<Text<MAX_PATH>> {
        let mut bytes = [0; MAX_PATH];
        if link.size >= MAX_PATH as u64 {
            return Err(Error::TooLarge("a symlink"));
        }
        let count = self.read(link, 0, &mut bytes)?;
        Text::whole(bytes.get(..count.min(link.size as usize)).unwrap_or(&[]))
    }

    fn lookup(&self, folder: &Node, wanted: &[u8]) -> Result<Node> {
        if folder.kind != Kind::Folder {
            return Err(Error::Missing);
        }
        if wanted == b"." || (wanted == b".." && *folder == self.root()?) {
            return Ok(*folder);
        }
        // A FAT knows no case.
        let ignore_case = matches!(self.format, Format::Fat(_));
        let mut found = None;
        self.list(folder, &mut |name, handle| {
            let same = name == wanted || (ignore_case && name.eq_ignore_ascii_case(wanted));
            if same {
                found = Some(handle);
            }
            same
        })?;
        self.node(found.ok_or(Error::Missing)?)
    }
}
