//! Block requests of any shape, on a disk that checks that only what it can do arrives.
#![no_main]

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::disk::{Disk, Info, Io};
use vmm_monitor::event_loop::Event;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::virtio::block::Block;
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::queue::{Position, Setup, Virtqueue};
use vmm_monitor::virtio::testing::{CountingNotifier, ram};

static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x4000));
const SIZE: u64 = 64 << 10;
const LENGTHS: [u32; 16] =
    [0, 1, 15, 16, 17, 20, 32, 48, 511, 512, 513, 1024, 4096, 0x2000, 0x8000_0000, u32::MAX];

/// In memory; finishes in an order that the fuzzer decides.
struct Strict {
    bytes: Vec<u8>,
    info: Info,
    waiting: Vec<(u16, Io)>,
    done: VecDeque<(u16, io::Result<u32>)>,
    order: u8,
    held: bool,
    ready: Event,
}

impl Strict {
    fn check(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        assert!(offset % 512 == 0 && len % 512 == 0 && offset + len <= SIZE, "{offset:#x}+{len:#x}");
        offset as usize..(offset + len) as usize
    }
}

impl Disk for Strict {
    fn info(&self) -> Info {
        self.info
    }
    fn submit(&mut self, tag: u16, io: Io) {
        assert!(self.waiting.iter().all(|(other, _)| *other != tag), "tags are unique");
        self.waiting.push((tag, io));
        self.ready.signal();
    }
    fn done(&mut self) -> Option<(u16, io::Result<u32>)> {
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        if self.waiting.is_empty() {
            return None;
        }
        let next = usize::from(self.order) % self.waiting.len();
        let (tag, io) = self.waiting.swap_remove(next);
        let result = match io {
            Io::Read { offset, mut to } => {
                let range = self.check(offset, to.len() as u64);
                to.write(&self.bytes[range]).map(|n| n as u32)
            }
            Io::Write { offset, mut from } => {
                assert!(!self.info.readonly);
                let range = self.check(offset, from.len() as u64);
                from.read(&mut self.bytes[range]).map(|n| n as u32)
            }
            Io::Flush if self.order & 0x80 != 0 => Err(io::ErrorKind::Other.into()),
            Io::Flush => Ok(0),
            Io::Discard { offset, len } => {
                assert!(!self.info.readonly);
                self.check(offset, len);
                Ok(0)
            }
            Io::WriteZeroes { offset, len, .. } => {
                assert!(!self.info.readonly);
                let range = self.check(offset, len);
                self.bytes[range].fill(0);
                Ok(0)
            }
        };
        Some((tag, result))
    }
    fn ready(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
    fn hold(&mut self) {
        self.held = true;
    }
    fn is_at_rest(&self) -> bool {
        self.held && self.waiting.is_empty() && self.done.is_empty()
    }
    fn go_on(&mut self) {
        self.held = false;
    }
    fn forget(&mut self) {
        self.waiting.clear();
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_at_checked(4) else { return };
    let info = Info {
        size: SIZE,
        readonly: head[0] & 1 != 0,
        block_size: if head[0] & 2 != 0 { 4096 } else { 512 },
        physical_block_size: 4096,
        discard: head[0] & 4 != 0,
    };
    let (waiting, done) = (Vec::new(), VecDeque::new());
    let disk = Strict {
        bytes: vec![0; SIZE as usize],
        info,
        waiting,
        done,
        order: head[1],
        held: false,
        ready: Event::new().unwrap(),
    };
    let mut block = Block::new(Box::new(disk), "fuzz");
    block.accept(if head[0] & 8 != 0 { u64::MAX } else { 0 });
    block.start();

    RAM.write_slice(&[0; 0x4000], GuestAddress(0)).unwrap();
    let size = 16;
    let setup = Setup { size, ready: true, descriptors: 0x1000, available: 0x1100, used: 0x1200 };
    let mut queue = [Virtqueue::new(RAM.clone(), Arc::new(CountingNotifier::default()), 0, 256)];
    assert!(queue[0].enable(&setup, Position::default(), false));
    // Descriptors from four bytes each, so that most lie in RAM and have lengths that mean something.
    let (descriptors, rest) = rest.split_at_checked(4 * 16).unwrap_or((rest, &[]));
    for (i, d) in descriptors.chunks_exact(4).enumerate() {
        let address = if d[2] & 0x80 != 0 { u64::MAX - u64::from(d[0]) } else { u64::from(d[0]) * 0x20 };
        let descriptor = [
            &address.to_le_bytes()[..],
            &LENGTHS[usize::from(d[1]) % LENGTHS.len()].to_le_bytes(),
            &u16::from(d[2] & 7).to_le_bytes(),
            &u16::from(d[3] % 17).to_le_bytes(),
        ];
        RAM.write_slice(&descriptor.concat(), GuestAddress(0x1000 + 16 * i as u64)).unwrap();
    }
    // Headers with a discard segment behind them, from eight bytes each; what is left over goes in as it is.
    let (headers, raw) = rest.split_at(rest.len().min(8 * 16));
    for (i, h) in headers.chunks_exact(8).enumerate() {
        let sector = i64::from(i16::from_le_bytes([h[2], h[3]])) << (h[1] & 0x3f);
        let bytes = [
            &u64::from(h[0] & 0x8f).to_le_bytes()[..],
            &sector.to_le_bytes(),
            &sector.to_le_bytes(),
            &u32::from(h[4]).to_le_bytes(),
            &u32::from(h[5]).to_le_bytes(),
        ];
        RAM.write_slice(&bytes.concat(), GuestAddress(0x40 * i as u64)).unwrap();
    }
    RAM.write_slice(&raw[..raw.len().min(0x400)], GuestAddress(0xc00)).unwrap();
    for i in 0..size {
        RAM.write_obj(i, GuestAddress(0x1104 + 2 * u64::from(i))).unwrap();
    }
    RAM.write_obj(u16::from(head[2] % 17), GuestAddress(0x1102)).unwrap();
    block.on_queue(0, &mut queue);
    block.on_event(0, &mut queue);
    block.drain(&mut queue, Instant::now()).expect("this disk is never slow");
    // A request without room for an answer breaks the queue; all others are answered.
    assert_eq!(queue[0].in_flight(), usize::from(queue[0].is_broken() && queue[0].in_flight() > 0));
});
