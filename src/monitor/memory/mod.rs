//! Guest RAM: one backing object, mapped once, in the regions that [`layout`] gives.
//!
//! Built first of all; the hypervisor maps it into the guest, the boot loaders fill it, and devices reach it
//! through their queues. Knows nothing of KVM.

mod buffers;
pub mod dirty;
pub mod frozen;
pub mod layout;
mod lazy;
pub mod lost;
pub mod packed;
mod restored;
mod saved;
mod slices;
pub mod testdev;
mod touched;
pub mod working_set;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::config::{self, Size};

pub use buffers::{Buffers, NotRam};
pub use restored::Way;
pub use saved::{Layer, RamFile, SavedRam, within};
pub use slices::Slices;
pub use touched::{Pagemap, union};

/// Guest RAM as devices and loaders see it. Every access is bounds-checked and goes through volatile or
/// atomic operations, because the guest's vCPUs write to it at the same time.
pub type GuestRam = GuestMemoryMmap<()>;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel gave no memory object of this size.
    #[error("cannot allocate {size} of guest memory ({})", config.backing_name())]
    Allocate {
        /// How much.
        size: Size,
        /// What was asked for.
        config: config::Memory,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A ROM that does not fit below 4 GiB, or that no reset vector is in.
    #[error("a ROM has 16 to {} bytes, and this one {size}", layout::ROM_MAX)]
    Rom {
        /// Bytes of the ROM.
        size: usize,
    },
    /// What it is to begin with is not as long.
    #[error("the saved memory has {saved}, and the machine {size}")]
    OtherSize {
        /// Of the file.
        saved: Size,
        /// What was asked for.
        size: Size,
    },
    /// A file that has it is not there as it was.
    #[error("the guest's memory is lost: {}", path.display())]
    Lost {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// It is compressed.
    #[error("compressed memory cannot be mapped")]
    Packed,
    /// Its pages are huge: no file is mapped onto them, and they do not come when they are touched.
    #[error("huge pages can only be filled by a copy of saved memory, before the machine begins")]
    HugePages {
        /// Of all of it.
        size: Size,
    },
    /// Its pages cannot come when they are touched.
    #[error("this process may not serve the guest's memory page by page (userfaultfd)")]
    Lazy(#[source] io::Error),
    /// The memory object could not be mapped.
    #[error("cannot map {size} of guest memory ({}): {reason}", config.backing_name())]
    Map {
        /// Of the region.
        size: Size,
        /// What was asked for.
        config: config::Memory,
        /// What went wrong.
        reason: String,
    },
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        let config = match self {
            Self::Allocate { config, .. } | Self::Map { config, .. } => config,
            Self::Rom { .. } => return None,
            Self::Packed => return Some("drop `memory=map`: it is then expanded".to_owned()),
            Self::HugePages { size } => {
                return Some(format!(
                    "copy it, `memory=copy`, or restore it without huge pages, `mem={size}`"
                ));
            }
            Self::Lazy(_) => {
                return Some(
                    "allow it, sudo sysctl -w vm.unprivileged_userfaultfd=1, or read all of it first, `memory=copy`"
                        .to_owned(),
                );
            }
            Self::Lost { source, .. } => {
                let is_disk = source.raw_os_error() == Some(libc::EIO);
                let why = match is_disk {
                    true => "the host cannot read its disk (dmesg has more)",
                    false => "leave a snapshot's files alone while machines run from them",
                };
                return Some(format!("{why}; see what is left: vmm snapshot verify FOLDER"));
            }
            Self::OtherSize { saved, .. } => return Some(format!("restore it with as much: `mem={saved}`")),
        };
        let (name, bytes) = match config.hugepages {
            None => {
                return Some(
                    "ask for less, `mem=512M`, or free memory on the host; free -h shows how much there is"
                        .to_owned(),
                );
            }
            Some(config::HugePages::TwoMiB) => ("2048kB", 2u64 << 20),
            Some(config::HugePages::OneGiB) => ("1048576kB", 1 << 30),
        };
        let pages = config.size.bytes().div_ceil(bytes);
        let pool = format!("/sys/kernel/mm/hugepages/hugepages-{name}");
        let all = pages.saturating_add(huge_pages_in_use(&pool));
        Some(format!("{pages} huge pages must be free: echo {all} | sudo tee {pool}/nr_hugepages"))
    }
}

/// Huge pages of `pool`, a folder of the kernel's, that somebody has or was promised.
fn huge_pages_in_use(pool: &str) -> u64 {
    let count = |file: &str| -> u64 {
        let text = std::fs::read_to_string(format!("{pool}/{file}")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    (count("nr_hugepages") + count("resv_hugepages")).saturating_sub(count("free_hugepages"))
}

/// A virtual machine's RAM, and its ROM if it has one.
#[derive(Debug, Clone)]
pub struct Memory {
    ram: Arc<GuestRam>,
    size: u64,
    /// What lies over the file that it was made of.
    layers: Arc<[Layer]>,
    /// Where it is mapped from files.
    watch: Option<Arc<lost::Watch>>,
    /// Where its pages come when they are touched.
    lazy: Option<Arc<lazy::Lazy>>,
    rom: Option<Arc<GuestRegionMmap>>,
    /// The page of the generation ID beside a ROM.
    generation: Option<Arc<GuestRegionMmap>>,
}

impl Memory {
    /// Reserves the RAM that `config` asks for. Pages come when they are first touched, unless `prefault`.
    ///
    /// # Errors
    /// [`Error`] when the host has not got it (huge pages that are not reserved, most of all).
    pub fn new(config: &config::Memory) -> Result<Self, Error> {
        let file = backing_file(config).map_err(|source| Error::Allocate {
            size: config.size,
            config: config.clone(),
            source,
        })?;
        Self::mapped(config, &file.map_or(Object::None, Object::Shared))
    }

    /// Its regions, each with where it is if they lie end to end.
    pub fn places(&self) -> impl Iterator<Item = (Range<u64>, &GuestRegionMmap)> {
        let mut end = 0;
        self.ram.iter().map(move |region| {
            let start = end;
            end += region.len();
            (start..end, region)
        })
    }

    fn mapped(config: &config::Memory, object: &Object) -> Result<Self, Error> {
        let size = config.size.bytes();
        let mut regions = Vec::new();
        let mut offset = 0;
        for range in layout::ram(size) {
            let len = range.end - range.start;
            regions.push(map(config, object, offset, range.start, len)?);
            offset += len;
        }
        let ram = GuestMemoryMmap::from_regions(regions).map_err(|e| Error::Map {
            size: config.size,
            config: config.clone(),
            reason: e.to_string(),
        })?;
        Ok(Self {
            ram: Arc::new(ram),
            size,
            layers: Arc::default(),
            watch: None,
            lazy: None,
            rom: None,
            generation: None,
        })
    }

    /// Puts a ROM below 4 GiB, so that its last byte is the last one there: the reset vector is 16 bytes before its end. Whole
    /// pages; what is missing at their start reads as ones, as an empty ROM does.
    ///
    /// # Errors
    /// Its size is impossible, or the host is out of memory.
    pub fn set_rom(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let size = bytes.len().next_multiple_of(0x1000) as u64;
        if bytes.len() < 16 || size > layout::ROM_MAX {
            return Err(Error::Rom { size: bytes.len() });
        }
        let anonymous = config::Memory { backing: Some(config::Backing::Anonymous), ..Default::default() };
        let base = layout::ROM_END - size;
        let region = map(&anonymous, &Object::None, 0, base, size)?;
        let padded = [vec![0xff; size as usize - bytes.len()], bytes.to_vec()].concat();
        let failed =
            |reason: String| Error::Map { size: Size::from_bytes(size), config: anonymous.clone(), reason };
        region.write_slice(&padded, MemoryRegionAddress(0)).map_err(|e| failed(e.to_string()))?;
        let page = map(&anonymous, &Object::None, 0, layout::GENERATION_BY_FIRMWARE, 0x1000)?;
        (self.rom, self.generation) = (Some(Arc::new(region)), Some(Arc::new(page)));
        Ok(())
    }

    /// The ROM's guest address, host address and size in bytes: what the hypervisor maps read-only.
    pub fn rom_slot(&self) -> Option<(u64, *mut u8, u64)> {
        self.rom.as_ref().map(|region| (region.start_addr().0, region.as_ptr(), region.len()))
    }

    /// What is read-only, in the same way: the ROM, and the page of the generation ID.
    pub fn read_only(&self) -> impl Iterator<Item = (u64, *mut u8, u64)> {
        let regions = [&self.rom, &self.generation].into_iter().flatten();
        regions.map(|region| (region.start_addr().0, region.as_ptr(), region.len()))
    }

    /// What the ROM holds, if there is one.
    pub fn rom(&self) -> Option<Vec<u8>> {
        let region = self.rom.as_ref()?;
        let mut bytes = vec![0; region.len() as usize];
        // All of it is there.
        region.read_slice(&mut bytes, MemoryRegionAddress(0)).ok()?;
        Some(bytes)
    }

    /// RAM and ROM, for who wants to see what the guest's processors see: code, above all. Not for devices, which could write
    /// to the ROM by it.
    pub fn all(&self) -> Arc<GuestRam> {
        [&self.rom, &self.generation]
            .into_iter()
            .flatten()
            .fold(self.ram.clone(), |all, region| all.insert_region(region.clone()).map_or(all, Arc::new))
    }

    /// The RAM itself.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Whether no other process sees what is written to it.
    pub fn is_private(&self) -> bool {
        self.ram.iter().all(|region| shared_object(region).is_none())
    }

    /// Whether a process that is forked keeps it as it is now, whatever is written to it here. Of huge pages the host may have none
    /// left to copy one to: the kernel then takes it from the child.
    pub fn stays_in_a_child(&self) -> bool {
        self.is_private() && self.ram.iter().all(|region| region.flags() & libc::MAP_HUGETLB == 0)
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// The memory object behind the RAM; none for anonymous memory.
fn backing_file(config: &config::Memory) -> io::Result<Option<Arc<File>>> {
    if config.backing() == config::Backing::Anonymous {
        return Ok(None);
    }
    let huge = match config.hugepages {
        None => MemfdFlags::empty(),
        Some(config::HugePages::TwoMiB) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(config::HugePages::OneGiB) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge)?;
    ftruncate(&fd, config.size.bytes())?;
    // Who shares it could otherwise cut it short, which ends this process at its next look (SIGBUS).
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(Some(Arc::new(File::from(fd))))
}

/// What a mapping is of.
enum Object {
    None,
    Shared(Arc<File>),
    Private(Arc<File>),
}

fn map(
    config: &config::Memory,
    object: &Object,
    offset: u64,
    base: u64,
    size: u64,
) -> Result<GuestRegionMmap, Error> {
    let failed = |reason: String| Error::Map { size: Size::from_bytes(size), config: config.clone(), reason };
    // Huge pages are reserved here and now: found missing later, they would be a SIGBUS.
    let mut flags = if config.hugepages.is_some() { 0 } else { libc::MAP_NORESERVE };
    if config.prefault {
        flags |= libc::MAP_POPULATE;
    }
    let len = usize::try_from(size).map_err(|e| failed(e.to_string()))?;
    let mut builder = MmapRegionBuilder::new(len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    match object {
        Object::Shared(file) => {
            builder = builder.with_file_offset(FileOffset::from_arc(file.clone(), offset));
            flags |= libc::MAP_SHARED;
        }
        Object::Private(file) => {
            builder = builder.with_file_offset(FileOffset::from_arc(file.clone(), offset));
            flags |= libc::MAP_PRIVATE;
        }
        Object::None => {
            flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            flags |= match config.hugepages {
                None => 0,
                Some(config::HugePages::TwoMiB) => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
                Some(config::HugePages::OneGiB) => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
            };
        }
    }
    let mapping = builder.with_mmap_flags(flags).build().map_err(|e| failed(e.to_string()))?;
    advise(config, mapping.as_ptr(), mapping.size());
    GuestRegionMmap::new(mapping, GuestAddress(base)).ok_or_else(|| failed("address overflow".into()))
}

/// Tells the kernel what the `size` bytes from `start` on are for: a mapping of ours.
fn advise(config: &config::Memory, start: *mut u8, size: usize) {
    // A host may give every large mapping huge pages unasked: then a guest that touches a page here and there holds 2 MiB each time.
    let advice = if config.thp { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    // SAFETY: the range is a mapping that the caller has made; the advice changes no contents.
    let advised = unsafe { madvise(start.cast(), size, advice) };
    if let (true, Err(error)) = (config.thp, advised) {
        log::warn!("no transparent huge pages for guest memory: {error}");
    }
    // SAFETY: as above. A core dump of the monitor is not the place for the guest's secrets, nor for its size.
    if let Err(error) = unsafe { madvise(start.cast(), size, Advice::LinuxDontDump) } {
        log::warn!("guest memory stays in core dumps: {error}");
    }
}

/// Says that all of `range` will be used soon: each whole block of 2 MiB in it is then one huge page, where the host has one at
/// hand, and one fault of the host's and one of the guest's in place of 512. For anonymous memory; a memfd's pages are small,
/// unless the host says otherwise (/sys/kernel/mm/transparent_hugepage/shmem_enabled). To be called before `range` is touched.
pub fn expect(ram: &GuestRam, range: Range<u64>) {
    const BLOCK: u64 = 2 << 20;
    for region in ram.iter().filter(|region| region.file_offset().is_none()) {
        let base = region.start_addr().0;
        let after = base + region.len();
        let start = range.start.clamp(base, after).next_multiple_of(BLOCK);
        let end = range.end.min(after) / BLOCK * BLOCK;
        if start >= end {
            continue;
        }
        // SAFETY: `start` to `end` lies in the region's mapping; the advice changes no contents. That the host has no such
        // pages, or only such (hugetlbfs), is no error.
        let _ = unsafe {
            let host = region.as_ptr().add((start - base) as usize);
            madvise(host.cast(), (end - start) as usize, Advice::LinuxHugepage)
        };
    }
}

/// The object of which `region` is a shared mapping, if it is one: others can map it and see the same.
pub fn shared_object(region: &GuestRegionMmap) -> Option<&FileOffset> {
    region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0)
}

/// The regions' guest address, host address and size in bytes: what the hypervisor maps.
pub fn slots(ram: &GuestRam) -> impl Iterator<Item = (u64, *mut u8, u64)> {
    ram.iter().map(|region| (region.start_addr().0, region.as_ptr(), region.len()))
}

/// Where `len` bytes from guest address `at` are in this process, as a number for the kernel, if they are in one region of RAM.
pub fn host_address(ram: &GuestRam, at: u64, len: u64) -> Option<u64> {
    let end = at.checked_add(len)?;
    let (base, host, _) = slots(ram).find(|(base, _, size)| *base <= at && end <= *base + *size)?;
    Some(host.addr() as u64 + (at - base))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn config(text: &str) -> config::Memory {
        text.parse().unwrap()
    }

    #[test]
    fn five_gib_cross_the_hole_in_one_object() {
        for text in ["5G", "5G,backing=anonymous", "5G,thp"] {
            let memory = Memory::new(&config(text)).unwrap();
            assert_eq!(memory.size(), 5 << 30);
            let ram = memory.ram();
            for address in [0, layout::HOLE.start - 1, layout::HOLE.end, layout::HOLE.end + (2 << 30) - 1] {
                ram.write_obj(0x5au8, GuestAddress(address)).unwrap();
            }
            assert!(!ram.address_in_range(GuestAddress(layout::HOLE.start)));
            assert!(ram.write_obj(0u8, GuestAddress(layout::HOLE.end + (2 << 30))).is_err());
        }
    }

    #[test]
    fn a_rom_ends_at_four_gib_and_is_no_ram() {
        let mut memory = Memory::new(&config("2M")).unwrap();
        assert!(memory.set_rom(&[0; 15]).is_err() && memory.set_rom(&vec![0; (16 << 20) + 1]).is_err());
        memory.set_rom(&[7; 0x1801]).unwrap();
        assert!(matches!(memory.rom_slot(), Some((0xffff_e000, _, 0x2000))));
        let all = memory.all();
        let byte = |at: u64| all.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!((byte(0xffff_ffff), byte(0xffff_e7ff), byte(0xffff_e7fe)), (7, 7, 0xff));
        all.write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0)).unwrap(), 1, "the same RAM");
        assert!(!memory.ram().address_in_range(GuestAddress(0xffff_fff0)));
    }

    #[test]
    fn huge_pages_that_the_host_has_not_got_are_an_error() {
        let error = Memory::new(&config("512T,hugepages=1G,prefault")).unwrap_err();
        assert!(error.to_string().contains("guest memory"), "{error}");
        for (text, pages, pool) in
            [("512T,hugepages=1G", 524_288, "1048576kB"), ("1T,hugepages=2M", 524_288, "2048kB")]
        {
            let hint = Memory::new(&config(text)).unwrap_err().hint().unwrap();
            assert!(hint.starts_with(&format!("{pages} huge pages must be free: echo ")), "{hint}");
            let end = format!(" | sudo tee /sys/kernel/mm/hugepages/hugepages-{pool}/nr_hugepages");
            assert!(hint.ends_with(&end), "{hint}");
        }
    }
}
