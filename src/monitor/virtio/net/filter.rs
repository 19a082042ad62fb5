//! Which frames a driver wants to have (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3): receive modes, addresses and VLANs.

use std::collections::BTreeSet;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use crate::net::START;

/// Addresses that a table holds; a longer one lets every address of its kind pass.
const TABLE: usize = 64;
/// VLANs that there are.
const VLANS: u16 = 4096;
/// Ethernet's type of a frame with a VLAN's tag (802.1Q).
const TAGGED: [u8; 2] = [0x81, 0];

bitflags! {
    /// Receive modes; also what a table has become by overflow.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Modes: u8 {
        /// Everything.
        const PROMISCUOUS = 1;
        /// Every group's address.
        const ALL_MULTICAST = 2;
        /// Every single device's.
        const ALL_UNICAST = 4;
        /// No group's.
        const NO_MULTICAST = 8;
        /// No single device's.
        const NO_UNICAST = 16;
        /// Not everybody's.
        const NO_BROADCAST = 32;
        /// The table of single devices' addresses is full.
        const UNICAST_FULL = 64;
        /// That of groups' is.
        const MULTICAST_FULL = 128;
    }
}

/// What the driver wants to have. After a reset: everything, as drivers without a control queue expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    pub modes: Modes,
    unicast: Vec<[u8; 6]>,
    multicast: Vec<[u8; 6]>,
    /// `None`: frames of every VLAN.
    vlans: Option<BTreeSet<u16>>,
}

/// [`Filter`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    modes: u8,
    unicast: Vec<[u8; 6]>,
    multicast: Vec<[u8; 6]>,
    vlans: Option<BTreeSet<u16>>,
}

impl Default for Filter {
    fn default() -> Self {
        Self { modes: Modes::PROMISCUOUS, unicast: Vec::new(), multicast: Vec::new(), vlans: None }
    }
}

impl Filter {
    /// The driver names its VLANs one by one: so far there are none.
    pub fn by_vlan(&mut self) {
        self.vlans = Some(BTreeSet::new());
    }

    /// Whether the driver, whose device has the address `mac`, wants the frame that begins with `start`.
    pub fn passes(&self, start: &[u8; START], mac: &[u8; 6]) -> bool {
        let modes = self.modes;
        if let (Some(vlans), &[_, _, _, _, _, _, _, _, _, _, _, _, t0, t1, v0, v1, ..]) = (&self.vlans, start)
            && [t0, t1] == TAGGED
            && !vlans.contains(&(u16::from_be_bytes([v0, v1]) & (VLANS - 1)))
        {
            return false;
        }
        if modes.contains(Modes::PROMISCUOUS) {
            return true;
        }
        let to: [u8; 6] = std::array::from_fn(|i| start[i]);
        if to == [0xff; 6] {
            !modes.contains(Modes::NO_BROADCAST)
        } else if to[0] & 1 != 0 {
            !modes.contains(Modes::NO_MULTICAST)
                && (modes.intersects(Modes::ALL_MULTICAST | Modes::MULTICAST_FULL)
                    || self.multicast.contains(&to))
        } else {
            !modes.contains(Modes::NO_UNICAST)
                && (modes.intersects(Modes::ALL_UNICAST | Modes::UNICAST_FULL)
                    || to == *mac
                    || self.unicast.contains(&to))
        }
    }

    /// Takes over the driver's two tables, each with its number of addresses in front. False if they are not that.
    pub fn set_tables(&mut self, data: &[u8]) -> bool {
        let Some((unicast, rest)) = table(data) else { return false };
        let Some((multicast, [])) = table(rest) else { return false };
        self.modes.set(Modes::UNICAST_FULL, unicast.len() > TABLE);
        self.modes.set(Modes::MULTICAST_FULL, multicast.len() > TABLE);
        let kept = |table: &[[u8; 6]]| if table.len() > TABLE { Vec::new() } else { table.to_vec() };
        (self.unicast, self.multicast) = (kept(unicast), kept(multicast));
        true
    }

    /// Adds VLAN `id`, or takes it out. False if there is no such VLAN.
    pub fn set_vlan(&mut self, id: u16, wanted: bool) -> bool {
        if id >= VLANS {
            return false;
        }
        let vlans = self.vlans.get_or_insert_default();
        if wanted {
            vlans.insert(id)
        } else {
            vlans.remove(&id)
        };
        true
    }

    pub fn save(&self) -> State {
        let Self { modes, unicast, multicast, vlans } = self.clone();
        State { modes: modes.bits(), unicast, multicast, vlans }
    }

    /// `None` if no driver can have brought that about.
    pub fn restored(state: State) -> Option<Self> {
        let State { modes, unicast, multicast, vlans } = state;
        let fits = unicast.len() <= TABLE && multicast.len() <= TABLE;
        let known = vlans.iter().flatten().all(|id| *id < VLANS);
        (fits && known).then_some(Self { modes: Modes::from_bits_retain(modes), unicast, multicast, vlans })
    }
}

/// A number, and as many addresses; and what follows. `None` if they are not all there.
fn table(data: &[u8]) -> Option<(&[[u8; 6]], &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (addresses, rest) = rest.split_at_checked(len)?;
    Some((addresses.as_chunks().0, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 9];
    const ALL: [u8; 6] = [0xff; 6];

    fn frame(to: [u8; 6], vlan: Option<u16>) -> [u8; START] {
        let mut start = [0; START];
        start[..6].copy_from_slice(&to);
        if let Some(id) = vlan {
            start[12..14].copy_from_slice(&TAGGED);
            start[14..16].copy_from_slice(&(id | 0xe000).to_be_bytes());
        }
        start
    }

    fn tables(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
        let table = |list: &[[u8; 6]]| [(list.len() as u32).to_le_bytes().to_vec(), list.concat()].concat();
        [table(unicast), table(multicast)].concat()
    }

    #[test]
    fn modes_and_tables_decide() {
        let passing =
            |filter: &Filter| [OWN, OTHER, GROUP, ALL].map(|to| filter.passes(&frame(to, None), &OWN));
        let mut filter = Filter::default();
        assert_eq!(passing(&filter), [true; 4]);
        for (modes, expect) in [
            (Modes::empty(), [true, false, false, true]),
            (Modes::ALL_MULTICAST, [true, false, true, true]),
            (Modes::ALL_UNICAST, [true, true, false, true]),
            (Modes::NO_UNICAST | Modes::ALL_UNICAST, [false, false, false, true]),
            (Modes::NO_MULTICAST | Modes::ALL_MULTICAST, [true, false, false, true]),
            (Modes::NO_BROADCAST, [true, false, false, false]),
        ] {
            filter.modes = modes;
            assert_eq!(passing(&filter), expect, "{modes:?}");
        }
        filter.modes = Modes::empty();
        assert!(filter.set_tables(&tables(&[OTHER], &[GROUP])));
        assert_eq!(passing(&filter), [true; 4]);
        assert!(filter.set_tables(&tables(&[], &[[3; 6]; 65])));
        assert_eq!(passing(&filter), [true, false, true, true], "too many groups: all of them");
        assert!(filter.set_tables(&tables(&[], &[])));
        assert_eq!(passing(&filter), [true, false, false, true]);
    }

    #[test]
    fn tables_that_are_not_all_there_change_nothing() {
        let mut filter = Filter::default();
        filter.set_tables(&tables(&[OTHER], &[GROUP]));
        let before = filter.clone();
        let good = tables(&[OTHER, OWN], &[GROUP]);
        for cut in 0..good.len() {
            assert!(!filter.set_tables(&good[..cut]), "{cut}");
        }
        assert!(!filter.set_tables(&[&good[..], &[0]].concat()));
        for count in [1, 0x2aaa_aaab, u32::MAX] {
            assert!(!filter.set_tables(&[&count.to_le_bytes()[..], &[0; 4]].concat()));
        }
        assert_eq!(filter, before);
    }

    #[test]
    fn vlans_are_let_in_one_by_one() {
        let mut filter = Filter::default();
        assert!(filter.passes(&frame(OTHER, Some(7)), &OWN));
        filter.by_vlan();
        assert!(filter.passes(&frame(OTHER, None), &OWN), "untagged frames are no VLAN's");
        assert!(filter.set_vlan(7, true) && filter.set_vlan(4095, true));
        let passing = |filter: &Filter| [6, 7, 4095].map(|id| filter.passes(&frame(OTHER, Some(id)), &OWN));
        assert_eq!(passing(&filter), [false, true, true]);
        assert!(
            filter.set_vlan(7, false) && !filter.set_vlan(4096, true) && !filter.set_vlan(u16::MAX, true)
        );
        assert_eq!(passing(&filter), [false, false, true]);
        assert_eq!(Filter::restored(filter.save()), Some(filter));
    }
}
