//! vCPU threads: run the guest, dispatch its exits, pass the gate, say how it ended.
//!
//! `machine` builds and joins them. This loop is the hottest path of the monitor: between two entries into the
//! guest there is one dispatch and nothing else.

mod code;
pub mod dispatch;
pub mod gate;
mod observe;
pub mod report;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};

use crate::kvm::{self, Error, Vcpu};
use crate::memory::GuestRam;
use crate::recorder::Recorder;
use dispatch::{Buses, End, Next, dispatch};
use gate::{Gate, Passed};
use observe::Observer;
pub use observe::{Observed, Seen};

/// What all vCPUs of a machine share.
#[derive(Debug)]
pub struct Shared {
    /// Where exits go.
    pub buses: Buses,
    /// Where vCPUs park.
    pub gate: Gate,
    /// Guest RAM, to read the instructions that reports and traces show.
    pub ram: Arc<GuestRam>,
    /// Where exits are told of, when somebody wants to know.
    pub recorder: Arc<Recorder>,
    /// The vCPUs that have been recorded.
    pub observed: Observed,
}

/// How a run ended, and what a person should know about it.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub end: Result<End, Error>,
    /// For the ends that are failures: what failed, where, with registers and code.
    pub report: Option<String>,
}

/// A running vCPU.
#[derive(Debug)]
pub struct Thread(JoinHandle<()>);

impl Thread {
    /// Starts `vcpu` on a thread of its own, named `vcpu0` and so on. The first end is sent to `ended`; then the
    /// thread waits at the gate for the machine to close.
    ///
    /// # Errors
    /// The host is out of threads.
    pub fn start<E: From<Ended> + Send + 'static>(
        mut vcpu: Vcpu,
        shared: Arc<Shared>,
        ended: Sender<E>,
    ) -> io::Result<Self> {
        let name = format!("vcpu{}", vcpu.id());
        let thread = thread::Builder::new().name(name).spawn(move || {
            vcpu.bind();
            let end = run(&mut vcpu, &shared);
            if let Some(end) = end {
                let report = report::report(&vcpu, &shared.ram, &end);
                let _ = ended.send(Ended { end, report }.into());
            }
            shared.gate.left();
        })?;
        Ok(Self(thread))
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
    loop {
        // One branch while nobody records; the observer has to put things back once nobody does any more.
        let next = if shared.recorder.is_on() | observer.is_active() {
            observer.turn(vcpu, shared)
        } else {
            vcpu.run().map(|mut exit| dispatch(&mut exit, &shared.buses))
        };
        let next = match next {
            Ok(next) => next,
            Err(error) => return Some(Err(error)),
        };
        match next {
            Next::Again => {}
            Next::Gate => match shared.gate.pass(|| vcpu.finish_instruction()) {
                Passed::Through => {}
                Passed::AfterPause => vcpu.announce_pause(),
                Passed::Leave => return None,
            },
            Next::End(end) => return Some(Ok(end)),
        }
    }
}
