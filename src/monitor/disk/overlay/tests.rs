//! Overlays against a model that loses power, and under several threads.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vm_memory::GuestAddress;

use super::*;
use crate::disk::Io;
use crate::disk::image::{Image, Step};
use crate::memory::GuestRam;

/// The disk ends in the middle of a cluster.
const SECTORS: usize = 401;
const SECTOR: usize = 512;

/// Opens what this test has just closed. A process that another test starts still has its lock until it has closed what it was not
/// meant to have.
pub fn open_again<T>(open: impl Fn() -> Result<T, Error>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match open() {
            Err(Error::Locked { .. }) if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            opened => break opened.unwrap(),
        }
    }
}

/// What the host's disk has of the overlay, and how many syncs it lives for.
#[derive(Default)]
struct Power {
    stable: Vec<u8>,
    syncs: u32,
}

thread_local! {
    static POWER: RefCell<Power> = RefCell::default();
}

fn contents(mut file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    file.flush().unwrap();
    bytes
}

fn sync(file: &File) -> rustix::io::Result<()> {
    POWER.with_borrow_mut(|power| {
        power.syncs = power.syncs.checked_sub(1).ok_or(rustix::io::Errno::IO)?;
        power.stable = contents(file);
        Ok(())
    })
}

/// A base in a folder; each of its sectors is of one byte, which is not 0.
fn base() -> (tempfile::TempDir, config::Disk) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| [base_byte(sector); SECTOR]).collect();
    fs::write(&path, bytes).unwrap();
    let overlay = Some(config::Overlay::Kept(dir.path().join("overlay")));
    let disk = config::Disk {
        path,
        readonly: false,
        overlay,
        lower: None,
        format: None,
        serial: None,
        block_size: None,
    };
    (dir, disk)
}

fn base_byte(sector: usize) -> u8 {
    (sector % 250) as u8 + 1
}

fn buffers(len: usize) -> Buffers {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), len.next_multiple_of(4096) + 8192)]).unwrap();
    let mut buffers = Buffers::empty(Arc::new(ram));
    let first = len.min(700);
    buffers.push(1, first).unwrap();
    buffers.push(4096, len - first).unwrap();
    buffers
}

fn perform(image: &Image, io: Io) -> io::Result<()> {
    match image.perform(io, &|| false)? {
        Step::Done(_) => Ok(()),
        Step::Left(_) => panic!("it stopped by itself"),
    }
}

/// The byte of each sector.
fn read(image: &Image, sector: usize, count: usize) -> Vec<u8> {
    let to = buffers(count * SECTOR);
    let io = Io::Read { offset: (sector * SECTOR) as u64, to: to.clone() };
    perform(image, io).unwrap();
    let mut bytes = Vec::new();
    { to }.read_to_end(&mut bytes).unwrap();
    let sectors = bytes.chunks_exact(SECTOR);
    sectors
        .map(|sector| {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is of two writes");
            sector[0]
        })
        .collect()
}

fn write(image: &Image, sector: usize, count: usize, byte: u8) {
    let from = buffers(count * SECTOR);
    { from.clone() }.write_all(&vec![byte; count * SECTOR]).unwrap();
    perform(image, Io::Write { offset: (sector * SECTOR) as u64, from }).unwrap();
}

#[derive(Debug, Clone)]
enum Op {
    Read(usize, usize),
    Write(usize, usize, u8),
    Zero(usize, usize, bool),
    Discard(usize, usize),
    Flush,
    Reopen,
    /// It is saved, and goes on over that.
    Save,
    /// Power goes at a flush after so many syncs, or without one; what else is on the disk then is by chance.
    Crash(Option<u32>, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..SECTORS).prop_flat_map(|sector| (Just(sector), 0..(SECTORS - sector).min(40) + 1));
    prop_oneof![
        3 => range().prop_map(|(sector, count)| Op::Read(sector, count)),
        6 => (range(), any::<u8>()).prop_map(|((sector, count), byte)| Op::Write(sector, count, byte)),
        2 => (range(), any::<bool>()).prop_map(|((sector, count), unmap)| Op::Zero(sector, count, unmap)),
        1 => range().prop_map(|(sector, count)| Op::Discard(sector, count)),
        2 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::Save),
        2 => (prop::option::of(0..2u32), any::<u64>()).prop_map(|(syncs, seed)| Op::Crash(syncs, seed)),
    ]
}

/// A disk, what each of its sectors reads as, and what it may read as after a crash.
struct Machine {
    disk: config::Disk,
    image: Option<Image>,
    now: Vec<u8>,
    possible: Vec<BTreeSet<u8>>,
    saved: u32,
}

impl Machine {
    fn new(disk: &config::Disk) -> Self {
        let now: Vec<_> = (0..SECTORS).map(base_byte).collect();
        let mut machine = Self { disk: disk.clone(), image: None, possible: Vec::new(), now, saved: 0 };
        machine.settled();
        machine.open();
        machine
    }

    fn overlay(&self) -> &Path {
        match &self.disk.overlay {
            Some(config::Overlay::Kept(path)) => path,
            _ => panic!("it has none"),
        }
    }

    fn open(&mut self) {
        // The file before it is closed first, as at the end of a run.
        self.image = None;
        let mut image = open_again(|| Image::open(&self.disk));
        image.sync = sync;
        self.image = Some(image);
        let stable = fs::read(self.overlay()).unwrap();
        POWER.set(Power { stable, syncs: u32::MAX });
    }

    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn settled(&mut self) {
        self.possible = self.now.iter().map(|byte| BTreeSet::from([*byte])).collect();
    }

    fn written(&mut self, sector: usize, count: usize, byte: u8) {
        for sector in sector..sector + count {
            self.now[sector] = byte;
            self.possible[sector].insert(byte);
        }
    }

    fn crash(&mut self, mut seed: u64) {
        let path = self.overlay().to_owned();
        let mut bytes = fs::read(&path).unwrap();
        let stable = POWER.take().stable;
        let map = map::BLOCK..2 * map::BLOCK;
        let mut at = 0;
        while at < bytes.len() {
            // Of the map each byte is old or new for itself, which is worse than any disk.
            let len = if map.contains(&at) { 1 } else { SECTOR };
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if seed >> 63 == 0 {
                bytes[at..at + len].copy_from_slice(&stable[at..at + len]);
            }
            at += len;
        }
        self.image = None;
        fs::write(&path, bytes).unwrap();
        self.open();
        self.now = read(self.image(), 0, SECTORS);
        for (sector, (byte, possible)) in self.now.iter().zip(&self.possible).enumerate() {
            assert!(possible.contains(byte), "sector {sector} is {byte}, and could be {possible:?}");
        }
        self.settled();
    }

    fn does(&mut self, op: Op) {
        let range = |sector: usize, count: usize| ((sector * SECTOR) as u64, (count * SECTOR) as u64);
        match op {
            Op::Read(sector, count) => {
                assert_eq!(read(self.image(), sector, count), self.now[sector..sector + count]);
            }
            Op::Write(sector, count, byte) => {
                write(self.image(), sector, count, byte);
                self.written(sector, count, byte);
            }
            Op::Zero(sector, count, unmap) => {
                let (offset, len) = range(sector, count);
                perform(self.image(), Io::WriteZeroes { offset, len, unmap }).unwrap();
                self.written(sector, count, 0);
            }
            Op::Discard(sector, count) => {
                let (offset, len) = range(sector, count);
                perform(self.image(), Io::Discard { offset, len }).unwrap();
                for (i, byte) in read(self.image(), sector, count).into_iter().enumerate() {
                    let was = self.now[sector + i];
                    assert!(byte == 0 || byte == was, "it reads as {byte} and not as {was} or nothing");
                    self.written(sector + i, 1, byte);
                }
            }
            Op::Flush => {
                perform(self.image(), Io::Flush).unwrap();
                self.settled();
            }
            Op::Reopen => {
                perform(self.image(), Io::Flush).unwrap();
                self.settled();
                self.open();
            }
            Op::Save => {
                let folder = self.overlay().parent().unwrap().to_owned();
                self.saved += 1;
                let [lower, overlay] =
                    ["lower", "overlay"].map(|name| folder.join(format!("{name}{}", self.saved)));
                self.image().save(&File::create(&lower).unwrap()).unwrap();
                self.disk.lower = Some(lower);
                self.disk.overlay = Some(config::Overlay::Kept(overlay));
                self.settled();
                self.open();
            }
            Op::Crash(syncs, seed) => {
                if let Some(syncs) = syncs {
                    POWER.with_borrow_mut(|power| power.syncs = syncs);
                    if perform(self.image(), Io::Flush).is_ok() {
                        self.settled();
                    }
                }
                self.crash(seed);
            }
        }
    }
}

#[test]
fn random_requests_agree_with_a_model_that_loses_power_now_and_then() {
    let config = Config { cases: 150, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&prop::collection::vec(op(), 1..40), |ops| {
        let (_keep, disk) = base();
        let before = fs::read(&disk.path).unwrap();
        let mut machine = Machine::new(&disk);
        for op in ops {
            machine.does(op);
        }
        assert_eq!(read(machine.image(), 0, SECTORS), machine.now);
        assert!(fs::read(&disk.path).unwrap() == before, "the base stays as it is");
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn after_a_sync_that_failed_no_flush_succeeds_and_no_cluster_comes() {
    let (_keep, disk) = base();
    let mut machine = Machine::new(&disk);
    write(machine.image(), 16, 8, 0xaa);
    POWER.with_borrow_mut(|power| power.syncs = 0);
    for _ in 0..2 {
        assert!(perform(machine.image(), Io::Flush).is_err());
        // The kernel has dropped what it could not write, and says so once.
        POWER.with_borrow_mut(|power| power.syncs = u32::MAX);
    }
    assert_eq!(read(machine.image(), 16, 8), [0xaa; 8]);
    machine.open();
    assert_eq!(read(machine.image(), 16, 8), machine.now[16..24]);
}

#[test]
fn an_overlay_that_is_thrown_away_is_never_synced() {
    let (keep, mut disk) = base();
    disk.overlay = Some(config::Overlay::Temporary);
    let mut image = Image::open(&disk).unwrap();
    image.sync = |_| panic!("for nobody");
    write(&image, 3, 2, 0xbb);
    perform(&image, Io::Flush).unwrap();
    assert_eq!(read(&image, 2, 4), [3, 0xbb, 0xbb, 6]);
    assert!(!image.is_unsaved());
    drop(image);
    assert_eq!(read(&Image::open(&disk).unwrap(), 2, 4), [3, 4, 5, 6]);
    assert_eq!(fs::read_dir(&keep).unwrap().count(), 1, "there is no file");
}

#[test]
fn a_saved_overlay_can_be_read_alone_and_is_not_written_to() {
    let (keep, mut disk) = base();
    disk.overlay = Some(config::Overlay::Temporary);
    let image = Image::open(&disk).unwrap();
    write(&image, 5, 20, 0xcc);
    let lower = keep.path().join("lower");
    image.save(&File::create(&lower).unwrap()).unwrap();
    let before = fs::read(&lower).unwrap();
    disk.lower = Some(lower.clone());
    let over = Image::open(&disk).unwrap();
    // A part of a cluster of which the lower one has all, and one of which it has nothing.
    write(&over, 10, 1, 0xdd);
    write(&over, 100, 1, 0xdd);
    perform(&over, Io::Discard { offset: 0, len: 400 * 512 }).unwrap();
    perform(&over, Io::WriteZeroes { offset: 8 * 512, len: 512, unmap: true }).unwrap();
    assert_eq!(read(&over, 5, 3), [0xcc; 3], "what is below is not discarded");
    drop(over);
    (disk.readonly, disk.overlay) = (true, None);
    let alone = Image::open(&disk).unwrap();
    assert_eq!(read(&alone, 4, 22)[..], [&[5][..], &[0xcc; 20], &[26]].concat());
    let from = buffers(512);
    assert!(perform(&alone, Io::Write { offset: 0, from }).is_err());
    assert!(fs::read(&lower).unwrap() == before);
    // Of another base it is refused as any overlay is.
    fs::write(&disk.path, [1; 512]).unwrap();
    drop(alone);
    assert!(matches!(Image::open(&disk), Err(Error::Unfit { unfit: Unfit::OtherBase { .. }, .. })));
}

#[test]
fn parts_of_a_cluster_that_threads_write_at_once_are_all_there() {
    let (_keep, disk) = base();
    let image = Image::open(&disk).unwrap();
    let clusters = SECTORS / 8;
    // Both are at the same cluster.
    let turn = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for odd in 0..2 {
            let (image, turn) = (&image, &turn);
            scope.spawn(move || {
                for cluster in 0..clusters {
                    turn.fetch_add(1, Ordering::SeqCst);
                    while turn.load(Ordering::SeqCst) < 2 * (cluster as u32 + 1) {
                        std::thread::yield_now();
                    }
                    for sector in [odd, odd + 2, odd + 4] {
                        write(image, 8 * cluster + sector, 1, 0xf0 | odd as u8);
                    }
                }
            });
        }
    });
    for cluster in 0..clusters {
        let sectors = read(&image, 8 * cluster, 8);
        assert_eq!(sectors[..6], [0xf0, 0xf1, 0xf0, 0xf1, 0xf0, 0xf1], "cluster {cluster}");
        assert_eq!(sectors[6..], [base_byte(8 * cluster + 6), base_byte(8 * cluster + 7)]);
    }
}

#[test]
fn a_disk_that_is_too_large_for_a_map_is_refused() {
    let (keep, mut disk) = base();
    disk.path = keep.path().join("large");
    let made = File::create(&disk.path).unwrap().set_len(LARGEST + 512);
    if made.is_err() {
        eprintln!("SKIP: an overlay that is too large: the file system has no such files");
        return;
    }
    assert!(matches!(Image::open(&disk), Err(Error::TooLarge { size, .. }) if size == LARGEST + 512));
    assert!(!keep.path().join("overlay").exists());
}
