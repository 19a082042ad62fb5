//! Every virtio device, as the generic tests see it: how to build one, and one exchange with it.
//!
//! To add a device, add a [`Subject`] to [`all`].

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmm_monitor::chardev::Endpoint;
use vmm_monitor::config;
use vmm_monitor::disk::Raw;
use vmm_monitor::net::{Link, Port, from_descriptor};
use vmm_monitor::virtio::block::Block;
use vmm_monitor::virtio::console::Console;
use vmm_monitor::virtio::device::VirtioDevice;
use vmm_monitor::virtio::net::Net;
use vmm_monitor::virtio::rng::Rng;

use crate::fs;
use crate::guest::{DATA, Guest};
use crate::vsock_driver;

/// A device under test.
pub struct Subject {
    pub name: &'static str,
    /// Builds it, always with the same configuration and the same things behind it. The last one built is gone by then.
    pub build: Box<dyn Fn() -> Box<dyn VirtioDevice>>,
    /// One exchange between a running device and its driver, with its outcome checked. Runs any number of times.
    pub traffic: Box<dyn Fn(&mut Guest)>,
    /// A queue from which the device takes all that is offered, whatever it is.
    pub queue: usize,
    /// What it stands on, for as long as it is used.
    _keep: Option<TempDir>,
}

/// The list.
pub fn all() -> Vec<Subject> {
    vec![
        block(512),
        block(4096),
        block_readonly(),
        rng(),
        console(),
        console_with_a_port(),
        net(NetSocket::Stream),
        net(NetSocket::Datagram),
        vsock(),
        file_system(),
    ]
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
        queue: 0,
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
    let disk = config::Disk::at(path);
    (dir, disk)
}

/// The device on an image, as a machine would build it.
pub fn open(disk: &config::Disk) -> Box<dyn VirtioDevice> {
    // Another test may be starting a process at this moment: until that has become another program it holds copies of our
    // descriptors, and with them the lock of an image that was just closed here.
    let end = Instant::now() + Duration::from_secs(10);
    let disk = loop {
        match Raw::open(disk) {
            Err(vmm_monitor::disk::Error::Locked { .. }) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => break result.unwrap(),
        }
    };
    Box::new(Block::new(Box::new(disk), "conformance"))
}

/// A block request's header at `at`.
pub fn header(guest: &Guest, at: u64, kind: u32, sector: u64) {
    guest.store(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
}

/// With blocks of any size the unit of requests is a sector.
fn block(block_size: u32) -> Subject {
    let (keep, mut disk) = image(1 << 20);
    disk.block_size = Some(block_size.to_string().parse().unwrap());
    let fill = AtomicU8::new(1);
    Subject {
        name: if block_size == 512 { "block" } else { "block, large blocks" },
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
        queue: 0,
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
        queue: 0,
        _keep: Some(keep),
    }
}

/// A host end, and the other end of it.
fn stream() -> (Endpoint, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (Endpoint::from_stream(ours).unwrap(), theirs)
}

/// Bytes both ways over a port: its receive queue, and the transmit queue behind that.
fn talk(guest: &mut Guest, receive: usize, mut host: &UnixStream, round: u32) {
    let said = format!("said in round {round}.");
    guest.store(DATA, said.as_bytes());
    let (half, len) = (said.len() as u32 / 2, said.len() as u32);
    let parts = [(DATA, half), (DATA + u64::from(half), len - half)];
    let (transmit, old) = (receive + 1, guest.rings[receive + 1].available());
    let head = guest.rings[transmit].add(&parts, &[]);
    guest.kick(transmit, old);
    // A hostile driver may have said a lot before, which nobody has read yet.
    let (mut heard, mut buf) = (Vec::new(), [0; 65536]);
    while !heard.ends_with(said.as_bytes()) {
        let len = host.read(&mut buf).expect("what the guest says");
        heard.extend(&buf[..len]);
    }
    assert_eq!(guest.rings[transmit].wait_used(10), (head, 0));
    let typed = format!("typed in round {round}\n");
    host.write_all(typed.as_bytes()).unwrap();
    assert_eq!(guest.request(receive, &[], &[(DATA + 0x100, 5), (DATA + 0x200, 100)]) as usize, typed.len());
    let got = [guest.load(DATA + 0x100, 5), guest.load(DATA + 0x200, typed.len() - 5)].concat();
    assert_eq!(got, typed.as_bytes());
}

fn console() -> Subject {
    let (end, host) = stream();
    let round = AtomicU32::new(0);
    Subject {
        name: "console",
        build: Box::new(move || Box::new(Console::new(end.clone(), vec![]).unwrap())),
        traffic: Box::new(move |guest| talk(guest, 0, &host, round.fetch_add(1, Ordering::Relaxed))),
        queue: 1,
        _keep: None,
    }
}

fn console_with_a_port() -> Subject {
    let ((main, main_host), (port, port_host)) = (stream(), stream());
    let round = AtomicU32::new(0);
    let say = |guest: &mut Guest, id: u8, event: u8, value: u8| {
        guest.store(DATA, &[id, 0, 0, 0, event, 0, value, 0]);
        guest.request(3, &[(DATA, 8)], &[]);
    };
    let hear = |guest: &mut Guest, expect: &[u8]| {
        let len = guest.request(2, &[], &[(DATA, 64)]) as usize;
        assert_eq!(guest.load(DATA, len), expect);
    };
    Subject {
        name: "console with a port",
        build: Box::new(move || {
            Box::new(Console::new(main.clone(), vec![("agent".to_owned(), port.clone())]).unwrap())
        }),
        traffic: Box::new(move |guest| {
            // DEVICE_READY; DEVICE_ADD of both.
            say(guest, 0, 0, 1);
            hear(guest, &[0, 0, 0, 0, 1, 0, 0, 0]);
            hear(guest, &[1, 0, 0, 0, 1, 0, 0, 0]);
            // PORT_READY; CONSOLE_PORT, or PORT_NAME and PORT_OPEN. Then PORT_OPEN from the driver.
            say(guest, 0, 3, 1);
            hear(guest, &[0, 0, 0, 0, 4, 0, 1, 0]);
            say(guest, 1, 3, 1);
            hear(guest, b"\x01\0\0\0\x07\0\x01\0agent");
            hear(guest, &[1, 0, 0, 0, 6, 0, 1, 0]);
            say(guest, 0, 6, 1);
            say(guest, 1, 6, 1);
            let round = round.fetch_add(1, Ordering::Relaxed);
            talk(guest, 0, &main_host, round);
            talk(guest, 4, &port_host, round);
        }),
        queue: 1,
        _keep: None,
    }
}

/// The address of each network device here.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x21];

/// What a link goes over.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum NetSocket {
    Stream,
    Datagram,
}

/// Who is at the other end of a link.
pub enum Peer {
    Stream(UnixStream),
    Datagram(UnixDatagram),
}

impl Peer {
    /// The next frame.
    pub fn receive(&mut self) -> Vec<u8> {
        match self {
            Self::Stream(stream) => {
                let mut prefix = [0; 4];
                stream.read_exact(&mut prefix).expect("a frame");
                let mut frame = vec![0; u32::from_be_bytes(prefix) as usize];
                stream.read_exact(&mut frame).expect("all of it");
                frame
            }
            Self::Datagram(socket) => {
                let mut frame = vec![0; 0x2_0000];
                let len = socket.recv(&mut frame).expect("a frame");
                frame.truncate(len);
                frame
            }
        }
    }

    pub fn send(&mut self, frame: &[u8]) {
        match self {
            Self::Stream(stream) => {
                stream.write_all(&[&(frame.len() as u32).to_be_bytes()[..], frame].concat()).unwrap();
            }
            Self::Datagram(socket) => assert_eq!(socket.send(frame).unwrap(), frame.len()),
        }
    }
}

/// A link, and the other end of it.
pub fn link(socket: NetSocket) -> (Link, Peer) {
    let patience = Some(Duration::from_secs(10));
    let (ours, peer) = match socket {
        NetSocket::Stream => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_read_timeout(patience).unwrap();
            (ours.into(), Peer::Stream(theirs))
        }
        NetSocket::Datagram => {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            theirs.set_read_timeout(patience).unwrap();
            (ours.into(), Peer::Datagram(theirs))
        }
    };
    (from_descriptor(ours, 0).unwrap(), peer)
}

/// The device on `links`, as a machine would build it.
pub fn net_on(links: &[Link]) -> Box<dyn VirtioDevice> {
    Box::new(Net::new(Port::new(links.to_vec(), MAC), None))
}

/// A frame to `to`, with `rest` behind the addresses.
pub fn frame(to: [u8; 6], rest: &[u8]) -> Vec<u8> {
    [&to[..], &[2, 9, 9, 9, 9, 9], rest].concat()
}

fn net(socket: NetSocket) -> Subject {
    let (link, peer) = link(socket);
    let (peer, round) = (std::sync::Mutex::new(peer), AtomicU32::new(0));
    Subject {
        name: if socket == NetSocket::Stream { "net" } else { "net, datagrams" },
        build: Box::new(move || net_on(std::slice::from_ref(&link))),
        traffic: Box::new(move |guest| {
            let round = round.fetch_add(1, Ordering::Relaxed).to_be_bytes();
            let mut peer = peer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // Only its own frames, from now on: another's is not seen.
            guest.store(DATA, &[0, 0, 0, 0xff]);
            assert_eq!(guest.request(2, &[(DATA, 2), (DATA + 2, 1)], &[(DATA + 3, 1)]), 1);
            assert_eq!(guest.load(DATA + 3, 1), [0]);
            let (to_us, to_other) = (frame(MAC, &round), frame([2; 6], &round));
            peer.send(&to_other);
            peer.send(&to_us);
            let writable = [(DATA + 0x100, 20), (DATA + 0x200, 2000)];
            let used = guest.request(0, &[], &writable) as usize;
            assert_eq!(used, 12 + to_us.len());
            let got = [guest.load(DATA + 0x100, 20), guest.load(DATA + 0x200, used - 20)].concat();
            assert_eq!(got, [&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], &to_us[..]].concat());

            let from_us = frame([2; 6], &[&round[..], b"from the guest"].concat());
            guest.store(DATA, &[0; 12]);
            guest.store(DATA + 12, &from_us);
            let (old, len) = (guest.rings[1].available(), from_us.len() as u32);
            let head = guest.rings[1].add(&[(DATA, 5), (DATA + 5, 10), (DATA + 15, len - 3)], &[]);
            guest.kick(1, old);
            // A hostile driver may have sent a lot before, which nobody has read yet.
            while peer.receive() != from_us {}
            assert_eq!(guest.rings[1].wait_used(10), (head, 0));
        }),
        queue: 1,
        _keep: None,
    }
}

fn vsock() -> Subject {
    let host = std::sync::Arc::new(vsock_driver::Host::new());
    let (behind, round) = (host.clone(), AtomicU32::new(0));
    Subject {
        name: "vsock",
        build: Box::new(move || behind.device()),
        traffic: Box::new(move |guest| {
            vsock_driver::exchange(&host, guest, round.fetch_add(1, Ordering::Relaxed));
        }),
        queue: vsock_driver::TRANSMIT,
        _keep: None,
    }
}

fn file_system() -> Subject {
    let (keep, share) = fs::folder();
    Subject {
        name: "fs",
        build: Box::new(move || fs::device(&share)),
        traffic: Box::new(fs::exchange),
        queue: fs::REQUESTS,
        _keep: Some(keep),
    }
}
