//! [`Roots`]: where a guest's kernel has its page tables, as its registers tell while it runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::IMAGE;
use vmm_monitor::recorder::Event;
use vmm_monitor::recorder::registers::Collector;

/// Where page tables of a guest's kernel were seen: CR3 and CR4. The first, because those of the kernel itself are never freed,
/// and the last, because those are in use.
#[derive(Debug, Default)]
pub struct Roots {
    first: Vec<(u64, u64)>,
    last: VecDeque<(u64, u64)>,
    registers: BTreeMap<usize, Collector>,
}

impl Roots {
    /// So many of either.
    const SOME: usize = 8;

    /// The next event of registers on `track`.
    pub fn see(&mut self, track: usize, event: &Event) {
        let registers = self.registers.entry(track).or_default();
        registers.add(event);
        let Some(registers) = registers.at(event.time) else { return };
        let [_, cr3, cr4, _] = registers.system.unwrap_or_default();
        let rip = registers.general[16];
        let root = (cr3, cr4);
        if cr3 == 0 || !IMAGE.contains(&rip) || self.last.back() == Some(&root) {
            return;
        }
        if self.first.len() < Self::SOME && !self.first.contains(&root) {
            self.first.push(root);
        }
        self.last.retain(|known| *known != root);
        self.last.push_back(root);
        if self.last.len() > Self::SOME {
            self.last.pop_front();
        }
    }

    /// All of them, those in use first.
    pub fn newest_first(&self) -> Vec<(u64, u64)> {
        let mut all: Vec<_> = self.last.iter().rev().chain(&self.first).copied().collect();
        let mut seen = BTreeSet::new();
        all.retain(|root| seen.insert(*root));
        all
    }
}
