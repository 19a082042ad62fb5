//! A network device with two pairs of queues: rings, headers and commands of any content, and frames in any pieces from the peer.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::net::{Port, from_descriptor};
use vmm_monitor::state::Saved;
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::net::Net;
use vmm_monitor::virtio::testing::{RING, RINGS, queues, ram};

static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x8000));

fuzz_target!(|data: &[u8]| {
    let Some((head, mut rest)) = data.split_at_checked(4) else { return };
    let pair = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, from_descriptor(theirs.into(), 0).unwrap())
    };
    let ((mut host, one), (mut other, two)) = (pair(), pair());
    let port = Port::new(vec![one, two], [2, 0, 0, 0, 0, 1]);
    let mut net = Net::new(port.clone(), Some(1500));

    let mut queues = queues(&RAM, &net.traits().queues, head[0] & 1 != 0);
    let features = u64::from_le_bytes(std::array::from_fn(|i| head[1 + i % 3]));
    net.accept(if head[0] & 2 != 0 { u64::MAX } else { features });
    net.start();
    while let Some((patch, more)) = rest.split_at_checked(4) {
        let index = usize::from(patch[0]) % queues.len();
        let at = RINGS - 0x100 + RING * index as u64 + 2 * u64::from(patch[1]);
        let len = usize::from(patch[2]).min(more.len());
        RAM.write_slice(&more[..len], GuestAddress(at)).unwrap();
        rest = &more[len..];
        if patch[3] & 1 != 0 {
            if patch[3] & 32 != 0 {
                let _ = host.write(&(len as u32).to_be_bytes());
            }
            let _ = host.write(&more[..len]);
            let _ = other.write(&more[..len]);
        }
        if patch[3] & 2 != 0 {
            net.on_queue(index, &mut queues);
        }
        if patch[3] & 4 != 0 {
            for source in 0..net.event_sources().len() {
                net.on_event(source, &mut queues);
            }
        }
        if patch[3] & 8 != 0 {
            net.drain(&mut queues, Instant::now()).expect("never waits");
            assert!(queues.iter().all(|queue| queue.in_flight() == 0), "all is put back");
            let saved = net.save_bytes();
            net = Net::new(port.clone(), Some(1500));
            net.restore_bytes(&saved).expect("what was saved is taken back");
            assert_eq!(net.save_bytes(), saved);
            net.resume(&mut queues);
        }
        if patch[3] & 16 != 0 {
            let _ = host.read(&mut [0; 4096]);
        }
    }
    net.finish(&mut queues, Instant::now()).expect("never waits");
    net.drain(&mut queues, Instant::now()).expect("never waits");
    net.reset();
});
