//! What the guest may reach: a pure decision but for one question, whether an address is the host's own.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use super::route::Routes;
use super::{DNS, GATEWAY};
use crate::config::{Allow, UserNet};

/// Ranges that no configuration but one that names part of them opens: this host and its network, link-local addresses (and
/// with them a cloud's metadata), groups, and what is reserved.
const CLOSED: [(Ipv4Addr, u8); 6] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
    // The guest's own network: what is in it the monitor answers for.
    (Ipv4Addr::new(10, 0, 2, 0), 24),
];

pub struct Policy {
    restrict: bool,
    names: bool,
    allow: Vec<Allow>,
    routes: Routes,
}

impl Policy {
    pub fn new(config: &UserNet, routes: Routes) -> Self {
        let names = !config.restrict || !config.dns.is_empty();
        Self { restrict: config.restrict, names, allow: config.allow.clone(), routes }
    }

    /// Whether the guest reaches anything beyond its own network.
    pub fn leads_out(&self) -> bool {
        !self.restrict || !self.allow.is_empty()
    }

    /// Where on the host's side a flow to `target` goes, port 0 for ping. `None`: nowhere.
    pub fn target(&mut self, target: SocketAddrV4) -> Option<SocketAddrV4> {
        let host = host_side(target);
        let routes = &mut self.routes;
        is_open(self.restrict, &self.allow, host, |ip| routes.leaves_the_host(ip.into())).then_some(host)
    }

    /// Whether the guest may ask for names.
    pub fn has_names(&self) -> bool {
        self.names
    }
}

/// What the guest calls the gateway is the host's loopback.
fn host_side(target: SocketAddrV4) -> SocketAddrV4 {
    let ip = if *target.ip() == GATEWAY { Ipv4Addr::LOCALHOST } else { *target.ip() };
    SocketAddrV4::new(ip, target.port())
}

fn is_open(
    restrict: bool,
    allow: &[Allow],
    target: SocketAddrV4,
    leaves_the_host: impl FnOnce(Ipv4Addr) -> bool,
) -> bool {
    let ip = *target.ip();
    let mut allowed = allow
        .iter()
        .filter(|allow| allow.contains(ip) && allow.port.is_none_or(|port| port == target.port()));
    let closed = CLOSED
        .iter()
        .find(|(address, prefix)| Allow { address: ip, prefix: 32, port: None }.is_within(*address, *prefix));
    if let Some((address, prefix)) = closed {
        return ip != DNS && allowed.any(|allow| allow.is_within(*address, *prefix));
    }
    let by_name = allowed.clone().any(|allow| allow.prefix == 32);
    by_name || (!restrict || allowed.next().is_some()) && leaves_the_host(ip)
}

/// What names of the guest's network mean to a resolver of the host: only the DNS server's address is served there.
pub fn is_dns(target: SocketAddrV4) -> bool {
    *target.ip() == DNS && target.port() == 53
}

/// The addresses that the monitor answers for itself.
pub fn is_ours(ip: IpAddr) -> bool {
    ip == GATEWAY || ip == DNS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(config: &[&str], restrict: bool, target: &str, own: &str) -> bool {
        let allow: Vec<Allow> = config.iter().map(|text| text.parse().unwrap()).collect();
        let own: Ipv4Addr = own.parse().unwrap();
        is_open(restrict, &allow, host_side(target.parse().unwrap()), |ip| ip != own)
    }

    #[test]
    fn the_world_is_open_and_the_host_is_not() {
        let plain = |target| open(&[], false, target, "192.168.1.5");
        assert!(plain("1.1.1.1:443") && plain("192.168.1.6:22") && plain("10.0.3.1:1"));
        for closed in [
            "10.0.2.2:22",
            "127.0.0.1:22",
            "127.0.0.53:53",
            "0.0.0.0:22",
            "192.168.1.5:22",
            "169.254.169.254:80",
            "224.0.0.251:5353",
            "255.255.255.255:67",
            "10.0.2.3:80",
            "10.0.2.15:80",
            "10.0.2.99:80",
        ] {
            assert!(!plain(closed), "{closed}");
        }
    }

    #[test]
    fn the_host_is_opened_by_name_alone() {
        assert!(open(&["127.0.0.1"], false, "10.0.2.2:22", "0.0.0.0"));
        assert!(open(&["127.0.0.1:22"], false, "10.0.2.2:22", "0.0.0.0"));
        assert!(!open(&["127.0.0.1:22"], false, "10.0.2.2:23", "0.0.0.0"));
        assert!(!open(&["0.0.0.0/0"], false, "10.0.2.2:22", "0.0.0.0"), "not by a wide range");
        assert!(!open(&["192.168.0.0/16"], false, "192.168.1.5:22", "192.168.1.5"));
        assert!(open(&["192.168.1.5"], false, "192.168.1.5:22", "192.168.1.5"));
        assert!(open(&["169.254.169.254:80"], false, "169.254.169.254:80", "0.0.0.0"));
    }

    #[test]
    fn a_restricted_guest_reaches_what_is_allowed() {
        assert!(!open(&[], true, "1.1.1.1:443", "0.0.0.0"));
        assert!(open(&["1.1.1.0/24:443"], true, "1.1.1.1:443", "0.0.0.0"));
        assert!(!open(&["1.1.1.0/24:443"], true, "1.1.1.1:80", "0.0.0.0"));
        assert!(!open(&["1.1.1.0/24"], true, "1.1.1.1:80", "1.1.1.1"), "the host's own");
    }
}
