//! A driver's half of a socket device, and the host's programs at the other end.

use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::time::Instant;

use tempfile::TempDir;
use vmm_monitor::bus::Busy;
use vmm_monitor::event_loop::Interest;
use vmm_monitor::state::{Saved, StateError};
use vmm_monitor::virtio::device::{Traits, VirtioDevice};
use vmm_monitor::virtio::queue::Virtqueue;
use vmm_monitor::virtio::vsock::Vsock;
use vmm_monitor::vsock::Sockets;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::guest::{DATA, Guest};

pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;
pub const EVENT: usize = 2;
/// The guest's address.
pub const CID: u64 = 3;
/// The host's port on which somebody listens, for streams.
pub const PORT: u32 = 1234;
/// The guest's port that the host calls.
pub const GUEST_PORT: u32 = 77;

pub const STREAM: u16 = 1;
pub const SEQPACKET: u16 = 2;
pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

pub const HEADER: u32 = size_of::<Header>() as u32;
/// Where packets are written.
const OUT: u64 = DATA;
/// Where they are read, one at a time.
const IN: u64 = DATA + 0x2_0000;
/// Bytes of payload that fit there.
pub const ROOM: u32 = 4096;

/// `struct virtio_vsock_hdr` on a little-endian machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// The guest's end of a connection: what it says in each packet.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    pub guest: u32,
    pub host: u32,
    pub kind: u16,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Line {
    /// From the guest's port `guest` to the host's `host`.
    pub fn new(guest: u32, host: u32) -> Self {
        Self { guest, host, kind: STREAM, buf_alloc: 0x4_0000, fwd_cnt: 0 }
    }

    pub fn header(&self, op: u16, flags: u32, len: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: self.guest,
            dst_port: self.host,
            len,
            kind: self.kind,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }
}

/// Has the device take a packet, and waits until it has.
pub fn send_raw(guest: &mut Guest, header: Header, data: &[u8]) {
    guest.store(OUT, header.as_bytes());
    guest.store(OUT + u64::from(HEADER), data);
    let len = data.len() as u32;
    let parts = [(OUT, HEADER), (OUT + u64::from(HEADER), len)];
    assert_eq!(guest.request(TRANSMIT, &parts[..if len > 0 { 2 } else { 1 }], &[]), 0);
}

pub fn send(guest: &mut Guest, line: &Line, op: u16, flags: u32) {
    send_raw(guest, line.header(op, flags, 0), &[]);
}

pub fn send_data(guest: &mut Guest, line: &Line, data: &[u8], flags: u32) {
    send_raw(guest, line.header(RW, flags, data.len() as u32), data);
}

/// The next packet for the guest.
pub fn receive(guest: &mut Guest) -> (Header, Vec<u8>) {
    let used = guest.request(RECEIVE, &[], &[(IN, HEADER), (IN + 0x100, ROOM)]);
    packet(guest, used)
}

/// The same, which is to be `op` on `line`.
#[track_caller]
pub fn expect(guest: &mut Guest, line: &Line, op: u16) -> (Header, Vec<u8>) {
    let (header, data) = receive(guest);
    let seen = (header.src_cid, header.dst_cid, header.src_port, header.dst_port, header.kind, header.op);
    assert_eq!(seen, (2, CID, line.host, line.guest, line.kind, op), "{header:?}");
    (header, data)
}

/// Offers a buffer for a packet that nobody waits for yet.
pub fn offer(guest: &mut Guest) {
    let old = guest.rings[RECEIVE].available();
    guest.rings[RECEIVE].add(&[], &[(IN, HEADER), (IN + 0x100, ROOM)]);
    guest.kick(RECEIVE, old);
}

/// The packet for which a buffer was offered, if it has come.
pub fn offered(guest: &mut Guest) -> Option<(Header, Vec<u8>)> {
    let (_, used) = guest.rings[RECEIVE].used()?;
    Some(packet(guest, used))
}

/// The same, for which is waited.
pub fn wait_offered(guest: &mut Guest) -> (Header, Vec<u8>) {
    let (_, used) = guest.rings[RECEIVE].wait_used(20);
    packet(guest, used)
}

/// The packet of `used` bytes in the one place for those that come.
fn packet(guest: &Guest, used: u32) -> (Header, Vec<u8>) {
    let header = Header::read_from_bytes(&guest.load(IN, HEADER as usize)).unwrap();
    let len = header.len;
    assert_eq!(used, HEADER + len, "{header:?}");
    (header, guest.load(IN + 0x100, len as usize))
}

/// A device whose callbacks are counted.
struct Counted(Vsock, Arc<AtomicUsize>);

impl Saved for Counted {
    fn save_bytes(&self) -> Vec<u8> {
        self.0.save_bytes()
    }
    fn restore_bytes(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.0.restore_bytes(bytes)
    }
}

impl VirtioDevice for Counted {
    fn traits(&self) -> Traits {
        self.0.traits()
    }
    fn config(&self) -> &[u8] {
        self.0.config()
    }
    fn accept(&mut self, features: u64) {
        self.0.accept(features);
    }
    fn start(&mut self) {
        self.0.start();
    }
    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.on_queue(index, queues);
    }
    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        self.0.event_sources()
    }
    fn interest(&self, source: usize) -> Interest {
        self.0.interest(source)
    }
    fn on_event(&mut self, source: usize, queues: &mut [Virtqueue]) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.on_event(source, queues);
    }
    fn finish(&mut self, queues: &mut [Virtqueue], deadline: Instant) -> Result<(), Busy> {
        self.0.finish(queues, deadline)
    }
    fn drain(&mut self, queues: &mut [Virtqueue], deadline: Instant) -> Result<(), Busy> {
        self.0.drain(queues, deadline)
    }
    fn resume(&mut self, queues: &mut [Virtqueue]) {
        self.0.resume(queues);
    }
    fn forget(&mut self, index: usize) {
        self.0.forget(index);
    }
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// The host's programs, and the sockets between them and the guest.
pub struct Host {
    pub sockets: Sockets,
    pub listener: UnixListener,
    callbacks: Arc<AtomicUsize>,
    dir: TempDir,
}

impl Host {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let sockets = Sockets::open(&dir.path().join("v")).unwrap();
        let listener = UnixListener::bind(dir.path().join(format!("v_{PORT}"))).unwrap();
        Self { sockets, listener, callbacks: Arc::default(), dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn device(&self) -> Box<dyn VirtioDevice> {
        let device = Vsock::new(self.sockets.clone(), CID as u32);
        Box::new(Counted(device, self.callbacks.clone()))
    }

    /// Whether the worker comes to sleep.
    pub fn is_at_rest(&self) -> bool {
        (0..200).any(|_| {
            let before = self.callbacks.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            self.callbacks.load(Ordering::SeqCst) == before
        })
    }

    /// A device that runs.
    pub fn start(&self) -> Guest {
        let mut guest = Guest::new(self.device());
        guest.start(0);
        guest
    }

    /// The guest's port `port` calls the host, and is answered.
    pub fn connect(&self, guest: &mut Guest, port: u32) -> (Line, UnixStream) {
        self.forget_earlier();
        let line = Line::new(port, PORT);
        send(guest, &line, REQUEST, 0);
        expect(guest, &line, RESPONSE);
        (line, patient(self.listener.accept().unwrap().0))
    }

    /// Those that nobody has taken in.
    fn forget_earlier(&self) {
        self.listener.set_nonblocking(true).unwrap();
        while self.listener.accept().is_ok() {}
        self.listener.set_nonblocking(false).unwrap();
    }

    /// The same, while data comes on another connection, which is taken.
    pub fn connect_past(&self, guest: &mut Guest, port: u32, other: Line) -> (Line, UnixStream) {
        let line = Line::new(port, PORT);
        send(guest, &line, REQUEST, 0);
        loop {
            let (header, _) = receive(guest);
            let (to, op) = (header.dst_port, header.op);
            if to == port {
                assert_eq!(op, RESPONSE);
                return (line, patient(self.listener.accept().unwrap().0));
            }
            assert_eq!(to, other.guest);
        }
    }

    /// A program that calls the guest's port.
    pub fn call(&self, port: u32) -> UnixStream {
        let mut program = patient(UnixStream::connect(self.path("v")).unwrap());
        writeln!(program, "CONNECT {port}").unwrap();
        program
    }

    /// The host calls the guest, which answers.
    pub fn called(&self, guest: &mut Guest) -> (Line, UnixStream) {
        let mut program = self.call(GUEST_PORT);
        let (header, _) = receive(guest);
        let (op, to) = (header.op, header.dst_port);
        assert_eq!((op, to), (REQUEST, GUEST_PORT));
        let line = Line::new(GUEST_PORT, header.src_port);
        send(guest, &line, RESPONSE, 0);
        assert_eq!(read_line(&mut program), format!("OK {}\n", line.host));
        (line, program)
    }
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// Reads to the end of a line, and no further.
pub fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("a line");
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

pub fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).expect("what the guest sends");
    bytes
}

/// Bytes that differ from place to place.
pub fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// One exchange each way over connections that begin and end with it.
pub fn exchange(host: &Host, guest: &mut Guest, round: u32) {
    let (mut line, mut program) = host.connect(guest, 9000 + round);
    let said = format!("said in round {round}");
    send_data(guest, &line, said.as_bytes(), 0);
    assert_eq!(read(&mut program, said.len()), said.as_bytes());
    let typed = format!("typed in round {round}");
    program.write_all(typed.as_bytes()).unwrap();
    let (header, data) = expect(guest, &line, RW);
    let forwarded = header.fwd_cnt;
    assert_eq!((data, forwarded), (typed.clone().into_bytes(), said.len() as u32));
    line.fwd_cnt = typed.len() as u32;
    send(guest, &line, SHUTDOWN, 3);
    expect(guest, &line, RST);
    assert_eq!(program.read(&mut [0]).unwrap(), 0, "its end");

    let (line, program) = host.called(guest);
    drop(program);
    let (header, _) = expect(guest, &line, SHUTDOWN);
    let flags = header.flags;
    assert_eq!(flags, 3);
    send(guest, &line, RST, 0);
}
