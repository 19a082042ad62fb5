//! The header in front of each frame (virtio 1.3, 5.1.6): what a driver's says is checked before the host acts on it.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::features::{CSUM, HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_USO};
use crate::net::HEADER;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCP4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCP6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// Bytes of Ethernet's header: no frame is shorter.
pub const ETHERNET: usize = 14;

/// `struct virtio_net_hdr`, in the form of version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: le::U16,
    gso_size: le::U16,
    csum_start: le::U16,
    csum_offset: le::U16,
    num_buffers: le::U16,
}

/// What a driver's header means for a frame of `len` bytes, with all that is meaningless set to zero.
///
/// # Errors
/// It cannot be, or needs a feature that the driver has not accepted: the frame is to be dropped.
pub fn checked(bytes: [u8; HEADER], len: usize, features: u64) -> Result<[u8; HEADER], &'static str> {
    let header: Header = zerocopy::transmute!(bytes);
    if len < ETHERNET {
        return Err("shorter than Ethernet's header");
    }
    // 5.1.6.2.2: unknown flags, and fields that no flag gives a meaning to, are ignored. num_buffers is the device's to set.
    let mut fine = Header::default();
    if header.flags & NEEDS_CSUM != 0 {
        let (start, offset) = (usize::from(header.csum_start.get()), usize::from(header.csum_offset.get()));
        if features & CSUM == 0 {
            return Err("a checksum is left to the device without CSUM");
        }
        if start < ETHERNET || start + offset + 2 > len {
            return Err("its checksum is outside of it");
        }
        fine.flags = NEEDS_CSUM;
        (fine.csum_start, fine.csum_offset) = (header.csum_start, header.csum_offset);
    }
    let (kind, ecn) = (header.gso_type & !GSO_ECN, header.gso_type & GSO_ECN != 0);
    // Which feature it takes, where the checksum lies in the transport's header, and how long that is at least.
    let (feature, offset, transport) = match kind {
        GSO_NONE if ecn => return Err("congestion marks without segments"),
        GSO_NONE => return Ok(zerocopy::transmute!(fine)),
        GSO_TCP4 => (HOST_TSO4, 16, 20),
        GSO_TCP6 => (HOST_TSO6, 16, 20),
        GSO_UDP => (HOST_USO, 6, 8),
        _ => return Err("an unknown kind of segments"),
    };
    if features & feature == 0 || (ecn && (features & HOST_ECN == 0 || kind == GSO_UDP)) {
        return Err("segments of a kind that was not agreed on");
    }
    if fine.flags & NEEDS_CSUM == 0 {
        return Err("segments without checksum");
    }
    let start = usize::from(fine.csum_start.get());
    if usize::from(fine.csum_offset.get()) != offset || start + transport > len {
        return Err("no transport header where the checksum says");
    }
    if header.gso_size.get() == 0 {
        return Err("segments of no size");
    }
    fine.gso_type = header.gso_type;
    fine.gso_size = header.gso_size;
    // A hint only, which may be wrong (5.1.6.2.2).
    fine.hdr_len = (usize::from(header.hdr_len.get()).clamp(start + transport, len) as u16).into();
    Ok(zerocopy::transmute!(fine))
}

/// The header of a frame that lies in `buffers` buffers of the guest's, from what came with the frame.
pub fn received(bytes: [u8; HEADER], guest_csum: bool, buffers: u16) -> [u8; HEADER] {
    let mut header: Header = zerocopy::transmute!(bytes);
    // 5.1.6.4.1: without the feature the driver wants to hear nothing of checksums.
    header.flags &= if guest_csum { NEEDS_CSUM | DATA_VALID } else { 0 };
    header.num_buffers = buffers.into();
    zerocopy::transmute!(header)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;

    fn header(gso_type: u8, csum: Option<(u16, u16)>, gso_size: u16, hdr_len: u16) -> Header {
        let (csum_start, csum_offset) = csum.unwrap_or((0xffff, 0xffff));
        Header {
            flags: if csum.is_some() { NEEDS_CSUM } else { 0 },
            gso_type,
            hdr_len: hdr_len.into(),
            gso_size: gso_size.into(),
            csum_start: csum_start.into(),
            csum_offset: csum_offset.into(),
            num_buffers: 7.into(),
        }
    }

    fn check(header: Header, len: usize, features: u64) -> Result<Header, &'static str> {
        checked(zerocopy::transmute!(header), len, features).map(|bytes| zerocopy::transmute!(bytes))
    }

    #[test]
    fn a_header_that_asks_for_nothing_comes_out_empty() {
        for len in [14, 60, 1514, 65550] {
            let asks = Header { flags: !NEEDS_CSUM, ..header(GSO_NONE, None, 9, 9) };
            assert_eq!(check(asks, len, 0), Ok(Header::default()));
        }
        assert!(check(Header::default(), 13, ALL).is_err());
    }

    #[test]
    fn segments_need_their_feature_a_checksum_and_a_size() {
        let tcp = Some((34, 16));
        let fine = check(header(GSO_TCP4, tcp, 1448, 54), 9000, ALL).unwrap();
        assert_eq!((fine.gso_size.get(), fine.hdr_len.get(), fine.num_buffers.get()), (1448, 54, 0));
        for hdr_len in [0, u16::MAX] {
            let fine = check(header(GSO_TCP6 | GSO_ECN, tcp, 1, hdr_len), 9000, ALL).unwrap();
            assert_eq!(fine.hdr_len.get(), if hdr_len == 0 { 54 } else { 9000 });
        }
        assert!(check(header(GSO_UDP, Some((34, 6)), 1, 0), 42, ALL).is_ok());
        for (what, header, len, features) in [
            ("no size", header(GSO_TCP4, tcp, 0, 54), 9000, ALL),
            ("no checksum", header(GSO_TCP4, None, 9, 54), 9000, ALL),
            ("no TSO4", header(GSO_TCP4, tcp, 9, 54), 9000, ALL & !HOST_TSO4),
            ("no TSO6", header(GSO_TCP6, tcp, 9, 54), 9000, ALL & !HOST_TSO6),
            ("no ECN", header(GSO_TCP4 | GSO_ECN, tcp, 9, 54), 9000, ALL & !HOST_ECN),
            ("no USO", header(GSO_UDP, Some((34, 6)), 9, 54), 9000, ALL & !HOST_USO),
            ("UDP with ECN", header(GSO_UDP | GSO_ECN, Some((34, 6)), 9, 54), 9000, ALL),
            ("ECN alone", header(GSO_ECN, None, 9, 54), 9000, ALL),
            ("UFO", header(3, Some((34, 6)), 9, 54), 9000, ALL),
            ("unknown", header(6, tcp, 9, 54), 9000, ALL),
            ("another checksum", header(GSO_TCP4, Some((34, 6)), 9, 54), 9000, ALL),
            ("transport cut", header(GSO_TCP4, tcp, 9, 54), 53, ALL),
            ("no CSUM", header(GSO_NONE, tcp, 0, 0), 9000, 0),
            ("outside", header(GSO_NONE, Some((34, 25)), 0, 0), 60, ALL),
            ("far outside", header(GSO_NONE, Some((u16::MAX, u16::MAX)), 0, 0), 60, ALL),
            ("in the addresses", header(GSO_NONE, Some((13, 6)), 0, 0), 60, ALL),
        ] {
            assert!(check(header, len, features).is_err(), "{what}");
        }
    }

    #[test]
    fn no_kind_of_segments_passes_but_those_that_there_are_features_for() {
        let fine: Vec<u8> = (0..=u8::MAX)
            .filter(|kind| {
                // Where TCP has its checksum, and where UDP has it: tunnels are kinds of segments, too, with bits of their own.
                [16, 6]
                    .iter()
                    .any(|offset| check(header(*kind, Some((34, *offset)), 9, 54), 9000, u64::MAX).is_ok())
            })
            .collect();
        let tcp = [GSO_TCP4, GSO_TCP6, GSO_TCP4 | GSO_ECN, GSO_TCP6 | GSO_ECN];
        let mut known = [&[GSO_NONE, GSO_UDP][..], &tcp].concat();
        known.sort_unstable();
        assert_eq!(fine, known);
    }

    #[test]
    fn a_driver_hears_of_checksums_only_if_it_wants_to() {
        let bytes = [0xff; HEADER];
        assert_eq!(received(bytes, true, 3)[0], NEEDS_CSUM | DATA_VALID);
        assert_eq!(received(bytes, false, 0x102)[..1], [0]);
        assert_eq!(received(bytes, false, 0x102)[10..], [2, 1]);
    }

    proptest! {
        #[test]
        fn whatever_passes_lies_inside_of_the_frame_and_was_agreed_on(
            bytes in any::<[u8; HEADER]>(), small in any::<bool>(), len in 0usize..70000, features in any::<u64>(),
        ) {
            // Half of them with small numbers, so that many pass.
            let bytes = if small { bytes.map(|byte| byte & 0x15) } else { bytes };
            if let Ok(fine) = checked(bytes, len, features) {
                let fine: Header = zerocopy::transmute!(fine);
                let csum = fine.flags == NEEDS_CSUM;
                prop_assert!(csum || fine.flags == 0);
                prop_assert!(!csum || features & CSUM != 0);
                let end = usize::from(fine.csum_start.get()) + usize::from(fine.csum_offset.get()) + 2;
                prop_assert!(!csum || end <= len);
                prop_assert!(usize::from(fine.hdr_len.get()) <= len);
                prop_assert!(fine.gso_type == 0 || (csum && fine.gso_size.get() > 0));
                prop_assert_eq!(fine.num_buffers.get(), 0);
                let again: [u8; HEADER] = zerocopy::transmute!(fine);
                prop_assert_eq!(checked(again, len, features), Ok(again));
            }
        }
    }
}
