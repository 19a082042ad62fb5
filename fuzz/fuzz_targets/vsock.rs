//! A socket device: rings and packets of any content, programs on the host that call, answer, write, read and go at any time.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::state::Saved;
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::testing::{RING, RINGS, queues, ram};
use vmm_monitor::virtio::vsock::Vsock;
use vmm_monitor::vsock::Sockets;

static RAM: LazyLock<Arc<GuestRam>> = LazyLock::new(|| ram(0x8000));
/// The sockets of the guest, which outlive its devices, and who listens on port 1.
static HOST: LazyLock<(Sockets, UnixListener, PathBuf)> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("vmm-fuzz-{}", std::process::id()));
    let sockets = Sockets::open(&path).unwrap();
    let port = path.with_file_name(format!("vmm-fuzz-{}_1", std::process::id()));
    let _ = std::fs::remove_file(&port);
    let listener = UnixListener::bind(&port).unwrap();
    listener.set_nonblocking(true).unwrap();
    (sockets, listener, path)
});

fuzz_target!(|data: &[u8]| {
    let Some((head, mut rest)) = data.split_at_checked(4) else { return };
    let (sockets, listener, path) = &*HOST;
    while listener.accept().is_ok() {}
    // Who called and was not taken in before: the queue of the socket is short, and a call waits for room there.
    while !sockets.host().events().is_empty() {}
    (0..4).for_each(|_| drop(sockets.host().events()));
    let mut calls = 0;
    let mut programs: Vec<UnixStream> = Vec::new();
    let mut vsock = Vsock::new(sockets.clone(), 3);

    let mut queues = queues(&RAM, &vsock.traits().queues, head[0] & 1 != 0);
    // Packets that reach further than arbitrary bytes: to the port that somebody listens on.
    let mut packet = [0; 44];
    (packet[0], packet[8], packet[16], packet[20], packet[28], packet[30]) = (3, 2, 9, 1, 1, 1);
    packet[36..40].copy_from_slice(&0x1_0000u32.to_le_bytes());
    for i in 0..8u8 {
        packet[30] = i;
        RAM.write_slice(&packet, GuestAddress(0x4000 + 0x40 * u64::from(i))).unwrap();
    }
    vsock.accept(u64::from(head[1]));
    vsock.start();
    while let Some((patch, more)) = rest.split_at_checked(4) {
        let index = usize::from(patch[0]) % queues.len();
        let area = if patch[3] & 64 != 0 { 0x4000 } else { RINGS - 0x100 + RING * index as u64 };
        let len = usize::from(patch[2]).min(more.len());
        RAM.write_slice(&more[..len], GuestAddress(area + 2 * u64::from(patch[1]))).unwrap();
        rest = &more[len..];
        if patch[3] & 1 != 0 && calls < 64 {
            calls += 1;
            match programs.len() {
                0..8 => programs.extend(UnixStream::connect(path).ok().inspect(|program| {
                    program.set_nonblocking(true).unwrap();
                    let _ = { program }.write_all(b"CONNECT 9\n");
                })),
                _ => drop(programs.remove(0)),
            }
        }
        if let Ok((program, _)) = listener.accept() {
            program.set_nonblocking(true).unwrap();
            programs.push(program);
        }
        if patch[3] & 32 != 0 {
            programs.iter_mut().for_each(|program| drop(program.write(&more[..len])));
        }
        if patch[3] & 2 != 0 {
            vsock.on_queue(index, &mut queues);
        }
        if patch[3] & 4 != 0 {
            vsock.on_event(0, &mut queues);
        }
        if patch[3] & 8 != 0 {
            vsock.drain(&mut queues, Instant::now()).expect("never waits");
            assert!(queues.iter().all(|queue| queue.in_flight() == 0), "all is put back");
            let saved = vsock.save_bytes();
            vsock = Vsock::new(sockets.clone(), 3);
            vsock.restore_bytes(&saved).expect("what was saved is taken back");
            assert_eq!(vsock.save_bytes(), saved);
            vsock.resume(&mut queues);
        }
        if patch[3] & 128 != 0 {
            let _ = vsock.finish(&mut queues, Instant::now());
            vsock.reset();
            vsock.accept(u64::from(head[1]));
            vsock.start();
        }
        if patch[3] & 16 != 0 {
            programs.iter_mut().for_each(|program| drop(program.read(&mut [0; 4096])));
        }
    }
    // Readers who stand still are not waited for here.
    let _ = vsock.finish(&mut queues, Instant::now());
    vsock.drain(&mut queues, Instant::now()).expect("never waits");
    vsock.reset();
});
