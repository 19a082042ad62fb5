//! A packet of IP from the guest, of either version.

use std::net::IpAddr;

use smoltcp::wire::{IpProtocol, Ipv4Packet, Ipv6Packet};

/// What an error about a packet of IPv6 quotes of it: as much as the smallest MTU has room for (RFC 4443, 2.4 c).
const QUOTE6: usize = 1280 - 40 - 8;

/// A packet that is whole: no fragment.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    pub from: IpAddr,
    pub to: IpAddr,
    /// What follows the header. Extension headers of IPv6 are protocols like others, and none that we know.
    pub protocol: IpProtocol,
    pub hops: u8,
    /// All of it, and what is behind its header.
    pub bytes: &'a [u8],
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// The packet at the beginning of `bytes`; behind it there may be Ethernet's padding.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Option<Self> {
        let ip = Ipv4Packet::new_checked(bytes).ok()?;
        let is_part = ip.more_frags() || ip.frag_offset() > 0;
        if ip.header_len() < 20 || is_part {
            return None;
        }
        let bytes = bytes.get(..usize::from(ip.total_len()))?;
        Some(Self {
            from: ip.src_addr().into(),
            to: ip.dst_addr().into(),
            protocol: ip.next_header(),
            hops: ip.hop_limit(),
            bytes,
            payload: bytes.get(usize::from(ip.header_len())..)?,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Option<Self> {
        let ip = Ipv6Packet::new_checked(bytes).ok()?;
        let bytes = bytes.get(..ip.total_len())?;
        Some(Self {
            from: ip.src_addr().into(),
            to: ip.dst_addr().into(),
            protocol: ip.next_header(),
            hops: ip.hop_limit(),
            bytes,
            payload: bytes.get(ip.header_len()..)?,
        })
    }

    /// What an error about it quotes: of IPv4 its header, and eight bytes (RFC 792).
    pub fn quote(&self) -> &'a [u8] {
        let len = match self.from {
            IpAddr::V4(_) => self.bytes.len() - self.payload.len() + 8,
            IpAddr::V6(_) => QUOTE6,
        };
        &self.bytes[..self.bytes.len().min(len)]
    }
}
