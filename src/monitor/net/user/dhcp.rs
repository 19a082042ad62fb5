//! The one lease: 10.0.2.15 for whoever asks (RFC 2131).

use std::net::{Ipv4Addr, SocketAddr};

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, IpProtocol,
    UdpPacket,
};

use super::Context;
use super::addresses::{DNS, GATEWAY, GUEST};
use super::ip::Packet;
use super::udp::put;

/// A day, in seconds.
const LEASE: u32 = 24 * 60 * 60;
/// The largest packet of IP on this link (RFC 2132, 5.1).
const OPTION_MTU: u8 = 26;

/// Takes what is for the server. False if the packet is something else.
pub fn input(context: &mut Context, packet: &Packet<'_>) -> bool {
    let is_here = packet.to == GATEWAY || packet.to == Ipv4Addr::BROADCAST;
    let Some(Ok(udp)) = (is_here && packet.protocol == IpProtocol::Udp)
        .then(|| UdpPacket::new_checked(packet.payload))
        .filter(|udp| udp.as_ref().is_ok_and(|udp| udp.dst_port() == DHCP_SERVER_PORT))
    else {
        return false;
    };
    answer(context, udp.payload());
    true
}

/// Answers what a client says.
fn answer(context: &mut Context, message: &[u8]) {
    let Ok(packet) = DhcpPacket::new_checked(message) else { return };
    let Ok(query) = DhcpRepr::parse(&packet) else { return };
    let is_for_another = query.server_identifier.is_some_and(|server| server != GATEWAY);
    let wanted = query.requested_ip.unwrap_or(query.client_ip);
    let answer = match query.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if is_for_another => return,
        DhcpMessageType::Request if wanted == GUEST => DhcpMessageType::Ack,
        DhcpMessageType::Request => DhcpMessageType::Nak,
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return,
    };
    let (is_lease, is_nak) = (query.message_type != DhcpMessageType::Inform, answer == DhcpMessageType::Nak);
    let mtu = (context.frames.mtu as u16).to_be_bytes();
    let options = [DhcpOption { kind: OPTION_MTU, data: &mtu }];
    // A guest that has nowhere to go is told so by having no way there.
    let (router, resolver) = (context.policy.leads_out(), context.policy.has_names());
    let reply = DhcpRepr {
        message_type: answer,
        your_ip: if is_lease && !is_nak { GUEST } else { Ipv4Addr::UNSPECIFIED },
        server_ip: GATEWAY,
        router: (router && !is_nak).then_some(GATEWAY),
        subnet_mask: (!is_nak).then_some(Ipv4Addr::new(255, 255, 255, 0)),
        server_identifier: Some(GATEWAY),
        dns_servers: (resolver && !is_nak).then(|| [DNS].into_iter().collect()),
        lease_duration: (is_lease && !is_nak).then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        requested_ip: None,
        client_identifier: None,
        parameter_request_list: None,
        max_size: None,
        additional_options: if is_nak { &[] } else { &options },
        ..query
    };
    let mut bytes = vec![0; reply.buffer_len()];
    if reply.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).is_err() {
        return;
    }
    // By broadcast: the client may have no address yet, and nobody else listens.
    let (from, to) = ((GATEWAY, DHCP_SERVER_PORT), (Ipv4Addr::BROADCAST, DHCP_CLIENT_PORT));
    put(&mut context.frames, SocketAddr::from(from), SocketAddr::from(to), &bytes);
}
