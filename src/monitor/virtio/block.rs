//! virtio-blk: requests on a [`Disk`] (virtio 1.3, 5.2). Knows no files and no image formats.
//!
//! The worker parses and submits; the disk's own threads do the I/O, and `on_event` answers what they have finished.

use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::device::{Traits, VirtioDevice};
use super::queue::{Chain, Virtqueue};
use crate::bus::Busy;
use crate::disk::{Disk, Info, Io};
use crate::guest_warn;
use crate::memory::Buffers;
use crate::sandbox::Needs;
use crate::state::{StateError, Stateful};

/// The unit of capacity and sector numbers, whatever the block size (5.2.4).
const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: a queue's descriptors without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a segment.
const SIZE_MAX: u32 = 256 << 10;
/// What both limits allow together. A request with more fails: none may take for ever.
const REQUEST_MAX: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Bytes in flight beyond which no further request is taken, so that a pause or reset does not take for ever either.
const IN_FLIGHT_MAX: u64 = 2 * REQUEST_MAX;
/// Bytes of one discard: a file system only notes them.
const DISCARD_MAX: u64 = 1 << 30;
/// Bytes of one write-zeroes: some back ends have to write them.
const WRITE_ZEROES_MAX: u64 = 32 << 20;
/// Bytes of the serial number (5.2.6).
const ID_SIZE: usize = 20;

/// `struct virtio_blk_config` (5.2.4), up to what is offered.
#[derive(Debug, Clone, Default, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Config {
    capacity: le::U64,
    size_max: le::U32,
    seg_max: le::U32,
    geometry: [u8; 4],
    blk_size: le::U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: le::U16,
    opt_io_size: le::U32,
    writeback: u8,
    unused0: u8,
    num_queues: le::U16,
    max_discard_sectors: le::U32,
    max_discard_seg: le::U32,
    discard_sector_alignment: le::U32,
    max_write_zeroes_sectors: le::U32,
    max_write_zeroes_seg: le::U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// Where [`Config::writeback`] is.
const WRITEBACK_OFFSET: usize = std::mem::offset_of!(Config, writeback);

/// `struct virtio_blk_req` without its data (5.2.6).
#[derive(Debug, Clone, Copy, FromBytes, KnownLayout)]
#[repr(C)]
struct Header {
    kind: le::U32,
    _reserved: le::U32,
    sector: le::U64,
}

/// `struct virtio_blk_discard_write_zeroes` (5.2.6).
#[derive(Debug, Clone, Copy, FromBytes, KnownLayout)]
#[repr(C)]
struct Segment {
    sector: le::U64,
    sectors: le::U32,
    flags: le::U32,
}

/// [`Segment`]'s one flag.
const UNMAP: u32 = 1;

/// What is in front of the status byte in a request's answer, and what the driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// VIRTIO_BLK_S_IOERR
    Error,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported,
}

/// A parsed request.
enum Request {
    /// For the disk; the number of bytes that count for [`IN_FLIGHT_MAX`].
    Io(Io, u64),
    /// For the serial number.
    Id(Buffers),
}

/// Where a request is answered.
#[derive(Debug)]
struct Answer {
    /// The status byte.
    status: Buffers,
    /// Bytes in front of it.
    room: usize,
    /// Bytes in front of it that are written if the request succeeds.
    written: usize,
}

/// A request that the disk has.
#[derive(Debug)]
struct Pending {
    answer: Answer,
    /// What it counts for [`IN_FLIGHT_MAX`].
    cost: u64,
    /// It has to be on stable storage before it counts as done (writethrough).
    sync: bool,
}

/// A block device.
pub struct Block {
    disk: Box<dyn Disk>,
    info: Info,
    id: [u8; ID_SIZE],
    config: Config,
    /// Feature bits that are offered.
    offered: u64,
    /// Those of them that the driver has accepted.
    features: u64,
    /// By head of chain.
    pending: Vec<Option<Pending>>,
    /// Sum of the costs in `pending`.
    in_flight: u64,
    /// Requests were left in the queue because too much is in flight.
    held_back: bool,
    /// Heads of requests that a saved device had not finished. They begin anew.
    restored: Vec<u16>,
}

impl Block {
    /// A block device on `disk`, whose serial number starts with the first 20 bytes of `id`.
    pub fn new(disk: Box<dyn Disk>, id: &str) -> Self {
        let info = disk.info();
        let discard = if info.discard && !info.readonly { 1 } else { 0 };
        let exponent = (info.physical_block_size / info.block_size).max(1).ilog2();
        let config = Config {
            capacity: (info.size / SECTOR).into(),
            size_max: SIZE_MAX.into(),
            seg_max: SEG_MAX.into(),
            blk_size: info.block_size.into(),
            physical_block_exp: exponent as u8,
            min_io_size: 1.into(),
            writeback: 1,
            num_queues: 1.into(),
            max_discard_sectors: (discard * (DISCARD_MAX / SECTOR) as u32).into(),
            max_discard_seg: discard.into(),
            discard_sector_alignment: (discard * (info.physical_block_size / SECTOR as u32)).into(),
            max_write_zeroes_sectors: (discard * (WRITE_ZEROES_MAX / SECTOR) as u32).into(),
            max_write_zeroes_seg: discard.into(),
            write_zeroes_may_unmap: discard as u8,
            ..Config::default()
        };
        let mut bytes = [0; ID_SIZE];
        let len = id.len().min(ID_SIZE);
        bytes[..len].copy_from_slice(&id.as_bytes()[..len]);
        let pending = (0..QUEUE_SIZE).map(|_| None).collect();
        let offered = offered(&info);
        Self {
            disk,
            info,
            id: bytes,
            config,
            offered,
            features: 0,
            pending,
            in_flight: 0,
            held_back: false,
            restored: Vec::new(),
        }
    }

    /// Answers or submits one request.
    fn take(&mut self, chain: Chain, queue: &mut Virtqueue) {
        let Chain { head, readable, mut writable } = chain;
        let status = writable.split_off_back(1);
        if status.is_empty() {
            // There is no place for an answer.
            return queue.fail("a block request has no status byte");
        }
        let mut answer = Answer { status, room: writable.len(), written: 0 };
        match self.parse(readable, writable) {
            Ok(Request::Io(io, cost)) => {
                let writes = !matches!(io, Io::Read { .. } | Io::Flush);
                let sync = writes && self.config.writeback == 0;
                if let Io::Read { to, .. } = &io {
                    answer.written = to.len();
                }
                self.in_flight += cost;
                self.pending[usize::from(head)] = Some(Pending { answer, cost, sync });
                self.disk.submit(head, io);
            }
            Ok(Request::Id(mut to)) => {
                answer.written = to.write(&self.id).unwrap_or(0);
                answer.give(queue, head, Ok(()));
            }
            Err(refusal) => answer.give(queue, head, Err(refusal)),
        }
    }

    fn parse(&self, mut readable: Buffers, writable: Buffers) -> Result<Request, Refusal> {
        let header: Header = read(&mut readable)?;
        let accepted = |bit: u32| self.features & (1 << bit) != 0;
        match header.kind.get() {
            VIRTIO_BLK_T_IN => {
                let (offset, len) = self.range(header.sector.get(), writable.len() as u64, REQUEST_MAX)?;
                Ok(Request::Io(Io::Read { offset, to: writable }, len))
            }
            VIRTIO_BLK_T_OUT if self.info.readonly => Err(Refusal::Error),
            VIRTIO_BLK_T_OUT => {
                let (offset, len) = self.range(header.sector.get(), readable.len() as u64, REQUEST_MAX)?;
                Ok(Request::Io(Io::Write { offset, from: readable }, len))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Request::Io(Io::Flush, 0)),
            VIRTIO_BLK_T_GET_ID => Ok(Request::Id(writable)),
            VIRTIO_BLK_T_DISCARD if accepted(VIRTIO_BLK_F_DISCARD) => {
                let (segment, offset, len) = self.segment(readable, DISCARD_MAX)?;
                if segment.flags.get() != 0 {
                    return Err(Refusal::Unsupported);
                }
                Ok(Request::Io(Io::Discard { offset, len }, 0))
            }
            VIRTIO_BLK_T_WRITE_ZEROES if accepted(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let (segment, offset, len) = self.segment(readable, WRITE_ZEROES_MAX)?;
                if segment.flags.get() & !UNMAP != 0 {
                    return Err(Refusal::Unsupported);
                }
                let unmap = segment.flags.get() & UNMAP != 0;
                Ok(Request::Io(Io::WriteZeroes { offset, len, unmap }, len))
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// The one segment of a discard or write-zeroes request, with its range.
    fn segment(&self, mut readable: Buffers, most: u64) -> Result<(Segment, u64, u64), Refusal> {
        let segment: Segment = read(&mut readable)?;
        if !readable.is_empty() {
            return Err(Refusal::Error);
        }
        let (offset, len) =
            self.range(segment.sector.get(), u64::from(segment.sectors.get()) * SECTOR, most)?;
        Ok((segment, offset, len))
    }

    /// The byte range of `len` bytes from `sector`, if that is whole sectors of the disk, and at most `most`
    /// bytes. The block size is a hint, and changes no unit (5.2.4).
    fn range(&self, sector: u64, len: u64, most: u64) -> Result<(u64, u64), Refusal> {
        let offset = sector.checked_mul(SECTOR).ok_or(Refusal::Error)?;
        let end = offset.checked_add(len).ok_or(Refusal::Error)?;
        if len.is_multiple_of(SECTOR) && len <= most && end <= self.info.size {
            Ok((offset, len))
        } else {
            Err(Refusal::Error)
        }
    }

    /// Answers what the disk has finished.
    fn collect(&mut self, queue: &mut Virtqueue) {
        while let Some((head, result)) = self.disk.done() {
            let Some(slot) = self.pending.get_mut(usize::from(head)) else { continue };
            let Some(mut pending) = slot.take() else { continue };
            match result {
                Ok(_) if pending.sync => {
                    pending.sync = false;
                    *slot = Some(pending);
                    self.disk.submit(head, Io::Flush);
                }
                Ok(_) => {
                    self.in_flight -= pending.cost;
                    pending.answer.give(queue, head, Ok(()));
                }
                Err(error) => {
                    guest_warn!("a disk request failed on the host: {error}");
                    self.in_flight -= pending.cost;
                    pending.answer.give(queue, head, Err(Refusal::Error));
                }
            }
        }
    }

    /// Heads of the requests that are not finished.
    fn unfinished(&self) -> impl Iterator<Item = u16> {
        (0..QUEUE_SIZE).zip(&self.pending).filter_map(|(head, pending)| pending.as_ref().map(|_| head))
    }
}

/// The feature bits for a disk.
fn offered(info: &Info) -> u64 {
    let mut bits = vec![
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    if info.readonly {
        bits.push(VIRTIO_BLK_F_RO);
    } else if info.discard {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.iter().fold(0, |all, bit| all | 1 << bit)
}

/// Reads one of the structures at the front of a request.
fn read<T: FromBytes>(from: &mut Buffers) -> Result<T, Refusal> {
    let mut bytes = [0; 16];
    let bytes = &mut bytes[..size_of::<T>()];
    from.read_exact(bytes).map_err(|_| Refusal::Error)?;
    T::read_from_bytes(bytes).map_err(|_| Refusal::Error)
}

impl Answer {
    /// Writes the status byte, and gives the chain back.
    fn give(mut self, queue: &mut Virtqueue, head: u16, result: Result<(), Refusal>) {
        let byte = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Refusal::Error) => VIRTIO_BLK_S_IOERR,
            Err(Refusal::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        // The place was in RAM when it was popped, and RAM stays.
        let _ = self.status.write(&[byte as u8]);
        // 2.7.8.2: bytes that were written, from the front on. The status byte is among them only if nothing
        // in front of it was left out; a failed read leaves that undefined.
        let front = if result.is_ok() { self.written } else { 0 };
        let used = if front == self.room { front + 1 } else { front };
        queue.complete(head, used as u32);
    }
}

impl VirtioDevice for Block {
    fn traits(&self) -> Traits {
        Traits { kind: VIRTIO_ID_BLOCK, features: self.offered, queues: vec![QUEUE_SIZE] }
    }

    fn needs(&self) -> Needs {
        Needs::DISK
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // The only field that a driver may write, and only if it has taken CONFIG_WCE (5.2.5).
        let writable = self.features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0;
        if let (true, WRITEBACK_OFFSET, [on @ (0 | 1)]) = (writable, offset, data) {
            self.config.writeback = *on;
        }
    }

    fn accept(&mut self, features: u64) {
        self.features = features & self.offered;
        // 5.2.5.2, 5.2.6.2: the cache is writeback for a driver that knows how to flush it; one that does not
        // must find its writes on stable storage when they complete.
        self.config.writeback = (features & 1 << VIRTIO_BLK_F_FLUSH != 0).into();
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        loop {
            self.held_back = self.in_flight >= IN_FLIGHT_MAX;
            if self.held_back {
                return;
            }
            let Some(chain) = queues[index].pop() else { return };
            self.take(chain, &mut queues[index]);
        }
    }

    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.disk.ready()]
    }

    fn on_event(&mut self, _source: usize, queues: &mut [Virtqueue]) {
        self.collect(&mut queues[0]);
        if self.held_back {
            self.on_queue(0, queues);
        }
    }

    fn drain(&mut self, queues: &mut [Virtqueue], deadline: Instant) -> Result<(), Busy> {
        self.disk.hold();
        loop {
            self.collect(&mut queues[0]);
            if self.disk.is_at_rest() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Busy(format!("{} disk requests are unfinished", self.unfinished().count())));
            }
            let ready = self.disk.ready();
            let mut ready = [PollFd::new(&ready, PollFlags::IN)];
            // Interrupted or not: the next look tells.
            let _ = poll(&mut ready, Timespec::try_from(left).ok().as_ref());
        }
    }

    fn resume(&mut self, queues: &mut [Virtqueue]) {
        self.disk.go_on();
        for head in std::mem::take(&mut self.restored) {
            if let Some(chain) = queues[0].retake(head) {
                self.take(chain, &mut queues[0]);
            }
        }
    }

    fn forget(&mut self, _index: usize) {
        self.disk.forget();
        self.pending.fill_with(|| None);
        self.in_flight = 0;
        self.held_back = false;
        self.restored = Vec::new();
    }

    fn reset(&mut self) {
        self.forget(0);
        self.disk.go_on();
        self.features = 0;
        self.config.writeback = 1;
    }
}

/// [`Block`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The guest knows the disk's size: another disk will not do.
    size: u64,
    features: u64,
    writeback: bool,
    /// Heads of the requests that are not finished: each is begun anew.
    unfinished: Vec<u16>,
}

impl Stateful for Block {
    type State = State;

    fn save(&self) -> State {
        let unfinished = self.restored.iter().copied().chain(self.unfinished()).collect();
        let (features, writeback) = (self.features, self.config.writeback != 0);
        State { size: self.info.size, features, writeback, unfinished }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if state.size != self.info.size {
            let (saved, size) = (state.size, self.info.size);
            return Err(StateError::Invalid(format!("the disk had {saved} bytes, and has {size} now")));
        }
        if state.features & !self.offered != 0 || state.unfinished.iter().any(|head| *head >= QUEUE_SIZE) {
            let (features, unfinished) = (state.features, state.unfinished);
            return Err(StateError::Invalid(format!("features {features:#x}, requests {unfinished:?}")));
        }
        self.features = state.features;
        self.config.writeback = state.writeback.into();
        self.restored = state.unfinished;
        Ok(())
    }
}
