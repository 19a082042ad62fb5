//! AF_VSOCK sockets, which rustix does not have: for the program that tests them. Knows no orders.

use crate::kernel::syscall4;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;

const SYS_SOCKET: usize = 41;
const SYS_CONNECT: usize = 42;
const SYS_ACCEPT: usize = 43;
const SYS_SHUTDOWN: usize = 48;
const SYS_BIND: usize = 49;
const SYS_LISTEN: usize = 50;

const AF_VSOCK: usize = 40;
const SOCK_STREAM: usize = 1;
const SOCK_SEQPACKET: usize = 5;
const SHUT_WR: usize = 1;
/// VMADDR_CID_ANY
const ANY: u32 = u32::MAX;
/// VMADDR_CID_HOST
const HOST: u32 = 2;

/// `struct sockaddr_vm` (linux/vm_sockets.h).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

impl Address {
    fn new(cid: u32, port: u32) -> Self {
        Self { family: AF_VSOCK as u16, reserved: 0, port, cid, flags: 0, zero: [0; 3] }
    }
}

fn socket(messages: bool) -> Result<OwnedFd, Errno> {
    let kind = if messages { SOCK_SEQPACKET } else { SOCK_STREAM };
    // SAFETY: it takes numbers.
    let fd = unsafe { syscall4(SYS_SOCKET, AF_VSOCK, kind, 0, 0)? };
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A connection to the host's port, of messages or of bytes.
pub fn connect(port: u32, messages: bool) -> Result<OwnedFd, Errno> {
    let (socket, address) = (socket(messages)?, Address::new(HOST, port));
    let (fd, len) = (socket.as_raw_fd() as usize, size_of::<Address>());
    // SAFETY: the address is read only, and lives over the call.
    unsafe { syscall4(SYS_CONNECT, fd, &raw const address as usize, len, 0)? };
    Ok(socket)
}

/// A socket that listens on the guest's port.
pub fn listen(port: u32, messages: bool) -> Result<OwnedFd, Errno> {
    let (socket, address) = (socket(messages)?, Address::new(ANY, port));
    let (fd, len) = (socket.as_raw_fd() as usize, size_of::<Address>());
    // SAFETY: the address is read only, and lives over the call.
    unsafe { syscall4(SYS_BIND, fd, &raw const address as usize, len, 0)? };
    // SAFETY: it takes numbers.
    unsafe { syscall4(SYS_LISTEN, fd, 128, 0, 0)? };
    Ok(socket)
}

/// The next who connects.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: nobody's address is asked for.
    let fd = unsafe { syscall4(SYS_ACCEPT, listener.as_raw_fd() as usize, 0, 0, 0)? };
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Nothing more is sent over it.
pub fn end_output(socket: BorrowedFd<'_>) {
    // SAFETY: it takes numbers. It fails only where the other end is gone.
    let _ = unsafe { syscall4(SYS_SHUTDOWN, socket.as_raw_fd() as usize, SHUT_WR, 0, 0) };
}
