//! Every virtio device, as the generic tests see it: how to build one, and one exchange with it.
//!
//! To add a device, add a [`Subject`] to [`all`].

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use tempfile::TempDir;
use vmm::config;
use vmm::disk::Raw;
use vmm::virtio::block::Block;
use vmm::virtio::device::VirtioDevice;
use vmm::virtio::rng::Rng;

use crate::guest::{DATA, Guest};

/// A device under test.
pub struct Subject {
    pub name: &'static str,
    /// Builds it, always with the same configuration and the same things behind it. The last one built is gone by then.
    pub build: Box<dyn Fn() -> Box<dyn VirtioDevice>>,
    /// One exchange between a running device and its driver, with its outcome checked. Runs any number of times.
    pub traffic: Box<dyn Fn(&mut Guest)>,
    /// What it stands on, for as long as it is used.
    _keep: Option<TempDir>,
}

/// The list.
pub fn all() -> Vec<Subject> {
    vec![block(), block_readonly(), rng()]
}

fn rng() -> Subject {
    Subject {
        name: "rng",
        build: Box::new(|| Box::new(Rng)),
        traffic: Box::new(|guest| {
            guest.store(DATA, &[0; 64]);
            assert_eq!(guest.request(0, &[], &[(DATA, 24), (DATA + 32, 32)]), 56);
            assert_ne!(guest.load(DATA, 24), [0; 24]);
            assert_eq!(guest.load(DATA + 24, 8), [0; 8], "nothing between the buffers");
            assert_ne!(guest.load(DATA + 32, 32), [0; 32]);
        }),
        _keep: None,
    }
}

/// An image of `size` bytes, each sector full of its own number.
pub fn image(size: u64) -> (TempDir, config::Disk) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.img");
    let file = File::create(&path).unwrap();
    for sector in 0..size / 512 {
        file.write_all_at(&[sector as u8; 512], sector * 512).unwrap();
    }
    let disk = config::Disk { path, readonly: false, serial: None, block_size: None };
    (dir, disk)
}

/// The device on an image, as a machine would build it.
pub fn open(disk: &config::Disk) -> Box<dyn VirtioDevice> {
    Box::new(Block::new(Box::new(Raw::open(disk).unwrap()), "conformance"))
}

/// A block request's header at `at`.
pub fn header(guest: &Guest, at: u64, kind: u32, sector: u64) {
    guest.store(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
}

fn block() -> Subject {
    let (keep, disk) = image(1 << 20);
    let fill = AtomicU8::new(1);
    Subject {
        name: "block",
        build: Box::new(move || open(&disk)),
        traffic: Box::new(move |guest| {
            let (out, back, status) = (DATA + 0x1000, DATA + 0x3000, DATA + 0x100);
            let byte = fill.fetch_add(1, Ordering::Relaxed);
            guest.store(out, &[byte; 1024]);
            guest.store(status, &[0xff; 3]);
            header(guest, DATA, 1, 40);
            let parts = [(DATA, 16), (out, 512), (out + 512, 512)];
            assert_eq!(guest.request(0, &parts, &[(status, 1)]), 1);
            header(guest, DATA, 4, 0);
            assert_eq!(guest.request(0, &[(DATA, 16)], &[(status + 1, 1)]), 1);
            header(guest, DATA, 0, 39);
            assert_eq!(guest.request(0, &[(DATA, 16)], &[(back, 2048), (status + 2, 1)]), 2049);
            assert_eq!(guest.load(status, 3), [0; 3]);
            let expect = [vec![39; 512], vec![byte; 1024], vec![42; 512]].concat();
            assert_eq!(guest.load(back, 2048), expect);
        }),
        _keep: Some(keep),
    }
}

fn block_readonly() -> Subject {
    let (keep, mut disk) = image(64 << 10);
    disk.readonly = true;
    Subject {
        name: "block, read-only",
        build: Box::new(move || open(&disk)),
        traffic: Box::new(|guest| {
            let (data, status) = (DATA + 0x1000, DATA + 0x100);
            header(guest, DATA, 0, 7);
            assert_eq!(guest.request(0, &[(DATA, 16)], &[(data, 512), (status, 1)]), 513);
            assert_eq!((guest.load(status, 1), guest.load(data, 512)), (vec![0], vec![7; 512]));
            header(guest, DATA, 1, 7);
            guest.request(0, &[(DATA, 16), (data, 512)], &[(status, 1)]);
            assert_eq!(guest.load(status, 1), [1], "a write is an error");
        }),
        _keep: Some(keep),
    }
}
