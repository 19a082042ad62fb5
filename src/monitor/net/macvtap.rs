//! A macvtap: an interface on top of one of the host's, with an address of its own, whose other end is ours. Frames go past the
//! host's network: it needs no bridge, and the host itself is not reached.
//!
//! Its device file, `/dev/tap` and the interface's number, is a tap in all but how it is opened; each time is a queue.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::iter;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::Error;
use super::tap::Tap;
use crate::config::Mac;

/// A macvtap that is open.
pub struct Macvtap {
    /// One for each pair of queues.
    pub queues: Vec<Tap>,
    /// The interface's address: it lets no frame pass to another.
    pub mac: Mac,
}

/// Opens `queues` queues of the macvtap called `name`, which is there.
pub fn open(name: &str, queues: u16) -> Result<Macvtap, Error> {
    let interface = Path::new("/sys/class/net").join(name);
    if fs::symlink_metadata(&interface).is_err() {
        return Err(Error::NoMacvtap { name: name.to_owned() });
    }
    let failed = |what| move |source| Error::Tap { name: name.to_owned(), what, source };
    let read = |file: &str| Ok(fs::read_to_string(interface.join(file))?.trim().to_owned());
    let number: String = read("ifindex").map_err(failed("find"))?;
    let tap = format!("tap{number}");
    let device = read(&format!("{tap}/dev")).or_else(|_| read(&format!("macvtap/{tap}/dev")));
    let device = device.map_err(|_: io::Error| Error::NotAMacvtap { name: name.to_owned() })?;
    let mac = read("address").and_then(|text| text.parse().map_err(io::Error::other));
    let mac = mac.map_err(failed("read the address of"))?;
    let path = PathBuf::from("/dev").join(tap);
    let open = || {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        file.map_err(|source| {
            let (name, path, device) = (name.to_owned(), path.clone(), device.replace(':', " "));
            Error::Macvtap { name, path, device, source }
        })
    };
    let first = open()?;
    // The kernel takes whoever opens it for a queue more, and shares the frames out among all.
    if flock(&first, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
        return Err(Error::Busy { kind: "macvtap", name: name.to_owned() });
    }
    let files = iter::once(Ok(first)).chain((1..queues).map(|_| open()));
    // What it is made with, and keeps unless it is told otherwise.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let queue = |file: Result<File, Error>| Tap::passed(file?.into(), flags).map_err(failed("set up"));
    Ok(Macvtap { queues: files.map(queue).collect::<Result<_, _>>()?, mac })
}
