//! A link over a descriptor that somebody else has opened: a tap, a stream, or a socket with datagrams.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};

use super::socket::{Datagram, Stream};
use super::tap::{self, Tap};
use super::{Error, Link, Wire};

/// The wire over descriptor `number`, which this process was started with.
pub fn inherited(number: u32) -> Result<Box<dyn Wire>, Error> {
    let not_passed = || Error::NotPassed { fd: number };
    let raw = i32::try_from(number).map_err(|_| not_passed())?;
    // SAFETY: only asked for its flags, and then duplicated: a number that is no descriptor is an error of those calls, and one
    // that is somebody's else stays theirs.
    let theirs = unsafe { BorrowedFd::borrow_raw(raw) };
    // Whatever this process has opened itself closes at exec: a descriptor that does not was passed to it.
    match fcntl_getfd(theirs) {
        Ok(flags) if !flags.contains(FdFlags::CLOEXEC) => {}
        _ => return Err(not_passed()),
    }
    let own = fcntl_dupfd_cloexec(theirs, 3).map_err(|error| Error::Host(error.into()))?;
    wire(own, number)
}

/// The link over `fd`, called `number` in messages.
///
/// # Errors
/// It is nothing that carries frames; or the host is out of descriptors.
pub fn from_descriptor(fd: OwnedFd, number: u32) -> Result<Link, Error> {
    Link::boxed(wire(fd, number)?).map_err(Error::Host)
}

fn wire(fd: OwnedFd, number: u32) -> Result<Box<dyn Wire>, Error> {
    if let Some(flags) = tap::flags(&fd) {
        if flags & libc::IFF_NO_PI == 0 {
            return Err(Error::PacketInfo { fd: number });
        }
        return Ok(Box::new(Tap::passed(fd, flags).map_err(Error::Host)?));
    }
    let is_ours = socket_domain(&fd) == Ok(AddressFamily::UNIX) && getpeername(&fd).is_ok();
    Ok(match socket_type(&fd) {
        Ok(SocketType::STREAM) if is_ours => Box::new(Stream::new(fd).map_err(Error::Host)?),
        Ok(SocketType::DGRAM) if is_ours => Box::new(Datagram::new(fd, false).map_err(Error::Host)?),
        Ok(SocketType::SEQPACKET) if is_ours => Box::new(Datagram::new(fd, true).map_err(Error::Host)?),
        _ => return Err(Error::NotALink { fd: number }),
    })
}
