//! fw_cfg: any sequence of port accesses, with DMA requests of any content at any place.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::bus::Device;
use vmm_monitor::legacy::fw_cfg::{FwCfg, Items};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::state::Saved;
use vmm_monitor::virtio::testing::ram;

static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x4000));

fuzz_target!(|data: &[u8]| {
    let mut items = Items::default();
    items.add_bytes(5, [1, 0]);
    items.add_bytes(0x11, vec![7; 0x1234]);
    items.add_file("etc/e820", vec![9; 40]);
    let mut device = FwCfg::new(items, RAM.clone());
    let mut rest = data;
    while let Some((&[what, width], more)) = rest.split_first_chunk() {
        let (offset, width) = (u64::from(what & 15), usize::from(width % 8) + 1);
        let Some((bytes, more)) = more.split_at_checked(if what & 16 != 0 { 18 } else { width }) else {
            return;
        };
        rest = more;
        match what >> 4 {
            // A request, near the start of memory or across its end, and its doorbell.
            1 | 3 => {
                let at = u32::from(u16::from_le_bytes([bytes[0], bytes[1]]) % 0x4010);
                let _ = RAM.write_slice(&bytes[2..], GuestAddress(at.into()));
                device.write(8, &at.to_be_bytes());
            }
            0 | 2 => _ = device.write(offset, bytes),
            _ => device.read(offset, &mut [0; 8][..width]),
        }
        let saved = device.save_bytes();
        device.restore_bytes(&saved).unwrap();
    }
});
