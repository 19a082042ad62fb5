//! Neighbours and the router of IPv6 (RFC 4861): who has which address of the monitor's, and what a guest needs to make its own.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Duration as Lifetime;
use smoltcp::wire::{
    Icmpv6Packet, Icmpv6Repr, IpProtocol, NdiscNeighborFlags, NdiscPrefixInfoFlags, NdiscPrefixInformation,
    NdiscRepr, NdiscRouterFlags,
};

use super::Context;
use super::addresses::{DNS6, NETWORK6, PREFIX6, ROUTER, is_ours};
use super::ethernet::OUR_MAC;
use super::icmp;
use super::ip::Packet;

/// Types of messages (4.1, 4.3), and bytes before the address that a solicitation of neighbours is about.
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOR_SOLICITATION: u8 = 135;
const TARGET: usize = 8;
/// All that are on the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// How often the router makes itself known, and how long it is taken to be there (6.2.1).
const INTERVAL: Duration = Duration::from_secs(600);
const LIFETIME: Duration = INTERVAL.saturating_mul(3);
/// The network's addresses are good for ever.
const FOREVER: Lifetime = Lifetime::from_secs(u32::MAX as u64);
/// The option with a server of DNS (RFC 8106, 5.1), and its length in units of eight bytes.
const RDNSS: [u8; 2] = [25, 3];
/// The option with domains (5.2), in front of whose list are eight bytes.
const DNSSL: u8 = 31;

/// Says unasked what the router is: when a guest begins to speak, which spares it a second or two, and now and then.
#[derive(Debug, Default)]
pub struct Router {
    next: Option<Instant>,
}

impl Router {
    /// The guest speaks IPv6.
    pub fn hear(&mut self, context: &mut Context) {
        if self.next.is_none() {
            self.next = Some(context.now);
            self.on_time(context);
        }
    }

    /// When there is something to say.
    pub fn deadline(&self) -> Option<Instant> {
        self.next
    }

    pub fn on_time(&mut self, context: &mut Context) {
        if self.next.is_some_and(|at| at <= context.now) {
            self.next = Some(context.now + INTERVAL);
            advertise(context);
        }
    }
}

/// Takes what is for the link alone. False if the packet is something else.
pub fn input(context: &mut Context, packet: &Packet<'_>) -> bool {
    let (IpAddr::V6(from), IpProtocol::Icmpv6) = (packet.from, packet.protocol) else { return false };
    // One that has come from further off would have less (7.1.1, 6.1.1).
    let solicits = packet.hops == 255 && packet.payload.get(1) == Some(&0);
    match packet.payload.first() {
        Some(&ROUTER_SOLICITATION) if solicits => advertise(context),
        Some(&NEIGHBOR_SOLICITATION) if solicits => {
            let target = packet.payload.get(TARGET..).and_then(|rest| rest.first_chunk::<16>());
            if let Some(target) = target {
                answer(context, from, Ipv6Addr::from(*target));
            }
        }
        Some(133..=137) => {}
        _ => return false,
    }
    true
}

/// The guest at `from` asks who has `target`. One without an address wants it for itself.
fn answer(context: &mut Context, from: Ipv6Addr, target: Ipv6Addr) {
    if !is_ours(target.into()) || is_ours(from.into()) || from.is_multicast() {
        return;
    }
    let is_asked = !from.is_unspecified();
    let mut flags = NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE;
    flags.set(NdiscNeighborFlags::SOLICITED, is_asked);
    let to = if is_asked { from } else { ALL_NODES };
    let message = NdiscRepr::NeighborAdvert { flags, target_addr: target, lladdr: Some(OUR_MAC.into()) };
    put(context, (target, to), message, &[]);
}

/// The guest makes itself an address, and learns of the way out and of names, as far as it may have either. Where there is more to
/// know (flag O), DHCPv6 says no other thing; it also gives an address to those who ask for one.
fn advertise(context: &mut Context) {
    let (leads_out, has_names) = (context.policy.leads_out(), context.policy.has_names());
    let lifetime = if leads_out { LIFETIME.as_secs() } else { 0 };
    let message = NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::OTHER,
        router_lifetime: Lifetime::from_secs(lifetime),
        reachable_time: Lifetime::from_millis(0),
        retrans_time: Lifetime::from_millis(0),
        lladdr: Some(OUR_MAC.into()),
        mtu: Some(context.frames.mtu as u32),
        prefix_info: Some(NdiscPrefixInformation {
            prefix_len: PREFIX6,
            flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
            valid_lifetime: FOREVER,
            preferred_lifetime: FOREVER,
            prefix: NETWORK6,
        }),
    };
    let lifetime = (LIFETIME.as_secs() as u32).to_be_bytes();
    let mut names = Vec::new();
    if has_names {
        names.extend(RDNSS);
        names.extend([0; 2]);
        names.extend(lifetime);
        names.extend(DNS6.octets());
    }
    let mut search = context.search();
    if !search.is_empty() {
        search.resize(search.len().next_multiple_of(8), 0);
        names.extend([DNSSL, 1 + (search.len() / 8) as u8, 0, 0]);
        names.extend(lifetime);
        names.extend(search);
    }
    put(context, (ROUTER, ALL_NODES), message, &names);
}

/// A message, and options behind it.
fn put(context: &mut Context, (from, to): (Ipv6Addr, Ipv6Addr), message: NdiscRepr<'_>, options: &[u8]) {
    let message = Icmpv6Repr::Ndisc(message);
    let len = message.buffer_len();
    icmp::put(context, (from.into(), to.into()), len + options.len(), |bytes| {
        let (own, rest) = bytes.split_at_mut(len);
        message.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(own), &ChecksumCapabilities::ignored());
        rest.copy_from_slice(options);
    });
}
