//! AF_VSOCK addresses, which rustix does not have (linux/vm_sockets.h), and the calls that take one.

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen as listen_on, socket_with};

/// VMADDR_CID_ANY: the guest's own, whatever it is.
pub const ANY: u32 = u32::MAX;
/// VMADDR_CID_HOST
pub const HOST: u32 = 2;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// `struct sockaddr_vm`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

impl Address {
    /// Port `port` of the machine that has the number `cid`.
    pub fn new(cid: u32, port: u32) -> Self {
        Self { family: AddressFamily::VSOCK.as_raw(), reserved: 0, port, cid, flags: 0, zero: [0; 3] }
    }
}

// SAFETY: the pointer is to a whole `sockaddr_vm`, which lives over the call, with its length.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f((&raw const *self).cast(), size_of::<Self>() as SocketAddrLen)
    }
}

/// A socket of that kind.
///
/// # Errors
/// The kernel has no vsock.
pub fn socket(kind: SocketType) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::VSOCK, kind, SocketFlags::CLOEXEC, None)
}

/// Listens on the guest's `port`.
///
/// # Errors
/// The kernel has no vsock, or somebody has the port.
pub fn listen(port: u32, kind: SocketType) -> Result<OwnedFd, Errno> {
    let socket = socket(kind)?;
    bind(&socket, &Address::new(ANY, port))?;
    listen_on(&socket, BACKLOG)?;
    Ok(socket)
}
