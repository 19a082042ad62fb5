//! A virtqueue whose rings and descriptors hold whatever the fuzzer likes, and change between the device's looks.
#![no_main]

use std::io::{Read, Write};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::virtio::queue::{Position, Setup, Virtqueue};
use vmm_monitor::virtio::testing::{CountingNotifier, ram};

static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x4000));
const SIZE: u16 = 16;

fuzz_target!(|data: &[u8]| {
    let Some((head, mut rest)) = data.split_at_checked(8) else { return };
    let number = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    RAM.write_slice(&[0; 0x4000], GuestAddress(0)).unwrap();
    let mut queue = Virtqueue::new(RAM.clone(), Arc::new(CountingNotifier::default()), 0, SIZE);
    let setup = Setup { size: SIZE, ready: true, descriptors: 0x1000, available: 0x1100, used: 0x1200 };
    let position = Position { next_available: number(0), next_used: number(2) };
    assert!(queue.enable(&setup, position, head[4] & 1 != 0));
    let mut taken = Vec::new();
    // Rounds of: the driver writes somewhere around its rings, the device looks.
    while let Some((patch, more)) = rest.split_at_checked(4) {
        let at = 0xff0 + u64::from(u16::from_le_bytes([patch[0], patch[1]]) % 0x300);
        let len = usize::from(patch[2]).min(more.len());
        RAM.write_slice(&more[..len], GuestAddress(at)).unwrap();
        rest = &more[len..];
        for _ in 0..64 {
            let Some(mut chain) = queue.pop() else { break };
            assert!(chain.head < SIZE && !taken.contains(&chain.head));
            let (readable, writable) = (chain.readable.len(), chain.writable.len());
            // Whatever the descriptors say, each part lies in RAM.
            assert!(chain.readable.slices().all(|slice| slice.len() <= 0x4000));
            let mut bytes = [0; 100];
            assert_eq!(chain.readable.read(&mut bytes).unwrap(), readable.min(100));
            if patch[3] & 1 != 0 {
                assert_eq!(chain.writable.write(&bytes).unwrap(), writable.min(100));
            }
            taken.push(chain.head);
            if patch[3] & 2 != 0 {
                let head = taken.swap_remove(usize::from(patch[3] >> 2) % taken.len());
                queue.complete(head, writable as u32);
            }
        }
        assert!(taken.len() <= usize::from(SIZE));
        queue.notify();
    }
    for head in taken {
        queue.complete(head, 0);
    }
    queue.notify();
    assert_eq!(queue.in_flight(), 0);
});
