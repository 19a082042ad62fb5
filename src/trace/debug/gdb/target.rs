//! The machine as the gdbstub crate wants it: vCPU n is thread n + 1, all of them stop and run together.

use std::collections::VecDeque;
use std::num::NonZero;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as Breaks, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE};

use super::breakpoints::Breakpoints;
use super::registers::{Registers, X86_64};
use vmm_monitor::kvm::debug::{Access, Breakpoint, Exception, GuestDebug};
use vmm_monitor::kvm::{self, Vcpu};
use vmm_monitor::machine::{AlreadyEnded, Debug};
use vmm_monitor::memory::GuestRam;
use vmm_monitor::vcpu::{Stop, linear};

/// Why the stub cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused what gdb asked for.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// It runs already.
    #[error("asked to run, but runs")]
    Runs,
    /// Not a vCPU.
    #[error("there is no thread {0}")]
    NoThread(Tid),
}

/// DR6: single step (SDM vol. 3, 18.2.3).
const BS: u64 = 1 << 14;
/// What a memory access that failed is told as: EFAULT.
const FAULT: u8 = 14;

/// What a vCPU does when the machine goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
}

/// A machine under gdb.
#[derive(Debug)]
pub struct Guest {
    pub debug: Debug,
    breakpoints: Breakpoints,
    /// By vCPU; none where gdb named none.
    actions: Vec<Option<Action>>,
    /// Those with no action stay.
    locked: bool,
    /// The vCPU that stopped last: software breakpoints are meant as it sees memory.
    current: u32,
    /// What has been watched and came while others had stopped already: told next.
    pub pending: VecDeque<Stop>,
    /// gdb has let it run.
    pub resumed: bool,
    /// It runs: nothing can be asked of its vCPUs, and a peer that does so all the same is told.
    pub running: bool,
    /// Bytes of memory that may still be read for the packet at hand.
    pub budget: usize,
}

/// The thread that gdb knows vCPU `vcpu` by.
pub fn thread(vcpu: u32) -> Tid {
    NonZero::new(vcpu as usize + 1).unwrap_or(NonZero::<usize>::MIN)
}

impl Guest {
    /// gdb never asks for more memory at once; another peer shall not keep the thread busy for long.
    pub const BUDGET: usize = 8192;

    /// The machine that `debug` holds.
    pub fn new(debug: Debug) -> Self {
        let actions = vec![None; debug.cpus() as usize];
        Self {
            debug,
            breakpoints: Breakpoints::default(),
            actions,
            locked: false,
            current: 0,
            pending: VecDeque::new(),
            resumed: false,
            running: false,
            budget: Self::BUDGET,
        }
    }

    /// Goes on with another machine in its place: the guest rebooted.
    pub fn replace(&mut self, debug: Debug) {
        self.breakpoints.forget_software();
        self.pending.clear();
        self.current = 0;
        self.running = false;
        self.debug = debug;
    }

    /// The vCPU that stopped last.
    pub fn current(&self) -> Tid {
        thread(self.current)
    }

    /// What to tell gdb of `stop`. None if it was the guest's own affair: then the vCPU has its exception, and goes on.
    pub fn reason(&mut self, stop: Stop) -> Option<MultiThreadStopReason<u64>> {
        let (tid, dr6) = (thread(stop.vcpu), stop.trap.dr6);
        if stop.trap.exception == 3 {
            if self.breakpoints.software_at(stop.trap.pc) {
                self.current = stop.vcpu;
                return Some(MultiThreadStopReason::SwBreak(tid));
            }
            return self.inject(stop.vcpu, Exception::Breakpoint);
        }
        let mut hit = self.breakpoints.hardware().iter().enumerate().filter(|(n, _)| dr6 >> n & 1 != 0);
        let reason = if let Some((_, breakpoint)) = hit.next() {
            let addr = breakpoint.address;
            match breakpoint.access {
                Access::Execute => MultiThreadStopReason::HwBreak(tid),
                Access::Write => MultiThreadStopReason::Watch { tid, kind: WatchKind::Write, addr },
                Access::ReadWrite => MultiThreadStopReason::Watch { tid, kind: WatchKind::ReadWrite, addr },
            }
        } else if dr6 & BS != 0 && self.actions.get(stop.vcpu as usize) == Some(&Some(Action::Step)) {
            MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP }
        } else {
            return self.inject(stop.vcpu, Exception::Debug);
        };
        self.current = stop.vcpu;
        Some(reason)
    }

    /// Keeps what would not come again by itself.
    pub fn postpone(&mut self, stop: Stop) {
        let watched = |(n, breakpoint): (usize, &Breakpoint)| {
            breakpoint.access != Access::Execute && stop.trap.dr6 >> n & 1 != 0
        };
        let mut hardware = self.breakpoints.hardware().iter().enumerate();
        if stop.trap.exception == 1 && hardware.any(watched) {
            self.pending.push_back(stop);
        }
    }

    fn inject(&mut self, vcpu: u32, exception: Exception) -> Option<MultiThreadStopReason<u64>> {
        let step = self.actions.get(vcpu as usize) == Some(&Some(Action::Step));
        let debug = GuestDebug { inject: Some(exception), ..self.guest_debug(step) };
        match self.debug.with(vcpu, move |vcpu, _| vcpu.set_guest_debug(&debug)) {
            Ok(Ok(())) | Err(AlreadyEnded) => {}
            Ok(Err(error)) => {
                log::warn!("give the guest its own exception: {}", vmm_monitor::error_chain(&error))
            }
        }
        self.debug.release(vcpu);
        None
    }

    fn guest_debug(&self, step: bool) -> GuestDebug {
        GuestDebug {
            step,
            block_interrupts: false,
            software: self.breakpoints.any_software(),
            hardware: self.breakpoints.hardware().to_vec(),
            inject: None,
        }
    }

    /// Takes all breakpoints away. The vCPUs must stand still.
    pub fn clear(&mut self) -> Result<(), AlreadyEnded> {
        self.breakpoints.clear(self.debug.ram());
        for vcpu in 0..self.debug.cpus() {
            let cleared = self.debug.with(vcpu, |vcpu, _| vcpu.set_guest_debug(&GuestDebug::default()))?;
            if let Err(error) = cleared {
                log::warn!("vcpu{vcpu}: take breakpoints away: {}", vmm_monitor::error_chain(&error));
            }
        }
        Ok(())
    }

    /// The vCPU of a thread that gdb names.
    fn vcpu(&self, tid: Tid) -> Option<u32> {
        u32::try_from(tid.get() - 1).ok().filter(|vcpu| *vcpu < self.debug.cpus())
    }

    /// Does `errand` to the vCPU of `tid`.
    fn with<R: Send + 'static>(
        &self,
        tid: Tid,
        errand: impl FnOnce(&mut Vcpu, &GuestRam) -> R + Send + 'static,
    ) -> TargetResult<R, Self> {
        let vcpu = self.vcpu(tid).filter(|_| !self.running).ok_or(TargetError::NonFatal)?;
        self.debug.with(vcpu, errand).map_err(|AlreadyEnded| TargetError::NonFatal)
    }
}

/// gdb is told that it did not work, and a log why.
fn refused(error: kvm::Error) -> TargetError<Error> {
    log::warn!("gdb: {}", vmm_monitor::error_chain(&error));
    TargetError::NonFatal
}

impl Target for Guest {
    type Arch = X86_64;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, registers: &mut Registers, tid: Tid) -> TargetResult<(), Self> {
        *registers = self.with(tid, |vcpu, _| Registers::of(vcpu))?.map_err(refused)?;
        Ok(())
    }

    fn write_registers(&mut self, registers: &Registers, tid: Tid) -> TargetResult<(), Self> {
        let registers = registers.clone();
        self.with(tid, move |vcpu, _| registers.set(vcpu))?.map_err(refused)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let len = data.len();
        self.budget = self.budget.checked_sub(len).ok_or(TargetError::Errno(FAULT))?;
        let bytes = self.with(tid, move |vcpu, ram| {
            let mut bytes = vec![0; len];
            let count = linear::read(vcpu, ram, start, &mut bytes);
            bytes.truncate(count);
            bytes
        })?;
        if bytes.is_empty() && len > 0 {
            return Err(TargetError::Errno(FAULT));
        }
        let read = &mut data[..bytes.len()];
        read.copy_from_slice(&bytes);
        self.breakpoints.unhide(start, read);
        Ok(read.len())
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let bytes = data.to_vec();
        let count = self.with(tid, move |vcpu, ram| linear::write(vcpu, ram, start, &bytes))?;
        self.breakpoints.written(self.debug.ram(), start, &data[..count.min(data.len())]);
        if count < data.len() { Err(TargetError::Errno(FAULT)) } else { Ok(()) }
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.debug.cpus()).for_each(|vcpu| active(thread(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Guest {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Error> {
        let state = self.with(tid, |vcpu, _| vcpu.mp_state()).ok().and_then(Result::ok);
        let state = match state.map(|state| state.mp_state) {
            Some(KVM_MP_STATE_RUNNABLE) => "runs",
            Some(KVM_MP_STATE_HALTED) => "halted",
            Some(_) => "waits to be started",
            None => "gone",
        };
        let text = format!("vcpu{}: {state}", tid.get() - 1);
        let len = text.len().min(buf.len());
        buf[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), Error> {
        if self.running {
            return Err(Error::Runs);
        }
        self.resumed = true;
        let blocks = self.debug.blocks_interrupts;
        for vcpu in 0..self.debug.cpus() {
            let step = self.actions[vcpu as usize] == Some(Action::Step);
            let mut debug = self.guest_debug(step);
            let set = self.debug.with(vcpu, move |vcpu, _| {
                // A halted vCPU waits for the interrupt that blocking would keep from it.
                debug.block_interrupts = blocks && vcpu.mp_state()?.mp_state == KVM_MP_STATE_RUNNABLE;
                vcpu.set_guest_debug(&debug)
            });
            match set {
                Ok(set) => set?,
                // Its end is on the way, and will be told.
                Err(AlreadyEnded) => return Ok(()),
            }
        }
        self.running = true;
        if !self.pending.is_empty() {
            return Ok(());
        }
        for vcpu in 0..self.debug.cpus() {
            if self.actions[vcpu as usize].is_some() || !self.locked {
                self.debug.release(vcpu);
            }
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.actions.fill(None);
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        let vcpu = self.vcpu(tid).ok_or(Error::NoThread(tid))?;
        self.actions[vcpu as usize] = Some(Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        let vcpu = self.vcpu(tid).ok_or(Error::NoThread(tid))?;
        self.actions[vcpu as usize] = Some(Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Guest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.locked = true;
        Ok(())
    }
}

impl Breaks for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let physical = self.with(self.current(), move |vcpu, _| vcpu.translate(address))?;
        let Some(physical) = physical else { return Ok(false) };
        Ok(self.breakpoints.add_software(self.debug.ram(), address, physical))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.breakpoints.remove_software(self.debug.ram(), address);
        Ok(true)
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.add_hardware(Breakpoint { address, len: 1, access: Access::Execute }))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.breakpoints.remove_hardware(Breakpoint { address, len: 1, access: Access::Execute });
        Ok(true)
    }
}

impl HwWatchpoint for Guest {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.add_hardware(watch(address, len, kind)))
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.breakpoints.remove_hardware(watch(address, len, kind));
        Ok(true)
    }
}

/// A debug register for it. None watches reads alone: writes are told too then.
fn watch(address: u64, len: u64, kind: WatchKind) -> Breakpoint {
    let access = match kind {
        WatchKind::Write => Access::Write,
        WatchKind::Read | WatchKind::ReadWrite => Access::ReadWrite,
    };
    Breakpoint { address, len, access }
}
