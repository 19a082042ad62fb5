//! fw_cfg against guests of every kind: one life with save and restore in the middle, and any sequence of port accesses and DMA
//! requests, which must stay in RAM, change nothing but what was asked for, and never panic.

use std::io;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::bus::Device;
use vmm_monitor::legacy::fw_cfg::{Content, FwCfg, Items, Source};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::state::Saved;

/// A file of a length that no memory holds: each byte is its place.
struct Endless;

impl Source for Endless {
    fn len(&self) -> u64 {
        1 << 40
    }
    fn byte(&self, offset: u64) -> io::Result<u8> {
        Ok(offset as u8)
    }
    fn copy(&self, offset: u64, len: u64, ram: &GuestRam, to: u64) -> io::Result<()> {
        assert!(offset + len <= self.len(), "more than there is");
        let bytes: Vec<_> = (offset..offset + len).map(|at| at as u8).collect();
        ram.write_slice(&bytes, GuestAddress(to)).map_err(io::Error::other)
    }
    fn bytes(&self) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::OutOfMemory.into())
    }
}

const RAM: usize = 0x4000;

fn ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM), (GuestAddress(1 << 32), RAM)]).unwrap())
}

fn device(ram: &Arc<GuestRam>) -> FwCfg {
    let mut items = Items::default();
    items.add_bytes(5, [2, 0]);
    items.add(0x11, Content::Source(Box::new(Endless)));
    items.add_file("etc/e820", vec![9; 40]);
    FwCfg::new(items, ram.clone())
}

fn request(control: u32, length: u32, address: u64) -> Vec<u8> {
    [&control.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()].concat()
}

fn byte(device: &mut FwCfg) -> u8 {
    let mut byte = [0xff];
    device.read(1, &mut byte);
    byte[0]
}

#[test]
fn it_goes_on_where_it_was_saved() {
    let ram = ram();
    let mut one = device(&ram);
    one.write(0, &0x11u16.to_le_bytes());
    assert_eq!([byte(&mut one), byte(&mut one)], [0, 1]);
    one.write(4, &1u32.to_be_bytes());
    let saved = one.save_bytes();
    let mut other = device(&ram);
    other.restore_bytes(&saved).unwrap();
    assert_eq!(other.save_bytes(), saved);
    assert_eq!(byte(&mut other), 2);
    // The upper half of the DMA address was part of it: the request lies above 4 GiB.
    ram.write_slice(&request(0b10, 3, 0x100), GuestAddress(1 << 32)).unwrap();
    other.write(8, &0u32.to_be_bytes());
    let mut read = [0; 3];
    ram.read_slice(&mut read, GuestAddress(0x100)).unwrap();
    assert_eq!(read, [3, 4, 5]);
    for cut in 0..saved.len() {
        assert!(device(&ram).restore_bytes(&saved[..cut]).is_err(), "{cut}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Dma { control: u32, length: u32, address: u64, at: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || prop_oneof![0..0x5000u64, (1u64 << 32) - 8..(1 << 32) + 0x5000, any::<u64>()];
    let item = prop_oneof![Just(0u32), Just(1), Just(5), Just(0x11), Just(0x19), Just(0x20), 0..0x1_0000u32];
    let control = (item, prop_oneof![0..32u32, any::<u32>()]).prop_map(|(item, bits)| item << 16 ^ bits);
    let dma = (control, prop_oneof![0..0x5000u32, any::<u32>()], place(), place());
    let step = prop_oneof![
        (0..12u64, proptest::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, data)| Step::Write(at, data)),
        (0..12u64, 1..9usize).prop_map(|(at, len)| Step::Read(at, len)),
        dma.prop_map(|(control, length, address, at)| Step::Dma { control, length, address, at }),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #[test]
    fn no_guest_breaks_it(steps in steps()) {
        let ram = ram();
        let mut device = device(&ram);
        for step in steps {
            match step {
                Step::Write(at, data) => _ = device.write(at, &data),
                Step::Read(at, len) => device.read(at, &mut vec![0; len]),
                Step::Dma { control, length, address, at } => {
                    // It may not lie in RAM, or not all of it: then there is nothing to read.
                    let _ = ram.write_slice(&request(control, length, address), GuestAddress(at));
                    device.write(4, &((at >> 32) as u32).to_be_bytes());
                    device.write(8, &(at as u32).to_be_bytes());
                }
            }
            let saved = device.save_bytes();
            device.restore_bytes(&saved).unwrap();
        }
    }
}
