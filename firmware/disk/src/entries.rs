//! What can be booted: the entries of the menu, their order, and which is the default.

use crate::text::{Shown, Text};
use crate::unified::Unified;
use crate::volume::{Kind, Node, Volume};
use crate::{Error, Result, bls, grub, plain, syslinux, version};
use core::cmp::Ordering;
use core::fmt;

/// The most entries that are kept. Of more, the last in order are left out.
pub const MAX: usize = 16;
/// The most initrds of an entry.
pub const MAX_INITRDS: usize = 3;
/// The longest path in an entry.
pub type Path = Text<192>;

/// One thing to boot.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entry {
    /// Its name among the others: the file's without `.conf`, or grub's id.
    pub id: Text<96>,
    /// What the menu shows.
    pub title: Text<80>,
    /// The kernel's version.
    pub version: Text<64>,
    /// What the Boot Loader Specification sorts by first.
    pub sort_key: Text<32>,
    /// And second.
    pub machine: Text<32>,
    /// Boot counting says that it has failed too often.
    pub exhausted: bool,
    /// The kernel's path.
    pub linux: Path,
    /// That file is a unified image, and this where kernel and initrd lie in it.
    pub unified: Option<Unified>,
    /// The initrds' paths.
    pub initrd: [Path; MAX_INITRDS],
    /// How many of these there are.
    pub initrds: usize,
    /// The kernel's command line.
    pub options: Text<1024>,
    /// UUID or label of the file system with the files, if not the one that the entry was found on.
    pub filesystem: Text<36>,
    /// Which volume the files are on.
    pub volume: usize,
}

impl Entry {
    /// One more initrd.
    ///
    /// # Errors
    /// Too many, or too long.
    pub fn add_initrd(&mut self, path: &[u8]) -> Result<()> {
        *self.initrd.get_mut(self.initrds).ok_or(Error::TooLarge("the list of initrds"))? =
            Text::whole(path)?;
        self.initrds += 1;
        Ok(())
    }

    /// The initrds.
    pub fn initrds(&self) -> &[Path] {
        self.initrd.get(..self.initrds).unwrap_or_default()
    }

    /// As the menu shows it. Two kernels of one system often have one title.
    pub fn show(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        write!(f, "{}", Shown(if self.title.is_empty() { self.id.bytes() } else { self.title.bytes() }))?;
        let told =
            |part: &[u8]| !part.is_empty() && self.title.bytes().windows(part.len()).any(|w| w == part);
        if self.version.is_empty() || told(self.version.bytes()) {
            Ok(())
        } else {
            write!(f, " ({})", self.version)
        }
    }
}

/// The menu.
#[derive(Debug)]
pub struct Entries {
    list: [Entry; MAX],
    count: usize,
    /// Which one is booted if nobody chooses.
    pub default: usize,
}

impl Default for Entries {
    fn default() -> Self {
        Self::new()
    }
}

impl Entries {
    /// None.
    pub const fn new() -> Self {
        const NONE: Entry = Entry {
            id: Text::EMPTY,
            title: Text::EMPTY,
            version: Text::EMPTY,
            sort_key: Text::EMPTY,
            machine: Text::EMPTY,
            exhausted: false,
            linux: Text::EMPTY,
            unified: None,
            initrd: [Text::EMPTY; MAX_INITRDS],
            initrds: 0,
            options: Text::EMPTY,
            filesystem: Text::EMPTY,
            volume: 0,
        };
        Self { list: [NONE; MAX], count: 0, default: 0 }
    }

    /// All of them, in order.
    pub fn all(&self) -> &[Entry] {
        self.list.get(..self.count).unwrap_or_default()
    }

    /// Those added since there were `before`.
    pub fn since(&mut self, before: usize) -> &mut [Entry] {
        self.list.get_mut(before..self.count).unwrap_or_default()
    }

    /// Adds one at the end; false if there is no room.
    pub fn push(&mut self, entry: Entry) -> bool {
        let Some(slot) = self.list.get_mut(self.count) else { return false };
        *slot = entry;
        self.count += 1;
        true
    }

    /// Adds one where `order` puts it: before those that it is less than. The last one has to go if there is no room.
    pub fn insert(&mut self, entry: Entry, order: fn(&Entry, &Entry) -> Ordering) {
        let at = self.all().iter().position(|other| order(&entry, other).is_lt()).unwrap_or(self.count);
        if at >= MAX {
            return;
        }
        self.count = (self.count + 1).min(MAX);
        if let Some(tail) = self.list.get_mut(at..self.count) {
            tail.rotate_right(1);
            tail[0] = entry;
        }
    }

    /// Keeps what `good` says; the default stays with its entry, or becomes the first.
    pub fn retain(&mut self, mut good: impl FnMut(&mut Entry) -> bool) {
        let (mut kept, mut default) = (0, 0);
        for at in 0..self.count {
            let mut entry = self.list[at];
            if good(&mut entry) {
                if at == self.default {
                    default = kept;
                }
                self.list[kept] = entry;
                kept += 1;
            }
        }
        (self.count, self.default) = (kept, default);
    }
}

/// The order of the Boot Loader Specification: what has not failed first, what has a sort key first, by it, by machine,
/// the newest first; without a key by file name, the newest first.
pub fn order(a: &Entry, b: &Entry) -> Ordering {
    let by_key = || match (a.sort_key.is_empty(), b.sort_key.is_empty()) {
        (false, false) => a
            .sort_key
            .bytes()
            .cmp(b.sort_key.bytes())
            .then_with(|| a.machine.bytes().cmp(b.machine.bytes()))
            .then_with(|| version::compare(b.version.bytes(), a.version.bytes())),
        (without, other) => without.cmp(&other),
    };
    a.exhausted.cmp(&b.exhausted).then_with(by_key).then_with(|| version::compare(b.id.bytes(), a.id.bytes()))
}

/// Looks for entries on `volumes` in four ways, and stays with the first that finds any whose kernel is
/// there: Boot Loader Specification, grub.cfg, Syslinux's configuration, kernels that lie where Debian puts
/// them. `scratch` holds one configuration file at a time; `note` is told what was found wrong.
pub fn find(
    volumes: &[Option<Volume>],
    scratch: &mut [u8],
    entries: &mut Entries,
    note: &mut dyn FnMut(fmt::Arguments),
) {
    type Reader = fn(&[Option<Volume>], usize, &mut [u8], &mut Entries) -> Result<()>;
    for (what, read) in [
        ("loader/entries", bls::read as Reader),
        ("grub.cfg", grub::read as Reader),
        ("extlinux.conf", syslinux::read as Reader),
        ("kernels", plain::read as Reader),
    ] {
        for (index, volume) in volumes.iter().enumerate() {
            let Some(volume) = volume else { continue };
            let mut found = |entries: &mut Entries| {
                let result = read(volumes, index, scratch, entries);
                // Sorting may have mixed them with those of other volumes, which have an index already.
                entries.since(0).iter_mut().for_each(|entry| {
                    if entry.volume == usize::MAX {
                        entry.volume = index;
                    }
                });
                result
            };
            match found(entries) {
                Ok(()) | Err(Error::Missing) => {}
                Err(error) => note(format_args!("{what} of {} {}: {error}", volume.kind(), volume.uuid())),
            }
        }
        entries.retain(|entry| {
            settle(entry, volumes);
            let Some(Some(volume)) = volumes.get(entry.volume) else { return false };
            match open(volume, entry.linux.bytes()) {
                Ok(_) => true,
                Err(error) => {
                    note(format_args!("{}: {error}", entry.linux));
                    false
                }
            }
        });
        if !entries.all().is_empty() {
            return;
        }
    }
}

/// Follows what grub's `search` asked for.
fn settle(entry: &mut Entry, volumes: &[Option<Volume>]) {
    let wanted = entry.filesystem.bytes();
    let is = |volume: &Option<Volume>| {
        volume.as_ref().is_some_and(|volume| {
            volume.uuid().bytes().eq_ignore_ascii_case(wanted) || volume.label().bytes() == wanted
        })
    };
    if let (false, Some(index)) = (wanted.is_empty(), volumes.iter().position(is)) {
        entry.volume = index;
    }
}

/// The file at `path` as entries name it: from the volume's root, or, where /boot is no file system of its own, from /boot.
///
/// # Errors
/// [`Error::Missing`], and what the file system says.
pub fn open(volume: &Volume, path: &[u8]) -> Result<Node> {
    let mut below = Text::<256>::whole(b"/boot/")?;
    below.push(path)?;
    let node = match volume.find(path) {
        Err(Error::Missing) => volume.find(below.bytes())?,
        other => other?,
    };
    if node.kind == Kind::File { Ok(node) } else { Err(Error::Missing) }
}
