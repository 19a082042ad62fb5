//! Work on TCP's segments that the guest's kernel does itself, or that is done here for one that does not: checksums, and cutting
//! what is longer than a segment. So one copy moves 64 KiB whatever the MTU.

use std::net::IpAddr;

use smoltcp::wire::{IpAddress, IpProtocol, TcpPacket};

use super::ethernet::ETHERNET;
use super::ip::Packet;
use crate::net::{HEADER, Offloads};

/// `flags` and `gso_type` of `struct virtio_net_hdr_v1` (virtio 1.3, 5.1.6).
const NEEDS_CSUM: u8 = 1;
const TCPV4: u8 = 1;
const TCPV6: u8 = 4;
/// Flags of a segment that its parts do not have, but for the last: FIN and PSH.
const LAST_ALONE: u8 = 0x09;
/// The longest packet.
pub const LONGEST: usize = 0xffff;
/// Nobody's segments are shorter by need (RFC 9293, 3.7.1): those of others go one by one.
const SHORTEST: usize = 536;

/// Where the parts of a packet with TCP are.
struct Segment {
    from: IpAddress,
    to: IpAddress,
    /// Bytes before TCP's header, and before its data.
    tcp: usize,
    data: usize,
}

impl Segment {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let packet = Packet::parse(bytes)?;
        let tcp = bytes.len().checked_sub(packet.payload.len())?;
        let len = TcpPacket::new_checked(packet.payload).ok()?.header_len();
        let (from, to) = (packet.from.into(), packet.to.into());
        (packet.bytes.len() == bytes.len()).then_some(Self { from, to, tcp, data: tcp + usize::from(len) })
    }
}

/// Whether a guest that does `left` itself cuts what goes to `to`.
fn cuts(left: Offloads, to: IpAddr) -> bool {
    left.contains(Offloads::CSUM | if to.is_ipv4() { Offloads::TSO4 } else { Offloads::TSO6 })
}

/// The packets that become of `packet`, for a guest that does `left` itself and takes segments with `mss` bytes of data, if that
/// is known. Each has room for Ethernet's header in front, and what it still needs beside it.
pub fn finish(packet: Vec<u8>, left: Offloads, mss: Option<usize>) -> Vec<([u8; HEADER], Vec<u8>)> {
    let Some(segment) = Segment::parse(&packet[ETHERNET..]) else { return vec![([0; HEADER], packet)] };
    let data = packet.len() - ETHERNET - segment.data;
    let size = mss.filter(|mss| data > *mss);
    let packets = match size {
        Some(mss) if !cuts(left, segment.to.into()) => cut(&packet, &segment, mss),
        _ => vec![packet],
    };
    let whole = packets.len() == 1;
    let finish = |mut bytes: Vec<u8>| {
        let mut header = checksum(&mut bytes[ETHERNET..], left.contains(Offloads::CSUM));
        if let Some(mss) = size.filter(|_| whole) {
            header[1] = if segment.to.version() == smoltcp::wire::IpVersion::Ipv4 { TCPV4 } else { TCPV6 };
            header[2..4].copy_from_slice(&((ETHERNET + segment.data) as u16).to_le_bytes());
            header[4..6].copy_from_slice(&(mss as u16).to_le_bytes());
        }
        (header, bytes)
    };
    packets.into_iter().map(finish).collect()
}

/// Cuts a packet into segments as a guest's kernel would.
fn cut(packet: &[u8], segment: &Segment, mss: usize) -> Vec<Vec<u8>> {
    let (headers, data) = packet.split_at(ETHERNET + segment.data);
    let pieces = data.chunks(mss);
    let last = pieces.len().saturating_sub(1);
    let one = |(number, piece): (usize, &[u8])| {
        let mut bytes = [headers, piece].concat();
        let len = bytes.len() - ETHERNET;
        let (ip, tcp) = bytes[ETHERNET..].split_at_mut(segment.tcp);
        if let IpAddress::Ipv4(_) = segment.to {
            ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            smoltcp::wire::Ipv4Packet::new_unchecked(ip).fill_checksum();
        } else {
            ip[4..6].copy_from_slice(&((len - segment.tcp) as u16).to_be_bytes());
        }
        if number < last {
            tcp[13] &= !LAST_ALONE;
        }
        let mut tcp = TcpPacket::new_unchecked(tcp);
        tcp.set_seq_number(tcp.seq_number() + number * mss);
        bytes
    };
    pieces.enumerate().map(one).collect()
}

/// Puts TCP's checksum into `packet`, or, if that is `left` to the guest, what it needs to compute it: the sum over the
/// pseudo-header, and where it starts and goes (virtio 1.3, 5.1.6.2).
fn checksum(packet: &mut [u8], left: bool) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let Some(Segment { from, to, tcp: start, .. }) = Segment::parse(packet) else { return header };
    let segment = &mut packet[start..];
    let len = segment.len() as u32;
    let mut tcp = TcpPacket::new_unchecked(segment);
    if !left {
        tcp.fill_checksum(&from, &to);
        return header;
    }
    let sum = sum_of(from.into()) + sum_of(to.into()) + u32::from(u8::from(IpProtocol::Tcp)) + len;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    tcp.set_checksum(sum as u16);
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&((ETHERNET + start) as u16).to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    header
}

/// The sum of an address' words.
fn sum_of(ip: IpAddr) -> u32 {
    let words = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    words.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}

/// Of a SYN: how much data the guest's segments have where packets have `mtu` bytes, and the same packet as if it were as many
/// whole ones as go into one packet.
pub fn raise_mss(bytes: &[u8], mtu: usize) -> Option<(usize, Vec<u8>)> {
    const SYN: u8 = 2;
    const MSS: u8 = 2;
    const NOTHING: u8 = 1;
    let segment = Segment::parse(bytes)?;
    let tcp = &bytes[segment.tcp..segment.data];
    let mut at = 20;
    while tcp[13] & SYN != 0 {
        match tcp.get(at..)? {
            [MSS, 4, high, low, ..] => {
                let headers = segment.tcp + 20;
                let mss = usize::from(u16::from_be_bytes([*high, *low])).min(mtu.checked_sub(headers)?);
                let most = (LONGEST - headers).checked_div(mss)? * mss;
                let mut raised = bytes.to_vec();
                raised[segment.tcp + at + 2..][..2].copy_from_slice(&(most as u16).to_be_bytes());
                return (mss >= SHORTEST && most > 0).then_some((mss, raised));
            }
            [NOTHING, ..] => at += 1,
            [_, len, ..] if *len >= 2 => at += usize::from(*len),
            _ => break,
        }
    }
    None
}
