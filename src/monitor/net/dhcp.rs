//! DHCP (RFC 2131) for a guest that has one lease and no other: what is answered to its client.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

/// The largest packet of IP on this link (RFC 2132, 5.1).
const OPTION_MTU: u8 = 26;
/// Domains to look names up in (RFC 3397).
const OPTION_SEARCH: u8 = 119;

/// What a client gets.
#[derive(Debug, Clone)]
pub struct Lease {
    /// The client's address.
    pub client: Ipv4Addr,
    /// Who gives it.
    pub server: Ipv4Addr,
    /// The way out of the network, which is a /24.
    pub router: Option<Ipv4Addr>,
    /// Who answers questions for names.
    pub resolver: Option<Ipv4Addr>,
    /// Domains in the form of RFC 1035, up to 255 bytes. Empty if there are none.
    pub search: Vec<u8>,
    /// The largest packet of IP, in bytes, where the device does not tell.
    pub mtu: Option<u16>,
    /// In seconds; all ones are for ever.
    pub duration: u32,
}

impl Lease {
    /// The answer to what a client says. `None` if it says nothing that is to be answered.
    pub fn answer(&self, message: &[u8]) -> Option<Vec<u8>> {
        let packet = DhcpPacket::new_checked(message).ok()?;
        let query = DhcpRepr::parse(&packet).ok()?;
        let is_for_another = query.server_identifier.is_some_and(|server| server != self.server);
        let wanted = query.requested_ip.unwrap_or(query.client_ip);
        let answer = match query.message_type {
            DhcpMessageType::Discover => DhcpMessageType::Offer,
            DhcpMessageType::Request if is_for_another => return None,
            DhcpMessageType::Request if wanted == self.client => DhcpMessageType::Ack,
            DhcpMessageType::Request => DhcpMessageType::Nak,
            DhcpMessageType::Inform => DhcpMessageType::Ack,
            _ => return None,
        };
        let is_lease = query.message_type != DhcpMessageType::Inform;
        let is_nak = answer == DhcpMessageType::Nak;
        let mtu = self.mtu.filter(|_| !is_nak).map(u16::to_be_bytes);
        let mtu = mtu.as_ref().map(|mtu| DhcpOption { kind: OPTION_MTU, data: mtu });
        let search = (!is_nak && !self.search.is_empty())
            .then_some(DhcpOption { kind: OPTION_SEARCH, data: &self.search });
        let options: Vec<_> = mtu.into_iter().chain(search).collect();
        let reply = DhcpRepr {
            message_type: answer,
            your_ip: if is_lease && !is_nak { self.client } else { Ipv4Addr::UNSPECIFIED },
            server_ip: self.server,
            router: self.router.filter(|_| !is_nak),
            subnet_mask: (!is_nak).then_some(Ipv4Addr::new(255, 255, 255, 0)),
            server_identifier: Some(self.server),
            dns_servers: self.resolver.filter(|_| !is_nak).map(|resolver| [resolver].into_iter().collect()),
            lease_duration: (is_lease && !is_nak).then_some(self.duration),
            renew_duration: None,
            rebind_duration: None,
            requested_ip: None,
            client_identifier: None,
            parameter_request_list: None,
            max_size: None,
            additional_options: &options,
            ..query
        };
        let mut bytes = vec![0; reply.buffer_len()];
        reply.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).ok()?;
        Some(bytes)
    }
}
