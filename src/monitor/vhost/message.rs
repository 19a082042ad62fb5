//! Messages of vhost-user: a request and its answer over the socket, each within a deadline.
//!
//! From QEMU's docs/interop/vhost-user.rst, "Message Specification": native byte order, one message a request, descriptors beside
//! it. What the other side sends is read to the length that is due, and refused if it says anything else of itself.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The request's number, as the front end sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
}

/// What is before each message's payload.
#[derive(Debug, Clone, Copy, Default, IntoBytes, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    request: u32,
    flags: u32,
    /// Bytes of the payload.
    size: u32,
}

/// Version of the protocol, in the flags.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// VHOST_MEMORY_BASELINE_NREGIONS
pub const MOST_DESCRIPTORS: usize = 8;

/// A ring and a number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct State {
    pub index: u32,
    pub num: u32,
}

/// Where a ring's parts are, by [`Region::user_address`].
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub struct Addresses {
    pub index: u32,
    pub flags: u32,
    pub descriptors: u64,
    pub used: u64,
    pub available: u64,
    pub log: u64,
}

/// A stretch of guest memory in a descriptor that goes with it.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub struct Region {
    pub guest_address: u64,
    pub size: u64,
    pub user_address: u64,
    pub mmap_offset: u64,
}

/// Waits until `flags` hold for `socket`.
fn wait(socket: &OwnedFd, flags: PollFlags, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(socket, flags)], Some(&left)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer")),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends `request` with `payload` and `descriptors`, [`MOST_DESCRIPTORS`] at most.
pub fn send(
    socket: &OwnedFd,
    request: Request,
    payload: &[u8],
    descriptors: &[BorrowedFd<'_>],
    need_reply: bool,
    deadline: Instant,
) -> io::Result<()> {
    let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
    let header = Header { request: request as u32, flags, size: payload.len() as u32 };
    let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(payload)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    loop {
        match sendmsg(socket.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) if sent == header.as_bytes().len() + payload.len() => return Ok(()),
            // One that reads its messages has room for a whole one.
            Ok(_) => return Err(io::Error::other("it does not read its messages")),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(socket, PollFlags::OUT, deadline)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads the answer to `request`.
pub fn answer<T: IntoBytes + FromBytes + Default>(
    socket: &OwnedFd,
    request: Request,
    deadline: Instant,
) -> io::Result<T> {
    let (mut header, mut payload) = (Header::default(), T::default());
    fill(socket, header.as_mut_bytes(), deadline)?;
    let due = Header { request: request as u32, flags: VERSION | REPLY, size: size_of::<T>() as u32 };
    // The flag of the request may come back with the answer.
    let Header { request: of, flags, size } = header;
    if (of, flags & !NEED_REPLY, size) != (due.request, due.flags, due.size) {
        let what = format!("{request:?} is answered by message {of}, flags {flags:#x}, {size} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    fill(socket, payload.as_mut_bytes(), deadline)?;
    Ok(payload)
}

fn fill(socket: &OwnedFd, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        match recv(socket, &mut *bytes, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has hung up")),
            Ok((_, got)) => bytes = bytes.get_mut(got..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(socket, PollFlags::IN, deadline)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
