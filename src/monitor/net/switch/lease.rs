//! [`Lease`]: the address of a port's guest, which it gets by DHCP from the monitor. Other ports see nothing of that.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress,
    IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};

use super::FRONT;
use super::segment::Id;
use crate::memory::Slices;
use crate::net::dhcp;

/// Who answers: nobody on the segment has that address.
const SERVER: EthernetAddress = EthernetAddress([0x52, 0x55, 0x0a, 0, 0, 0xfe]);
/// A client's message has less than this, by Ethernet's MTU.
const LONGEST: usize = 1514;
const ETHERNET: usize = 14;

/// What one guest gets.
pub struct Lease {
    /// The device that has it; others behind the port, on a bridge inside of the guest, have to ask elsewhere.
    pub mac: [u8; 6],
    pub lease: dhcp::Lease,
    /// Leads to the port's own socket: an answer comes to the guest like any other frame.
    pub port: OwnedFd,
}

impl Lease {
    /// A lease without an end, as the folder knows of none.
    pub fn new(mac: [u8; 6], client: Ipv4Addr, server: Ipv4Addr, port: OwnedFd) -> Self {
        let duration = u32::MAX;
        Self {
            mac,
            lease: dhcp::Lease {
                client,
                server,
                router: None,
                resolver: None,
                search: Vec::new(),
                mtu: None,
                duration,
            },
            port,
        }
    }

    /// Takes a frame to all, if it is for the server, and answers it as port `id`. False if it is something else.
    pub fn take(&self, id: Id, frame: &Slices) -> bool {
        if frame.len() > LONGEST {
            return false;
        }
        let mut bytes = vec![0; frame.len()];
        frame.copy_to(0, &mut bytes);
        let Some(message) = self.message(&bytes) else { return false };
        if let Some(answer) = self.lease.answer(message) {
            // Where there is no room for it, the client asks again.
            let _ = rustix::io::write(&self.port, &self.frame(id, &answer));
        }
        true
    }

    /// What a client on the guest's device says to servers.
    fn message<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let frame = EthernetFrame::new_checked(bytes).ok()?;
        if frame.src_addr().0 != self.mac || frame.ethertype() != EthernetProtocol::Ipv4 {
            return None;
        }
        let ip = Ipv4Packet::new_checked(frame.payload()).ok()?;
        if ip.next_header() != IpProtocol::Udp || ip.more_frags() || ip.frag_offset() != 0 {
            return None;
        }
        let udp = UdpPacket::new_checked(ip.payload()).ok()?;
        (udp.dst_port() == DHCP_SERVER_PORT).then(|| udp.payload())
    }

    /// A message of port `id` to itself, with `answer` for the guest's client in it. By broadcast: it may have no address yet.
    fn frame(&self, id: Id, answer: &[u8]) -> Vec<u8> {
        let udp = UdpRepr { src_port: DHCP_SERVER_PORT, dst_port: DHCP_CLIENT_PORT };
        let (src_addr, dst_addr) = (self.lease.server, Ipv4Addr::BROADCAST);
        let len = udp.header_len() + answer.len();
        let ip =
            Ipv4Repr { src_addr, dst_addr, next_header: IpProtocol::Udp, payload_len: len, hop_limit: 64 };
        let mut message = vec![0; FRONT + ETHERNET + ip.buffer_len() + len];
        message[..size_of::<Id>()].copy_from_slice(&id.to_ne_bytes());
        let mut frame = EthernetFrame::new_unchecked(&mut message[FRONT..]);
        frame.set_src_addr(SERVER);
        frame.set_dst_addr(EthernetAddress(self.mac));
        frame.set_ethertype(EthernetProtocol::Ipv4);
        let sums = ChecksumCapabilities::default();
        let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
        ip.emit(&mut packet, &sums);
        let mut datagram = UdpPacket::new_unchecked(packet.payload_mut());
        let (src, dst) = (IpAddress::Ipv4(src_addr), IpAddress::Ipv4(dst_addr));
        udp.emit(&mut datagram, &src, &dst, answer.len(), |bytes| bytes.copy_from_slice(answer), &sums);
        message
    }
}
