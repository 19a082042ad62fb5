//! A vhost-user back end of a network device for tests, by hand: it serves one front end after the other, and misbehaves if asked to.
//!
//! Written against QEMU's docs/interop/vhost-user.rst and virtio 1.3, 2.7, and with nothing of the monitor's.

#![allow(dead_code, reason = "some want faults, and some a network")]

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown, recvmsg, shutdown};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

/// VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES.
pub const FEATURES: u64 = 1 << 32 | 1 << 30;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
pub const REPLY_ACK: u64 = 1 << 3;
const HEADER: usize = 12;
const NEED_REPLY: u32 = 8;
/// VHOST_USER_PROTOCOL_F_MQ.
pub const MQ: u64 = 1;
/// Pairs of rings.
const PAIRS: usize = 2;
/// VHOST_USER_GET_VRING_BASE.
pub const GET_VRING_BASE: u32 = 11;

/// How a back end behaves.
#[derive(Debug, Clone)]
pub struct Conduct {
    pub features: u64,
    pub protocol: u64,
    /// Pairs of queues that it says it serves.
    pub pairs: u64,
    /// What becomes of one request, by its number.
    pub fault: Option<(u32, Fault)>,
}

impl Default for Conduct {
    fn default() -> Self {
        Self { features: FEATURES, protocol: REPLY_ACK, pairs: 1, fault: None }
    }
}

/// What a back end does in place of what it should.
#[derive(Debug, Clone)]
pub enum Fault {
    Silent,
    HangUp,
    /// An answer of these bytes.
    Says(Vec<u8>),
}

/// Where frames of the guest go, and frames for it come from.
pub enum Wire {
    /// Back to the guest.
    Echo,
    /// A descriptor that takes and gives a frame at a time.
    Host(File),
}

#[derive(Default)]
struct Ring {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next: u16,
    next_used: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
}

/// What a front end has asked for, in order, and the connection with it.
#[derive(Default)]
pub struct Seen {
    pub requests: Vec<u32>,
    pub accepted: u64,
    /// Where each ring was last said to go on (SET_VRING_BASE).
    pub bases: BTreeMap<usize, u16>,
    connection: Option<UnixStream>,
}

/// A back end that listens.
pub struct BackEnd {
    pub seen: Arc<Mutex<Seen>>,
    ending: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl BackEnd {
    pub fn listen(path: &Path, conduct: Conduct, wire: Wire) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let (ending, end) = UnixStream::pair().unwrap();
        let seen = Arc::<Mutex<Seen>>::default();
        let for_thread = seen.clone();
        let thread = thread::spawn(move || {
            let mut wire = wire;
            while ready(&[listener.as_fd(), end.as_fd()]) == [true, false] {
                let (connection, _) = listener.accept().unwrap();
                for_thread.lock().unwrap().connection = Some(connection.try_clone().unwrap());
                let rings = Default::default();
                let (ram, waiting) = (GuestMemoryMmap::new(), Default::default());
                Server {
                    connection,
                    conduct: &conduct,
                    seen: &for_thread,
                    wire: &mut wire,
                    rings,
                    ram,
                    waiting,
                }
                .serve(end.as_fd());
                let connection = for_thread.lock().unwrap().connection.take();
                let _ = connection.map(|connection| connection.shutdown(std::net::Shutdown::Both));
            }
        });
        Self { seen, ending, thread: Some(thread) }
    }

    /// Cuts off the front end of now.
    pub fn hang_up(&self) {
        let seen = self.seen.lock().unwrap();
        seen.connection.as_ref().expect("somebody is connected").shutdown(std::net::Shutdown::Both).unwrap();
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _ = shutdown(&self.ending, Shutdown::Both);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_none_or(|ended| ended.is_ok()), "the back end failed");
    }
}

/// Waits until one of `descriptors` is readable, or at its end; which are.
fn ready(descriptors: &[BorrowedFd<'_>]) -> Vec<bool> {
    let mut list: Vec<_> = descriptors.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    while poll(&mut list, None).is_err() {}
    list.iter().map(|fd| !fd.revents().is_empty()).collect()
}

struct Server<'a> {
    connection: UnixStream,
    conduct: &'a Conduct,
    seen: &'a Mutex<Seen>,
    wire: &'a mut Wire,
    rings: [Ring; 2 * PAIRS],
    ram: GuestMemoryMmap<()>,
    /// Frames for the guest, by the pair that they go through.
    waiting: [VecDeque<Vec<u8>>; PAIRS],
}

impl Server<'_> {
    /// Until the front end is gone, or `end` is readable.
    fn serve(&mut self, end: BorrowedFd<'_>) {
        loop {
            let idle = self.connection.as_fd();
            let kick = |ring: usize| self.rings[ring].kick.as_ref().map_or(idle, AsFd::as_fd);
            let wire = match &*self.wire {
                Wire::Echo => idle,
                Wire::Host(file) => file.as_fd(),
            };
            let kicks = (0..self.rings.len()).map(kick);
            let ready = ready(&[idle, wire, end].into_iter().chain(kicks).collect::<Vec<_>>());
            let [asked, came, over, ref kicked @ ..] = ready[..] else { unreachable!() };
            if over {
                return;
            }
            for (ring, _) in self.rings.iter().zip(kicked).filter(|(_, kicked)| **kicked) {
                // It does not block.
                let _ = ring.kick.as_ref().map(|mut kick| kick.read(&mut [0; 8]));
            }
            if came && let Wire::Host(file) = &mut *self.wire {
                let mut frame = vec![0; 2048];
                if let (Ok(len @ 1..), ..=255) = (file.read(&mut frame), self.waiting[0].len()) {
                    self.waiting[0].push_back(frame[..len].to_vec());
                }
            }
            if asked && !self.answer() {
                return;
            }
            for pair in 0..PAIRS {
                self.transmit(pair);
                self.receive(pair);
            }
        }
    }

    fn usable(&self, ring: usize) -> bool {
        self.rings[ring].kick.is_some() && self.rings[ring].enabled
    }

    fn transmit(&mut self, pair: usize) {
        let ring = 2 * pair + 1;
        while self.usable(ring)
            && let Some((head, parts)) = take(&self.ram, &mut self.rings[ring])
        {
            let mut frame = Vec::new();
            for (at, len, _) in parts {
                let mut part = vec![0; len as usize];
                self.ram.read_slice(&mut part, GuestAddress(at)).unwrap();
                frame.extend(part);
            }
            put(&self.ram, &mut self.rings[ring], head, 0);
            let frame = frame.split_off(HEADER);
            match &mut *self.wire {
                Wire::Echo => self.waiting[pair].push_back(frame),
                Wire::Host(file) => drop(file.write(&frame)),
            }
        }
    }

    fn receive(&mut self, pair: usize) {
        let ring = 2 * pair;
        while self.usable(ring)
            && !self.waiting[pair].is_empty()
            && let Some((head, parts)) = take(&self.ram, &mut self.rings[ring])
        {
            let frame = self.waiting[pair].pop_front().unwrap_or_default();
            // One buffer was used (num_buffers).
            let all = [&[0; 10][..], &[1, 0], &frame].concat();
            let mut rest = &all[..];
            for (at, len, _) in parts {
                let (part, behind) = rest.split_at(rest.len().min(len as usize));
                self.ram.write_slice(part, GuestAddress(at)).unwrap();
                rest = behind;
            }
            put(&self.ram, &mut self.rings[ring], head, all.len() as u32);
        }
    }

    /// Fails at what strict back ends end at, passt among them: a message of another length, another number of descriptors, features
    /// that were not offered, and a ring before guest memory, its size and its place.
    fn check(&self, request: u32, payload: &[u8], descriptors: usize) {
        let word = |at: usize| u32::from_ne_bytes(payload[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let regions = if request == 5 { word(0) as usize } else { 0 };
        let (length, due) = match request {
            1 | 3 | 15 | 17 => (0, 0),
            5 => (8 + 32 * regions, regions),
            9 => (40, 0),
            12..=14 => (8, 1),
            _ => (8, 0),
        };
        assert_eq!((payload.len(), descriptors), (length, due), "request {request}");
        match request {
            2 => {
                let (accepted, offered) = (long(0), self.conduct.features);
                assert_eq!(accepted & !offered, 0, "SET_FEATURES {accepted:#x} of {offered:#x}");
                let due = offered & FEATURES;
                assert_eq!(accepted & due, due, "SET_FEATURES {accepted:#x} lacks one of {due:#x}");
            }
            16 => assert_eq!(long(0) & !self.conduct.protocol, 0, "SET_PROTOCOL_FEATURES"),
            8..=14 | 18 => {
                let rings = 2 * self.conduct.pairs;
                assert!(u64::from(word(0)) < rings, "request {request} for ring {}", word(0));
            }
            _ => {}
        }
        if let 9 | 12 | 18 = request {
            let ring = &self.rings[word(0) as usize];
            assert!(
                ring.size != 0 && self.ram.num_regions() != 0,
                "request {request} before a ring's size, or memory"
            );
            assert!(request == 9 || ring.used != 0, "request {request} before SET_VRING_ADDR");
        }
    }

    /// Does what the next message asks for. False at the end.
    fn answer(&mut self) -> bool {
        let Some((request, flags, payload, mut descriptors)) = message(&self.connection) else {
            return false;
        };
        self.seen.lock().unwrap().requests.push(request);
        let number =
            |at: usize| payload.get(at..at + 8).map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap()));
        let first = number(0).unwrap_or_default();
        let (index, value) = (first as u32 as usize % (2 * PAIRS), (first >> 32) as u16);
        self.check(request, &payload, descriptors.len());
        let ring = &mut self.rings[index];
        let mut file = || descriptors.pop().map(File::from);
        let mut answer = None;
        match request {
            1 => answer = Some(self.conduct.features),
            2 => self.seen.lock().unwrap().accepted = first,
            3 | 16 => {}
            5 => {
                let regions = descriptors.drain(..).enumerate().map(|(i, fd)| {
                    let field = |n: usize| number(8 + 32 * i + 8 * n).unwrap();
                    let file = FileOffset::new(File::from(fd), field(3));
                    let (base, size) = (GuestAddress(field(0)), field(1) as usize);
                    GuestRegionMmap::from_range(base, size, Some(file)).unwrap()
                });
                self.ram = GuestMemoryMmap::from_regions(regions.collect()).unwrap();
            }
            8 => ring.size = value,
            9 => {
                // User addresses are guest addresses here.
                (ring.descriptors, ring.used, ring.available) =
                    (number(8).unwrap(), number(16).unwrap(), number(24).unwrap());
            }
            10 => {
                (ring.next, ring.next_used) = (value, value);
                self.seen.lock().unwrap().bases.insert(index, value);
            }
            GET_VRING_BASE => {
                answer = Some(first & 0xffff_ffff | u64::from(ring.next) << 32);
                *ring = Ring::default();
            }
            12 => ring.kick = file(),
            13 => ring.call = file(),
            14 => {}
            15 => answer = Some(self.conduct.protocol),
            17 => answer = Some(self.conduct.pairs),
            18 => ring.enabled = value != 0,
            _ => panic!("request {request}"),
        }
        if self.conduct.features & 1 << 30 == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        let mut said = Vec::new();
        if let Some(answer) = answer.or((flags & NEED_REPLY != 0).then_some(0)) {
            said = [request, 5, 8].iter().flat_map(|word| word.to_ne_bytes()).collect();
            said.extend(answer.to_ne_bytes());
        }
        match &self.conduct.fault {
            Some((of, fault)) if *of == request => match fault {
                Fault::Silent => said.clear(),
                Fault::HangUp => return false,
                Fault::Says(bytes) => said.clone_from(bytes),
            },
            _ => {}
        }
        self.connection.write_all(&said).is_ok()
    }
}

/// The next message: request, flags, payload and descriptors.
fn message(mut connection: &UnixStream) -> Option<(u32, u32, Vec<u8>, Vec<OwnedFd>)> {
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(connection, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::empty()).ok()?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if got.bytes == 0 {
        return None;
    }
    connection.read_exact(&mut header[got.bytes..]).ok()?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let mut payload = vec![0; word(8) as usize];
    connection.read_exact(&mut payload).ok()?;
    Some((word(0), word(4), payload, descriptors))
}

/// A chain: its head, and address, length and flags of each part.
type Chain = (u16, Vec<(u64, u32, u16)>);

/// The next chain.
fn take(ram: &GuestMemoryMmap<()>, ring: &mut Ring) -> Option<Chain> {
    let index: u16 = ram.load(GuestAddress(ring.available + 2), Ordering::Acquire).unwrap();
    if index == ring.next {
        return None;
    }
    let at = ring.available + 4 + 2 * u64::from(ring.next % ring.size);
    let head: u16 = ram.read_obj(GuestAddress(at)).unwrap();
    ring.next = ring.next.wrapping_add(1);
    let (mut parts, mut next) = (Vec::new(), Some(head));
    while let Some(descriptor) = next {
        let at = ring.descriptors + 16 * u64::from(descriptor);
        let raw: [u64; 2] = ram.read_obj(GuestAddress(at)).unwrap();
        let flags = (raw[1] >> 32) as u16;
        parts.push((raw[0], raw[1] as u32, flags));
        next = (flags & 1 != 0).then_some((raw[1] >> 48) as u16);
    }
    Some((head, parts))
}

/// Gives the chain of `head` back, with `len` bytes written.
fn put(ram: &GuestMemoryMmap<()>, ring: &mut Ring, head: u16, len: u32) {
    let at = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
    ram.write_obj([u32::from(head), len], GuestAddress(at)).unwrap();
    ring.next_used = ring.next_used.wrapping_add(1);
    ram.store(ring.next_used, GuestAddress(ring.used + 2), Ordering::Release).unwrap();
    if let Some(mut call) = ring.call.as_ref() {
        call.write_all(&1u64.to_ne_bytes()).unwrap();
    }
}
