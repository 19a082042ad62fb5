//! The gate that every vCPU passes: open, closed (park here) or shut for good.
//!
//! The machine turns it; vCPU threads look at it before their first instruction, and then only after they were kicked, so
//! that it costs nothing per exit. A debugger holds vCPUs back one by one, and sends [`VcpuRequest`]s to those that wait.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::bus::lock;
use crate::kvm::Vcpu;

/// What the vCPUs should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Park,
    Leave,
}

/// One vCPU.
#[derive(Debug, Default)]
struct Slot {
    /// A debugger has it wait, even if the others run.
    held: bool,
    /// It stands still.
    parked: bool,
    /// Its thread has left the run loop.
    left: bool,
    requests: VecDeque<VcpuRequest>,
}

#[derive(Debug)]
struct State {
    want: Want,
    vcpus: Vec<Slot>,
}

impl State {
    fn stands(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.parked || vcpu.left)
    }

    fn waits(&self, vcpu: usize) -> bool {
        self.want == Want::Park || (self.want == Want::Run && self.vcpus[vcpu].held)
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// A function to be called with a vCPU that waits at the gate, by its own thread.
pub struct VcpuRequest(pub Box<dyn FnOnce(&mut Vcpu) + Send>);

impl fmt::Debug for VcpuRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VcpuRequest")
    }
}

/// What [`Gate::pass`] has its vCPU do while the gate is closed.
#[derive(Debug)]
pub enum GateWork {
    /// It will wait: bring it to rest.
    Parking,
    /// Do this.
    Request(VcpuRequest),
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

/// Why [`Gate::close`] did not close the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotClosed {
    /// It is shut for good.
    Shut,
    /// This vCPU did not come in time.
    Running(usize),
}

impl Gate {
    /// How long the closer waits before it kicks the stragglers again.
    const PATIENCE: Duration = Duration::from_millis(20);

    /// An open gate for `vcpus` threads.
    pub fn new(vcpus: usize) -> Self {
        let vcpus = (0..vcpus).map(|_| Slot::default()).collect();
        Self { state: Mutex::new(State { want: Want::Run, vcpus }), changed: Condvar::new() }
    }

    /// Called by the thread of `vcpu`. Waits while the gate is closed, or closed to this vCPU.
    pub fn pass(&self, vcpu: usize, mut call: impl FnMut(GateWork)) -> Passed {
        if lock(&self.state).waits(vcpu) {
            call(GateWork::Parking);
        }
        let mut state = lock(&self.state);
        let mut passed = Passed::Through;
        while state.waits(vcpu) {
            passed = Passed::AfterPause;
            if let Some(request) = state.vcpus[vcpu].requests.pop_front() {
                state.vcpus[vcpu].parked = false;
                drop(state);
                call(GateWork::Request(request));
                state = lock(&self.state);
                continue;
            }
            state.vcpus[vcpu].parked = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.vcpus[vcpu].parked = false;
        if state.want == Want::Leave { Passed::Leave } else { passed }
    }

    /// Called by the thread of `vcpu` as it leaves the run loop, for whatever reason.
    pub fn left(&self, vcpu: usize) {
        let mut state = lock(&self.state);
        state.vcpus[vcpu].left = true;
        state.vcpus[vcpu].requests.clear();
        self.changed.notify_all();
    }

    /// Closes the gate and waits until all vCPUs stand still. `kick` brings them out of the guest.
    ///
    /// # Errors
    /// [`NotClosed`]; the gate is open again if it was.
    pub fn close(&self, deadline: Instant, kick: impl Fn()) -> Result<(), NotClosed> {
        let mut state = lock(&self.state);
        if state.want == Want::Leave {
            return Err(NotClosed::Shut);
        }
        state.want = Want::Park;
        let over = || Instant::now() >= deadline;
        state = self.wait(state, kick, |state| state.stands() || state.want != Want::Park || over());
        if state.want == Want::Leave {
            return Err(NotClosed::Shut);
        }
        match state.vcpus.iter().position(|vcpu| !vcpu.parked && !vcpu.left) {
            None => Ok(()),
            Some(vcpu) => {
                state.want = Want::Run;
                self.changed.notify_all();
                Err(NotClosed::Running(vcpu))
            }
        }
    }

    /// Opens a closed gate. Those that are held stay.
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
        drop(self.wait(state, kick, |state| state.vcpus.iter().all(|vcpu| vcpu.left)));
    }

    /// Has `vcpu` wait when it next passes.
    pub fn hold(&self, vcpu: usize) {
        lock(&self.state).vcpus[vcpu].held = true;
    }

    /// Has every vCPU wait, and waits until all stand still. False if the gate is shut for good.
    pub fn hold_all(&self, kick: impl Fn()) -> bool {
        let mut state = lock(&self.state);
        state.vcpus.iter_mut().for_each(|vcpu| vcpu.held = true);
        state = self.wait(state, kick, |state| state.stands() || state.want == Want::Leave);
        state.want != Want::Leave
    }

    /// Lets `vcpu` run on when the gate is open.
    pub fn release(&self, vcpu: usize) {
        lock(&self.state).vcpus[vcpu].held = false;
        self.changed.notify_all();
    }

    /// Has the thread of `vcpu` serve `request` while it waits. Dropped unserved if it leaves before.
    pub fn send(&self, vcpu: usize, request: VcpuRequest) {
        let mut state = lock(&self.state);
        if !state.vcpus[vcpu].left {
            state.vcpus[vcpu].requests.push_back(request);
        }
        self.changed.notify_all();
    }

    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        kick: impl Fn(),
        done: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while !done(&state) {
            drop(state);
            kick();
            state = lock(&self.state);
            if !done(&state) {
                let wait = self.changed.wait_timeout(state, Self::PATIENCE);
                state = wait.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            }
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_vcpu_that_does_not_come_is_named_and_the_others_run_on() {
        let gate = Arc::new(Gate::new(2));
        let vcpu = gate.clone();
        let thread = thread::spawn(move || while vcpu.pass(0, |_| ()) != Passed::Leave {});
        let deadline = Instant::now() + Duration::from_millis(50);
        assert_eq!(gate.close(deadline, || ()), Err(NotClosed::Running(1)));
        gate.left(1);
        assert_eq!(gate.close(soon(), || ()), Ok(()));
        gate.left(0);
        gate.shut(|| ());
        thread.join().unwrap();
    }

    #[test]
    fn parks_all_runs_on_and_lets_all_leave() {
        let gate = Arc::new(Gate::new(3));
        let (rounds, pauses) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let vcpus: Vec<_> = (0..3)
            .map(|vcpu| {
                let (gate, rounds, pauses) = (gate.clone(), rounds.clone(), pauses.clone());
                thread::spawn(move || {
                    loop {
                        rounds.fetch_add(1, Ordering::SeqCst);
                        match gate.pass(vcpu, |_| ()) {
                            Passed::Through => thread::yield_now(),
                            Passed::AfterPause => _ = pauses.fetch_add(1, Ordering::SeqCst),
                            Passed::Leave => return gate.left(vcpu),
                        }
                    }
                })
            })
            .collect();
        assert_eq!(gate.close(soon(), || ()), Ok(()));
        let before = rounds.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(rounds.load(Ordering::SeqCst), before, "all stand still");
        gate.open();
        while rounds.load(Ordering::SeqCst) < before + 30 || pauses.load(Ordering::SeqCst) < 3 {
            thread::yield_now();
        }
        // Held one by one, they stay when the gate is closed and opened.
        assert!(gate.hold_all(|| ()));
        let before = rounds.load(Ordering::SeqCst);
        assert_eq!(gate.close(soon(), || ()), Ok(()));
        gate.open();
        gate.release(1);
        while rounds.load(Ordering::SeqCst) < before + 30 {
            thread::yield_now();
        }
        assert_eq!(pauses.load(Ordering::SeqCst), 4, "one of them runs");
        gate.shut(|| ());
        vcpus.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(gate.close(soon(), || ()), Err(NotClosed::Shut), "nobody is left to park");
    }
}
