//! [`UserNet`]: what a guest reaches, and how it is reached, by a network that the monitor makes itself.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::text::ParseError;

/// A network of the guest and the monitor, behind which are the host's sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserNet {
    /// Nothing but published ports, and what `allow` has.
    pub restrict: bool,
    /// Who answers questions for names. Empty: the host's resolvers.
    pub dns: Vec<Resolver>,
    /// What may be reached although it is the host's own, or although `restrict` is on.
    pub allow: Vec<Allow>,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<Publish>,
}

impl UserNet {
    /// The largest packet, where the configuration has none: 64 KiB go in one piece.
    pub const MTU: u16 = 65520;
    /// The smallest: what every host takes (RFC 791, 3.2).
    pub const MIN_MTU: u16 = 576;
}

/// Addresses that may be reached: `ADDR[/BITS][:PORT]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allow {
    /// One of them; its first `prefix` bits are those of all.
    pub address: Ipv4Addr,
    /// 0 to 32.
    pub prefix: u8,
    /// The port of TCP or UDP. Absent: all, and ping.
    pub port: Option<u16>,
}

impl Allow {
    /// Whether all addresses of this range are in the range of `address` and `prefix`.
    pub fn is_within(&self, address: Ipv4Addr, prefix: u8) -> bool {
        let bits = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or_default();
        self.prefix >= prefix && (self.address.to_bits() ^ address.to_bits()) & bits == 0
    }

    /// Whether `address` is in the range.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        Self { address, prefix: 32, port: None }.is_within(self.address, self.prefix)
    }
}

impl FromStr for Allow {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || {
            ParseError::new(format!(
                "{text:?} is not an address or range like 127.0.0.1, 127.0.0.1:8080 or 192.168.0.0/16"
            ))
        };
        let (range, port) = match text.split_once(':') {
            Some((range, port)) => (range, Some(number(port).filter(|port| *port > 0).ok_or_else(wrong)?)),
            None => (text, None),
        };
        let (address, prefix) = match range.split_once('/') {
            Some((address, prefix)) => {
                (address, number(prefix).filter(|prefix| *prefix <= 32).ok_or_else(wrong)? as u8)
            }
            None => (range, 32),
        };
        Ok(Self { address: address.parse().map_err(|_| wrong())?, prefix, port })
    }
}

impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        if self.prefix < 32 {
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
        address.map(Self).ok_or_else(wrong)
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
    fn what_is_allowed_reads_as_it_is_written() {
        for text in ["127.0.0.1", "127.0.0.1:8080", "192.168.0.0/16", "0.0.0.0/0:443"] {
            assert_eq!(text.parse::<Allow>().unwrap().to_string(), text);
        }
        for wrong in
            ["", "localhost", "127.0.0.1:", "127.0.0.1:0", "1.2.3.4/33", "1.2.3.4/", "::1", "1.2.3.4/+8"]
        {
            assert!(wrong.parse::<Allow>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_hold_addresses_and_other_ranges() {
        let allow = |text: &str| text.parse::<Allow>().unwrap();
        let address = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        assert!(allow("10.0.0.0/8").contains(address("10.255.0.1")));
        assert!(!allow("10.0.0.0/8").contains(address("11.0.0.0")));
        assert!(allow("0.0.0.0/0").contains(address("255.255.255.255")));
        assert!(!allow("0.0.0.0/0").is_within(address("127.0.0.0"), 8));
        assert!(allow("127.1.0.0/16").is_within(address("127.0.0.0"), 8));
    }
}
