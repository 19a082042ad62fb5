//! vCPU threads: run the guest, dispatch its exits, pass the gate, say how it ended.
//!
//! `machine` builds and joins them. This loop is the hottest path of the monitor: between two entries into the
//! guest there is one dispatch and nothing else.

pub mod dispatch;
pub mod gate;
mod observe;
mod seat;
mod x86_64;

use std::fmt;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crate::kvm::exit::{Stuck, Trap};
use crate::kvm::{self, Error, Vcpu};
use crate::memory::GuestRam;
use crate::recorder::Recorder;
use crate::threads::{self, Role};
use dispatch::{Buses, End, Next, dispatch};
use gate::{Gate, GateWork, Passed, VcpuRequest};
use observe::Observer;
pub use observe::{Observed, ObservedVcpu};
pub use seat::Seat;
use x86_64::restart;
pub use x86_64::{linear, report};

/// What all vCPUs of a machine share.
#[derive(Debug)]
pub struct Shared {
    /// Where exits go.
    pub buses: Buses,
    /// Where vCPUs park.
    pub gate: Gate,
    /// Guest RAM, to read the instructions that reports and traces show.
    pub ram: Arc<GuestRam>,
    /// Where exits are recorded, if the recorder is on.
    pub recorder: Arc<Recorder>,
    /// The vCPUs that have been recorded.
    pub observed: Observed,
    /// No BIOS writes to [`layout::RESET_FLAG`](crate::memory::layout::RESET_FLAG): that it changed tells something.
    pub reset_flag: bool,
    /// A vCPU whose guest panicked waits at the gate, and goes on when the machine lets it.
    pub holds_on_panic: bool,
    /// The debugger that breakpoints and steps are reported to, once there is one.
    pub debugger: OnceLock<Listener>,
}

/// A vCPU waits at the gate, because of this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// Which.
    pub vcpu: u32,
    /// Why.
    pub trap: Trap,
}

/// Called on a vCPU's thread when it stops for the debugger.
pub struct Listener(pub Box<dyn Fn(Stop) + Send + Sync>);

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

/// How a run ended, and what a person should know about it.
#[derive(Debug)]
pub struct Ended {
    /// The vCPU that ended it.
    pub vcpu: u32,
    /// How.
    pub end: Result<End, Error>,
    /// For the ends that are failures: what failed, where, with registers and code.
    pub report: Option<String>,
}

/// A running vCPU.
#[derive(Debug)]
pub struct Thread(JoinHandle<()>);

impl Thread {
    /// Starts `vcpu` on a thread of its own, named `vcpu0` and so on, or on that of `seat`. The first end is sent to `ended`; then
    /// the thread waits at the gate for the machine to close, or, after a panic that it is held for, to go on.
    ///
    /// # Errors
    /// The host is out of threads.
    pub fn start<E: From<Ended> + Send + 'static>(
        mut vcpu: Vcpu,
        seat: Option<Seat>,
        shared: Arc<Shared>,
        ended: Sender<E>,
    ) -> io::Result<Self> {
        let role = Role::Vcpu(vcpu.id());
        let run = move || {
            vcpu.bind();
            while let Some(end) = run(&mut vcpu, &shared) {
                let held = shared.holds_on_panic && matches!(end, Ok(End::Panic));
                if held {
                    // Before anybody can want to release it.
                    shared.gate.hold(vcpu.id() as usize);
                }
                let report = report::report(&vcpu, &shared.ram, &end);
                let _ = ended.send(Ended { vcpu: vcpu.id(), end, report }.into());
                if !held {
                    break;
                }
            }
            shared.gate.left(vcpu.id() as usize);
        };
        match seat {
            Some(seat) => Ok(Self(seat.run(run))),
            None => threads::spawn(role, run).map(Self),
        }
    }

    /// Brings the vCPU out of the guest. A kick that comes before the thread has taken its vCPU is lost: the gate kicks
    /// again.
    pub fn kick(&self) {
        kvm::kick(&self.0);
    }

    /// Waits for the thread, which must have been told to leave.
    pub fn join(self) {
        let _ = self.0.join();
    }
}

/// Runs until the guest ends (and how), or the gate says to leave (`None`).
fn run(vcpu: &mut Vcpu, shared: &Shared) -> Option<Result<End, Error>> {
    let mut observer = Observer::default();
    // A debugger may hold it before its first instruction.
    let mut next = Next::Gate;
    loop {
        match next {
            Next::Again if vcpu.is_stepping() => match finish_step(vcpu, shared) {
                Ok(finished) => next = finished,
                Err(error) => return Some(Err(error)),
            },
            Next::Again => {}
            Next::Gate | Next::Trap(_) => {
                if let Next::Trap(trap) = next
                    && let Err(end) = stop(vcpu, shared, trap)
                {
                    return Some(Ok(end));
                }
                match pass(vcpu, shared) {
                    Ok(Passed::Through) => {}
                    Ok(Passed::AfterPause) => vcpu.announce_pause(),
                    Ok(Passed::Leave) => return None,
                    Err(end) => return Some(end),
                }
                next = Next::Again;
            }
            Next::End(End::TripleFault) if restart::is_meant(vcpu, &shared.ram, shared.reset_flag) => {
                log::info!("Reset by a triple fault");
                return Some(Ok(End::Reset));
            }
            Next::End(end) => match breakpoint(vcpu, shared, end) {
                Some(trap) => next = Next::Trap(trap),
                None => return Some(Ok(end)),
            },
        }
        if next != Next::Again {
            continue;
        }
        // One branch while nobody records; the observer has to put things back once nobody does any more.
        let turn = if shared.recorder.is_on() | observer.is_active() {
            observer.turn(vcpu, shared)
        } else {
            vcpu.run().map(|mut exit| dispatch(&mut exit, &shared.buses))
        };
        next = match turn {
            Ok(next) => next,
            Err(error) => return Some(Err(error)),
        };
    }
}

/// Reports to the debugger, and makes the vCPU wait for it.
fn stop(vcpu: &Vcpu, shared: &Shared, trap: Trap) -> Result<(), End> {
    let Some(listener) = shared.debugger.get() else {
        return Err(End::Stuck(Stuck::Unexpected(kvm_bindings::KVM_EXIT_DEBUG)));
    };
    // Before anybody can want to release it.
    shared.gate.hold(vcpu.id() as usize);
    (listener.0)(Stop { vcpu: vcpu.id(), trap });
    Ok(())
}

/// Whether what looks like the end is a breakpoint's instruction under a debugger.
fn breakpoint(vcpu: &Vcpu, shared: &Shared, end: End) -> Option<Trap> {
    let End::Stuck(Stuck::InternalError { suberror: kvm_bindings::KVM_INTERNAL_ERROR_EMULATION, .. }) = end
    else {
        return None;
    };
    shared.debugger.get()?;
    x86_64::debug::breakpoint(vcpu, &shared.ram)
}

/// Passes the gate, at rest if it has to wait there.
fn pass(vcpu: &mut Vcpu, shared: &Shared) -> Result<Passed, Result<End, Error>> {
    let mut end = None;
    let passed = shared.gate.pass(vcpu.id() as usize, |meanwhile| match meanwhile {
        GateWork::Parking => match finish(vcpu, shared) {
            Ok(Next::Trap(trap)) => end = stop(vcpu, shared, trap).err().map(Ok),
            Ok(Next::End(early)) => end = Some(Ok(early)),
            Ok(Next::Again | Next::Gate) => {}
            Err(error) => end = Some(Err(error)),
        },
        GateWork::Request(VcpuRequest(request)) => request(vcpu),
    });
    end.map_or(Ok(passed), Err)
}

/// Brings the last instruction to its end, whatever exits that still takes. [`Next::Again`]: it is done.
fn finish(vcpu: &mut Vcpu, shared: &Shared) -> Result<Next, Error> {
    while let Some(mut exit) = vcpu.finish_instruction()? {
        match dispatch(&mut exit, &shared.buses) {
            Next::Again => {}
            other => return Ok(other),
        }
    }
    Ok(Next::Again)
}

/// Ends a step over an instruction that came out for a device: KVM's emulator does not tell when one that writes is done.
fn finish_step(vcpu: &mut Vcpu, shared: &Shared) -> Result<Next, Error> {
    match finish(vcpu, shared)? {
        Next::Again => Ok(Next::Trap(x86_64::debug::stepped(vcpu)?)),
        other => Ok(other),
    }
}
