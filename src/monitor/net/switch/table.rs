//! [`Table`]: behind which port an address is, learned from what comes from there.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::segment::Id;

pub type Address = [u8; 6];

/// Addresses behind one port: a guest's own, and those of a bridge inside of it. A port that uses more forgets its own oldest, and
/// nobody else's.
const EACH: usize = 16;

/// See the file's text.
#[derive(Debug, Default)]
pub struct Table {
    ports: HashMap<Address, Id>,
    of: BTreeMap<Id, VecDeque<Address>>,
}

impl Table {
    /// `address` has sent from port `id`.
    pub fn learn(&mut self, address: Address, id: Id) {
        // A group's address sends nothing.
        if address[0] & 1 != 0 || self.ports.get(&address) == Some(&id) {
            return;
        }
        if let Some(before) = self.ports.insert(address, id)
            && let Some(list) = self.of.get_mut(&before)
        {
            list.retain(|other| *other != address);
        }
        let list = self.of.entry(id).or_default();
        if list.len() == EACH
            && let Some(oldest) = list.pop_front()
        {
            self.ports.remove(&oldest);
        }
        list.push_back(address);
    }

    /// The port of `address`, if it is one port's, and known.
    pub fn find(&self, address: &Address) -> Option<Id> {
        self.ports.get(address).copied()
    }

    /// Port `id` is gone.
    pub fn forget(&mut self, id: Id) {
        for address in self.of.remove(&id).unwrap_or_default() {
            self.ports.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_move_and_a_port_with_many_forgets_its_own_alone() {
        let mut table = Table::default();
        let address = |n: u8| [2, 0, 0, 0, 0, n];
        table.learn(address(200), 9);
        (0..100).for_each(|n| table.learn(address(n), 1));
        assert_eq!(
            (table.find(&address(200)), table.find(&address(99)), table.find(&address(0))),
            (Some(9), Some(1), None)
        );
        assert_eq!((table.ports.len(), table.of[&1].len()), (1 + EACH, EACH));
        table.learn(address(99), 9);
        table.learn([3; 6], 9);
        assert_eq!((table.find(&address(99)), table.find(&[3; 6])), (Some(9), None));
        table.forget(1);
        assert_eq!(
            (table.find(&address(99)), table.find(&address(98)), table.ports.len()),
            (Some(9), None, 2)
        );
    }
}
