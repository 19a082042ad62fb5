//! DHCPv6 (RFC 8415): the resolver for those who ask for no more, and one lease for those who want one. Addresses that guests make
//! themselves, by what the router says, are as good.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use smoltcp::wire::{IpProtocol, UdpPacket};

use super::Context;
use super::addresses::{DNS6, GUEST6, NETWORK6, PREFIX6, ROUTER};
use super::ethernet::OUR_MAC;
use super::ip::Packet;
use super::udp::put;

const SERVER_PORT: u16 = 547;
const CLIENT_PORT: u16 = 546;
/// Types of messages (7.3).
const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION_REQUEST: u8 = 11;
/// Options (21, and RFC 3646).
const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_ADDRESS: u16 = 5;
const STATUS: u16 = 13;
const RAPID_COMMIT: u16 = 14;
const DNS_SERVERS: u16 = 23;
const DOMAIN_LIST: u16 = 24;
/// Status codes (21.13).
const SUCCESS: u16 = 0;
const NO_ADDRESSES: u16 = 2;
const NOT_ON_LINK: u16 = 4;
/// An association has a number of the client's, and two times, before its options (21.4); an address two lifetimes behind it (21.6).
const IA_HEADER: usize = 12;
/// A day, in seconds; renewed after a half, and from anybody after three quarters.
const LEASE: u32 = 24 * 60 * 60;
/// A client's name for itself is no longer (11.1).
const LONGEST_ID: usize = 130;

/// Takes what is for the server. False if the packet is something else.
pub fn input(context: &mut Context, packet: &Packet<'_>) -> bool {
    let IpAddr::V6(from) = packet.from else { return false };
    let Some(Ok(udp)) = (packet.protocol == IpProtocol::Udp).then(|| UdpPacket::new_checked(packet.payload))
    else {
        return false;
    };
    let is_here = packet.to == ROUTER || packet.to.is_multicast();
    if udp.dst_port() != SERVER_PORT || !is_here {
        return false;
    }
    let is_client = from.is_unicast_link_local();
    let (has_names, search) = (context.policy.has_names(), context.search());
    let reply = is_client.then(|| answer(udp.payload(), has_names, &search)).flatten();
    if let Some(reply) = reply {
        let (server, client) = ((ROUTER, SERVER_PORT), (from, CLIENT_PORT));
        put(&mut context.frames, SocketAddr::from(server), SocketAddr::from(client), &reply);
    }
    true
}

/// Options one after the other, up to one that is cut off.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let ([a, b, c, d], rest) = bytes.split_first_chunk()?;
        let (data, rest) = rest.split_at_checked(u16::from_be_bytes([*c, *d]).into())?;
        bytes = rest;
        Some((u16::from_be_bytes([*a, *b]), data))
    })
}

fn option(kind: u16, data: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &(data.len() as u16).to_be_bytes(), data].concat()
}

fn status(code: u16) -> Vec<u8> {
    option(STATUS, &code.to_be_bytes())
}

/// What this server calls itself: a DUID by its Ethernet address (11.4).
fn own_id() -> Vec<u8> {
    [&[0, 3, 0, 1][..], &OUR_MAC.0].concat()
}

/// The reply to a client's message, if it gets one. Domains of `search`: see [`super::Search::list`].
fn answer(message: &[u8], names: bool, search: &[u8]) -> Option<Vec<u8>> {
    let ([kind, id @ ..], rest) = message.split_first_chunk::<4>()?;
    let find = |kind| options(rest).find(|(other, _)| *other == kind).map(|(_, data)| data);
    let (client, server) = (find(CLIENT_ID), find(SERVER_ID));
    // Those that are meant for one server name it, those for any name none (16).
    let is_ours = match *kind {
        SOLICIT | CONFIRM | REBIND => server.is_none() && client.is_some(),
        REQUEST | RENEW | RELEASE | DECLINE => server == Some(&own_id()) && client.is_some(),
        INFORMATION_REQUEST => server.is_none_or(|server| server == own_id()),
        _ => false,
    };
    if !is_ours || client.is_some_and(|client| client.len() > LONGEST_ID) {
        return None;
    }
    let is_rapid = *kind == SOLICIT && find(RAPID_COMMIT).is_some();
    let mut reply = vec![if *kind == SOLICIT && !is_rapid { ADVERTISE } else { REPLY }];
    reply.extend(id);
    reply.extend(client.map(|client| option(CLIENT_ID, client)).unwrap_or_default());
    reply.extend(option(SERVER_ID, &own_id()));
    if is_rapid {
        reply.extend(option(RAPID_COMMIT, &[]));
    }
    let associations = options(rest).filter(|(kind, data)| *kind == IA_NA && data.len() >= IA_HEADER);
    match *kind {
        // One without an address asks nothing (18.3.3).
        CONFIRM => reply.extend(status(on_link(associations)?)),
        RELEASE | DECLINE => reply.extend(status(SUCCESS)),
        SOLICIT | REQUEST | RENEW | REBIND => {
            for (number, (_, association)) in associations.enumerate().take(8) {
                reply.extend(grant(&association[..4], number == 0));
            }
        }
        _ => {}
    }
    if names {
        reply.extend(option(DNS_SERVERS, &DNS6.octets()));
    }
    if !search.is_empty() {
        reply.extend(option(DOMAIN_LIST, search));
    }
    Some(reply)
}

/// Answers an association, the first of a client's by the address.
fn grant(id: &[u8], is_first: bool) -> Vec<u8> {
    let mut data = id.to_vec();
    if is_first {
        data.extend((LEASE / 2).to_be_bytes());
        data.extend((LEASE / 4 * 3).to_be_bytes());
        data.extend(option(IA_ADDRESS, &[&GUEST6.octets()[..], &[LEASE.to_be_bytes(); 2].concat()].concat()));
    } else {
        data.extend([0; 8]);
        data.extend(status(NO_ADDRESSES));
    }
    option(IA_NA, &data)
}

/// Whether all addresses of `associations` are of this network. `None` if there are none.
fn on_link<'a>(associations: impl Iterator<Item = (u16, &'a [u8])>) -> Option<u16> {
    let addresses = associations.flat_map(|(_, data)| options(&data[IA_HEADER..]));
    let addresses = addresses.filter(|(kind, _)| *kind == IA_ADDRESS);
    let mut is_here = addresses
        .filter_map(|(_, data)| data.first_chunk::<16>())
        .map(|address| (Ipv6Addr::from(*address).to_bits() ^ NETWORK6.to_bits()) >> (128 - PREFIX6) == 0);
    let first = is_here.next()?;
    Some(if first && is_here.all(|here| here) { SUCCESS } else { NOT_ON_LINK })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: [u8; 14] = [0, 1, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 1];

    fn message(kind: u8, more: &[Vec<u8>]) -> Vec<u8> {
        [&[kind, 7, 8, 9][..], &CLIENT, &more.concat()].concat()
    }

    fn association(id: u8, address: Option<&str>) -> Vec<u8> {
        let address = address.map(|text| text.parse::<Ipv6Addr>().unwrap());
        let address =
            address.map(|ip| option(IA_ADDRESS, &[&ip.octets()[..], &[0; 8]].concat())).unwrap_or_default();
        option(IA_NA, &[&[0, 0, 0, id][..], &[0; 8], &address].concat())
    }

    fn server() -> Vec<u8> {
        option(SERVER_ID, &own_id())
    }

    #[test]
    fn a_client_is_offered_and_given_the_address() {
        for (kind, more, expected) in [
            (SOLICIT, Vec::new(), ADVERTISE),
            (SOLICIT, vec![option(RAPID_COMMIT, &[])], REPLY),
            (REQUEST, vec![server()], REPLY),
            (RENEW, vec![server()], REPLY),
            (REBIND, Vec::new(), REPLY),
        ] {
            let asked = [vec![association(1, None), association(2, None)], more].concat();
            let reply = answer(&message(kind, &asked), true, &[]).unwrap();
            assert_eq!(reply[..4], [expected, 7, 8, 9]);
            assert_eq!(reply[4..18], CLIENT);
            let granted: Vec<_> = options(&reply[4..]).filter(|(kind, _)| *kind == IA_NA).collect();
            let address = options(&granted[0].1[12..]).next().unwrap();
            assert_eq!((address.0, &address.1[..16]), (IA_ADDRESS, &GUEST6.octets()[..]));
            assert_eq!(options(&granted[1].1[12..]).next(), Some((STATUS, &[0, 2][..])), "one, and no more");
            assert!(options(&reply[4..]).any(|option| option == (DNS_SERVERS, &DNS6.octets()[..])));
        }
    }

    #[test]
    fn who_has_an_address_of_its_own_gets_the_resolver() {
        let reply = answer(&message(INFORMATION_REQUEST, &[]), true, &[]).unwrap();
        let kinds: Vec<_> = options(&reply[4..]).map(|(kind, _)| kind).collect();
        assert_eq!((reply[0], kinds), (REPLY, vec![CLIENT_ID, SERVER_ID, DNS_SERVERS]));
        let reply = answer(&message(INFORMATION_REQUEST, &[]), true, b"\x03lab\x00").unwrap();
        assert_eq!(options(&reply[4..]).last(), Some((DOMAIN_LIST, &b"\x03lab\x00"[..])));
        let reply = answer(&message(INFORMATION_REQUEST, &[]), false, &[]).unwrap();
        assert!(!options(&reply[4..]).any(|(kind, _)| kind == DNS_SERVERS), "no names, no resolver");
    }

    #[test]
    fn addresses_of_another_network_are_told_to_be_wrong() {
        let confirm = |list: &[&str]| {
            let asked: Vec<_> = list.iter().map(|address| association(1, Some(address))).collect();
            let reply = answer(&message(CONFIRM, &asked), true, &[])?;
            options(&reply[4..]).find(|(kind, _)| *kind == STATUS).map(|(_, data)| data.to_vec())
        };
        assert_eq!(confirm(&["fd76:6d6d:6e65:74::15"]), Some(vec![0, 0]));
        assert_eq!(confirm(&["fd76:6d6d:6e65:74::15", "2001:db8::1"]), Some(vec![0, 4]));
        assert_eq!(confirm(&[]), None);
    }

    #[test]
    fn what_is_for_another_server_or_cut_off_is_not_answered() {
        let other = option(SERVER_ID, &[0, 3, 0, 1, 1, 1, 1, 1, 1, 1]);
        for kind in [REQUEST, RENEW, RELEASE, DECLINE, INFORMATION_REQUEST, SOLICIT, ADVERTISE, REPLY, 12] {
            assert_eq!(answer(&message(kind, std::slice::from_ref(&other)), true, &[]), None, "{kind}");
        }
        let whole = message(SOLICIT, &[association(1, None)]);
        for len in 0..4 + CLIENT.len() {
            assert_eq!(answer(&whole[..len], true, &[]), None, "{len} bytes");
        }
    }
}
