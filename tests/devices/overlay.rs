//! virtio-blk on an image with an overlay: what a guest writes, what the next one finds, and what the image is afterwards.

use std::fs::{self, read};

use tempfile::TempDir;
use vmm_monitor::config;
use vmm_monitor::disk::{Error, Raw};

use crate::block::*;
use crate::guest::Guest;
use crate::subjects;

/// An image of `size` bytes, each sector full of its own number, with an overlay beside it.
fn image(size: u64) -> (TempDir, config::Disk) {
    let (dir, mut disk) = subjects::image(size);
    disk.overlay = Some(config::Overlay::Kept(dir.path().join("overlay")));
    (dir, disk)
}

/// Disk `disk` as a guest reads it.
fn whole(vm: &mut Guest) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < SIZE as usize {
        assert_eq!(ask(vm, IN, bytes.len() as u64 / 512, &[], &[(BUFFER, 16 << 10)]).0, OK);
        bytes.extend(vm.load(BUFFER, 16 << 10));
    }
    bytes
}

fn fill(vm: &mut Guest, sector: u64, byte: u8) {
    vm.store(BUFFER, &[byte; 512]);
    assert_eq!(ask(vm, OUT, sector, &[(BUFFER, 512)], &[]), (OK, 1));
}

#[test]
fn random_requests_agree_with_a_model_and_the_image_stays() {
    agrees_with_a_model(image, |disk, paused, model| {
        // Nothing was flushed but by chance: the next guest finds it, because this one's disk is closed in order.
        drop(paused);
        let (_keep, before) = subjects::image(SIZE);
        whole(&mut guest(disk)) == model && read(&disk.path).unwrap() == read(before.path).unwrap()
    });
}

#[test]
fn whatever_a_guest_writes_to_its_first_sectors_it_is_a_raw_disk() {
    let (_keep, disk) = image(SIZE);
    let mut vm = guest(&disk);
    for mark in [b"QFI\xfb\0\0\0\x03", b"VMMOVRLY"] {
        vm.store(BUFFER, &[&mark[..], &[0; 504]].concat());
        assert_eq!(ask(&mut vm, OUT, 0, &[(BUFFER, 512)], &[]).0, OK);
        drop(vm);
        vm = guest(&disk);
        let bytes = whole(&mut vm);
        assert_eq!(bytes[..8], mark[..], "byte for byte what was written");
        assert_eq!(bytes[512], 1, "and the image behind it");
    }
}

#[test]
fn one_image_has_many_overlays_and_each_one_writer() {
    let (keep, disk) = image(SIZE);
    let with = |name: &str| config::Disk {
        overlay: Some(config::Overlay::Kept(keep.path().join(name))),
        ..disk.clone()
    };
    let thrown_away = config::Disk { overlay: Some(config::Overlay::Temporary), ..disk.clone() };
    let mut vms = [guest(&with("a")), guest(&with("b")), guest(&thrown_away), guest(&thrown_away)];
    for (byte, vm) in (1..).zip(&mut vms) {
        fill(vm, 3, byte);
    }
    let locked = |disk: &config::Disk| matches!(Raw::open(disk), Err(Error::Locked { .. }));
    let plain = config::Disk { overlay: None, ..disk.clone() };
    assert!(locked(&with("a")) && locked(&plain), "what is in use is not written to by others");
    assert!(!locked(&config::Disk { readonly: true, ..plain }), "but read");
    for (byte, vm) in (1..).zip(&mut vms) {
        assert_eq!(whole(vm)[3 * 512], byte, "each has its own");
        assert_eq!(
            vm.features & (1 << 5 | 1 << 13 | 1 << 14),
            1 << 13 | 1 << 14,
            "and may write and discard"
        );
    }
    drop(vms);
    assert_eq!(whole(&mut guest(&with("b")))[3 * 512], 2);
    assert_eq!(whole(&mut guest(&thrown_away))[3 * 512], 3, "as in the image");
}

#[test]
fn an_overlay_takes_only_the_space_of_what_was_written_and_a_discard_gives_it_back() {
    use std::os::unix::fs::MetadataExt;
    let (keep, disk) = image(SIZE);
    let blocks = || fs::metadata(keep.path().join("overlay")).unwrap().blocks();
    let mut vm = guest(&disk);
    let empty = blocks();
    for sector in 0..256 {
        fill(&mut vm, sector, 0xcc);
    }
    assert_eq!(ask(&mut vm, FLUSH, 0, &[], &[]).0, OK);
    let full = blocks();
    assert!((256..512).contains(&(full - empty)), "{empty} and {full} blocks of 512 bytes");
    assert_eq!(range(&mut vm, DISCARD, 0, 512, 0), OK);
    if blocks() == full {
        eprintln!(
            "SKIP: discards of an overlay, their last part: the file system under {} gives no space back",
            keep.path().display()
        );
    }
}
