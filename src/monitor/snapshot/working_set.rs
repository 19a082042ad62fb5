//! The file of a [`WorkingSet`] in a snapshot's folder: the first machine that goes on from it writes down what it touches, and those
//! that follow read it.
//!
//! It is advice, and as untrusted as the rest: one that is not whole, another snapshot's or beyond the bounds is none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::Header;
use crate::machine::Handle;
use crate::memory::Pagemap;
use crate::memory::working_set::{Run, WorkingSet};
use crate::output;

/// Its name in the folder.
const NAME: &str = "working-set";
/// Its first bytes; the last is the version.
const MAGIC: [u8; 8] = *b"VMMPAGE\x01";
/// More than the longest, in bytes.
const MAX: u64 = 256 << 10;
const PAGE: u64 = 4096;

/// Of a snapshot: the checksums of its configuration, state and memory, and bytes of memory.
type Identity = (u32, u32, u32, u64);

fn identity(header: &Header) -> Identity {
    (header.config, header.state, header.memory, header.size)
}

/// Whether it is what this makes in a folder.
pub fn is_named(name: &str) -> bool {
    name == NAME
}

/// What follows its CRC-32.
#[derive(Serialize, Deserialize)]
struct Record {
    /// The snapshot's checksums and size.
    of: Identity,
    /// Of each run: pages between it and the one before, pages of it, and whether they are written to.
    runs: Vec<(u32, u32, bool)>,
}

/// That of the snapshot in `folder` with this header.
pub fn read(folder: &Path, header: &Header) -> Option<WorkingSet> {
    // Whatever it is, it is not waited for.
    let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(folder.join(NAME)).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX + 1).read_to_end(&mut bytes).ok()?;
    decode(&bytes, &identity(header))
}

fn encode(of: Identity, set: &WorkingSet) -> Option<Vec<u8>> {
    let mut end = 0;
    let runs = set.runs().iter().map(|Run { pages, written }| {
        let (gap, count) = (pages.start - end, pages.end - pages.start);
        end = pages.end;
        Some((u32::try_from(gap).ok()?, u32::try_from(count).ok()?, *written))
    });
    let record = Record { of, runs: runs.collect::<Option<_>>()? };
    let record = postcard::to_stdvec(&record).ok()?;
    Some([&MAGIC[..], &crc32fast::hash(&record).to_le_bytes(), &record].concat())
}

fn decode(bytes: &[u8], snapshot: &Identity) -> Option<WorkingSet> {
    let (checksum, record) = bytes.strip_prefix(&MAGIC)?.split_first_chunk()?;
    if bytes.len() as u64 > MAX || u32::from_le_bytes(*checksum) != crc32fast::hash(record) {
        return None;
    }
    let Record { of, runs } = postcard::from_bytes(record).ok()?;
    let mut end = 0;
    let runs = runs.into_iter().map(|(gap, count, written)| {
        let start = end + u64::from(gap);
        end = start + u64::from(count);
        Run { pages: start..end, written }
    });
    let set = WorkingSet::of(runs.collect())?;
    (of == *snapshot && end <= of.3 / PAGE).then_some(set)
}

/// A file of a folder that nothing is written down in yet. Who reads it meanwhile finds nothing.
#[derive(Debug)]
pub struct Unrecorded {
    file: File,
    snapshot: Identity,
    pagemap: Pagemap,
}

impl Unrecorded {
    /// That of `folder`, unless it is another user's, nobody may write there, or another machine is about to write it.
    pub(super) fn of(folder: &Path, header: &Header) -> Option<Self> {
        let is_ours = fs::metadata(folder).is_ok_and(|folder| folder.uid() == geteuid().as_raw());
        let pagemap = Pagemap::open().ok()?;
        let file = is_ours.then(|| output::create(&folder.join(NAME)).ok()).flatten()?;
        Some(Self { file, snapshot: identity(header), pagemap })
    }

    /// Writes down what `machine`, which goes on from the folder, has touched until now.
    ///
    /// # Errors
    /// It cannot be seen, or not be written.
    pub fn record(mut self, machine: &Handle) -> io::Result<WorkingSet> {
        let set = machine.memory().working_set(&self.pagemap)?;
        let bytes = encode(self.snapshot, &set).ok_or(io::ErrorKind::InvalidData)?;
        // Half of it is none: there is a checksum.
        self.file.write_all(&bytes).map(|()| set)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::working_set::{MOST_READ, MOST_WRITTEN};

    const SNAPSHOT: Identity = (1, 2, 3, 64 << 20);

    /// With a checksum that is right, whatever is in it.
    fn sealed(record: &[u8]) -> Vec<u8> {
        [&MAGIC[..], &crc32fast::hash(record).to_le_bytes(), record].concat()
    }

    fn set(runs: &[(u64, u64, bool)]) -> WorkingSet {
        let runs = runs.iter().map(|(start, end, written)| Run { pages: *start..*end, written: *written });
        WorkingSet::of(runs.collect()).unwrap()
    }

    #[test]
    fn what_is_written_is_read_again_for_the_same_snapshot_alone() {
        let set = set(&[(0, 3, true), (3, 40, false), (16_383, 16_384, true)]);
        let bytes = encode(SNAPSHOT, &set).unwrap();
        assert_eq!(decode(&bytes, &SNAPSHOT), Some(set));
        assert_eq!(decode(&bytes, &(1, 2, 4, 64 << 20)), None);
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len], &SNAPSHOT), None, "{len}");
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert_eq!(decode(&bytes, &SNAPSHOT), None, "{at}");
        }
    }

    #[test]
    fn pages_that_the_memory_has_not_got_are_refused() {
        let record = |runs: &[(u32, u32, bool)]| {
            sealed(&postcard::to_stdvec(&Record { of: SNAPSHOT, runs: runs.to_vec() }).unwrap())
        };
        assert!(decode(&record(&[(16_383, 1, true)]), &SNAPSHOT).is_some());
        for runs in [
            &[(16_384, 1, true)][..],
            &[(16_383, 2, false)],
            &[(0, 0, true)],
            &[(u32::MAX, u32::MAX, false); 2],
        ] {
            assert_eq!(decode(&record(runs), &SNAPSHOT), None, "{runs:?}");
        }
    }

    proptest! {
        #[test]
        fn a_record_of_anything_is_none_or_within_the_bounds(
            of in any::<bool>(),
            garbage in prop::collection::vec(any::<u8>(), 0..200),
            runs in prop::collection::vec((0u32..300, 0u32..300, any::<bool>()), 0..200),
        ) {
            let record = postcard::to_stdvec(&Record { of: SNAPSHOT, runs }).unwrap();
            let bytes = if of { record } else { [&record[..8], &garbage].concat() };
            if let Some(set) = decode(&sealed(&bytes), &SNAPSHOT) {
                prop_assert!(set.count(true) <= MOST_WRITTEN && set.count(false) <= MOST_READ);
                prop_assert!(set.runs().is_sorted_by(|a, b| a.pages.end <= b.pages.start));
                prop_assert!(set.runs().iter().all(|run| run.pages.start < run.pages.end && run.pages.end <= SNAPSHOT.3 / PAGE));
            }
            let _ = decode(&bytes, &SNAPSHOT);
        }
    }
}
