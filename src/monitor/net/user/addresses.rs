//! The network's addresses, the same for every guest: 10.0.2.0/24, and of IPv6 a unique local prefix (RFC 4193) whose bytes are
//! letters, so that hosts have it for nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The gateway, and the host as the guest calls it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Who answers questions for names.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The guest, by its lease.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Bits of the network's address.
pub const PREFIX: u8 = 24;

/// [`GATEWAY`] in IPv6.
pub const GATEWAY6: Ipv6Addr = six(0x2);
/// [`DNS`] in IPv6.
pub const DNS6: Ipv6Addr = six(0x3);
/// What a guest has that asks for a lease of IPv6; one of its own making is as good.
pub const GUEST6: Ipv6Addr = six(0x15);
/// The network itself.
pub const NETWORK6: Ipv6Addr = six(0);
/// Bits of its address.
pub const PREFIX6: u8 = 64;
/// The gateway on the link, which routers speak from (RFC 4861, 4.2).
pub const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// An address of the network: `fd` and "vmm net".
const fn six(host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd76, 0x6d6d, 0x6e65, 0x74, 0, 0, 0, host)
}

/// The addresses that the monitor answers for itself.
pub fn is_ours(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => [GATEWAY, DNS].contains(&ip),
        IpAddr::V6(ip) => [GATEWAY6, DNS6, ROUTER].contains(&ip),
    }
}

/// Whether questions for names go there.
pub fn is_dns(target: SocketAddr) -> bool {
    (target.ip() == DNS || target.ip() == DNS6) && target.port() == 53
}

/// Whether a guest may call itself `ip`, and speak to `to` by that name: nothing from an address that is good for the link alone
/// leaves it.
pub fn is_guests(ip: IpAddr, to: IpAddr) -> bool {
    let is_on_net = match ip {
        IpAddr::V4(ip) => (ip.to_bits() ^ GATEWAY.to_bits()) >> (32 - PREFIX) == 0,
        IpAddr::V6(ip) if ip.is_unicast_link_local() => is_ours(to),
        IpAddr::V6(ip) => (ip.to_bits() ^ NETWORK6.to_bits()) >> (128 - PREFIX6) == 0,
    };
    is_on_net && !is_ours(ip)
}

/// The gateway, as the guest at `guest` knows it.
pub fn gateway(guest: IpAddr) -> IpAddr {
    match guest {
        IpAddr::V4(_) => GATEWAY.into(),
        IpAddr::V6(guest) if guest.is_unicast_link_local() => ROUTER.into(),
        IpAddr::V6(_) => GATEWAY6.into(),
    }
}
