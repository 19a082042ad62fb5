//! [`UserNet`]: what a guest reaches, and how it is reached, by a network that the monitor makes itself.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::text::ParseError;

/// A network of the guest and the monitor, behind which are the host's sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNet {
    /// IPv6 beside IPv4. It takes an MTU of [`UserNet::MIN_MTU_IPV6`].
    pub ipv6: bool,
    /// Nothing but published ports, and what `allow` has.
    pub restrict: bool,
    /// Who answers questions for names. Empty: the host's resolvers.
    pub dns: Vec<Resolver>,
    /// What may be reached although it is the host's own, or although `restrict` is on.
    pub allow: Vec<Allow>,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<Publish>,
}

impl Default for UserNet {
    fn default() -> Self {
        Self { ipv6: true, restrict: false, dns: Vec::new(), allow: Vec::new(), publish: Vec::new() }
    }
}

impl UserNet {
    /// The largest packet, where the configuration has none: 64 KiB go in one piece.
    pub const MTU: u16 = 65520;
    /// The smallest: what every host takes (RFC 791, 3.2).
    pub const MIN_MTU: u16 = 576;
    /// The smallest for IPv6 (RFC 8200, 5).
    pub const MIN_MTU_IPV6: u16 = 1280;
}

/// Addresses that may be reached: `ADDR[/BITS][:PORT]`; one of IPv6 is in brackets if a port follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allow {
    /// One of them; its first `prefix` bits are those of all.
    pub address: IpAddr,
    /// Up to 32, or 128 for IPv6.
    pub prefix: u8,
    /// The port of TCP or UDP. Absent: all, and ping.
    pub port: Option<u16>,
}

/// Bits of an address like this one.
fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Which family, and its bits from the top of a number.
fn bits(address: IpAddr) -> (u8, u128) {
    let bits = match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    };
    (width(address), bits)
}

impl Allow {
    /// Whether all addresses of this range are in the range of `address` and `prefix`.
    pub fn is_within(&self, address: IpAddr, prefix: u8) -> bool {
        let (family, theirs) = bits(address);
        let (own_family, own) = bits(self.address);
        let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or_default();
        family == own_family && self.prefix >= prefix && (own ^ theirs) & mask == 0
    }

    /// Whether `address` is in the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::one(address).is_within(self.address, self.prefix)
    }

    /// The lowest address of the range.
    fn first(&self) -> IpAddr {
        let kept = |width: u8| u32::from(width - self.prefix);
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(kept(32)).unwrap_or_default();
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(kept(128)).unwrap_or_default();
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        }
    }

    /// The range of `address` alone.
    pub fn one(address: IpAddr) -> Self {
        Self { address, prefix: width(address), port: None }
    }

    /// Whether it is one address, and no more.
    pub fn is_one(&self) -> bool {
        self.prefix == width(self.address)
    }

    /// Address, bits and port as they are written.
    fn parts(text: &str) -> Option<(&str, Option<&str>, Option<&str>)> {
        let (address, rest) = match text.strip_prefix('[') {
            Some(rest) => rest.split_once(']').filter(|(address, _)| address.contains(':'))?,
            // An address of IPv6 without brackets has colons, and no port.
            None => match text.find(if text.matches(':').count() > 1 { &['/'][..] } else { &['/', ':'] }) {
                Some(at) => text.split_at(at),
                None => (text, ""),
            },
        };
        let (range, port) = match rest.split_once(':') {
            Some((range, port)) => (range, Some(port)),
            None => (rest, None),
        };
        match range {
            "" => Some((address, None, port)),
            range => Some((address, Some(range.strip_prefix('/')?), port)),
        }
    }

    fn read(text: &str) -> Option<Self> {
        let (address, prefix, port) = Self::parts(text)?;
        let mut allow = Self::one(address.parse().ok()?);
        if let Some(prefix) = prefix {
            allow.prefix = number(prefix).filter(|prefix| *prefix <= allow.prefix.into())? as u8;
        }
        if let Some(port) = port {
            allow.port = Some(number(port).filter(|port| *port > 0)?);
        }
        Some(allow)
    }
}

impl FromStr for Allow {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let allow = Self::read(text).ok_or_else(|| {
            ParseError::new(format!(
                "{text:?} is not an address or range like 127.0.0.1, 127.0.0.1:8080, 192.168.0.0/16 or [::1]:8080"
            ))
        })?;
        let first = allow.first();
        if first != allow.address {
            return Err(ParseError::new(format!(
                "{text:?} has bits beyond its /{}, whose range begins at {first}",
                allow.prefix
            )));
        }
        if let IpAddr::V6(address) = first
            && let Some(address) = address.to_ipv4_mapped()
        {
            return Err(ParseError::new(format!("{text:?} stands for an IPv4 address: write {address}")));
        }
        Ok(allow)
    }
}

impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (IpAddr::V6(address), Some(_)) => write!(f, "[{address}]")?,
            (address, _) => write!(f, "{address}")?,
        }
        if !self.is_one() {
            write!(f, "/{}", self.prefix)?;
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// Ports of the host that lead to ports of the guest: `[ADDR:]HOST[-LAST]:GUEST[-LAST][/tcp|/udp]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish {
    /// The host's address.
    pub address: IpAddr,
    /// The first port on the host.
    pub host: u16,
    /// The first port in the guest.
    pub guest: u16,
    /// How many ports, one after the other.
    pub count: u16,
    /// UDP, and not TCP.
    pub udp: bool,
}

impl Publish {
    /// Each of the ports: the host's address, and the guest's port.
    pub fn ports(self) -> impl Iterator<Item = (SocketAddr, u16)> {
        (0..self.count).map(move |n| {
            (SocketAddr::new(self.address, self.host.wrapping_add(n)), self.guest.wrapping_add(n))
        })
    }

    /// A port of the host that this one takes, and `other`, too.
    pub fn clash(self, other: Self) -> Option<SocketAddr> {
        let whole = |address: IpAddr| address.is_unspecified();
        let same = self.address == other.address
            || self.address.is_ipv4() == other.address.is_ipv4()
                && (whole(self.address) || whole(other.address));
        let first = self.host.max(other.host);
        let taken = |publish: Self| first - publish.host < publish.count;
        let clash = same && self.udp == other.udp && taken(self) && taken(other);
        clash.then(|| SocketAddr::new(self.address, first))
    }

    /// What is published, as a number to open a socket by.
    pub fn protocol(self) -> &'static str {
        if self.udp { "udp" } else { "tcp" }
    }
}

/// Digits alone.
fn number(text: &str) -> Option<u16> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// First port, and how many.
fn ports(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first > 0 && last >= first).then(|| (first, (last - first).saturating_add(1)))
}

impl FromStr for Publish {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = |why: &str| {
            let hint = "write HOST:GUEST, for example 8080:80; also 0.0.0.0:8080:80, 5353:53/udp and 8000-8009:80-89";
            ParseError::hinted(format!("{text:?} does not publish a port: {why}"), hint)
        };
        let (rest, udp) = match text.rsplit_once('/') {
            None | Some((_, "tcp")) => (text.strip_suffix("/tcp").unwrap_or(text), false),
            Some((rest, "udp")) => (rest, true),
            Some((_, other)) => return Err(wrong(&format!("{other:?} is neither tcp nor udp"))),
        };
        let (rest, inner) = rest.rsplit_once(':').ok_or_else(|| wrong("the guest's port is missing"))?;
        let (address, outer) = match rest.rsplit_once(':') {
            Some((address, outer)) => {
                let bare =
                    address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
                let bare =
                    bare.parse().map_err(|_| wrong(&format!("{address:?} is not an address of the host")))?;
                (bare, outer)
            }
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
        };
        let is_no_port =
            |text: &str| wrong(&format!("{text:?} is not a port or range of ports from 1 to 65535"));
        let (host, count) = ports(outer).ok_or_else(|| is_no_port(outer))?;
        let (guest, inside) = ports(inner).ok_or_else(|| is_no_port(inner))?;
        if count != inside {
            return Err(wrong(&format!("{count} ports of the host, and {inside} of the guest")));
        }
        Ok(Self { address, host, guest, count, udp })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.address != Ipv4Addr::LOCALHOST {
            match self.address {
                IpAddr::V4(address) => write!(f, "{address}:")?,
                IpAddr::V6(address) => write!(f, "[{address}]:")?,
            }
        }
        let range = |first: u16| match self.count {
            1 => first.to_string(),
            count => format!("{first}-{}", first + (count - 1)),
        };
        write!(f, "{}:{}", range(self.host), range(self.guest))?;
        if self.udp { f.write_str("/udp") } else { Ok(()) }
    }
}

/// A server of DNS: `ADDR[:PORT]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolver(pub SocketAddr);

impl Resolver {
    /// Where servers of DNS listen.
    pub const PORT: u16 = 53;
}

impl FromStr for Resolver {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let plain = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, Self::PORT));
        let address = plain.or_else(|_| text.parse()).ok().filter(|address| address.port() > 0);
        let wrong = || {
            ParseError::new(format!(
                "{text:?} is not an address of a DNS server like 9.9.9.9 or 127.0.0.1:5353"
            ))
        };
        // No address of one host's.
        let none = |ip: IpAddr| ip.is_unspecified() || ip.is_multicast() || ip == Ipv4Addr::BROADCAST;
        address.filter(|address| !none(address.ip())).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.port() == Self::PORT { write!(f, "{}", self.0.ip()) } else { write!(f, "{}", self.0) }
    }
}

/// In files these are the texts of the command line.
macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(ParseError::in_file)
            }
        }
    };
}
as_text!(Allow);
as_text!(Publish);
as_text!(Resolver);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_reads_as_it_is_written() {
        for text in [
            "8080:80",
            "0.0.0.0:8080:80",
            "5353:53/udp",
            "8000-8009:80-89",
            "[::1]:1-65535:1-65535/udp",
            "192.168.1.2:1:2",
        ] {
            assert_eq!(text.parse::<Publish>().unwrap().to_string(), text);
        }
        let tcp: Publish = "127.0.0.1:1-2:3-4/tcp".parse().unwrap();
        let ports: Vec<_> = tcp.ports().map(|(host, guest)| (host.to_string(), guest)).collect();
        assert_eq!(ports, [("127.0.0.1:1".to_owned(), 3), ("127.0.0.1:2".to_owned(), 4)]);
        for wrong in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:0",
            "x:80",
            "+80:80",
            "80:80/sctp",
            "1-3:1-2",
            "3-1:3-1",
            "1.2.3:1:2",
            "65535-65536:1-2",
            "host:1:2",
            "-:1",
        ] {
            assert!(wrong.parse::<Publish>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_port_of_the_host_leads_to_one_place() {
        let publish = |text: &str| text.parse::<Publish>().unwrap();
        for (one, other, clash) in [
            ("8080:80", "8080:81", Some("127.0.0.1:8080")),
            ("8000-8009:80-89", "8005-8020:5-20", Some("127.0.0.1:8005")),
            ("1-65535:1-65535", "65535:1", Some("127.0.0.1:65535")),
            ("0.0.0.0:8080:80", "8080:80", Some("0.0.0.0:8080")),
            ("[::1]:8080:80", "[::]:8080:80", Some("[::1]:8080")),
            ("8080:80", "8080:80/udp", None),
            ("8080:80", "8081:80", None),
            ("8080:80", "[::1]:8080:80", None),
            ("8080:80", "127.0.0.2:8080:80", None),
        ] {
            let clashes = publish(one).clash(publish(other)).map(|address| address.to_string());
            assert_eq!(clashes.as_deref(), clash, "{one} {other}");
            assert_eq!(publish(other).clash(publish(one)).is_some(), clash.is_some(), "{other} {one}");
        }
    }

    #[test]
    fn a_resolver_has_the_address_of_a_host() {
        for text in ["9.9.9.9", "127.0.0.1:5353", "::1", "[fd00::3]:5353"] {
            assert_eq!(text.parse::<Resolver>().unwrap().to_string(), text);
        }
        for wrong in ["0.0.0.0", "[::]:53", "224.0.0.251", "255.255.255.255", "ff02::fb", "9.9.9.9:0", "dns"]
        {
            assert!(wrong.parse::<Resolver>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_allowed_reads_as_it_is_written() {
        for text in [
            "127.0.0.1",
            "127.0.0.1:8080",
            "192.168.0.0/16",
            "0.0.0.0/0:443",
            "::1",
            "[::1]:8080",
            "2001:db8::/32",
            "[2001:db8::]/32:443",
            "::/0",
        ] {
            assert_eq!(text.parse::<Allow>().unwrap().to_string(), text);
        }
        assert_eq!("[::1]".parse::<Allow>().unwrap().to_string(), "::1");
        for wrong in [
            "",
            "localhost",
            "127.0.0.1:",
            "127.0.0.1:0",
            "1.2.3.4/33",
            "1.2.3.4/",
            "1.2.3.4/+8",
            "::1/129",
            "[::1",
            "[::1]:",
            "[::1]8",
            "[1.2.3.4]:80",
            "fe80::1%eth0",
            "]::1",
        ] {
            assert!(wrong.parse::<Allow>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_hold_addresses_and_other_ranges() {
        let allow = |text: &str| text.parse::<Allow>().unwrap();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(allow("10.0.0.0/8").contains(address("10.255.0.1")));
        assert!(!allow("10.0.0.0/8").contains(address("11.0.0.0")));
        assert!(allow("0.0.0.0/0").contains(address("255.255.255.255")));
        assert!(!allow("0.0.0.0/0").is_within(address("127.0.0.0"), 8));
        assert!(allow("127.1.0.0/16").is_within(address("127.0.0.0"), 8));
        assert!(allow("2001:db8::/32").contains(address("2001:db8:ffff::")));
        assert!(!allow("2001:db8::/32").contains(address("2001:db9::")));
        assert!(!allow("::/0").contains(address("1.2.3.4")) && !allow("0.0.0.0/0").contains(address("::")));
    }
}
