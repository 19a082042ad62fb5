//! Tells this guest's programs what others change in the host's folders: see [`Change`]. One thread for all of them, which sleeps while none is
//! mounted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;

use interface::share;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::change::Change;

/// Between two looks: half of what a guest believes for a second anyway.
const PAUSE: Duration = Duration::from_millis(500);
/// Changes of one folder before the next one's turn.
const IN_A_ROW: usize = 256;
/// What is mounted: readable, with POLLPRI once there is something else (proc(5)).
const MOUNTS: &str = "/proc/self/mountinfo";
/// Holds an answer.
const STACK: usize = 128 << 10;

/// Begins. Without a thread for it nobody is told.
pub fn start() {
    let _ = thread::Builder::new().stack_size(STACK).spawn(run);
}

fn run() -> io::Result<()> {
    let changed = File::open(MOUNTS)?;
    // None: nobody tells of its changes.
    let mut shares: BTreeMap<Vec<u8>, Option<OwnedFd>> = BTreeMap::new();
    loop {
        let tags = tags(&fs::read(MOUNTS)?);
        shares.retain(|tag, _| tags.contains(tag));
        for tag in tags {
            shares.entry(tag).or_insert_with_key(|tag| share::aside(tag).ok());
        }
        loop {
            for share in shares.values_mut() {
                share.take_if(|folder| repeat(folder).is_err());
            }
            let is_told = shares.values().any(Option::is_some);
            let pause = Timespec::try_from(PAUSE).map_err(io::Error::other)?;
            let mut wanted = [PollFd::new(&changed, PollFlags::PRI)];
            poll(&mut wanted, is_told.then_some(&pause))?;
            if !wanted[0].revents().is_empty() {
                break;
            }
        }
    }
}

/// Does once more what others have done in `folder`.
fn repeat(folder: &OwnedFd) -> io::Result<()> {
    for _ in 0..IN_A_ROW {
        match Change::next(folder.as_fd())? {
            Some(change) => change.repeat(folder.as_fd()),
            None => break,
        }
    }
    Ok(())
}

/// Those of the folders that are mounted.
fn tags(mounts: &[u8]) -> BTreeSet<Vec<u8>> {
    let tag = |line: &[u8]| {
        // Behind the optional fields: what kind it is, and of what.
        let mut words = line.split(|byte| *byte == b' ').skip_while(|word| *word != b"-").skip(1);
        (words.next()? == b"virtiofs").then(|| words.next().map(unescaped))?
    };
    mounts.split(|byte| *byte == b'\n').filter_map(tag).collect()
}

/// proc(5) writes some bytes as three octal digits.
fn unescaped(word: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((byte, others)) = rest.split_first() {
        let digits = others.get(..3).filter(|_| *byte == b'\\');
        let number = digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(number.unwrap_or(*byte));
        rest = others.get(if number.is_some() { 3 } else { 0 }..).unwrap_or_default();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_told_from_other_mounts() {
        let mounts = b"23 29 0:21 / /proc rw,nosuid - proc proc rw\n\
            40 29 0:35 / /src rw,nosuid,nodev shared:9 - virtiofs share0 rw\n\
            41 29 0:36 /its-name /etc/it rw - virtiofs a\\040tag rw\n\
            42 29 0:35 / /again ro - virtiofs share0 rw\n\
            43 29 0:37 / /odd rw - virtiofs\n";
        let expected = [&b"share0"[..], b"a tag"].map(<[u8]>::to_vec);
        assert_eq!(tags(mounts), BTreeSet::from(expected));
        assert_eq!(unescaped(b"a\\134\\1x\\"), b"a\\\\1x\\");
    }
}
