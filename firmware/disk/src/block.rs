//! virtio-blk (virtio 1.3, 5.2), read only: small reads through a few cached blocks, large ones straight into place.

use crate::virtio::{CONFIG, Device, Queue};
use bootdisk::{Disk, Error, Result};
use core::cell::RefCell;

/// The device's kind.
pub const KIND: u32 = 2;
const SECTOR: u64 = 512;
/// The most bytes of one request.
const LARGEST: usize = 4 << 20;
const CACHED: usize = 4096;
const BLOCKS: usize = 8;
const REQUEST_IN: u32 = 0;

/// Blocks of a disk. Too large for the stack.
pub struct Cache {
    blocks: [[u8; CACHED]; BLOCKS],
    /// Their numbers.
    numbers: [Option<u64>; BLOCKS],
    /// Which is overwritten next.
    oldest: usize,
}

impl Cache {
    /// Nothing.
    pub const EMPTY: Self = Self { blocks: [[0; CACHED]; BLOCKS], numbers: [None; BLOCKS], oldest: 0 };
}

/// A disk.
pub struct Block<'c> {
    sectors: u64,
    state: RefCell<State<'c>>,
}

struct State<'c> {
    queue: Queue,
    cache: &'c mut Cache,
}

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

impl<'c> Block<'c> {
    /// Sets the device up.
    pub fn open(device: Device, cache: &'c mut Cache) -> Option<Self> {
        let [queue] = device.open()?;
        let sectors = u64::from(device.read(CONFIG)) | u64::from(device.read(CONFIG + 4)) << 32;
        let state = RefCell::new(State { queue, cache });
        Some(Self { sectors: sectors.min(u64::MAX / SECTOR), state })
    }
}

impl Disk for Block<'_> {
    fn size(&self) -> u64 {
        self.sectors * SECTOR
    }

    fn read(&self, mut offset: u64, mut into: &mut [u8]) -> Result<()> {
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > self.size()) {
            return Err(Error::Read);
        }
        let mut state = self.state.try_borrow_mut().map_err(|_| Error::Read)?;
        while !into.is_empty() {
            let whole = into.len().min(LARGEST) / SECTOR as usize * SECTOR as usize;
            let count = if offset.is_multiple_of(SECTOR) && whole >= CACHED {
                request(&mut state.queue, offset / SECTOR, into.get_mut(..whole).ok_or(Error::Read)?)?;
                whole
            } else {
                let block = state.block(offset / CACHED as u64, self.size())?;
                let from = block.get(offset as usize % CACHED..).unwrap_or_default();
                let count = from.len().min(into.len());
                into.get_mut(..count)
                    .ok_or(Error::Read)?
                    .copy_from_slice(from.get(..count).ok_or(Error::Read)?);
                count
            };
            into = into.get_mut(count..).ok_or(Error::Read)?;
            offset += count as u64;
        }
        Ok(())
    }
}

impl State<'_> {
    /// Block `number`; behind the disk's end it is whatever was there before.
    fn block(&mut self, number: u64, size: u64) -> Result<&[u8; CACHED]> {
        let at = match self.cache.numbers.iter().position(|cached| *cached == Some(number)) {
            Some(at) => at,
            None => {
                let at = (self.cache.oldest + 1) % BLOCKS;
                self.cache.oldest = at;
                let start = number * CACHED as u64;
                let count = size.saturating_sub(start).min(CACHED as u64) as usize;
                self.cache.numbers[at] = None;
                let into = self.cache.blocks[at].get_mut(..count).ok_or(Error::Read)?;
                request(&mut self.queue, start / SECTOR, into)?;
                self.cache.numbers[at] = Some(number);
                at
            }
        };
        Ok(&self.cache.blocks[at])
    }
}

/// Reads whole sectors.
fn request(queue: &mut Queue, sector: u64, into: &mut [u8]) -> Result<()> {
    let header = Header { kind: REQUEST_IN, reserved: 0, sector };
    let mut status = 0xffu8;
    let status_at = &raw mut status;
    queue.submit(&[
        (&raw const header as u64, size_of::<Header>() as u32, false),
        (into.as_mut_ptr() as u64, into.len() as u32, true),
        (status_at as u64, 1, true),
    ]);
    if queue.wait().is_none() {
        // The device may still write into this memory, later: nothing can be done with it any more.
        crate::entry::give_up();
    }
    // SAFETY: a local, which the device has written.
    if unsafe { status_at.read_volatile() } == 0 { Ok(()) } else { Err(Error::Read) }
}
