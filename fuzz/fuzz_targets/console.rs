//! A console with several ports: queues of any content, and input from the host's end.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::chardev::Endpoint;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::virtio::console::Console;
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::testing::{RING, RINGS, queues, ram};

static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x8000));

fuzz_target!(|data: &[u8]| {
    let Some((head, mut rest)) = data.split_at_checked(4) else { return };
    let pair = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, Endpoint::from_stream(theirs).unwrap())
    };
    let (mut host, end) = pair();
    let (mut other, named) = pair();
    let named = if head[0] & 1 != 0 { vec![("log".to_owned(), named)] } else { Vec::new() };
    let mut console = Console::new(end, named).expect("a timer");

    let mut queues = queues(&RAM, &console.traits().queues, head[0] & 2 != 0);
    console.accept(if head[0] & 4 != 0 { u64::MAX } else { 0 });
    console.start();
    while let Some((patch, more)) = rest.split_at_checked(4) {
        let index = usize::from(patch[0]) % queues.len();
        let at = RINGS - 0x100 + RING * index as u64 + 2 * u64::from(patch[1]);
        let len = usize::from(patch[2]).min(more.len());
        RAM.write_slice(&more[..len], GuestAddress(at)).unwrap();
        rest = &more[len..];
        if patch[3] & 1 != 0 {
            let _ = host.write(&more[..len]);
            let _ = other.write(&more[..len]);
        }
        if patch[3] & 2 != 0 {
            console.on_queue(index, &mut queues);
        }
        if patch[3] & 4 != 0 {
            for source in 0..console.event_sources().len() {
                console.on_event(source, &mut queues);
            }
        }
        if patch[3] & 8 != 0 && len > 0 {
            let offset = usize::from(patch[1]) % console.config().len();
            let len = len.min(console.config().len() - offset).min(8);
            console.write_config(offset, &more[..len]);
        }
        if patch[3] & 16 != 0 {
            let _ = host.read(&mut [0; 4096]);
        }
    }
    console.drain(&mut queues, Instant::now()).expect("never waits");
    console.reset();
});
