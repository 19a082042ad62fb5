//! [`Table`]: all connections of a guest, whose turn it is to send to it, and what ends by itself.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use super::connection::{Connection, Fate};
use super::header::{Header, Key, Op};
use super::share::{Share, Shares};
use crate::vsock::{End, Host};

/// The first of the host's ports from which it calls; those below are for who listens.
const FIRST_PORT: u32 = 1 << 30;
/// Resets that wait for the guest until no more is heard of it.
const MAX_RESETS: usize = 256;

/// The connections. They are fewer than ports.
#[derive(Debug, Default)]
pub struct Table {
    /// By their ends' numbers.
    connections: HashMap<u64, Connection>,
    /// The guest's name for each that it knows.
    keys: HashMap<Key, u64>,
    deadlines: BTreeSet<(Instant, u64)>,
    turns: VecDeque<u64>,
    /// Resets for the guest, of what is no connection any more.
    resets: VecDeque<Header>,
    shares: Shares,
    calls: u32,
}

impl Table {
    /// A share for one more connection, if there may be one.
    pub fn admit(&mut self, limit: usize) -> Option<Share> {
        if self.connections.len() >= limit {
            return None;
        }
        self.shares.take()
    }

    /// Gives back a share that came to nothing.
    pub fn give_back(&mut self, share: Share) {
        self.shares.give_back(share);
    }

    /// A name for a call to the guest's port `guest`.
    pub fn free_key(&mut self, guest: u32) -> Key {
        loop {
            let key = Key { host: FIRST_PORT | self.calls, guest };
            self.calls = (self.calls + 1) % FIRST_PORT;
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// Adds a connection, whose key no other has.
    pub fn insert(&mut self, connection: Connection) {
        let Some(id) = connection.end.as_ref().map(End::id) else { return };
        self.keys.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.settle(id, Fate::Stays, None);
    }

    /// The connection that the guest calls `key`.
    pub fn id(&self, key: &Key) -> Option<u64> {
        self.keys.get(key).copied()
    }

    pub fn get(&mut self, id: u64) -> Option<&mut Connection> {
        self.connections.get_mut(&id)
    }

    /// Does with connection `id` what `act` says is to become of it.
    pub fn update(&mut self, id: u64, cid: u64, host: &Host, act: impl FnOnce(&mut Connection) -> Fate) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let before = connection.deadline;
        let fate = act(connection);
        if let Some((end, on)) = connection.waits_for_room() {
            host.wait_for_room(end, on);
        }
        if let Some(at) = before.filter(|at| Some(*at) != connection.deadline) {
            self.deadlines.remove(&(at, id));
        }
        self.settle(id, fate, Some(cid));
    }

    fn settle(&mut self, id: u64, fate: Fate, cid: Option<u64>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if matches!(fate, Fate::Reset | Fate::Drains) {
            let is_known = fate == Fate::Drains || connection.is_known();
            if let Some(cid) = cid.filter(|_| is_known) {
                self.resets.push_back(Header::to_guest(cid, connection.key, connection.kind, Op::Rst));
            }
        }
        match fate {
            Fate::Stays => {
                self.deadlines.extend(connection.deadline.map(|at| (at, id)));
                if connection.wants_turn() && !connection.queued {
                    connection.queued = true;
                    self.turns.push_back(id);
                }
            }
            Fate::Drains => drop(self.keys.remove(&connection.key)),
            Fate::Over | Fate::Reset => self.remove(id),
        }
    }

    fn remove(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else { return };
        self.shares.give_back(connection.share);
        // Else those who come and go while the guest takes nothing would pile up.
        if connection.queued {
            self.turns.retain(|other| *other != id);
        }
        if let Some(at) = connection.deadline {
            self.deadlines.remove(&(at, id));
        }
        // One that drains has no name any more, and another may have it.
        if self.keys.get(&connection.key) == Some(&id) {
            self.keys.remove(&connection.key);
        }
    }

    /// The connection whose turn it is.
    pub fn next_turn(&mut self) -> Option<u64> {
        let id = self.turns.pop_front()?;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.queued = false;
        }
        Some(id)
    }

    /// Whether there is anything for the guest.
    pub fn is_waiting(&self) -> bool {
        !self.turns.is_empty() || !self.resets.is_empty()
    }

    /// A reset for what is no connection.
    pub fn refuse(&mut self, header: &Header) {
        self.resets.push_back(header.refused());
    }

    pub fn next_reset(&mut self) -> Option<Header> {
        self.resets.pop_front()
    }

    /// The guest is gone.
    pub fn forget_resets(&mut self) {
        self.resets.clear();
    }

    /// Connections whose readers on the host have to take something before more goes on, with their ends.
    pub fn stalled(&self) -> impl Iterator<Item = (u64, &End)> {
        let ends =
            self.connections.iter().filter_map(|(id, connection)| Some((*id, connection.end.as_ref()?)));
        ends.filter(|(_, end)| end.is_stalled())
    }

    /// Has all of those take what they can.
    pub fn flush(&mut self, cid: u64, host: &Host) {
        let stalled: Vec<_> = self.stalled().map(|(id, _)| id).collect();
        stalled.into_iter().for_each(|id| self.update(id, cid, host, |connection| connection.flush(false)));
    }

    /// Whether so many resets wait that no more may come of what the guest sends.
    pub fn is_full(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// The connections whose time is over.
    pub fn expired(&self) -> Vec<u64> {
        let now = Instant::now();
        self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| *id).collect()
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Ends all connections, of which the guest learns by other means. Those stay for which something of the guest's waits, until the
    /// host's programs have taken it.
    pub fn clear(&mut self) {
        (self.keys, self.deadlines, self.turns, self.resets) = Default::default();
        let shares = &mut self.shares;
        self.connections.retain(|_, connection| {
            let drains = connection.cut_off();
            if !drains {
                shares.give_back(connection.share);
            }
            drains
        });
    }
}
