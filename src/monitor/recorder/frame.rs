//! What [`Kind::Frame`](super::Kind::Frame) says, and where: numbers that stand in files.

/// In `address`: the frame's bytes.
pub const LENGTH: u64 = 0xffff_ffff;
/// In `address`: it is the guest's, and not for the guest.
pub const FROM_GUEST: u64 = 1 << 32;

/// In `guest`, from bit 32: what Ethernet's header says of the contents (IEEE 802's EtherType). Below are the ports of TCP and UDP:
/// the source in the upper half.
pub const IPV4: u64 = 0x0800;
/// ARP: `size` is its operation, `rip` the sender, `value` the target.
pub const ARP: u64 = 0x0806;
/// `rip` and `value` are the lower halves of source and destination: a network's prefix is not kept.
pub const IPV6: u64 = 0x86dd;

/// In `count`: IP's protocol (IANA's numbers). `size` is the type of a message.
pub const ICMP: u8 = 1;
/// `size` has its flags.
pub const TCP: u8 = 6;
/// Has ports alone.
pub const UDP: u8 = 17;
/// `size` is the type of a message.
pub const ICMPV6: u8 = 58;
