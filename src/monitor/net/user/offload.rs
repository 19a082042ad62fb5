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
    let segment = Segment::parse(bytes)?;
    let tcp = &bytes[segment.tcp..segment.data];
    if tcp[13] & SYN == 0 {
        return None;
    }
    let at = segment.tcp + mss_at(tcp)?;
    let headers = segment.tcp + 20;
    let told = bytes.get(at..at + 2)?;
    let mss = usize::from(u16::from_be_bytes([told[0], told[1]])).min(mtu.checked_sub(headers)?);
    let most = (LONGEST - headers).checked_div(mss)? * mss;
    let mut raised = bytes.to_vec();
    raised[at..at + 2].copy_from_slice(&(most as u16).to_be_bytes());
    (mss >= SHORTEST && most > 0).then_some((mss, raised))
}

/// Where in a header of TCP the size of segments stands, if there is such an option (RFC 9293, 3.2).
fn mss_at(tcp: &[u8]) -> Option<usize> {
    const NOTHING: u8 = 1;
    const MSS: u8 = 2;
    let mut at = 20;
    loop {
        match tcp.get(at..)? {
            [MSS, 4, _, _, ..] => return Some(at + 2),
            [NOTHING, ..] => at += 1,
            [_, len, ..] if *len >= 2 => at += usize::from(*len),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{IpProtocol, IpRepr, Ipv4Packet};

    use super::*;

    const ENDS: [[&str; 2]; 2] =
        [["10.0.2.2", "10.0.2.15"], ["fd76:6d6d:6e65:74::2", "fd76:6d6d:6e65:74::15"]];
    const ALL: Offloads = Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6);

    /// A packet with TCP, behind room for Ethernet's header.
    fn packet([from, to]: [&str; 2], flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
        let [from, to] = [from, to].map(|end| end.parse::<IpAddr>().unwrap().into());
        let len = 20 + options.len() + data.len();
        let ip = IpRepr::new(from, to, IpProtocol::Tcp, len, 64);
        let mut bytes = vec![0; ETHERNET + ip.buffer_len()];
        ip.emit(&mut bytes[ETHERNET..], &smoltcp::phy::ChecksumCapabilities::default());
        let tcp = &mut bytes[ETHERNET + ip.header_len()..];
        tcp[..20].copy_from_slice(&[0, 80, 1, 2, 0, 0, 0, 9, 0, 0, 0, 7, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        tcp[12] += (options.len() as u8 / 4) << 4;
        tcp[20..20 + options.len()].copy_from_slice(options);
        tcp[20 + options.len()..].copy_from_slice(data);
        bytes
    }

    #[test]
    fn what_the_guest_does_not_cut_is_cut_here() {
        let data: Vec<u8> = (0..3500).map(|n| n as u8).collect();
        for ends in ENDS {
            // ACK, PSH and FIN.
            let mut back: Vec<u8> = Vec::new();
            let pieces = finish(packet(ends, 0x19, &[], &data), Offloads::empty(), Some(1460));
            assert_eq!(pieces.len(), 3);
            for (number, (header, bytes)) in pieces.iter().enumerate() {
                assert_eq!(header, &[0; HEADER], "it needs nothing more");
                let bytes = &bytes[ETHERNET..];
                let ip = Packet::parse(bytes).unwrap();
                assert_eq!(ip.bytes.len(), bytes.len());
                let tcp = TcpPacket::new_checked(ip.payload).unwrap();
                assert!(tcp.verify_checksum(&ip.from.into(), &ip.to.into()));
                assert!(!ip.from.is_ipv4() || Ipv4Packet::new_checked(bytes).unwrap().verify_checksum());
                assert_eq!(tcp.seq_number().0, 9 + number as i32 * 1460);
                assert_eq!((tcp.psh(), tcp.fin(), tcp.ack()), (number == 2, number == 2, true));
                back.extend(tcp.payload());
            }
            assert!(back == data);
        }
    }

    #[test]
    fn what_the_guest_cuts_goes_whole() {
        for (ends, kind, ip) in [(ENDS[0], TCPV4, 20), (ENDS[1], TCPV6, 40)] {
            let whole = packet(ends, 0x10, &[], &[1; 3000]);
            let pieces = finish(whole.clone(), ALL, Some(1400));
            let [(header, bytes)] = &pieces[..] else { panic!("{} pieces", pieces.len()) };
            let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
            assert_eq!(header[..2], [NEEDS_CSUM, kind]);
            assert_eq!([word(2), word(4), word(6), word(8)], [14 + ip + 20, 1400, 14 + ip, 16]);
            assert_eq!(bytes.len(), whole.len());
            // One that is no longer than a segment, or of which nothing is known, needs no cutting.
            for mss in [Some(3000), None] {
                assert_eq!(finish(whole.clone(), ALL, mss)[0].0[1..6], [0; 5]);
            }
        }
    }

    #[test]
    fn a_syn_asks_for_as_many_whole_segments_as_go_into_a_packet() {
        let raised = |ends, flags, options: &[u8], mtu| {
            let syn = packet(ends, flags, options, &[]);
            raise_mss(&syn[ETHERNET..], mtu).map(|(mss, raised)| {
                let tcp = raised.len() - options.len();
                let at = tcp + options.windows(2).position(|two| two == [2, 4]).unwrap() + 2;
                (mss, u16::from_be_bytes([raised[at], raised[at + 1]]))
            })
        };
        let mss = |mss: u16| [[1, 1, 1, 1], [2, 4, (mss >> 8) as u8, mss as u8]].concat();
        assert_eq!(raised(ENDS[0], 2, &mss(1460), 1500), Some((1460, 64240)));
        assert_eq!(raised(ENDS[1], 0x12, &mss(1440), 1500), Some((1440, 64800)));
        assert_eq!(raised(ENDS[0], 2, &mss(65480), 65520), Some((65480, 65480)));
        assert_eq!(raised(ENDS[0], 2, &mss(65480), 1500), Some((1460, 64240)), "more than the link takes");
        for (flags, options) in [(0x10, mss(1460)), (2, mss(535)), (2, mss(0)), (2, vec![2, 3, 5, 180])] {
            assert_eq!(raised(ENDS[0], flags, &options, 1500), None, "{flags:#x} {options:?}");
        }
        for options in [[3, 0, 0, 0], [3, 1, 0, 0], [3, 255, 0, 0], [0, 2, 4, 5], [2, 4, 5, 0]] {
            let syn = packet(ENDS[0], 2, &options, &[]);
            assert!(raise_mss(&syn[ETHERNET..], 1500).is_none() || options[..2] == [2, 4], "{options:?}");
        }
    }
}
