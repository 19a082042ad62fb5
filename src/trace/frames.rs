//! What a network device's frame was: `sends 74 bytes: TCP 10.0.2.15:49152 > 10.0.2.2:80 SYN`.

use std::net::Ipv4Addr;

use vmm_monitor::recorder::Event;
use vmm_monitor::recorder::frame::{self, Frame};

/// A [`Kind::Frame`](vmm_monitor::recorder::Kind::Frame), from the guest's point of view.
pub fn tell(event: &Event) -> String {
    let frame = event.as_frame();
    let does = if frame.from_guest { "sends" } else { "receives" };
    let ends = [frame.source, frame.destination];
    let what = match frame.kind {
        frame::IPV4 => packet(&frame, ends.map(|ip| v4(ip).to_string()), false),
        frame::IPV6 => packet(&frame, ends.map(v6), true),
        frame::ARP => arp(&frame),
        kind => {
            let name = match kind {
                0 => "no type".to_owned(),
                // A length: the frames of old, and spanning trees.
                1..0x600 => "802.3".to_owned(),
                0x88cc => "LLDP".to_owned(),
                _ => format!("type {kind:#06x}"),
            };
            let [source, destination] = ends.map(mac);
            format!("{name} {source} > {destination}")
        }
    };
    format!("{does} {} bytes: {what}", frame.len)
}

fn v4(ip: u64) -> Ipv4Addr {
    Ipv4Addr::from(ip as u32)
}

/// The lower half, which is all that is known.
fn v6(half: u64) -> String {
    let groups = [48, 32, 16, 0].map(|shift| format!("{:x}", half >> shift & 0xffff));
    format!("..{}", groups.join(":"))
}

fn mac(address: u64) -> String {
    [40, 32, 24, 16, 8, 0].map(|shift| format!("{:02x}", address >> shift & 0xff)).join(":")
}

fn arp(frame: &Frame) -> String {
    let (sender, target) = (v4(frame.source), v4(frame.destination));
    match frame.detail {
        1 if sender == target => format!("ARP {sender} announces itself"),
        1 => format!("ARP who has {target}? asks {sender}"),
        2 => format!("ARP {sender} answers {target}"),
        other => format!("ARP operation {other}, {sender} > {target}"),
    }
}

fn packet(frame: &Frame, [source, destination]: [String; 2], six: bool) -> String {
    let (from, to) = (frame.source_port, frame.destination_port);
    let end = |address: &str, port: u16| match six {
        true => format!("[{address}]:{port}"),
        false => format!("{address}:{port}"),
    };
    let ends = format!("{} > {}", end(&source, from), end(&destination, to));
    match frame.protocol {
        frame::TCP => format!("TCP {ends} {}", flags(frame.detail)),
        frame::UDP => format!("UDP {ends}{}", service(from, to)),
        frame::ICMP => format!("ICMP {source} > {destination} {}", message(frame.detail, &ICMP)),
        frame::ICMPV6 => format!("ICMPv6 {source} > {destination} {}", message(frame.detail, &ICMPV6)),
        other => format!("IP protocol {other} {source} > {destination}"),
    }
}

/// Flags of TCP (RFC 9293, 3.1).
fn flags(bits: u8) -> String {
    let names = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
    let set: Vec<_> =
        names.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1).map(|(_, name)| *name).collect();
    if set.is_empty() { "without flags".to_owned() } else { set.join(" ") }
}

/// What a port of UDP is known for, if it is for a guest's first steps.
fn service(from: u16, to: u16) -> &'static str {
    match (from, to) {
        (67 | 68, 67 | 68) => " (DHCP)",
        (53, _) | (_, 53) => " (DNS)",
        (546 | 547, 546 | 547) => " (DHCPv6)",
        _ => "",
    }
}

/// RFC 792.
const ICMP: [(u8, &str); 4] =
    [(0, "echo reply"), (3, "unreachable"), (8, "echo request"), (11, "time exceeded")];
/// RFC 4443, 4861.
const ICMPV6: [(u8, &str); 9] = [
    (1, "unreachable"),
    (2, "packet too big"),
    (3, "time exceeded"),
    (128, "echo request"),
    (129, "echo reply"),
    (133, "router solicitation"),
    (134, "router advertisement"),
    (135, "neighbour solicitation"),
    (136, "neighbour advertisement"),
];

fn message(kind: u8, known: &[(u8, &str)]) -> String {
    let name = known.iter().find(|(number, _)| *number == kind).map(|(_, name)| (*name).to_owned());
    name.unwrap_or_else(|| format!("message {kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_as_sentences() {
        let of = |kind, (source_port, destination_port), protocol, detail, source, destination| {
            let (from_guest, len) = (true, 60);
            let frame = Frame {
                from_guest,
                len,
                kind,
                source,
                destination,
                protocol,
                source_port,
                destination_port,
                detail,
            };
            Event::frame(0, frame)
        };
        let (guest, host) = (0x0a00_020f, 0x0a00_0202);
        let (ports, none) = ((49152, 80), (0, 0));
        for (event, words) in [
            (of(frame::IPV4, ports, 6, 2, guest, host), "TCP 10.0.2.15:49152 > 10.0.2.2:80 SYN"),
            (of(frame::IPV4, ports, 6, 0x18, guest, host), "TCP 10.0.2.15:49152 > 10.0.2.2:80 PSH ACK"),
            (of(frame::IPV4, (68, 67), 17, 0, 0, 0xffff_ffff), "UDP 0.0.0.0:68 > 255.255.255.255:67 (DHCP)"),
            (of(frame::IPV4, none, 1, 8, guest, host), "ICMP 10.0.2.15 > 10.0.2.2 echo request"),
            (
                of(frame::IPV6, ports, 6, 4, 1, 0x5054_00ff_fe12_0003),
                "TCP [..0:0:0:1]:49152 > [..5054:ff:fe12:3]:80 RST",
            ),
            (of(frame::IPV6, none, 58, 135, 1, 2), "ICMPv6 ..0:0:0:1 > ..0:0:0:2 neighbour solicitation"),
            (of(frame::ARP, none, 0, 1, guest, host), "ARP who has 10.0.2.2? asks 10.0.2.15"),
            (
                of(0x88b5, none, 0, 0, 0x0200_0000_0001, u64::MAX),
                "type 0x88b5 02:00:00:00:00:01 > ff:ff:ff:ff:ff:ff",
            ),
        ] {
            assert_eq!(tell(&event), format!("sends 60 bytes: {words}"));
        }
        let other = Frame { len: 1514, kind: frame::IPV4, protocol: 47, ..Frame::default() };
        assert_eq!(tell(&Event::frame(0, other)), "receives 1514 bytes: IP protocol 47 0.0.0.0 > 0.0.0.0");
    }
}
