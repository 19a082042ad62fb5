//! [`Cutter`]: TCP that a neighbour has left uncut, for a guest that takes none such.

use super::super::HEADER;
use super::checksum;

/// `gso_type` of TCP over IPv4 and over IPv6 (virtio 1.3, 5.1.6).
pub const TCPV4: u8 = 1;
pub const TCPV6: u8 = 4;
/// Where TCP's header has its checksum, and how long the header is at least.
pub const CHECKSUM: usize = 16;
pub const TCP: usize = 20;
/// Bytes of IPv6's header, and of IPv4's at least.
const IPV6: usize = 40;
const IPV4: usize = 20;
/// Flags that only the last segment has (FIN, PSH), and only the first (CWR; RFC 3168, 6.1.2).
const LAST_ALONE: u8 = 0x09;
const FIRST_ALONE: u8 = 0x80;

/// A frame, of which one segment is made after the other: never more than one is there beside it.
#[derive(Debug)]
pub struct Cutter {
    frame: Vec<u8>,
    /// Where the headers of IP and TCP begin, and the data.
    ip: usize,
    tcp: usize,
    data: usize,
    /// Bytes of a segment's data.
    size: usize,
    /// Where the next one's data begin.
    at: usize,
}

impl Cutter {
    /// Of a frame whose header is [`checked`](checksum::checked). `None` if it is no TCP over IP.
    pub fn new(header: &[u8; HEADER], frame: Vec<u8>) -> Option<Self> {
        let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let (size, tcp) = (word(4), word(6));
        let ip = match frame.get(12..14)? {
            // With a VLAN's tag.
            [0x81, 0] | [0x88, 0xa8] => 18,
            _ => 14,
        };
        let own = frame.get(ip..tcp)?;
        let is_ip = match header[1] {
            TCPV4 => own.len() >= IPV4 && own[0] >> 4 == 4 && usize::from(own[0] & 15) * 4 == own.len(),
            // Behind its header others may come.
            TCPV6 => own.len() >= IPV6 && own[0] >> 4 == 6,
            _ => false,
        };
        let len = usize::from(frame.get(tcp + 12)? >> 4) * 4;
        let data = tcp + len;
        let fine = is_ip && len >= TCP && size > 0 && data < frame.len();
        fine.then_some(Self { frame, ip, tcp, data, size, at: data })
    }

    /// The next segment, as a whole frame. `None` behind the last one.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        let &mut Self { ip, tcp, data, size, at, .. } = self;
        let piece = self.frame.get(at..).filter(|rest| !rest.is_empty())?;
        let piece = &piece[..size.min(piece.len())];
        let mut bytes = [&self.frame[..data], piece].concat();
        let (len, whole) = (bytes.len(), self.frame.len());
        if bytes[ip] >> 4 == 4 {
            let number = ((at - data) / size) as u16;
            set(&mut bytes, ip + 2, (len - ip) as u16);
            let id = word(&bytes, ip + 4).wrapping_add(number);
            set(&mut bytes, ip + 4, id);
            set(&mut bytes, ip + 10, 0);
            let sum = checksum::of(&bytes[ip..tcp]);
            set(&mut bytes, ip + 10, sum);
        } else {
            set(&mut bytes, ip + 4, (len - ip - IPV6) as u16);
        }
        let sequence = u32::from(word(&bytes, tcp + 4)) << 16 | u32::from(word(&bytes, tcp + 6));
        let sequence = sequence.wrapping_add((at - data) as u32);
        set(&mut bytes, tcp + 4, (sequence >> 16) as u16);
        set(&mut bytes, tcp + 6, sequence as u16);
        bytes[tcp + 13] &= !if at == data { 0 } else { FIRST_ALONE };
        bytes[tcp + 13] &= !if at + size < whole { LAST_ALONE } else { 0 };
        // What stands there is the sum over the pseudo-header, which has the length (RFC 1624, 3).
        let [old, new] = [whole, len].map(|end| (end - tcp) as u16);
        let sum = [word(&bytes, tcp + CHECKSUM), !old, new].into_iter().map(u64::from).sum();
        set(&mut bytes, tcp + CHECKSUM, checksum::fold(sum));
        checksum::fill(&mut bytes, tcp, CHECKSUM);
        self.at += size;
        Some(bytes)
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn set(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{IpAddress, IpProtocol, IpRepr, Ipv4Packet, Ipv6Packet, TcpPacket};

    use super::*;

    const ENDS: [[&str; 2]; 2] = [["10.1.2.3", "10.1.2.4"], ["fe80::1", "fe80::2"]];

    /// A frame of TCP with `data`, as a guest hands it over uncut, with its header.
    fn frame([from, to]: [&str; 2], tag: &[u8], data: &[u8], size: u16) -> ([u8; HEADER], Vec<u8>) {
        let [from, to] = [from, to].map(|end| end.parse::<IpAddress>().unwrap());
        let len = TCP + data.len();
        let repr = IpRepr::new(from, to, IpProtocol::Tcp, len, 64);
        let mut ip = vec![0; repr.buffer_len()];
        repr.emit(&mut ip, &ChecksumCapabilities::ignored());
        ip.truncate(repr.header_len());
        let sum =
            checksum::of(&[&octets(from)[..], &octets(to), &[0, 6], &(len as u16).to_be_bytes()].concat());
        let mut tcp = vec![0, 80, 1, 2, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 7, 0x50, 0x99, 1, 0, 0, 0, 0, 0];
        set(&mut tcp, CHECKSUM, !sum);
        let kind = if from.version() == smoltcp::wire::IpVersion::Ipv4 { TCPV4 } else { TCPV6 };
        let ethertype: &[u8] = if kind == TCPV4 { &[8, 0] } else { &[0x86, 0xdd] };
        let start = (12 + tag.len() + 2 + ip.len()) as u16;
        let words = [start + 20, size, start, 16, 0].map(u16::to_le_bytes).concat();
        let header = [&[checksum::NEEDED, kind][..], &words].concat().try_into().unwrap();
        (header, [&[2; 12], tag, ethertype, &ip, &tcp, data].concat())
    }

    fn octets(address: IpAddress) -> Vec<u8> {
        match std::net::IpAddr::from(address) {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        }
    }

    #[test]
    fn segments_are_whole_frames_with_checksums_and_carry_all_of_the_data() {
        let data: Vec<u8> = (0..4001).map(|n| n as u8).collect();
        for (ends, tag) in ENDS.iter().flat_map(|ends| [(*ends, &b""[..]), (*ends, &[0x81, 0, 0, 5])]) {
            let (header, whole) = frame(ends, tag, &data, 1000);
            let mut cutter = Cutter::new(&header, whole.clone()).unwrap();
            let mut back: Vec<u8> = Vec::new();
            for number in 0..5 {
                let bytes = cutter.next().unwrap();
                let ip = 14 + tag.len();
                assert_eq!(bytes[..ip], whole[..ip]);
                let [from, to] = ends.map(|end| end.parse::<IpAddress>().unwrap());
                let payload = if from.version() == smoltcp::wire::IpVersion::Ipv4 {
                    let packet = Ipv4Packet::new_checked(&bytes[ip..]).unwrap();
                    assert!(packet.verify_checksum() && packet.total_len() as usize == bytes.len() - ip);
                    assert_eq!(packet.ident(), number);
                    packet.payload().to_vec()
                } else {
                    let packet = Ipv6Packet::new_checked(&bytes[ip..]).unwrap();
                    assert_eq!(packet.total_len(), bytes.len() - ip);
                    packet.payload().to_vec()
                };
                let tcp = TcpPacket::new_checked(&payload[..]).unwrap();
                assert!(tcp.verify_checksum(&from, &to), "{number}");
                assert_eq!(
                    tcp.seq_number().0,
                    (0xffff_fff0u32 as i32).wrapping_add(1000 * i32::from(number))
                );
                assert_eq!((tcp.psh(), tcp.fin(), tcp.cwr()), (number == 4, number == 4, number == 0));
                back.extend(tcp.payload());
            }
            assert!(cutter.next().is_none() && back == data);
        }
    }

    #[test]
    fn what_is_no_tcp_over_ip_is_not_cut() {
        let (header, whole) = frame(ENDS[0], b"", &[7; 100], 10);
        let with = |at: usize, byte: u8| {
            let mut frame = whole.clone();
            frame[at] = byte;
            Cutter::new(&header, frame).is_some()
        };
        assert!(with(0, 2));
        // The version, a header of another length, a tag that is none, a header of TCP that is too short or too long.
        for (at, byte) in [(14, 0x65), (14, 0x46), (12, 0x81), (46, 0x40), (46, 0xf0)] {
            assert_eq!(with(at, byte), (at, byte) == (46, 0xf0), "{at} {byte:#x}");
        }
        for len in 0..55 {
            assert!(Cutter::new(&header, whole[..len].to_vec()).is_none(), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_frame_is_cut_into_at_most_its_length(
            bytes in any::<[u8; HEADER]>(), kind in prop::sample::select(vec![TCPV4, TCPV6]), start in 30u8..80,
            mut frame in prop::collection::vec(any::<u8>(), 0..300), version in prop::sample::select(vec![0x45u8, 0x60]),
        ) {
            let header = [1, kind, bytes[2], bytes[3], bytes[4], 0, start, 0, 16, 0, 0, 0];
            if let Some(byte) = frame.get_mut(14) {
                *byte = version;
            }
            let len = frame.len();
            if let Some(mut cutter) = Cutter::new(&header, frame) {
                let pieces = std::iter::from_fn(|| cutter.next()).take(len + 1).count();
                prop_assert!((1..=len).contains(&pieces));
            }
        }
    }
}
