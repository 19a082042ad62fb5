//! The control queue (virtio 1.3, 5.1.6.5): what the driver asks of the device beside the traffic.

use std::io::{Read, Write};

use virtio_bindings::virtio_net as spec;

use super::Net;
use super::features as f;
use super::filter::Modes;
use crate::guest_warn;
use crate::virtio::queue::{Chain, Virtqueue};

/// Bytes of one command that are looked at: a table of thousands of addresses.
const MOST: u64 = 64 << 10;

const OK: u8 = spec::VIRTIO_NET_OK as u8;
const ERR: u8 = spec::VIRTIO_NET_ERR as u8;

/// The receive modes: command, mode, and the feature that it takes.
const MODES: [(u32, Modes, u64); 6] = [
    (spec::VIRTIO_NET_CTRL_RX_PROMISC, Modes::PROMISCUOUS, f::CTRL_RX),
    (spec::VIRTIO_NET_CTRL_RX_ALLMULTI, Modes::ALL_MULTICAST, f::CTRL_RX),
    (spec::VIRTIO_NET_CTRL_RX_ALLUNI, Modes::ALL_UNICAST, f::CTRL_RX_EXTRA),
    (spec::VIRTIO_NET_CTRL_RX_NOMULTI, Modes::NO_MULTICAST, f::CTRL_RX_EXTRA),
    (spec::VIRTIO_NET_CTRL_RX_NOUNI, Modes::NO_UNICAST, f::CTRL_RX_EXTRA),
    (spec::VIRTIO_NET_CTRL_RX_NOBCAST, Modes::NO_BROADCAST, f::CTRL_RX_EXTRA),
];

/// Answers every command in `queue`.
pub fn serve(net: &mut Net, queue: &mut Virtqueue) {
    while let Some(Chain { head, readable, mut writable }) = queue.pop() {
        if writable.is_empty() {
            guest_warn!("network: a command without room for an answer");
            queue.complete(head, 0);
            continue;
        }
        let mut command = Vec::new();
        // Guest RAM can always be read.
        let _ = readable.take(MOST + 1).read_to_end(&mut command);
        let answer = match command.as_slice() {
            [class, code, data @ ..] if command.len() as u64 <= MOST => {
                let done = obey(net, (*class).into(), (*code).into(), data);
                if done.is_none() {
                    guest_warn!("network: command {class}.{code} with {} bytes is refused", data.len());
                }
                if done.is_some() { OK } else { ERR }
            }
            _ => ERR,
        };
        let written = writable.write(&[answer]).unwrap_or(0);
        queue.complete(head, written as u32);
    }
}

/// Does what a command says. `None` if it makes no sense, or needs a feature that was not accepted; nothing was changed then.
fn obey(net: &mut Net, class: u32, code: u32, data: &[u8]) -> Option<()> {
    let needs = |feature| (net.features & feature != 0).then_some(());
    match (class, code) {
        (spec::VIRTIO_NET_CTRL_RX, code) => {
            let (_, mode, feature) = MODES.iter().find(|(known, ..)| *known == code)?;
            needs(*feature)?;
            let [on @ (0 | 1)] = *data else { return None };
            net.filter.modes.set(*mode, on == 1);
        }
        (spec::VIRTIO_NET_CTRL_MAC, spec::VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            needs(f::CTRL_RX)?;
            net.filter.set_tables(data).then_some(())?;
        }
        (spec::VIRTIO_NET_CTRL_MAC, spec::VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
            needs(f::CTRL_MAC_ADDR)?;
            let mac: [u8; 6] = data.try_into().ok()?;
            (mac[0] & 1 == 0 && mac != [0; 6]).then_some(())?;
            net.config.mac = mac;
        }
        (spec::VIRTIO_NET_CTRL_VLAN, spec::VIRTIO_NET_CTRL_VLAN_ADD | spec::VIRTIO_NET_CTRL_VLAN_DEL) => {
            needs(f::CTRL_VLAN)?;
            let id = u16::from_le_bytes(data.try_into().ok()?);
            net.filter.set_vlan(id, code == spec::VIRTIO_NET_CTRL_VLAN_ADD).then_some(())?;
        }
        (spec::VIRTIO_NET_CTRL_ANNOUNCE, spec::VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
            needs(f::GUEST_ANNOUNCE)?;
            data.is_empty().then_some(())?;
            net.announce = false;
        }
        (spec::VIRTIO_NET_CTRL_MQ, spec::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            needs(f::MQ)?;
            let pairs = u16::from_le_bytes(data.try_into().ok()?);
            (1..=net.most_pairs()).contains(&pairs).then_some(())?;
            net.set_pairs(pairs);
        }
        (spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS, spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            needs(f::CTRL_GUEST_OFFLOADS)?;
            let wanted = u64::from_le_bytes(data.try_into().ok()?);
            let possible = net.features & f::GUEST_OFFLOADS;
            (wanted & !possible == 0 && f::sound(wanted) == wanted).then_some(())?;
            net.set_offloads(wanted);
        }
        _ => return None,
    }
    Some(())
}
