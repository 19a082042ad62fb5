//! The one lease: 10.0.2.15 for whoever asks.

use std::net::{Ipv4Addr, SocketAddr};

use smoltcp::wire::{DHCP_CLIENT_PORT, DHCP_SERVER_PORT, IpProtocol, UdpPacket};

use super::Context;
use super::addresses::{DNS, GATEWAY, GUEST};
use super::ip::Packet;
use super::udp::put;
use crate::net::dhcp::Lease;

/// A day, in seconds.
const DAY: u32 = 24 * 60 * 60;

/// Takes what is for the server. False if the packet is something else.
pub fn input(context: &mut Context, packet: &Packet<'_>) -> bool {
    let is_here = packet.to == GATEWAY || packet.to == Ipv4Addr::BROADCAST;
    let Some(Ok(udp)) = (is_here && packet.protocol == IpProtocol::Udp)
        .then(|| UdpPacket::new_checked(packet.payload))
        .filter(|udp| udp.as_ref().is_ok_and(|udp| udp.dst_port() == DHCP_SERVER_PORT))
    else {
        return false;
    };
    let lease = Lease {
        client: GUEST,
        server: GATEWAY,
        // A guest that has nowhere to go is told so by having no way there.
        router: context.policy.leads_out().then_some(GATEWAY),
        resolver: context.policy.has_names().then_some(DNS),
        search: context.search(),
        mtu: Some(context.frames.mtu as u16),
        duration: DAY,
    };
    if let Some(answer) = lease.answer(udp.payload()) {
        // By broadcast: the client may have no address yet, and nobody else listens.
        let (from, to) = ((GATEWAY, DHCP_SERVER_PORT), (Ipv4Addr::BROADCAST, DHCP_CLIENT_PORT));
        put(&mut context.frames, SocketAddr::from(from), SocketAddr::from(to), &answer);
    }
    true
}
