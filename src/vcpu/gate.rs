//! The gate that every vCPU passes: open, closed (park here) or shut for good.
//!
//! The machine turns it; vCPU threads look at it only after they were kicked, so that it costs nothing per exit.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use crate::bus::lock;

/// What the vCPUs should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Park,
    Leave,
}

#[derive(Debug)]
struct State {
    want: Want,
    parked: usize,
    /// Threads that have not left yet.
    present: usize,
}

/// See the module's text.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// What [`Gate::pass`] tells a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// The gate was open.
    Through,
    /// It was closed, and has opened again.
    AfterPause,
    /// Leave the run loop.
    Leave,
}

impl Gate {
    /// How long the closer waits before it kicks the stragglers again.
    const PATIENCE: Duration = Duration::from_millis(20);

    /// An open gate for `vcpus` threads.
    pub fn new(vcpus: usize) -> Self {
        let state = State { want: Want::Run, parked: 0, present: vcpus };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Called by a vCPU thread. Waits while the gate is closed; `before_parking` runs first then.
    pub fn pass(&self, before_parking: impl FnOnce()) -> Passed {
        if lock(&self.state).want == Want::Park {
            before_parking();
        }
        let mut state = lock(&self.state);
        let mut passed = Passed::Through;
        while state.want == Want::Park {
            passed = Passed::AfterPause;
            state.parked += 1;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            state.parked -= 1;
        }
        if state.want == Want::Leave { Passed::Leave } else { passed }
    }

    /// Called by a vCPU thread that leaves the run loop, for whatever reason.
    pub fn left(&self) {
        lock(&self.state).present -= 1;
        self.changed.notify_all();
    }

    /// Closes the gate and waits until all vCPUs stand still. `kick` brings them out of the guest. False if the gate is
    /// shut for good.
    pub fn close(&self, kick: impl Fn()) -> bool {
        let mut state = lock(&self.state);
        if state.want == Want::Leave {
            return false;
        }
        state.want = Want::Park;
        while state.parked < state.present && state.want == Want::Park {
            drop(state);
            kick();
            state = lock(&self.state);
            if state.parked < state.present {
                let wait = self.changed.wait_timeout(state, Self::PATIENCE);
                state = wait.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            }
        }
        state.want == Want::Park
    }

    /// Opens a closed gate.
    pub fn open(&self) {
        let mut state = lock(&self.state);
        if state.want == Want::Park {
            state.want = Want::Run;
        }
        self.changed.notify_all();
    }

    /// Shuts the gate for good, and waits until all vCPU threads have left their loops.
    pub fn shut(&self, kick: impl Fn()) {
        let mut state = lock(&self.state);
        state.want = Want::Leave;
        self.changed.notify_all();
        while state.present > 0 {
            drop(state);
            kick();
            state = lock(&self.state);
            if state.present > 0 {
                let wait = self.changed.wait_timeout(state, Self::PATIENCE);
                state = wait.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn parks_all_runs_on_and_lets_all_leave() {
        let gate = Arc::new(Gate::new(3));
        let (rounds, pauses) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let vcpus: Vec<_> = (0..3)
            .map(|_| {
                let (gate, rounds, pauses) = (gate.clone(), rounds.clone(), pauses.clone());
                thread::spawn(move || {
                    loop {
                        rounds.fetch_add(1, Ordering::SeqCst);
                        match gate.pass(|| ()) {
                            Passed::Through => thread::yield_now(),
                            Passed::AfterPause => _ = pauses.fetch_add(1, Ordering::SeqCst),
                            Passed::Leave => return gate.left(),
                        }
                    }
                })
            })
            .collect();
        assert!(gate.close(|| ()));
        let before = rounds.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(rounds.load(Ordering::SeqCst), before, "all stand still");
        gate.open();
        while rounds.load(Ordering::SeqCst) < before + 30 {
            thread::yield_now();
        }
        assert_eq!(pauses.load(Ordering::SeqCst), 3);
        gate.shut(|| ());
        vcpus.into_iter().for_each(|t| t.join().unwrap());
        assert!(!gate.close(|| ()), "nobody is left to park");
    }
}
