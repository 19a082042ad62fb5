//! Who is on a segment, by name and address: beside a port's socket lies a link whose text is `ADDRESS/NAME`, made under the
//! folder's lock and gone with the socket. Who asks reads the folder: nobody has to be told.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock, symlink};

use super::segment::{self, Id};
use crate::net::mac;

/// Addresses of machines end in 1 to this; the server of DHCP has the next one.
const LAST: u8 = 253;

/// The entry of port `id`.
pub fn path(folder: &Path, id: Id) -> PathBuf {
    folder.join(format!("{id:016x}.name"))
}

/// Address `host` on the segment called `segment`: the segments have networks of their own, 10.128.0.0/24 to 10.255.255.0/24.
fn address(segment: &str, host: u8) -> Ipv4Addr {
    let [a, b, ..] = mac::hash(segment.as_bytes()).to_le_bytes();
    Ipv4Addr::new(10, 128 | a, b, host)
}

/// Who gives the addresses of the segment called `segment`.
pub fn server(segment: &str) -> Ipv4Addr {
    address(segment, LAST + 1)
}

/// An address for the machine called `name` at port `id` of the segment called `segment` in `folder`, which is on record from now
/// on. It follows from the device's `mac`, unless another machine has it.
///
/// # Errors
/// The folder cannot be locked or written to, or has no free address.
pub fn enter(folder: &Path, id: Id, segment: &str, mac: [u8; 6], name: Option<&str>) -> io::Result<Ipv4Addr> {
    // Held until the entry is there: of two who enter at once, the second sees what the first has taken.
    let lock = File::open(folder)?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let taken: Vec<_> = entries(folder).map(|entry| entry.address).collect();
    let first = mac::hash(&mac) % u64::from(LAST);
    let hosts = (0..u64::from(LAST)).map(|n| 1 + ((first + n) % u64::from(LAST)) as u8);
    let free = hosts.map(|host| address(segment, host)).find(|address| !taken.contains(address));
    let address = free.ok_or_else(|| io::Error::other(format!("all {LAST} addresses are taken")))?;
    symlink(format!("{address}/{}", name.unwrap_or_default()), path(folder, id))?;
    Ok(address)
}

/// One machine's.
struct Entry {
    id: Id,
    address: Ipv4Addr,
    name: String,
}

fn entries(folder: &Path) -> impl Iterator<Item = Entry> {
    let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.filter_map(|path| {
        let id = path.file_name()?.to_str()?.strip_suffix(".name")?;
        let text = fs::read_link(&path).ok()?;
        let (address, name) = text.to_str()?.split_once('/')?;
        let id = Id::from_str_radix(id, 16).ok()?;
        Some(Entry { id, address: address.parse().ok()?, name: name.to_owned() })
    })
}

/// The machines on the segments that one machine is on. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Neighbours(Arc<Mutex<Vec<PathBuf>>>);

impl Neighbours {
    /// The machine is on the segment in `folder`.
    pub fn add(&self, folder: PathBuf) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(folder);
    }

    /// The address of the one called `name`, in letters of either case.
    pub fn find(&self, name: &str) -> Option<Ipv4Addr> {
        let folders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        folders.iter().find_map(|folder| {
            let mut named = entries(folder).filter(|entry| entry.name.eq_ignore_ascii_case(name));
            // What a machine that was killed has left is no answer.
            named.find(|entry| segment::is_there(folder, entry.id)).map(|entry| entry.address)
        })
    }
}
