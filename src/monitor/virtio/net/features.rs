//! Feature bits of a network device (virtio 1.3, 5.1.3): what is offered for a link, and what hangs on what.

use virtio_bindings::virtio_net as spec;

use crate::net::Offloads;

macro_rules! features {
    ($($name:ident = $bit:ident),* $(,)?) => {
        $(pub const $name: u64 = 1 << spec::$bit;)*
    };
}

features! {
    CSUM = VIRTIO_NET_F_CSUM,
    GUEST_CSUM = VIRTIO_NET_F_GUEST_CSUM,
    CTRL_GUEST_OFFLOADS = VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    MTU = VIRTIO_NET_F_MTU,
    MAC = VIRTIO_NET_F_MAC,
    GUEST_TSO4 = VIRTIO_NET_F_GUEST_TSO4,
    GUEST_TSO6 = VIRTIO_NET_F_GUEST_TSO6,
    GUEST_ECN = VIRTIO_NET_F_GUEST_ECN,
    HOST_TSO4 = VIRTIO_NET_F_HOST_TSO4,
    HOST_TSO6 = VIRTIO_NET_F_HOST_TSO6,
    HOST_ECN = VIRTIO_NET_F_HOST_ECN,
    MRG_RXBUF = VIRTIO_NET_F_MRG_RXBUF,
    STATUS = VIRTIO_NET_F_STATUS,
    CTRL_VQ = VIRTIO_NET_F_CTRL_VQ,
    CTRL_RX = VIRTIO_NET_F_CTRL_RX,
    CTRL_VLAN = VIRTIO_NET_F_CTRL_VLAN,
    CTRL_RX_EXTRA = VIRTIO_NET_F_CTRL_RX_EXTRA,
    GUEST_ANNOUNCE = VIRTIO_NET_F_GUEST_ANNOUNCE,
    MQ = VIRTIO_NET_F_MQ,
    CTRL_MAC_ADDR = VIRTIO_NET_F_CTRL_MAC_ADDR,
    GUEST_USO4 = VIRTIO_NET_F_GUEST_USO4,
    GUEST_USO6 = VIRTIO_NET_F_GUEST_USO6,
    HOST_USO = VIRTIO_NET_F_HOST_USO,
}

/// What a link must be able to do for frames of one kind to come to the guest.
const GUEST: [(u64, Offloads); 6] = [
    (GUEST_CSUM, Offloads::CSUM),
    (GUEST_TSO4, Offloads::TSO4),
    (GUEST_TSO6, Offloads::TSO6),
    (GUEST_ECN, Offloads::ECN),
    (GUEST_USO4, Offloads::USO4),
    (GUEST_USO6, Offloads::USO6),
];

/// The same from the guest.
const HOST: [(u64, Offloads); 5] = [
    (CSUM, Offloads::CSUM),
    (HOST_TSO4, Offloads::TSO4),
    (HOST_TSO6, Offloads::TSO6),
    (HOST_ECN, Offloads::ECN),
    (HOST_USO, Offloads::USO4.union(Offloads::USO6)),
];

/// Features that mean something only with one of others (5.1.3.1).
const NEEDS: [(u64, u64); 14] = [
    (GUEST_TSO4, GUEST_CSUM),
    (GUEST_TSO6, GUEST_CSUM),
    (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
    (GUEST_USO4, GUEST_CSUM),
    (GUEST_USO6, GUEST_CSUM),
    (HOST_TSO4, CSUM),
    (HOST_TSO6, CSUM),
    (HOST_ECN, HOST_TSO4 | HOST_TSO6),
    (HOST_USO, CSUM),
    (CTRL_RX | CTRL_VLAN | CTRL_MAC_ADDR, CTRL_VQ),
    (CTRL_RX_EXTRA, CTRL_RX),
    (GUEST_ANNOUNCE, CTRL_VQ),
    (MQ, CTRL_VQ),
    (CTRL_GUEST_OFFLOADS, CTRL_VQ),
];

/// Kinds of frames that the guest may leave to others to cut up.
pub const SEGMENTS: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
/// What CTRL_GUEST_OFFLOADS turns on and off.
pub const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_ECN | SEGMENTS;

/// What frames look like in the queues: the concern of who serves these.
pub const OF_FRAMES: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO | GUEST_OFFLOADS | MRG_RXBUF;

/// What only the monitor does when it serves the queues: it looks at each frame.
pub const FILTERS: u64 = CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN;

/// What is offered for a link with `offloads`.
pub fn offered(offloads: Offloads, mtu: bool, several: bool) -> u64 {
    let mut features = MAC
        | STATUS
        | MRG_RXBUF
        | CTRL_VQ
        | CTRL_RX
        | CTRL_RX_EXTRA
        | CTRL_VLAN
        | CTRL_MAC_ADDR
        | GUEST_ANNOUNCE;
    for (feature, needed) in GUEST.iter().chain(&HOST) {
        if offloads.contains(*needed) {
            features |= feature;
        }
    }
    if features & GUEST_OFFLOADS != 0 {
        features |= CTRL_GUEST_OFFLOADS;
    }
    features | if mtu { MTU } else { 0 } | if several { MQ } else { 0 }
}

/// `features` without those that mean nothing for want of another.
pub fn sound(mut features: u64) -> u64 {
    // What is left out may be what another one needs.
    for _ in 0..2 {
        for (feature, needed) in NEEDS {
            if features & needed == 0 {
                features &= !feature;
            }
        }
    }
    features
}

/// What the link is asked for where the guest wants `features`.
pub fn offloads(features: u64) -> Offloads {
    let wanted = GUEST.iter().filter(|(feature, _)| features & feature != 0);
    wanted.fold(Offloads::empty(), |all, (_, offload)| all | *offload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_sound_for_every_link() {
        let all = Offloads::all();
        for offloads in [all, all - Offloads::USO4 - Offloads::USO6, Offloads::empty()] {
            for (mtu, several) in [(false, false), (true, true)] {
                let features = offered(offloads, mtu, several);
                assert_eq!(sound(features), features, "{features:#x}");
                assert_eq!(features & (MTU | MQ) != 0, mtu);
                assert_eq!(super::offloads(features), offloads);
            }
        }
        assert_eq!(
            offered(Offloads::empty(), false, false) & (CSUM | GUEST_OFFLOADS | CTRL_GUEST_OFFLOADS),
            0
        );
    }

    #[test]
    fn a_feature_without_what_it_needs_counts_for_nothing() {
        assert_eq!(sound(HOST_TSO4 | HOST_ECN | GUEST_TSO6 | GUEST_ECN | MQ | CTRL_RX_EXTRA | CTRL_RX), 0);
        assert_eq!(sound(CSUM | HOST_TSO4 | HOST_ECN), CSUM | HOST_TSO4 | HOST_ECN);
        assert_eq!(sound(!0), !0);
    }
}
