//! Ethernet and ARP: frames on their way to the guest, and who answers for which address.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress, IpRepr,
};

use super::addresses::{DNS, GATEWAY};
use super::offload;
use crate::net::{HEADER, Offloads};

/// The address of all that is not the guest.
pub const OUR_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]);
/// Bytes of Ethernet's header.
pub const ETHERNET: usize = 14;
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
    /// Frames that were ever in the queue.
    queued: u64,
    /// Frames that the guest does not get.
    lost: u64,
    guest: EthernetAddress,
    /// The largest packet of IP.
    pub mtu: usize,
    /// What the guest does to TCP's segments itself.
    pub left: Offloads,
}

impl Frames {
    pub fn new(guest: [u8; 6], mtu: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            bytes: 0,
            queued: 0,
            lost: 0,
            guest: EthernetAddress(guest),
            mtu,
            left: Offloads::empty(),
        }
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

    /// Frames that there was no room for, or that are too long, since this was last asked.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    /// How many frames there have been.
    pub fn queued(&self) -> u64 {
        self.queued
    }

    /// How many of those the guest has.
    pub fn taken(&self) -> u64 {
        self.queued - self.queue.len() as u64
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
            self.lost += 1;
            return;
        }
        let mut frame = EthernetFrame::new_unchecked(&mut bytes);
        frame.set_dst_addr(to);
        frame.set_src_addr(OUR_MAC);
        frame.set_ethertype(protocol);
        self.bytes += bytes.len();
        self.queued += 1;
        self.queue.push_back(Frame { header, bytes });
    }

    /// A packet with `header`, whose payload `fill` writes.
    pub fn ip(&mut self, header: &IpRepr, fill: impl FnOnce(&mut [u8])) {
        if header.buffer_len() > self.mtu {
            let len = header.payload_len();
            log::debug!("user network: a packet of {len} bytes for the guest is too long");
            self.lost += 1;
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

    /// A packet of `len` bytes with TCP for `to` in it, which `fill` writes but for TCP's checksum. The guest's segments have `mss`
    /// bytes of data, if that is known; it may have more.
    pub fn tcp<R>(
        &mut self,
        to: IpAddr,
        mss: Option<usize>,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let mut bytes = vec![0; ETHERNET + len];
        let result = fill(&mut bytes[ETHERNET..]);
        for (header, bytes) in offload::finish(bytes, self.left, mss) {
            self.push(self.guest, protocol(to), bytes, header);
        }
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
