//! [`Frame`]: what a [`Kind::Frame`](super::Kind::Frame) keeps of a network device's frame.

/// IPv4, as Ethernet's header says it (IEEE 802's EtherType).
pub const IPV4: u16 = 0x0800;
/// ARP: `detail` is its operation, the addresses are those of IPv4.
pub const ARP: u16 = 0x0806;
/// IPv6: of its addresses only the lower halves are kept, without the network's prefix.
pub const IPV6: u16 = 0x86dd;

/// ICMP (IANA's numbers of IP's protocols): `detail` is the message's type.
pub const ICMP: u8 = 1;
/// TCP: `detail` has its flags.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMPv6: as ICMP.
pub const ICMPV6: u8 = 58;

/// A frame. What it has not is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Frame {
    /// It is the guest's, and not for the guest.
    pub from_guest: bool,
    /// Its bytes.
    pub len: u32,
    /// What Ethernet's header says of the contents.
    pub kind: u16,
    /// Who sends: an address of IP, or else of Ethernet.
    pub source: u64,
    /// To whom.
    pub destination: u64,
    /// IP's protocol.
    pub protocol: u8,
    /// Of TCP and UDP.
    pub source_port: u16,
    /// Of TCP and UDP.
    pub destination_port: u16,
    /// What the protocol has: see there.
    pub detail: u8,
}
