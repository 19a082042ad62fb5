//! Asks the kernel whether an address is one of the host's own (rtnetlink(7), RTM_GETROUTE).

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// `struct nlmsghdr` and `struct rtmsg`.
const HEADERS: usize = 16 + 12;
/// `rtm_type`, and its values (linux/rtnetlink.h).
const TYPE_AT: usize = 16 + 7;
const RTN_UNICAST: u8 = 1;

/// A socket to ask by.
pub struct Routes {
    socket: OwnedFd,
    asked: u32,
}

impl Routes {
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // The protocol with number 0, routes.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        Ok(Self { socket, asked: 0 })
    }

    /// Whether what is sent to `address` leaves the host, or would if there were a route. False for the host's own addresses
    /// and its networks' broadcast addresses, and if the kernel does not answer.
    pub fn leaves_the_host(&mut self, address: IpAddr) -> bool {
        self.ask(address).is_ok_and(|answer| answer)
    }

    fn ask(&mut self, address: IpAddr) -> io::Result<bool> {
        self.asked = self.asked.wrapping_add(1);
        let (family, bytes) = match address {
            IpAddr::V4(address) => (AddressFamily::INET, address.octets().to_vec()),
            IpAddr::V6(address) => (AddressFamily::INET6, address.octets().to_vec()),
        };
        let len = HEADERS + 4 + bytes.len();
        let mut request = Vec::with_capacity(len);
        request.extend((len as u32).to_ne_bytes());
        request.extend(libc::RTM_GETROUTE.to_ne_bytes());
        request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
        request.extend(self.asked.to_ne_bytes());
        request.extend(0u32.to_ne_bytes());
        // Family and the destination's prefix, then fields that a question leaves at zero.
        request.extend([family.as_raw() as u8, bytes.len() as u8 * 8]);
        request.extend([0; 10]);
        request.extend((4 + bytes.len() as u16).to_ne_bytes());
        request.extend(libc::RTA_DST.to_ne_bytes());
        request.extend(bytes);
        send(&self.socket, &request, SendFlags::empty())?;
        // The answer is there when the question has been sent. One that was left behind is passed over.
        loop {
            let mut answer = [0; 1024];
            let (n, _) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
            let word = |at: usize| answer[at..at + 4].try_into().map(u32::from_ne_bytes).unwrap_or_default();
            if n < HEADERS || word(8) != self.asked {
                continue;
            }
            return Ok(match u16::from_ne_bytes([answer[4], answer[5]]) {
                libc::RTM_NEWROUTE => answer[TYPE_AT] == RTN_UNICAST,
                // No route: the attempt to connect will say so.
                _ => {
                    i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) == -libc::ENETUNREACH
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn the_hosts_own_addresses_are_known() {
        let mut routes = Routes::new().unwrap();
        for own in ["127.0.0.1", "127.3.2.1", "0.0.0.0", "255.255.255.255", "::1"] {
            assert!(!routes.leaves_the_host(own.parse().unwrap()), "{own}");
        }
        assert!(routes.leaves_the_host(Ipv4Addr::new(192, 0, 2, 1).into()));
        assert!(routes.leaves_the_host(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()));
        // The address that the host has on its network, if it has one.
        let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        if probe.connect("192.0.2.1:9").is_ok() {
            let own = probe.local_addr().unwrap().ip();
            assert!(!routes.leaves_the_host(own), "{own}");
        }
    }
}
