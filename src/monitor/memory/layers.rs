//! [`SavedRam`]: RAM in files, one over the other. What a later one has takes the place of what is below it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

/// RAM, its regions end to end, as files have it. They are as long as it is, and do not change.
#[derive(Debug, Clone)]
pub struct SavedRam {
    /// What is not in a layer.
    pub bottom: Arc<File>,
    /// From the lowest up.
    pub layers: Vec<Layer>,
}

/// Pages that lie over others.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Each page in its place.
    pub file: Arc<File>,
    /// Which it has: ascending, of whole pages.
    pub runs: Vec<Range<u64>>,
}

impl From<File> for SavedRam {
    fn from(bottom: File) -> Self {
        Self { bottom: Arc::new(bottom), layers: Vec::new() }
    }
}

/// The part of `run`, a stretch of the file, that is in the region with `place` there: from the region's start.
pub fn within(run: &Range<u64>, place: &Range<u64>) -> Option<Range<u64>> {
    let (start, end) = (run.start.max(place.start), run.end.min(place.end));
    (start < end).then(|| start - place.start..end - place.start)
}

impl Layer {
    /// Maps what it has of `region`, which begins at `offset` of the file and is a private mapping, over what is there. Nobody uses that yet.
    pub(super) fn cover(&self, region: &GuestRegionMmap, offset: u64) -> io::Result<()> {
        let place = offset..offset + region.len();
        for part in self.runs.iter().filter_map(|run| within(run, &place)) {
            let at = libc::off_t::try_from(offset + part.start).map_err(io::Error::other)?;
            let len = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED);
            // SAFETY: `part` lies in the region, whose mapping is unmapped as a whole with it and has no users yet.
            let mapped = unsafe {
                let host = region.as_ptr().add(part.start as usize);
                libc::mmap(host.cast(), len, prot, flags | libc::MAP_NORESERVE, self.file.as_raw_fd(), at)
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}
