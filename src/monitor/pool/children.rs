//! The processes of a pool's spares, and of machines that were spares: they are its children for as long as it lives.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use super::{Maker, Reason, Spare};
use crate::api::registry::{Registry, of_spare};

/// How long spares have to end with their pool before they are killed.
const LIMIT: Duration = Duration::from_secs(2);

/// See the module's text.
pub(super) struct Children<'a> {
    pool: &'a str,
    registry: &'a Registry,
    all: BTreeMap<u32, Child>,
    /// Those that were taken, and are to stay.
    taken: BTreeSet<u32>,
}

impl<'a> Children<'a> {
    pub fn new(pool: &'a str, registry: &'a Registry) -> Self {
        Self { pool, registry, all: BTreeMap::new(), taken: BTreeSet::new() }
    }

    /// Starts a spare. If there can be none, its pool hears of it by `socket` as it would from the spare.
    pub fn make(&mut self, number: u32, socket: OwnedFd, maker: &mut dyn Maker) {
        let name = of_spare(self.pool, number);
        let copy = socket.try_clone();
        match copy.and_then(|socket| maker.make(&name, socket)) {
            Ok(child) => _ = self.all.insert(number, child),
            Err(error) => {
                let error = format!("cannot start a process: {error}");
                Spare::new(&name, socket).failed(&Reason { error, hint: None, code: None });
            }
        }
    }

    /// This one was taken.
    pub fn let_go(&mut self, number: u32) {
        self.taken.insert(number);
    }

    /// This one is of no use, and nothing is to be left of it, nor of the name by which it was to be `called`.
    pub fn remove(&mut self, number: u32, called: Option<String>, maker: &mut dyn Maker) {
        if let Some(child) = self.all.get_mut(&number) {
            // What it still has to do is done here.
            let _ = child.kill();
        }
        called.iter().for_each(|name| self.registry.forget(name));
        self.reap(maker);
        if !self.all.contains_key(&number) {
            self.clean_up(number, maker);
        }
    }

    /// Takes note of those that have ended.
    pub fn reap(&mut self, maker: &mut dyn Maker) {
        let ended = self.all.iter_mut().filter_map(|(number, child)| match child.try_wait() {
            Ok(None) => None,
            _ => Some(*number),
        });
        for number in ended.collect::<Vec<_>>() {
            self.all.remove(&number);
            if !self.taken.remove(&number) {
                self.clean_up(number, maker);
            }
        }
    }

    fn clean_up(&self, number: u32, maker: &mut dyn Maker) {
        let name = of_spare(self.pool, number);
        self.registry.forget(&name);
        maker.clean_up(&name);
    }

    /// Waits for the end of all that were not taken: their pool has ended.
    pub fn end(mut self, maker: &mut dyn Maker) {
        let deadline = Instant::now() + LIMIT;
        let mut killed = false;
        loop {
            self.reap(maker);
            let mut left: Vec<_> =
                self.all.iter_mut().filter(|(number, _)| !self.taken.contains(number)).collect();
            if left.is_empty() || (killed && Instant::now() > deadline + LIMIT) {
                return;
            }
            if !killed && Instant::now() > deadline {
                killed = true;
                left.iter_mut().for_each(|(_, child)| _ = child.kill());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}
