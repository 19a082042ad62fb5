//! [`Nodes`]: the files that the guest knows by number, with few descriptors for many of them.
//!
//! A node is known by device, inode and time of birth. It keeps where it was found last, so that its descriptor can be closed and opened
//! anew; what is there then must be the same file. One that has lost its name keeps its descriptor.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2, statx};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::wire::is_name;

/// The folder itself (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;
/// The most nodes: some 200 bytes each. A guest that has seen more has to forget some.
const MOST: usize = 1 << 20;

/// What a file is known by: never two files at a time, and not one after the other either where the host's file system keeps times of birth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Identity {
    device: (u32, u32),
    inode: u64,
    birth: (i64, u32),
}

impl From<&Statx> for Identity {
    fn from(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            birth: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
        }
    }
}

#[derive(Debug)]
struct Node {
    identity: Identity,
    /// How often the guest was told of it, without those that it has forgotten.
    lookups: u64,
    /// Where it was found: a folder's node, and a name there. None if it is there no more.
    place: Option<(u64, CString)>,
    /// Names it, whoever renames it.
    path: Option<Arc<OwnedFd>>,
    is_folder: bool,
}

/// [`Nodes`] without what the host has of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The device that the folder itself is on.
    device: (u32, u32),
    next: u64,
    /// By number, with how often the guest was told of it, and where it was found.
    nodes: Vec<(u64, Identity, u64, u64, CString)>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Nodes {
    nodes: HashMap<u64, Node>,
    numbers: HashMap<Identity, u64>,
    /// The number of the next.
    next: u64,
    /// Those with a descriptor, those that got theirs first in front.
    open: VecDeque<u64>,
    most_open: usize,
    /// Of [`Nodes::open`], those without a place.
    nameless: usize,
}

/// Opens the entry `name` of `folder` without opening what it is.
///
/// # Errors
/// As openat2(2) has them. A symbolic link is found as such.
pub fn find(folder: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    openat2(folder, name, flags, Mode::empty(), resolve)
}

/// What the host says of an open file.
///
/// # Errors
/// As statx(2) has them.
pub fn stat(file: &OwnedFd) -> Result<Statx, Errno> {
    statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

impl Nodes {
    /// Of the folder `root`. `most_open` of them at most have descriptors at a time.
    ///
    /// # Errors
    /// The host does not say what `root` is.
    pub fn new(root: OwnedFd, most_open: usize) -> Result<Self, Errno> {
        let identity = Identity::from(&stat(&root)?);
        let node = Node { identity, lookups: 1, place: None, path: Some(Arc::new(root)), is_folder: true };
        Ok(Self {
            nodes: HashMap::from([(ROOT, node)]),
            numbers: HashMap::from([(identity, ROOT)]),
            next: ROOT + 1,
            open: VecDeque::new(),
            most_open,
            nameless: 0,
        })
    }

    /// The descriptor that names node `number`.
    ///
    /// # Errors
    /// ESTALE: there is no such node, or its file is not where it was; or as openat2(2) has them.
    pub fn path(&mut self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        // Up to a folder that is open, and down again.
        let mut closed = Vec::new();
        let mut at = number;
        let mut path = loop {
            let node = self.nodes.get(&at).ok_or(Errno::STALE)?;
            if let Some(path) = &node.path {
                break path.clone();
            }
            let (folder, name) = node.place.clone().ok_or(Errno::STALE)?;
            closed.push((at, name, node.identity));
            // Folders that are each in the other: a guest cannot make them, but what it forgets is its own affair.
            if closed.len() > MOST_DEEP {
                return Err(Errno::STALE);
            }
            at = folder;
        };
        for (number, name, identity) in closed.into_iter().rev() {
            let found = find(&path, &name).map_err(|error| match error {
                Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
                error => error,
            })?;
            if Identity::from(&stat(&found)?) != identity {
                return Err(Errno::STALE);
            }
            path = Arc::new(found);
            self.opened(number, path.clone());
        }
        Ok(path)
    }

    /// The guest is told of the file `path`, which is entry `name` of the folder `folder`, or has none: its number.
    ///
    /// # Errors
    /// ENFILE: the guest knows too many, or too many that have no name.
    pub fn found(&mut self, place: Option<(u64, &CStr)>, path: OwnedFd, stat: &Statx) -> Result<u64, Errno> {
        let identity = Identity::from(stat);
        let place = place.map(|(folder, name)| (folder, name.to_owned()));
        if let Some(number) = self.numbers.get(&identity).copied()
            && let Some(node) = self.nodes.get_mut(&number)
        {
            node.lookups = node.lookups.saturating_add(1);
            if number != ROOT && place.is_some() {
                self.nameless -= usize::from(node.place.is_none());
                node.place = place;
            }
            return Ok(number);
        }
        // One without a place keeps its descriptor until it is forgotten.
        if self.nodes.len() >= MOST || place.is_none() && !self.may_keep() {
            return Err(Errno::NFILE);
        }
        let number = self.next;
        self.next += 1;
        self.nameless += usize::from(place.is_none());
        let is_folder = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        self.nodes.insert(number, Node { identity, lookups: 1, place, path: None, is_folder });
        self.numbers.insert(identity, number);
        self.opened(number, Arc::new(path));
        Ok(number)
    }

    /// The guest forgets `lookups` of what it was told of node `number`.
    pub fn forget(&mut self, number: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0
            && let Some(node) = self.nodes.remove(&number)
        {
            self.numbers.remove(&node.identity);
            self.nameless -= usize::from(node.place.is_none());
        }
    }

    /// The guest knows nothing but the folder itself.
    pub fn clear(&mut self) {
        self.nodes.retain(|number, _| *number == ROOT);
        self.numbers.retain(|_, number| *number == ROOT);
        self.open.clear();
        self.nameless = 0;
        self.next = ROOT + 1;
    }

    /// Those that can be found again, in the order of their numbers.
    pub fn save(&self) -> Saved {
        let saved = |(number, node): (&u64, &Node)| {
            let (folder, name) = node.place.clone()?;
            Some((*number, node.identity, node.lookups, folder, name))
        };
        let mut nodes: Vec<_> = self.nodes.iter().filter_map(saved).collect();
        nodes.sort_unstable_by_key(|(number, ..)| *number);
        let device = if nodes.is_empty() { (0, 0) } else { self.root_device() };
        Saved { device, next: self.next, nodes }
    }

    /// Takes them over. What is not there any more is found out when the guest asks for it.
    ///
    /// # Errors
    /// The guest cannot have known such.
    pub fn restore(&mut self, saved: Saved) -> Result<(), String> {
        let Saved { device, next, nodes } = saved;
        self.clear();
        if nodes.len() >= MOST || next <= ROOT {
            return Err(format!("{} nodes, the next {next}", nodes.len()));
        }
        let here = self.root_device();
        let mut parents = HashSet::new();
        for (number, mut identity, lookups, folder, name) in nodes {
            // The number of a device may be another one day.
            if identity.device == device {
                identity.device = here;
            }
            parents.insert(folder);
            let node = Node { identity, lookups, place: Some((folder, name)), path: None, is_folder: false };
            let is_one = (ROOT + 1..next).contains(&number) && lookups > 0;
            let is_name = node.place.as_ref().is_some_and(|(_, name)| is_name(name));
            if !is_one || !is_name || self.nodes.insert(number, node).is_some() {
                return Err(format!("node {number}, told {lookups} times"));
            }
            if self.numbers.insert(identity, number).is_some() {
                return Err(format!("node {number} is another, too"));
            }
        }
        // An empty one is known as such when it is found again.
        for parent in parents {
            self.nodes.entry(parent).and_modify(|node| node.is_folder = true);
        }
        self.next = next;
        Ok(())
    }

    fn root_device(&self) -> (u32, u32) {
        self.nodes.get(&ROOT).map(|root| root.identity.device).unwrap_or_default()
    }

    /// The file `path` is entry `name` of the folder `folder` no more. If it was found there, its node keeps a descriptor.
    pub fn lost(&mut self, folder: u64, name: &CStr, path: OwnedFd) {
        // Beyond that it is the guest's loss.
        let may_keep = self.may_keep();
        let Some((number, node)) = self.known(&path) else { return };
        let was_there = matches!(&node.place, Some((at, called)) if *at == folder && **called == *name);
        if !was_there || !may_keep {
            return;
        }
        node.place = None;
        let is_closed = node.path.is_none();
        self.nameless += 1;
        if is_closed {
            self.opened(number, Arc::new(path));
        }
    }

    /// The file `path` is now entry `name` of the folder `folder`.
    pub fn moved(&mut self, folder: u64, name: &CStr, path: &OwnedFd) {
        let Some((_, node)) = self.known(path) else { return };
        let had_none = node.place.replace((folder, name.to_owned())).is_none();
        self.nameless -= usize::from(had_none);
    }

    /// The folders among them.
    pub fn folders(&self) -> Vec<u64> {
        self.nodes.iter().filter(|(_, node)| node.is_folder).map(|(number, _)| *number).collect()
    }

    /// The names that lead to node `number`, with `/` between them: none to [`ROOT`]. None if there is no way, or one that is longer than
    /// `most` bytes.
    pub fn way(&self, number: u64, most: usize) -> Option<Vec<u8>> {
        let (mut at, mut names, mut len) = (number, Vec::new(), 0);
        while at != ROOT {
            let (folder, name) = self.nodes.get(&at)?.place.as_ref()?;
            len += name.count_bytes() + 1;
            if len > most {
                return None;
            }
            names.push(name.to_bytes());
            at = *folder;
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// Whether the guest knows the file that is `stat`.
    pub fn knows(&self, stat: &Statx) -> bool {
        self.numbers.contains_key(&Identity::from(stat))
    }

    /// The guest is told once more of the file that it knows as entry `name` of `folder`, where it is no more (there is the one that is
    /// `now`, or none): its number, and the file if that is still open. None if it knows none, or so many files that nobody looks.
    pub fn was(&mut self, folder: u64, name: &CStr, now: Option<&Statx>) -> Option<(u64, Arc<OwnedFd>)> {
        if self.nodes.len() > LOOKED_THROUGH_MOST {
            return None;
        }
        let now = now.map(Identity::from);
        let was = |node: &Node| {
            let is_at = node.place.as_ref().is_some_and(|(at, called)| *at == folder && **called == *name);
            is_at && Some(node.identity) != now && node.path.is_some()
        };
        let (number, node) = self.nodes.iter_mut().find(|(_, node)| was(node))?;
        node.lookups = node.lookups.saturating_add(1);
        Some((*number, node.path.clone()?))
    }

    /// A number that is no node's.
    pub fn nobody(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Whether another may have a descriptor for good.
    fn may_keep(&self) -> bool {
        self.nameless < self.most_open / 2
    }

    /// The node of the file `path`, if the guest knows it.
    fn known(&mut self, path: &OwnedFd) -> Option<(u64, &mut Node)> {
        let number = *self.numbers.get(&Identity::from(&stat(path).ok()?))?;
        self.nodes.get_mut(&number).filter(|_| number != ROOT).map(|node| (number, node))
    }

    /// Node `number` has this descriptor, and perhaps another has none any more.
    fn opened(&mut self, number: u64, path: Arc<OwnedFd>) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.path = Some(path);
        }
        self.open.push_back(number);
        for _ in 0..self.open.len() {
            if self.open.len() <= self.most_open {
                break;
            }
            let Some(first) = self.open.pop_front() else { break };
            match self.nodes.get_mut(&first) {
                Some(node) if node.place.is_some() => node.path = None,
                Some(_) => self.open.push_back(first),
                // Forgotten.
                None => {}
            }
        }
    }
}

/// Nodes that are looked through for one that was somewhere: half a millisecond.
const LOOKED_THROUGH_MOST: usize = 1 << 15;
/// Folders in each other between one that is open and one that is wanted: a path in one call has at most half of PATH_MAX.
const MOST_DEEP: usize = 2048;
