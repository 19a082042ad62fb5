//! `vmm trace --step`: one instruction after the other, each on a line: where, what, in which mode, and what it changed.
//!
//! A thread of its own lets the vCPU go by single steps (KVM_GUESTDBG_SINGLESTEP), and ends the machine when it has seen
//! enough. Other vCPUs run freely meanwhile.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::KVM_MP_STATE_RUNNABLE;

use super::view::View;
use crate::symbols::Symbols;
use vmm_monitor::kvm::debug::{Access, BREAKPOINTS, Breakpoint, GuestDebug};
use vmm_monitor::kvm::{self, Vcpu};
use vmm_monitor::machine::{self, AlreadyEnded, Debug};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::session::{Built, End, Observer};
use vmm_monitor::threads::{self, Role};
use vmm_monitor::vcpu::Stop;

/// Where Linux maps its image, less where it lies in physical memory (Documentation/arch/x86/x86_64/mm.rst). Before the guest
/// has paging on, its kernel runs so much below its symbols.
pub const LINUX_MAP: u64 = 0xffff_ffff_8000_0000;

/// What to step through.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Run freely to the first of these linear addresses (four at most); none: from the first instruction.
    pub from: Vec<u64>,
    /// How many instructions.
    pub count: u64,
}

/// How stepping ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepsEnd {
    /// After as many instructions as were asked for.
    All,
    /// The guest ended first.
    Ended,
    /// The guest ended without reaching the place where stepping was to begin.
    NeverThere,
    /// KVM failed, or the output cannot be written.
    Failed(String),
}

/// See the module's text.
#[derive(Debug)]
pub struct Steps {
    plan: Plan,
    symbols: Symbols,
    events: Option<Sender<Event>>,
    thread: Option<JoinHandle<(Walk, StepsEnd)>>,
    /// How the last machine's steps ended.
    pub end: StepsEnd,
}

enum Event {
    Stopped(Stop),
    Ended,
}

impl Steps {
    /// Steps as `plan` says, told on standard output with names of `symbols`.
    pub fn new(plan: Plan, symbols: Symbols) -> Self {
        Self { plan, symbols, events: None, thread: None, end: StepsEnd::Ended }
    }
}

impl Observer for Steps {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let machine = &*built.machine;
        let (events, received) = channel();
        let stopped = events.clone();
        let debug = machine.debug(move |stop| _ = stopped.send(Event::Stopped(stop)))?;
        let (plan, symbols) = (self.plan.clone(), std::mem::take(&mut self.symbols));
        let mut walk = Walk { debug, events: received, plan, symbols };
        let thread = threads::spawn(Role::Owner("step"), move || {
            let seen = walk.all();
            walk.debug.handle().kill();
            (walk, seen)
        });
        let failed = |source| machine::Error::Host { what: "the thread that steps".to_owned(), source };
        self.thread = Some(thread.map_err(failed)?);
        self.events = Some(events);
        Ok(())
    }

    fn ended(&mut self, _: &End<'_>) {
        self.stop();
    }
}

impl Steps {
    fn stop(&mut self) {
        let (Some(events), Some(thread)) = (self.events.take(), self.thread.take()) else { return };
        let _ = events.send(Event::Ended);
        // A panic there is a defect of ours, and goes on as one.
        let (walk, seen) = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (self.plan, self.symbols, self.end) = (walk.plan, walk.symbols, seen);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The steps through one machine.
struct Walk {
    debug: Debug,
    events: Receiver<Event>,
    /// What is left of it.
    plan: Plan,
    symbols: Symbols,
}

impl Walk {
    fn all(&mut self) -> StepsEnd {
        self.go().unwrap_or_else(|seen| seen)
    }

    fn go(&mut self) -> Result<StepsEnd, StepsEnd> {
        let vcpu = self.begin()?;
        for other in (0..self.debug.cpus()).filter(|other| *other != vcpu) {
            self.debug.release(other);
        }
        let mut out = io::stdout();
        let mut view = self.look(vcpu)?;
        while self.plan.count > 0 {
            self.debug.release(vcpu);
            if let Err(seen) = self.wait() {
                self.line(vcpu, &view, "(the guest ended here)", &mut out)?;
                return Err(seen);
            }
            let after = self.look(vcpu)?;
            self.line(vcpu, &view, &view.changes(&after), &mut out)?;
            view = after;
            self.plan.count -= 1;
        }
        Ok(StepsEnd::All)
    }

    /// Brings a vCPU to where stepping begins; the others are held too.
    fn begin(&mut self) -> Result<u32, StepsEnd> {
        if self.plan.from.is_empty() {
            return Ok(0);
        }
        let one = |address: &u64| Breakpoint { address: *address, len: 1, access: Access::Execute };
        let hardware = self.plan.from.iter().take(BREAKPOINTS).map(one).collect();
        self.set(&GuestDebug { hardware, ..GuestDebug::default() })?;
        (0..self.debug.cpus()).for_each(|vcpu| self.debug.release(vcpu));
        let stop =
            self.wait().map_err(|seen| if seen == StepsEnd::Ended { StepsEnd::NeverThere } else { seen })?;
        self.debug.hold()?;
        self.set(&GuestDebug::default())?;
        // Another vCPU may have come there at the same time: it runs on.
        while let Ok(Event::Stopped(_)) = self.events.try_recv() {}
        self.plan.from.clear();
        Ok(stop.vcpu)
    }

    fn set(&self, debug: &GuestDebug) -> Result<(), StepsEnd> {
        for vcpu in 0..self.debug.cpus() {
            let debug = debug.clone();
            self.debug.with(vcpu, move |vcpu, _| vcpu.set_guest_debug(&debug))??;
        }
        Ok(())
    }

    /// Where `vcpu` stands; it will come back after the next instruction.
    fn look(&self, vcpu: u32) -> Result<View, StepsEnd> {
        let blocks = self.debug.blocks_interrupts;
        let look = move |vcpu: &mut Vcpu, ram: &GuestRam| {
            // A halted vCPU waits for the interrupt that blocking would keep from it.
            let block_interrupts = blocks && vcpu.mp_state()?.mp_state == KVM_MP_STATE_RUNNABLE;
            vcpu.set_guest_debug(&GuestDebug { step: true, block_interrupts, ..GuestDebug::default() })?;
            View::of(vcpu, ram)
        };
        Ok(self.debug.with(vcpu, look)??)
    }

    fn wait(&self) -> Result<Stop, StepsEnd> {
        const LONG: Duration = Duration::from_secs(3);
        loop {
            match self.events.recv_timeout(LONG) {
                Ok(Event::Stopped(stop)) => return Ok(stop),
                Ok(Event::Ended) | Err(RecvTimeoutError::Disconnected) => return Err(StepsEnd::Ended),
                Err(RecvTimeoutError::Timeout) => log::warn!(
                    "the guest has not reached the next instruction of the trace yet: it waits for an interrupt, or runs \
                     elsewhere"
                ),
            }
        }
    }

    fn line(&self, vcpu: u32, view: &View, changes: &str, out: &mut impl Write) -> Result<(), StepsEnd> {
        let (pc, mut text) = (view.pc(), String::new());
        let linked = if pc < !LINUX_MAP { pc.wrapping_add(LINUX_MAP) } else { pc };
        let name = [pc, linked]
            .into_iter()
            .find_map(|address| self.symbols.find(address).map(|_| self.symbols.name(address)));
        let (bytes, instruction) = view.instruction();
        let _ = write!(text, "vcpu{vcpu}  {pc:<#18x}  ");
        if self.symbols.source.is_some() {
            let _ = write!(text, "{:<24} ", name.unwrap_or_default());
        }
        let _ = write!(text, "{bytes:<20} {instruction:<32} | {:<12} | {changes}", view.mode_name());
        writeln!(out, "{}", text.trim_end())
            .map_err(|error| StepsEnd::Failed(format!("write the steps: {error}")))
    }
}

impl From<AlreadyEnded> for StepsEnd {
    fn from(_: AlreadyEnded) -> Self {
        Self::Ended
    }
}

impl From<kvm::Error> for StepsEnd {
    fn from(error: kvm::Error) -> Self {
        Self::Failed(vmm_monitor::error_chain(&error))
    }
}
