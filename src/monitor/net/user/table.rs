//! A bounded table of flows: what goes between one port of the guest and one remote end. The oldest idle flow makes room.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Flows by their key, and by the number under which the host's descriptors report.
pub struct Table<K, F> {
    flows: HashMap<K, Entry<F>>,
    keys: HashMap<u64, K>,
    next: u64,
    limit: usize,
    /// Those that have something for the guest, for which there was no room.
    waiting: VecDeque<K>,
}

struct Entry<F> {
    id: u64,
    active: Instant,
    waiting: bool,
    flow: F,
}

impl<K: Copy + Eq + Hash, F> Table<K, F> {
    pub fn new(limit: usize) -> Self {
        Self { flows: HashMap::new(), keys: HashMap::new(), next: 0, limit, waiting: VecDeque::new() }
    }

    pub fn len(&self) -> usize {
        self.flows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    pub fn contains(&self, key: &K) -> bool {
        self.flows.contains_key(key)
    }

    /// The flow that has to go before another one can come.
    pub fn surplus(&self) -> Option<K> {
        let full = self.flows.len() >= self.limit;
        let oldest = || self.flows.iter().min_by_key(|(_, entry)| entry.active).map(|(key, _)| *key);
        full.then(oldest).flatten()
    }

    /// The number that the next flow will have.
    pub fn next_id(&self) -> u64 {
        self.next
    }

    /// Adds a flow, whose number is [`Table::next_id`]. There is room for it, and none of this key.
    pub fn insert(&mut self, key: K, now: Instant, flow: F) {
        let id = self.next;
        self.next += 1;
        self.keys.insert(id, key);
        self.flows.insert(key, Entry { id, active: now, waiting: false, flow });
    }

    /// The flow, whose idle time begins anew.
    pub fn touch(&mut self, key: &K, now: Instant) -> Option<&mut F> {
        let entry = self.flows.get_mut(key)?;
        entry.active = now;
        Some(&mut entry.flow)
    }

    pub fn get_mut(&mut self, key: &K) -> Option<&mut F> {
        self.flows.get_mut(key).map(|entry| &mut entry.flow)
    }

    pub fn all(&self) -> impl Iterator<Item = &F> {
        self.flows.values().map(|entry| &entry.flow)
    }

    pub fn key(&self, id: u64) -> Option<K> {
        self.keys.get(&id).copied()
    }

    pub fn remove(&mut self, key: &K) -> Option<F> {
        let entry = self.flows.remove(key)?;
        self.keys.remove(&entry.id);
        Some(entry.flow)
    }

    /// Has the flow be among [`Table::take_waiting`].
    pub fn wait(&mut self, key: K) {
        if let Some(entry) = self.flows.get_mut(&key).filter(|entry| !entry.waiting) {
            entry.waiting = true;
            self.waiting.push_back(key);
        }
    }

    /// Those that wait for room, the first first. They wait no longer.
    pub fn take_waiting(&mut self) -> Vec<K> {
        let mut keys: Vec<_> = std::mem::take(&mut self.waiting).into();
        // A flow may have gone, and another of that key may have come.
        keys.retain(|key| self.flows.get_mut(key).is_some_and(|entry| std::mem::take(&mut entry.waiting)));
        keys
    }

    /// Whether any wait.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Those that were idle for longer than `limit` allows them to be.
    pub fn idle(&self, now: Instant, limit: impl Fn(&F) -> Duration) -> Vec<K> {
        let is_idle = |entry: &Entry<F>| now.saturating_duration_since(entry.active) > limit(&entry.flow);
        self.flows.iter().filter(|(_, entry)| is_idle(entry)).map(|(key, _)| *key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_idle_flow_makes_room() {
        let mut table = Table::new(2);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        table.insert('a', at(0), 1);
        table.insert('b', at(1), 2);
        assert_eq!(table.surplus(), Some('a'));
        table.touch(&'a', at(2));
        assert_eq!(table.surplus(), Some('b'));
        assert_eq!(table.idle(at(4), |_| Duration::from_secs(2)), ['b']);
        assert_eq!((table.remove(&'b'), table.key(1), table.surplus()), (Some(2), None, None));
    }

    #[test]
    fn who_waits_comes_once_and_in_order() {
        let mut table = Table::new(9);
        let now = Instant::now();
        ['a', 'b', 'c'].into_iter().for_each(|key| table.insert(key, now, ()));
        ['b', 'a', 'b', 'c'].into_iter().for_each(|key| table.wait(key));
        table.remove(&'a');
        table.insert('a', now, ());
        assert_eq!(table.take_waiting(), ['b', 'c']);
        table.wait('b');
        assert_eq!(table.take_waiting(), ['b']);
        assert!(!table.is_waiting());
    }
}
