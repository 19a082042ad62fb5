//! fw_cfg: how firmware learns what the monitor has for it. QEMU's ABI (its docs/specs/fw_cfg.rst): numbered items, files in
//! a directory, read through a data port or, far faster, by DMA into guest memory.
//!
//! Made by `machine::load` with the [`Items`] that `boot::firmware` prepared, and only with `--firmware`. Nothing can be
//! written to. A DMA request lies in guest memory: it is read once, what it names must be RAM, and a vCPU can ask for
//! no more than that RAM holds.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::bus::{Device, Effect};
use crate::guest_warn;
use crate::memory::GuestRam;
use crate::state::{StateError, Stateful};

/// Ports: selector and data, a gap, and the DMA address.
pub const SIZE: u64 = 12;

const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;

/// Items of the interface itself.
const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const FILE_DIR: u16 = 0x19;
/// Numbers from here are files.
const FILE_FIRST: u16 = 0x20;
/// ID: the registers above, and DMA.
const FEATURES: u32 = 0b11;
/// What the DMA address reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// A file's name in the directory, with a NUL.
const NAME_SIZE: usize = 56;

/// Bits of a DMA request's control word; its upper half is the number to select.
const CONTROL_ERROR: u32 = 1;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;

/// Bytes that are not held in memory: a kernel, an initrd.
pub trait Source: Send {
    /// How many.
    fn len(&self) -> u64;
    /// Nothing at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The byte at `offset`, which is less than the length.
    ///
    /// # Errors
    /// It cannot be read.
    fn byte(&self, offset: u64) -> io::Result<u8>;
    /// Puts `len` bytes from `offset` on into `ram` at `to`. All of them exist, and it is RAM.
    ///
    /// # Errors
    /// They cannot be read.
    fn copy(&self, offset: u64, len: u64, ram: &GuestRam, to: u64) -> io::Result<()>;
    /// All of them, which fit into memory.
    ///
    /// # Errors
    /// They cannot be read.
    fn bytes(&self) -> io::Result<Vec<u8>>;
}

/// An item's bytes.
pub enum Content {
    /// Here.
    Bytes(Vec<u8>),
    /// Elsewhere.
    Source(Box<dyn Source>),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Source(source) => source.len(),
        }
    }

    fn byte(&self, offset: u64) -> io::Result<u8> {
        match self {
            Self::Bytes(bytes) => {
                Ok(usize::try_from(offset).ok().and_then(|at| bytes.get(at)).copied().unwrap_or(0))
            }
            Self::Source(source) => source.byte(offset),
        }
    }

    fn copy(&self, offset: u64, len: u64, ram: &GuestRam, to: u64) -> io::Result<()> {
        match self {
            Self::Bytes(bytes) => {
                let part =
                    bytes.get(offset as usize..offset.saturating_add(len) as usize).unwrap_or_default();
                ram.write_slice(part, GuestAddress(to)).map_err(io::Error::other)
            }
            Self::Source(source) => source.copy(offset, len, ram, to),
        }
    }
}

/// What there is to read.
#[derive(Default)]
pub struct Items {
    numbered: BTreeMap<u16, Content>,
    files: Vec<(String, Content)>,
}

impl Items {
    /// Adds an item with a number of its own.
    pub fn add(&mut self, number: u16, content: Content) {
        self.numbered.insert(number, content);
    }

    /// The same, of bytes; numbers are little-endian.
    pub fn add_bytes(&mut self, number: u16, bytes: impl Into<Vec<u8>>) {
        self.add(number, Content::Bytes(bytes.into()));
    }

    /// Adds a file. Its name is cut to what the directory holds.
    pub fn add_file(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.files.push((name.to_owned(), Content::Bytes(bytes.into())));
    }

    /// Numbers the files, and writes their directory.
    fn finish(mut self) -> BTreeMap<u16, Content> {
        self.files.sort_by(|a, b| a.0.cmp(&b.0));
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (number, (name, content)) in (FILE_FIRST..).zip(self.files) {
            let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
            directory.extend_from_slice(&size.to_be_bytes());
            directory.extend_from_slice(&number.to_be_bytes());
            directory.extend_from_slice(&[0; 2]);
            let mut field = [0; NAME_SIZE];
            field.iter_mut().zip(name.bytes().take(NAME_SIZE - 1)).for_each(|(to, from)| *to = from);
            directory.extend_from_slice(&field);
            self.numbered.insert(number, content);
        }
        self.numbered.insert(SIGNATURE, Content::Bytes(b"QEMU".to_vec()));
        self.numbered.insert(ID, Content::Bytes(FEATURES.to_le_bytes().to_vec()));
        self.numbered.insert(FILE_DIR, Content::Bytes(directory));
        self.numbered
    }
}

/// The device.
pub struct FwCfg {
    items: BTreeMap<u16, Content>,
    ram: Arc<GuestRam>,
    selected: u16,
    /// Of the next byte; at most the item's length.
    offset: u64,
    /// The upper half of the DMA address, until the lower half is written.
    dma_high: u32,
}

/// What the guest could tell apart: all that there is to read, too, which comes from files that may be others by now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    selected: u16,
    offset: u64,
    dma_high: u32,
    items: Vec<(u16, Vec<u8>)>,
}

/// A DMA request as it lies in guest memory, each field big-endian.
#[derive(Debug, Clone, Copy)]
struct Request {
    control: u32,
    length: u32,
    address: u64,
}

impl FwCfg {
    /// `ram` is what DMA goes to.
    pub fn new(items: Items, ram: Arc<GuestRam>) -> Self {
        Self { items: items.finish(), ram, selected: SIGNATURE, offset: 0, dma_high: 0 }
    }

    /// Replaces all there is to read.
    pub fn set_items(&mut self, items: Items) {
        self.items = items.finish();
    }

    /// Takes in what it has elsewhere, `most` bytes with all else, so that [`Stateful::save`] has all there is.
    ///
    /// # Errors
    /// It is more; a file cannot be read.
    pub fn take_in(&mut self, most: u64) -> io::Result<()> {
        let bytes = self.items.values().map(Content::len).fold(0, u64::saturating_add);
        if bytes > most {
            let [mib, most] = [bytes, most].map(|bytes| bytes.div_ceil(1 << 20));
            return Err(io::Error::other(format!("firmware is given {mib} MiB, and {most} can be saved")));
        }
        for item in self.items.values_mut() {
            if let Content::Source(source) = item {
                *item = Content::Bytes(source.bytes()?);
            }
        }
        Ok(())
    }

    /// Whether there is such an item does not matter: one that is not there is empty.
    fn select(&mut self, number: u16) {
        (self.selected, self.offset) = (number, 0);
    }

    fn left(&self) -> u64 {
        self.items.get(&self.selected).map_or(0, Content::len).saturating_sub(self.offset)
    }

    /// The next byte; zeroes behind the end.
    fn next_byte(&mut self) -> u8 {
        let Some(item) = self.items.get(&self.selected).filter(|item| self.offset < item.len()) else {
            return 0;
        };
        let byte = item.byte(self.offset).unwrap_or_else(|error| {
            guest_warn!("fw_cfg item {:#x} cannot be read: {error}", self.selected);
            0
        });
        self.offset += 1;
        byte
    }

    /// Does what the request at `address` asks for, and puts the outcome in place of its control word: zero, or the error bit.
    fn dma(&mut self, address: u64) {
        let mut bytes = [0; 16];
        if self.ram.read_slice(&mut bytes, GuestAddress(address)).is_err() {
            guest_warn!("fw_cfg: its request at {address:#x} is not in RAM");
            return;
        }
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let request = Request {
            control: word(0),
            length: word(4),
            address: u64::from(word(8)) << 32 | u64::from(word(12)),
        };
        let outcome = match self.serve(request) {
            Ok(()) => 0,
            Err(what) => {
                guest_warn!("fw_cfg item {:#x}: {what}", self.selected);
                CONTROL_ERROR
            }
        };
        // The request was readable there, so it is RAM; and the guest learns of nothing else than this word.
        let _ = self.ram.write_slice(&outcome.to_be_bytes(), GuestAddress(address));
    }

    fn serve(&mut self, request: Request) -> Result<(), String> {
        if request.control & CONTROL_SELECT != 0 {
            self.select((request.control >> 16) as u16);
        }
        let wanted = u64::from(request.length);
        let there = wanted.min(self.left());
        if request.control & CONTROL_READ != 0 {
            let (to, len) = (request.address, request.length as usize);
            if len > 0 && !self.ram.check_range(GuestAddress(to), len) {
                return Err(format!("{len} bytes at {to:#x} are not RAM"));
            }
            if let Some(item) = self.items.get(&self.selected).filter(|_| there > 0) {
                item.copy(self.offset, there, &self.ram, to).map_err(|error| error.to_string())?;
            }
            self.zero(to + there, wanted - there);
        } else if request.control & CONTROL_SKIP == 0 && request.control & CONTROL_WRITE != 0 {
            return Err("nothing can be written to".to_owned());
        } else if request.control & CONTROL_SKIP == 0 {
            return Ok(());
        }
        self.offset += there;
        Ok(())
    }

    /// Zeroes RAM.
    fn zero(&self, mut at: u64, mut len: u64) {
        const ZEROES: [u8; 4096] = [0; 4096];
        while len > 0 {
            let part = len.min(ZEROES.len() as u64);
            // All of it was found to be RAM.
            let _ = self.ram.write_slice(&ZEROES[..part as usize], GuestAddress(at));
            (at, len) = (at + part, len - part);
        }
    }
}

impl Device for FwCfg {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            // Also for 2 and 4 bytes at once: the port is one byte wide, and what is read is a sequence.
            (DATA, data) => data.iter_mut().for_each(|byte| *byte = self.next_byte()),
            (DMA_HIGH.., data) => {
                let rest = usize::try_from(offset - DMA_HIGH).ok().and_then(|at| DMA_SIGNATURE.get(at..));
                data.iter_mut().zip(rest.unwrap_or_default()).for_each(|(to, from)| *to = *from);
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (SELECTOR, &[low, high]) => self.select(u16::from_le_bytes([low, high])),
            (DMA_HIGH, &[a, b, c, d]) => self.dma_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let high = std::mem::take(&mut self.dma_high);
                self.dma(u64::from(high) << 32 | u64::from(low));
            }
            _ => {}
        }
        Effect::None
    }
}

impl Stateful for FwCfg {
    type State = State;

    fn save(&self) -> State {
        let here = |(number, content): (&u16, &Content)| match content {
            Content::Bytes(bytes) => Some((*number, bytes.clone())),
            Content::Source(_) => None,
        };
        let items = self.items.iter().filter_map(here).collect();
        State { selected: self.selected, offset: self.offset, dma_high: self.dma_high, items }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let here: BTreeMap<_, _> =
            state.items.into_iter().map(|(number, bytes)| (number, Content::Bytes(bytes))).collect();
        let elsewhere = |item: &&Content| matches!(item, Content::Source(_));
        let selected =
            here.get(&state.selected).or_else(|| self.items.get(&state.selected).filter(elsewhere));
        if state.offset > selected.map_or(0, Content::len) {
            return Err(StateError::Invalid(format!(
                "fw_cfg item {:#x} at {}",
                state.selected, state.offset
            )));
        }
        (self.selected, self.offset, self.dma_high) = (state.selected, state.offset, state.dma_high);
        // What was not taken in is here as it was there.
        self.items.retain(|_, item| elsewhere(&&*item));
        self.items.extend(here);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken;
    impl Source for Broken {
        fn len(&self) -> u64 {
            1 << 40
        }
        fn byte(&self, _: u64) -> io::Result<u8> {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
        fn copy(&self, _: u64, _: u64, _: &GuestRam, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
        fn bytes(&self) -> io::Result<Vec<u8>> {
            Ok(vec![9; 3])
        }
    }

    const REQUEST: u64 = 0x100;

    fn device() -> FwCfg {
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x3000), (GuestAddress(0x8000), 0x1000)]).unwrap();
        let mut items = Items::default();
        items.add_bytes(5, 3u16.to_le_bytes());
        items.add(9, Content::Source(Box::new(Broken)));
        items.add_file("etc/e820", [7; 20]);
        items.add_file("a", [1, 2, 3]);
        FwCfg::new(items, Arc::new(ram))
    }

    fn read(device: &mut FwCfg, item: u16, count: usize) -> Vec<u8> {
        assert_eq!(device.write(SELECTOR, &item.to_le_bytes()), Effect::None);
        let mut bytes = vec![0xff; count];
        bytes.chunks_mut(1).for_each(|byte| device.read(DATA, byte));
        bytes
    }

    fn dma(device: &mut FwCfg, control: u32, length: u32, address: u64) -> u32 {
        let request = [&control.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()].concat();
        device.ram.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        device.write(DMA_HIGH, &[0; 4]);
        device.write(DMA_LOW, &(REQUEST as u32).to_be_bytes());
        u32::from_be_bytes(device.ram.read_obj(GuestAddress(REQUEST)).unwrap())
    }

    #[test]
    fn the_port_tells_who_is_there_and_what_there_is() {
        let mut device = device();
        assert_eq!(read(&mut device, SIGNATURE, 6), b"QEMU\0\0", "zeroes behind the end");
        assert_eq!(read(&mut device, ID, 4), [3, 0, 0, 0]);
        assert_eq!(read(&mut device, 5, 2), [3, 0]);
        assert_eq!(read(&mut device, 0x7777, 2), [0, 0]);
        assert_eq!(read(&mut device, 9, 1), [0], "what cannot be read");
        let directory = read(&mut device, FILE_DIR, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..12], [0, 0, 0, 3, 0, 0x20, 0, 0]);
        assert_eq!(&directory[12..14], b"a\0");
        assert_eq!(directory[68..76], [0, 0, 0, 20, 0, 0x21, 0, 0]);
        assert_eq!(read(&mut device, 0x20, 3), [1, 2, 3]);
        let mut signature = [0; 4];
        device.read(DMA_LOW, &mut signature);
        assert_eq!(&signature, b" CFG");
    }

    #[test]
    fn dma_selects_skips_reads_and_fills_up() {
        let mut device = device();
        device.ram.write_slice(&[0xee; 64], GuestAddress(0x1000)).unwrap();
        assert_eq!(dma(&mut device, 0x20 << 16 | CONTROL_SELECT | CONTROL_SKIP, 1, 0), 0);
        assert_eq!(dma(&mut device, CONTROL_READ, 4, 0x1000), 0);
        let mut bytes = [0; 5];
        device.ram.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [2, 3, 0, 0, 0xee]);
        assert_eq!(dma(&mut device, 0x20 << 16 | CONTROL_SELECT | CONTROL_WRITE, 1, 0x1000), CONTROL_ERROR);
        assert_eq!(dma(&mut device, 0, 1, 0), 0, "nothing asked, nothing done");
    }

    #[test]
    fn dma_stays_in_ram() {
        let mut device = device();
        let select = 0x20 << 16 | CONTROL_SELECT | CONTROL_READ;
        for (address, len) in [(0x2fff, 2), (0x3000, 1), (u64::MAX, 2), (u64::MAX - 1, 1), (0, u32::MAX)] {
            assert_eq!(dma(&mut device, select, len, address), CONTROL_ERROR, "{address:#x}");
        }
        assert_eq!(dma(&mut device, select, 0, u64::MAX), 0, "no bytes are everywhere");
        assert_eq!(dma(&mut device, 9 << 16 | CONTROL_SELECT | CONTROL_READ, 9, 0), CONTROL_ERROR);
        // A request that is not in RAM, or half of it: nobody to tell.
        for low in [0x3000u32, 0x2ff8, u32::MAX] {
            device.write(DMA_LOW, &low.to_be_bytes());
        }
        device.write(DMA_HIGH, &[0xff; 4]);
        device.write(DMA_LOW, &[0xff; 4]);
    }

    #[test]
    fn what_there_is_to_read_is_saved_with_it() {
        let mut old = device();
        let error = old.take_in(1 << 30).unwrap_err().to_string();
        assert_eq!(error, "firmware is given 1048577 MiB, and 1024 can be saved");
        old.take_in(u64::MAX).unwrap();
        read(&mut old, 9, 1);
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut new = FwCfg::new(Items::default(), Arc::new(ram));
        new.restore(old.save()).unwrap();
        assert_eq!(new.save(), old.save());
        let mut rest = [0; 4];
        rest.chunks_mut(1).for_each(|byte| new.read(DATA, byte));
        assert_eq!((rest, read(&mut new, 0x20, 4)), ([9, 9, 0, 0], vec![1, 2, 3, 0]));
    }

    #[test]
    fn impossible_state_is_refused() {
        let mut device = device();
        read(&mut device, 0x20, 2);
        let state = device.save();
        device.restore(state.clone()).unwrap();
        assert!(device.restore(State { offset: 4, ..state.clone() }).is_err());
        assert!(device.restore(State { selected: 0x7777, offset: 1, ..state }).is_err());
    }
}
