//! Ethernet and ARP: frames on their way to the guest, and who answers for which address.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress,
    IpProtocol, IpRepr, Ipv4Packet, Ipv6Packet, TcpPacket,
};

use super::super::HEADER;
use super::addresses::{DNS, GATEWAY};

/// The address of all that is not the guest.
pub const OUR_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]);
/// Bytes of Ethernet's header.
const ETHERNET: usize = 14;
/// Frames and bytes above which what can wait does.
const ROOM: (usize, usize) = (64, 2 << 20);
/// Frames and bytes above which answers are lost.
const LIMIT: (usize, usize) = (1024, 8 << 20);

/// A frame for the guest.
pub struct Frame {
    /// What it still needs, as `struct virtio_net_hdr_v1`.
    pub header: [u8; HEADER],
    pub bytes: Vec<u8>,
}

/// Frames for the guest, in order.
pub struct Frames {
    queue: VecDeque<Frame>,
    bytes: usize,
    guest: EthernetAddress,
    /// The largest packet of IP.
    pub mtu: usize,
    /// The guest takes TCP's checksums that are yet to be computed.
    pub checksums_left: bool,
}

impl Frames {
    pub fn new(guest: [u8; 6], mtu: usize) -> Self {
        Self { queue: VecDeque::new(), bytes: 0, guest: EthernetAddress(guest), mtu, checksums_left: false }
    }

    /// The guest calls itself `address` now.
    pub fn is_from(&mut self, address: EthernetAddress) {
        if address.is_unicast() {
            self.guest = address;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether there is room for what can wait.
    pub fn has_room(&self) -> bool {
        self.queue.len() < ROOM.0 && self.bytes < ROOM.1
    }

    pub fn pop(&mut self) -> Option<Frame> {
        let frame = self.queue.pop_front()?;
        self.bytes -= frame.bytes.len();
        Some(frame)
    }

    fn push(
        &mut self,
        to: EthernetAddress,
        protocol: EthernetProtocol,
        mut bytes: Vec<u8>,
        header: [u8; HEADER],
    ) {
        if self.queue.len() >= LIMIT.0 || self.bytes >= LIMIT.1 {
            return;
        }
        let mut frame = EthernetFrame::new_unchecked(&mut bytes);
        frame.set_dst_addr(to);
        frame.set_src_addr(OUR_MAC);
        frame.set_ethertype(protocol);
        self.bytes += bytes.len();
        self.queue.push_back(Frame { header, bytes });
    }

    /// A packet with `header`, whose payload `fill` writes.
    pub fn ip(&mut self, header: &IpRepr, fill: impl FnOnce(&mut [u8])) {
        if header.buffer_len() > self.mtu {
            let len = header.payload_len();
            log::debug!("user network: a packet of {len} bytes for the guest is too long");
            return;
        }
        let mut bytes = vec![0; ETHERNET + header.buffer_len()];
        header.emit(&mut bytes[ETHERNET..], &ChecksumCapabilities::default());
        fill(&mut bytes[ETHERNET + header.header_len()..]);
        let to = match header.dst_addr() {
            IpAddress::Ipv4(to) if to.is_broadcast() => EthernetAddress::BROADCAST,
            IpAddress::Ipv6(to) if to.is_multicast() => group(to),
            _ => self.guest,
        };
        self.push(to, protocol(header.dst_addr().into()), bytes, [0; HEADER]);
    }

    /// A packet of `len` bytes with TCP for `to` in it, which `fill` writes but for TCP's checksum.
    pub fn tcp<R>(&mut self, to: IpAddr, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut bytes = vec![0; ETHERNET + len];
        let result = fill(&mut bytes[ETHERNET..]);
        let header = finish_tcp(&mut bytes[ETHERNET..], self.checksums_left).unwrap_or([0; HEADER]);
        self.push(self.guest, protocol(to), bytes, header);
        result
    }

    /// The guest asks who has an address.
    pub fn answer_arp(&mut self, packet: &[u8]) {
        let Ok(packet) = ArpPacket::new_checked(packet) else { return };
        let Ok(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpRepr::parse(&packet)
        else {
            return;
        };
        if ![GATEWAY, DNS].contains(&target_protocol_addr) {
            return;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: OUR_MAC,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let mut bytes = vec![0; ETHERNET + reply.buffer_len()];
        reply.emit(&mut ArpPacket::new_unchecked(&mut bytes[ETHERNET..]));
        self.push(self.guest, EthernetProtocol::Arp, bytes, [0; HEADER]);
    }
}

/// The address of a group's frames (RFC 2464, 7).
fn group(to: Ipv6Addr) -> EthernetAddress {
    let [.., a, b, c, d] = to.octets();
    EthernetAddress([0x33, 0x33, a, b, c, d])
}

fn protocol(to: IpAddr) -> EthernetProtocol {
    if to.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 }
}

/// Puts TCP's checksum into `packet`, or, if that is `left` to the guest, what it needs to compute it: the sum over the
/// pseudo-header, and where it starts and goes (virtio 1.3, 5.1.6.2).
fn finish_tcp(packet: &mut [u8], left: bool) -> Option<[u8; HEADER]> {
    const NEEDS_CSUM: u8 = 1;
    let (from, to, start): (IpAddress, IpAddress, usize) = match packet.first()? >> 4 {
        4 => {
            let ip = Ipv4Packet::new_checked(&*packet).ok()?;
            (ip.src_addr().into(), ip.dst_addr().into(), ip.header_len().into())
        }
        _ => {
            let ip = Ipv6Packet::new_checked(&*packet).ok()?;
            (ip.src_addr().into(), ip.dst_addr().into(), ip.header_len())
        }
    };
    let segment = packet.get_mut(start..)?;
    let len = segment.len() as u32;
    let mut tcp = TcpPacket::new_checked(segment).ok()?;
    let mut header = [0; HEADER];
    if !left {
        tcp.fill_checksum(&from, &to);
        return Some(header);
    }
    let ends = sum_of(from.into()) + sum_of(to.into());
    let sum = ends + u32::from(u8::from(IpProtocol::Tcp)) + len;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    tcp.set_checksum(sum as u16);
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&((ETHERNET + start) as u16).to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    Some(header)
}

/// The sum of an address' words.
fn sum_of(ip: IpAddr) -> u32 {
    let words = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    words.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}
