//! [`SavedRam`]: RAM in files, one over the other. What a later one has takes the place of what is below it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::packed::Packed;
use super::touched::union;

/// RAM, its regions end to end, as files have it. They are as long as it is, and do not change.
#[derive(Debug, Clone)]
pub struct SavedRam {
    /// What is not in a layer.
    pub bottom: RamFile,
    /// From the lowest up.
    pub layers: Vec<Layer>,
}

/// Pages that lie over others.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Each page in its place.
    pub file: RamFile,
    /// Which it has: ascending, of whole pages.
    pub runs: Vec<Range<u64>>,
}

/// A file of RAM. What it leaves out is zeroes.
#[derive(Debug, Clone)]
pub struct RamFile {
    /// What to call it.
    path: Arc<Path>,
    contents: Contents,
}

#[derive(Debug, Clone)]
enum Contents {
    /// Each byte in its place; holes are left out.
    Plain(Arc<File>),
    Packed(Arc<Packed>),
}

impl From<File> for SavedRam {
    fn from(bottom: File) -> Self {
        Self { bottom: RamFile::plain(bottom, Path::new("memory")), layers: Vec::new() }
    }
}

/// The part of `run`, a stretch of the file, that is in the region with `place` there: from the region's start.
pub fn within(run: &Range<u64>, place: &Range<u64>) -> Option<Range<u64>> {
    let (start, end) = (run.start.max(place.start), run.end.min(place.end));
    (start < end).then(|| start - place.start..end - place.start)
}

impl SavedRam {
    /// All of its files, the lowest first.
    pub fn files(&self) -> impl Iterator<Item = &RamFile> {
        [&self.bottom].into_iter().chain(self.layers.iter().map(|layer| &layer.file))
    }

    /// Whether it can be mapped as it is.
    pub fn is_plain(&self) -> bool {
        self.files().all(|file| file.as_plain().is_some())
    }

    /// Reads the `bytes` from `at` on.
    ///
    /// # Errors
    /// A file's.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let all = at..at + bytes.len() as u64;
        let parts: Vec<_> = self.layers.iter().map(|layer| (layer, layer.parts(&all))).collect();
        // What lies under a layer that has all of it is not read.
        let highest = parts.iter().rposition(|(_, parts)| *parts == [0..all.end - all.start]);
        if highest.is_none() {
            self.bottom.read(at, bytes)?;
        }
        for (layer, parts) in &parts[highest.unwrap_or(0)..] {
            for part in parts {
                let here = &mut bytes[part.start as usize..part.end as usize];
                layer.file.read(at + part.start, here)?;
            }
        }
        Ok(())
    }

    /// The stretches that may hold something else than zeroes.
    ///
    /// # Errors
    /// A file cannot be asked.
    pub fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let layers = self.layers.iter().flat_map(|layer| layer.runs.iter().cloned());
        Ok(union(self.bottom.data()?.into_iter().chain(layers).collect()))
    }
}

impl Layer {
    /// What it has of `all`: from its start.
    fn parts(&self, all: &Range<u64>) -> Vec<Range<u64>> {
        // Those that end before it are skipped in a few steps.
        let first = self.runs.partition_point(|run| run.end <= all.start);
        let here = self.runs[first..].iter().take_while(|run| run.start < all.end);
        here.filter_map(|run| within(run, all)).collect()
    }
}

impl RamFile {
    /// One that has each byte in its place, at `path`.
    pub fn plain(file: File, path: &Path) -> Self {
        Self { path: path.into(), contents: Contents::Plain(Arc::new(file)) }
    }

    /// One that is compressed, at `path`.
    pub fn packed(packed: Packed, path: &Path) -> Self {
        Self { path: path.into(), contents: Contents::Packed(Arc::new(packed)) }
    }

    /// What to call it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        match &self.contents {
            Contents::Plain(file) => file,
            Contents::Packed(packed) => packed.file(),
        }
    }

    /// The file, if it has each byte in its place.
    pub fn as_plain(&self) -> Option<&Arc<File>> {
        match &self.contents {
            Contents::Plain(file) => Some(file),
            Contents::Packed(_) => None,
        }
    }

    /// Bytes of RAM.
    ///
    /// # Errors
    /// The file cannot be asked.
    pub fn size(&self) -> io::Result<u64> {
        match &self.contents {
            Contents::Plain(file) => Ok(file.metadata()?.len()),
            Contents::Packed(packed) => Ok(packed.size()),
        }
    }

    /// Reads the `bytes` from `at` on.
    ///
    /// # Errors
    /// The file's, or it is damaged.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        match &self.contents {
            Contents::Plain(file) => file.read_exact_at(bytes, at),
            Contents::Packed(packed) => packed.read(at, bytes),
        }
    }

    /// The stretches that it does not leave out.
    ///
    /// # Errors
    /// The file cannot be asked.
    pub fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let file = match &self.contents {
            Contents::Packed(packed) => return Ok(packed.data()),
            Contents::Plain(file) => file,
        };
        let (mut all, mut at) = (Vec::new(), 0);
        loop {
            let start = match seek(&**file, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => return Ok(all),
                start => start?,
            };
            at = seek(&**file, SeekFrom::Hole(start))?;
            all.push(start..at);
        }
    }
}
