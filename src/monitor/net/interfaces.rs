//! News of the host's network interfaces (rtnetlink(7)), for links whose frames somebody else moves: the end of such an interface is no
//! error of any call of ours.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// The group that hears of interfaces, as a mask (linux/rtnetlink.h).
const RTMGRP_LINK: u32 = 1;
/// Messages that are taken in one turn; a host whose interfaces change faster holds nobody up.
const TURN: usize = 64;

/// Readable when an interface has come, gone or changed.
#[derive(Debug)]
pub struct Interfaces(OwnedFd);

impl Interfaces {
    /// Of this process's network namespace.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn watch() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // The protocol with number 0, routes and links.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, RTMGRP_LINK))?;
        Ok(Self(socket))
    }

    /// Takes the news. What they are is not looked at: there may have been more than the socket holds, so that whoever waits looks
    /// at its own interface.
    pub fn take(&self) {
        for _ in 0..TURN {
            match recv(&self.0, &mut [0; 16][..], RecvFlags::empty()) {
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsFd for Interfaces {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
