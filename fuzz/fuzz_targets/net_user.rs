//! The user network: frames of any content, half of them with an Ethernet and an IP header that are right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_monitor::config::{Net, NetTarget};
use vmm_monitor::net::Offloads;
use vmm_monitor::net::user::Stack;

/// From the guest to the gateway.
const HEADERS: [u8; 34] = [
    0x52, 0x55, 10, 0, 2, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 10, 0, 2, 15,
    10, 0, 2, 2,
];
/// The same in IPv6.
const HEADERS6: [u8; 54] = [
    0x52, 0x55, 10, 0, 2, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 0, 255, 0xfd, 0x76, 0x6d,
    0x6d, 0x6e, 0x65, 0, 0x74, 0, 0, 0, 0, 0, 0, 0, 0x15, 0xfd, 0x76, 0x6d, 0x6d, 0x6e, 0x65, 0, 0x74, 0, 0,
    0, 0, 0, 0, 0, 2,
];
/// ICMP, TCP, UDP.
const PROTOCOLS: [u8; 3] = [1, 6, 17];
const PROTOCOLS6: [u8; 3] = [58, 6, 17];
/// The group of routers, and that of DHCPv6's servers (RFC 4861, 4.1; RFC 8415, 7.1).
const GROUPS: [[u8; 16]; 2] = [
    [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
    [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2],
];

fuzz_target!(|data: &[u8]| {
    // The one port that is open has nobody: flows begin, and are refused.
    let net: Net = "user,restrict=on,allow=127.0.0.1:1,allow=[::1]:1,dns=127.0.0.1:1".parse().unwrap();
    let NetTarget::User(config) = net.to else { unreachable!() };
    let mut stack = Stack::new(&config, [2, 0, 0, 0, 0, 1], 1500).unwrap();
    let mut rest = data;
    while let Some(([kind, len], more)) = rest.split_first_chunk() {
        let (payload, more) = more.split_at(usize::from(*len).min(more.len()));
        rest = more;
        let mut frame = payload.to_vec();
        if kind & 0xc0 == 0xc0 {
            let mut headers = HEADERS6;
            headers[18..20].copy_from_slice(&(payload.len() as u16).to_be_bytes());
            headers[20] = PROTOCOLS6[usize::from(kind >> 1) % 3];
            if kind & 1 != 0 {
                // Only whoever is on the link speaks to a group.
                headers[22..24].copy_from_slice(&[0xfe, 0x80]);
                headers[24..30].fill(0);
                headers[38..54].copy_from_slice(&GROUPS[usize::from(kind >> 3 & 1)]);
            }
            frame.splice(..0, headers);
        } else if kind & 1 != 0 {
            let mut headers = HEADERS;
            headers[16..18].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
            headers[23] = PROTOCOLS[usize::from(kind >> 1) % 3];
            headers[33] = 2 + (kind >> 3 & 1);
            frame.splice(..0, headers);
        }
        let offloads = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6;
        stack.leave(if kind & 0x10 != 0 { offloads } else { Offloads::empty() });
        stack.input(&frame);
        if kind & 0x20 != 0 {
            while stack.output().is_some() {}
        }
    }
});
