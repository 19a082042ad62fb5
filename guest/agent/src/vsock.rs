//! Vsock addresses, which rustix does not have (linux/vm_sockets.h).

use std::io;

use rustix::fd::OwnedFd;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen as listen_on, socket_with};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

// SAFETY: the pointer is to a whole `sockaddr_vm`, which lives over the call, with its length.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f((&raw const *self).cast(), size_of::<Self>() as SocketAddrLen)
    }
}

/// Listens on `port`, whatever the guest's own address is.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    const ANY: u32 = u32::MAX;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let family = AddressFamily::VSOCK.as_raw();
    bind(&socket, &Address { family, reserved: 0, port, cid: ANY, flags: 0, zero: [0; 3] })?;
    listen_on(&socket, BACKLOG)?;
    Ok(socket)
}
