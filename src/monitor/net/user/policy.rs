//! What the guest may reach: a pure decision but for one question, whether an address is the host's own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Error;
use super::addresses::{DNS, DNS6, GATEWAY, GATEWAY6, NETWORK6, PREFIX, PREFIX6};
use super::route::Routes;
use crate::config::{Allow, UserNet};

/// An address, and how many of its first bits count.
type Range = (IpAddr, u8);

/// Ranges that no configuration but one that names part of them opens: this host and its network, link-local addresses (and
/// with them a cloud's metadata), groups, what is reserved, and addresses of IPv6 that stand for others of IPv4, which
/// whoever translates may bring back here.
const CLOSED: [Range; 14] = [
    (v4(0, 0, 0, 0), 8),
    LOOPBACK,
    (v4(169, 254, 0, 0), 16),
    (v4(224, 0, 0, 0), 4),
    (v4(240, 0, 0, 0), 4),
    // The guest's own network: what is in it the monitor answers for.
    NETWORK,
    // Nobody's address, the loopback, addresses of IPv4 as they are and for NAT64 (64:ff9b::/96, RFC 6052).
    (v6(0, 0), 8),
    // What is to be discarded (RFC 6666).
    (v6(0x0100, 0), 64),
    // Teredo and 6to4, with addresses of IPv4 inside (RFC 4380, RFC 3056).
    (v6(0x2001, 0), 32),
    (v6(0x2002, 0), 16),
    // The link, and the site, as it once was.
    (v6(0xfe80, 0), 10),
    (v6(0xfec0, 0), 10),
    (v6(0xff00, 0), 8),
    NETWORK_IN_6,
];

const LOOPBACK: Range = (v4(127, 0, 0, 0), 8);
const NETWORK: Range = (v4(10, 0, 2, 0), PREFIX);
const NETWORK_IN_6: Range = (IpAddr::V6(NETWORK6), PREFIX6);

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(a: u16, b: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0))
}

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
    pub fn target(&mut self, target: SocketAddr) -> Option<SocketAddr> {
        let routes = &mut self.routes;
        let mut is_open =
            |host: &SocketAddr| is_open(self.restrict, &self.allow, *host, |ip| routes.leaves_the_host(ip));
        host_sides(target).into_iter().flatten().find(|host| is_open(host))
    }

    /// Whether the guest may ask for names.
    pub fn has_names(&self) -> bool {
        self.names
    }
}

/// What the guest calls the gateway is the host's loopback, whose address of the same version comes first.
fn host_sides(target: SocketAddr) -> [Option<SocketAddr>; 2] {
    let at = |ip: IpAddr| Some(SocketAddr::new(ip, target.port()));
    let (four, six) = (at(Ipv4Addr::LOCALHOST.into()), at(Ipv6Addr::LOCALHOST.into()));
    match target.ip() {
        ip if ip == GATEWAY => [four, six],
        ip if ip == GATEWAY6 => [six, four],
        ip => [at(ip), None],
    }
}

fn is_open(
    restrict: bool,
    allow: &[Allow],
    target: SocketAddr,
    leaves_the_host: impl FnOnce(IpAddr) -> bool,
) -> bool {
    let ip = target.ip();
    let is_mapped = matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    // Sockets of IPv6 take the one for IPv4, past what is closed of that.
    if is_mapped || ip == DNS || ip == DNS6 {
        return false;
    }
    let mut allowed = allow
        .iter()
        .filter(|allow| allow.contains(ip) && allow.port.is_none_or(|port| port == target.port()));
    let closed = CLOSED.iter().find(|(address, prefix)| Allow::one(ip).is_within(*address, *prefix));
    if let Some((address, prefix)) = closed {
        return allowed.any(|allow| allow.is_within(*address, *prefix));
    }
    let by_name = allowed.clone().any(Allow::is_one);
    by_name || (!restrict || allowed.next().is_some()) && leaves_the_host(ip)
}

/// Refuses a setting that would open nothing, or not what it names.
///
/// # Errors
/// [`Error::Dead`]
pub fn check(list: &[Allow]) -> Result<(), Error> {
    list.iter().try_for_each(|allow| match dead(allow) {
        Some((why, hint)) => Err(Error::Dead { allow: *allow, why, hint }),
        None => Ok(()),
    })
}

/// Why `allow` opens nothing, and what to write.
fn dead(allow: &Allow) -> Option<(&'static str, &'static str)> {
    const LOCAL: &str = "what the guest calls the gateway, 10.0.2.2, is the host's 127.0.0.1: `net=user,allow=127.0.0.1:8080`";
    let within = |(address, prefix): Range| allow.is_within(address, prefix);
    if within(NETWORK) || within(NETWORK_IN_6) {
        return Some(("this is the guest's own network", LOCAL));
    }
    if within(LOOPBACK) && !allow.contains(Ipv4Addr::LOCALHOST.into()) {
        return Some(("of the host's loopback a guest reaches 127.0.0.1 alone", LOCAL));
    }
    let inside = CLOSED
        .iter()
        .filter(|(address, prefix)| *prefix > allow.prefix && allow.contains(*address))
        .map(|(_, prefix)| 1u128 << 127 >> (prefix - allow.prefix));
    let all = inside.sum::<u128>() == 1 << 127;
    all.then_some((
        "all of it is closed, and a range wider than a closed one does not open that",
        "name the addresses that the guest is to reach",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(config: &[&str], restrict: bool, target: &str, own: &str) -> bool {
        let allow: Vec<Allow> = config.iter().map(|text| text.parse().unwrap()).collect();
        let own: IpAddr = own.parse().unwrap();
        let sides = host_sides(target.parse().unwrap());
        sides.into_iter().flatten().any(|side| is_open(restrict, &allow, side, |ip| ip != own))
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
    fn ipv6_leads_no_further_than_ipv4() {
        let plain = |target| open(&[], false, target, "2a00::5");
        assert!(plain("[2606:4700::1]:443") && plain("[2a00::6]:22") && plain("[fd00::1]:1"));
        for closed in [
            "[::]:22",
            "[::1]:22",
            "[::127.0.0.1]:22",
            "[::ffff:127.0.0.1]:22",
            "[::ffff:1.1.1.1]:443",
            "[64:ff9b::7f00:1]:22",
            "[64:ff9b:1::7f00:1]:22",
            "[100::1]:1",
            "[2001::1]:1",
            "[2002:7f00:1::]:22",
            "[fe80::1]:22",
            "[febf::1]:22",
            "[fec0::1]:22",
            "[ff02::1]:22",
            "[2a00::5]:22",
            "[fd76:6d6d:6e65:74::2]:22",
            "[fd76:6d6d:6e65:74::3]:80",
            "[fd76:6d6d:6e65:74::15]:80",
        ] {
            assert!(!plain(closed), "{closed}");
            assert!(!open(&["::/0", "0.0.0.0/0"], false, closed, "2a00::5"), "{closed} by a wide range");
        }
        assert!(open(&["2a00::5"], false, "[2a00::5]:22", "2a00::5"));
        assert!(open(&["64:ff9b::/96"], false, "[64:ff9b::808:808]:53", "::"));
        assert!(open(&["2001:db8::/32"], true, "[2001:db8::1]:80", "::"));
        assert!(!open(&["2001:db8::/32"], true, "[2001:db9::1]:80", "::"));
    }

    #[test]
    fn the_gateway_is_the_loopback_of_either_version() {
        for gateway in ["10.0.2.2:22", "[fd76:6d6d:6e65:74::2]:22"] {
            for allow in ["127.0.0.1:22", "[::1]:22"] {
                assert!(open(&[allow], false, gateway, "::"), "{gateway}, {allow}");
            }
            assert!(!open(&["127.0.0.1:23", "[::1]:23"], false, gateway, "::"), "{gateway}");
        }
        let own = host_sides("[fd76:6d6d:6e65:74::2]:22".parse().unwrap());
        assert_eq!(own[0].map(|side| side.to_string()), Some("[::1]:22".to_owned()));
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

    #[test]
    fn what_would_open_nothing_is_refused() {
        for (text, word) in [
            ("224.0.0.0/3", "wider"),
            ("fe80::/9", "wider"),
            ("127.0.0.53:53", "127.0.0.1 alone"),
            ("127.1.0.0/16", "127.0.0.1 alone"),
            ("10.0.2.2:5432", "own network"),
            ("10.0.2.0/24", "own network"),
            ("[fd76:6d6d:6e65:74::2]:80", "own network"),
        ] {
            let error = check(&[text.parse().unwrap()]).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        for text in [
            "0.0.0.0/0",
            "::/0",
            "0.0.0.0/0:443",
            "127.0.0.1/32",
            "127.0.0.1:80",
            "127.0.0.0/8",
            "::1",
            "10.0.0.0/8",
            "128.0.0.0/1",
            "169.254.169.254:80",
            "64:ff9b::/96",
            "fc00::/7",
        ] {
            check(&[text.parse().unwrap()]).unwrap();
        }
    }
}
