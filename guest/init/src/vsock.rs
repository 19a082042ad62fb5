//! What the program that tests vsock does with sockets. Knows no orders.

use crate::kernel::syscall;
use interface::vsock::{Address, HOST, socket};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketType, shutdown};

const SYS_SETSOCKOPT: usize = 54;
const AF_VSOCK: usize = 40;
/// SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD
const SO_VM_SOCKETS_CONNECT_TIMEOUT: usize = 6;

fn kind(messages: bool) -> SocketType {
    if messages { SocketType::SEQPACKET } else { SocketType::STREAM }
}

/// A connection to the host's port, of messages or of bytes.
pub fn connect(port: u32, messages: bool) -> Result<OwnedFd, Errno> {
    let socket = socket(kind(messages))?;
    // On a busy emulated machine two seconds, as sockets have it, are too few. (Where it cannot be set, they have to do.)
    let limit = [60usize, 0];
    let (fd, value) = (socket.as_raw_fd() as usize, &raw const limit as usize);
    // SAFETY: a `struct timeval`, which is read only, and lives over the call.
    let _ = unsafe {
        syscall(SYS_SETSOCKOPT, [fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, value, size_of_val(&limit)])
    };
    rustix::net::connect(&socket, &Address::new(HOST, port))?;
    Ok(socket)
}

/// A socket that listens on the guest's port.
pub fn listen(port: u32, messages: bool) -> Result<OwnedFd, Errno> {
    interface::vsock::listen(port, kind(messages))
}

/// The next who connects.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::net::accept(listener)
}

/// Nothing more is sent over it.
pub fn end_output(socket: BorrowedFd<'_>) {
    // It fails only where the other end is gone.
    let _ = shutdown(socket, Shutdown::Write);
}
