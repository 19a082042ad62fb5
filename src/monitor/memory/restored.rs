//! How saved memory reaches a machine that goes on from it: [`Way`].

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::lazy::Lazy;
use super::lost::Watch;
use super::saved::{Layer, SavedRam};
use super::{Error, GuestRam, Memory, Object, advise, within};
use crate::config::{self, Size, VmConfig};
use crate::threads::{Role, spawn};

/// Bytes that a thread copies at a time.
const BATCH: u64 = 1 << 20;
/// Threads that copy, at most.
const MOST_THREADS: usize = 8;

/// How saved memory reaches a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Way {
    /// Mapped, if it is not compressed; else lazily where this process may, and else copied.
    #[default]
    Auto,
    /// Its file is mapped privately: a page is read when it is touched, and shared with others as long as nobody writes to it.
    Map,
    /// All of it is read before the machine begins.
    Copy,
    /// A page is read, and expanded if it is compressed, when it is touched; each machine has its own.
    Lazy,
}

impl Way {
    /// The one that leads to the memory of the machine that `config` describes. Mapped from a file it could not be given to another
    /// process, which is to write to it; and a file's pages are not huge.
    pub fn of(self, config: &VmConfig) -> Self {
        match self {
            _ if config.is_shared() => Self::Copy,
            Self::Auto if config.mem.hugepages.is_some() => Self::Copy,
            way => way,
        }
    }
}

impl Memory {
    /// RAM as it is in `saved`, which reaches it by `way`. What is written stays in this process.
    ///
    /// # Errors
    /// It is not as long as `config` says; it cannot be mapped or read; this process may not have it that way, or not in such pages.
    pub fn restored(config: &config::Memory, saved: SavedRam, way: Way) -> Result<Self, Error> {
        check_size(config, &saved)?;
        match way {
            Way::Map | Way::Lazy if config.hugepages.is_some() => Err(Error::HugePages { size: config.size }),
            Way::Auto if config.hugepages.is_some() => Self::copied(config, &saved),
            Way::Auto if saved.is_plain() => Self::private_copy(config, saved),
            Way::Auto if config.prefault => Self::copied(config, &saved),
            Way::Auto => match Self::lazy(config, &saved) {
                Err(Error::Lazy(error)) => {
                    log::info!("all memory is read before the start, for want of userfaultfd: {error}");
                    Self::copied(config, &saved)
                }
                other => other,
            },
            Way::Map => Self::private_copy(config, saved),
            Way::Copy => Self::copied(config, &saved),
            Way::Lazy => Self::lazy(config, &saved),
        }
    }

    /// RAM as it is in `saved`, whose files are mapped: neither they nor another that maps them sees what is written. Whoever changes a file
    /// changes what has not been written to here.
    ///
    /// # Errors
    /// It cannot be mapped, or is not as long as `config` says.
    pub fn private_copy(config: &config::Memory, saved: SavedRam) -> Result<Self, Error> {
        let failed = |source| Error::Allocate { size: config.size, config: config.clone(), source };
        if !saved.is_plain() {
            return Err(Error::Packed);
        }
        check_size(config, &saved)?;
        let bottom = saved.bottom.as_plain().ok_or(Error::Packed)?;
        let mut memory = Self::mapped(config, &Object::Private(bottom.clone()))?;
        memory.watch = Some(Watch::begin(&memory, &saved));
        for (place, region) in memory.places() {
            for layer in &saved.layers {
                cover(layer, region, place.start).map_err(failed)?;
            }
            if !saved.layers.is_empty() {
                advise(config, region.as_ptr(), region.len() as usize);
            }
        }
        memory.layers = saved.layers.into();
        Ok(memory)
    }

    fn copied(config: &config::Memory, saved: &SavedRam) -> Result<Self, Error> {
        let memory = Self::new(config)?;
        memory.fill(saved).map_err(|error| Error::lost(saved, memory.size, error))?;
        Ok(memory)
    }

    fn lazy(config: &config::Memory, saved: &SavedRam) -> Result<Self, Error> {
        // What is there from the start would never be asked for.
        let config = config::Memory { prefault: false, ..config.clone() };
        let mut memory = Self::mapped(&config, &Object::None)?;
        memory.lazy = Some(Arc::new(Lazy::begin(&memory.ram, saved).map_err(Error::Lazy)?));
        Ok(memory)
    }

    /// Waits until all of it is in this process: from then on it needs no file, and a process that is forked has it, too.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn complete(&self) -> io::Result<()> {
        self.lazy.as_ref().map_or(Ok(()), |lazy| lazy.complete())
    }

    /// Copies what `saved` has, on several threads. Nobody uses the memory yet.
    fn fill(&self, saved: &SavedRam) -> io::Result<()> {
        let batches = saved.data()?.into_iter().flat_map(|range| {
            // Whole pieces, so that none of a compressed file is expanded twice.
            let first = range.start / BATCH * BATCH;
            (first..range.end)
                .step_by(BATCH as usize)
                .map(move |at| at.max(range.start)..(at + BATCH).min(range.end))
        });
        let batches: Arc<[Range<u64>]> = batches.collect();
        let next = Arc::<AtomicUsize>::default();
        let threads = available_parallelism().map_or(1, usize::from).min(MOST_THREADS).min(batches.len());
        let work = || {
            let (ram, saved, batches, next) =
                (self.ram.clone(), saved.clone(), batches.clone(), next.clone());
            move || {
                while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                    copy(&ram, &saved, batch)?;
                }
                Ok::<_, io::Error>(())
            }
        };
        let others: Vec<_> = (1..threads).map_while(|_| spawn(Role::Fetch, work()).ok()).collect();
        let done = work()();
        // A panic over there has ended the process.
        others.into_iter().fold(done, |done, thread| done.and(thread.join().unwrap_or(Ok(()))))
    }
}

/// Whether `saved` is as long as `config` says.
fn check_size(config: &config::Memory, saved: &SavedRam) -> Result<(), Error> {
    for file in saved.files() {
        let len = file.size().map_err(|error| Error::lost(saved, config.size.bytes(), error))?;
        if len != config.size.bytes() {
            return Err(Error::OtherSize { saved: Size::from_bytes(len), size: config.size });
        }
    }
    Ok(())
}

/// Copies `batch` of `saved` to its place in `ram`, which nobody else uses yet.
fn copy(ram: &GuestRam, saved: &SavedRam, batch: &Range<u64>) -> io::Result<()> {
    let mut end = 0;
    for region in ram.iter() {
        let place = end..end + region.len();
        end = place.end;
        if let Some(part) = within(batch, &place) {
            // SAFETY: `part` lies in the region's mapping; other threads of `Memory::fill` write to other parts, and nobody else
            // has the memory before that is done.
            let bytes = unsafe {
                let start = region.as_ptr().add(part.start as usize);
                std::slice::from_raw_parts_mut(start, (part.end - part.start) as usize)
            };
            saved.read(place.start + part.start, bytes)?;
        }
    }
    Ok(())
}

/// Maps what `layer` has of `region`, which begins at `offset` of the file and is a private mapping, over what is there. Nobody uses that
/// yet.
fn cover(layer: &Layer, region: &GuestRegionMmap, offset: u64) -> io::Result<()> {
    let place = offset..offset + region.len();
    for part in layer.runs.iter().filter_map(|run| within(run, &place)) {
        let at = libc::off_t::try_from(offset + part.start).map_err(io::Error::other)?;
        let len = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED);
        // SAFETY: `part` lies in the region, whose mapping is unmapped as a whole with it and has no users yet.
        let mapped = unsafe {
            let host = region.as_ptr().add(part.start as usize);
            libc::mmap(host.cast(), len, prot, flags | libc::MAP_NORESERVE, layer.file.file().as_raw_fd(), at)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
