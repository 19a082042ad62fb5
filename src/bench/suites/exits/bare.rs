//! The least that can run a guest: KVM_RUN in a loop, in this process, with nothing behind it. What the monitor costs is
//! measured against it. Same memory, interrupts, doorbell, CPUID and entry as the machine's.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR};

use super::guest::{DOORBELL, Kind};
use super::{Said, brief, last_line, text};
use vmm_monitor::backends::Changes;
use vmm_monitor::boot::{self, Payload};
use vmm_monitor::config::VmConfig;
use vmm_monitor::event_loop::Event;
use vmm_monitor::kvm::exit::{Exit, Stuck};
use vmm_monitor::kvm::{self, Controllers, Kvm, Vcpu};
use vmm_monitor::machine;
use vmm_monitor::memory::{GuestRam, Memory, layout};
use vmm_monitor::vcpu::dispatch::{Buses, End, Next, dispatch};
use vmm_monitor::vcpu::report::report;
use vmm_monitor::vm::{Interrupt, IoEventAddress, Vm as _};

/// A guest that runs, and the interrupt line that it listens to.
pub struct Bare {
    pub line: Arc<dyn Interrupt>,
    thread: JoinHandle<()>,
    _doorbell: Event,
    _vm: kvm::Vm,
}

/// The parts in which a VM comes.
struct Parts {
    vm: kvm::Vm,
    vcpu: Vcpu,
    ram: Arc<GuestRam>,
}

fn parts(config: &VmConfig) -> Result<Parts, String> {
    let kvm = Kvm::open(&machine::kvm_path()).map_err(text)?;
    let memory = Memory::new(&config.mem).map_err(text)?;
    let vm = kvm.create_vm(&memory, Controllers::All).map_err(text)?;
    let kernel = config.kernel.clone().ok_or("nothing to boot")?;
    let payload = Payload::open(&kernel.into(), None, String::new(), config.boot).map_err(text)?;
    let list = machine::inventory(config, &Changes::default(), None).map_err(text)?;
    let platform = machine::platform(config.cpus.0, &list);
    let entry = boot::load(&memory, &payload, &platform).map_err(text)?;
    let (cpu, processor) = (vmm_monitor::config::Cpu::default(), kvm.processor().map_err(text)?);
    let vcpu = vm.create_vcpu(0, 1, &cpu, &processor).map_err(text)?;
    vcpu.enter_at(&entry).map_err(text)?;
    Ok(Parts { vm, vcpu, ram: memory.ram().clone() })
}

impl Bare {
    /// Sets the VM up and runs it in a thread of its own, which tells `said` of each mark.
    pub fn start(config: &VmConfig, kind: Kind, rounds: u32, said: Sender<Said>) -> Result<Self, String> {
        let Parts { vm, mut vcpu, ram } = parts(config)?;
        let line = vm.irq_line(layout::ACPI_GSI).map_err(text)?;
        let doorbell = Event::new().map_err(text)?;
        let at = IoEventAddress::Mmio { address: DOORBELL.into(), value: Some(0) };
        vm.ioeventfd(at, std::os::fd::AsFd::as_fd(&doorbell)).map_err(text)?;
        let run = move || {
            vcpu.bind();
            let end = go(&mut vcpu, &ram, kind, rounds, &said);
            let _ = said.send(Said::Over(end.err().unwrap_or_else(|| "the guest is done".to_owned())));
        };
        let thread = thread::Builder::new().name("bare".to_owned()).spawn(run).map_err(text)?;
        Ok(Self { line, thread, _doorbell: doorbell, _vm: vm })
    }

    /// Ends the run.
    pub fn stop(self) {
        while !self.thread.is_finished() {
            kvm::kick(&self.thread);
            thread::sleep(std::time::Duration::from_micros(50));
        }
        let _ = self.thread.join();
    }
}

/// Goes with the guest from mark to mark.
fn go(vcpu: &mut Vcpu, ram: &GuestRam, kind: Kind, rounds: u32, said: &Sender<Said>) -> Result<(), String> {
    await_mark(vcpu, ram, said)?;
    if kind.is_interrupt() {
        loop {
            await_mark(vcpu, ram, said)?;
        }
    }
    if let Some(expected) = kind.exit_reason() {
        for _ in 0..rounds {
            let reason = vcpu.run_bare().map_err(text)?;
            if reason != expected {
                return Err(unexpected(vcpu, ram, reason));
            }
        }
    }
    await_mark(vcpu, ram, said)
}

fn await_mark(vcpu: &mut Vcpu, ram: &GuestRam, said: &Sender<Said>) -> Result<(), String> {
    let mut exit = vcpu.run().map_err(text)?;
    if let Exit::PioOut { port, .. } = exit
        && u64::from(port) == layout::COM1
    {
        let _ = said.send(Said::Mark(Instant::now()));
        return Ok(());
    }
    if exit == Exit::Kicked {
        // Given up: where it was is what there is to say.
        let stuck = Ok(End::Stuck(Stuck::Unexpected(KVM_EXIT_INTR)));
        return Err(report(vcpu, ram, &stuck).and_then(|text| last_line(&text)).unwrap_or_default());
    }
    let what = format!("{exit:?} in place of a mark");
    match dispatch(&mut exit, &Buses::default()) {
        Next::End(end) => Err(explain(vcpu, ram, end)),
        Next::Again | Next::Gate | Next::Trap(_) => Err(what),
    }
}

fn unexpected(vcpu: &mut Vcpu, ram: &GuestRam, reason: u32) -> String {
    // KVM meets what it cannot do once more, and tells more of it.
    if reason == KVM_EXIT_INTERNAL_ERROR
        && let Ok(mut exit @ Exit::Stuck(Stuck::InternalError { .. })) = vcpu.run()
        && let Next::End(end) = dispatch(&mut exit, &Buses::default())
    {
        return explain(vcpu, ram, end);
    }
    explain(vcpu, ram, End::Stuck(Stuck::Unexpected(reason)))
}

fn explain(vcpu: &Vcpu, ram: &GuestRam, end: End) -> String {
    brief(&report(vcpu, ram, &Ok(end)).unwrap_or_else(|| format!("{end:?}")))
}

/// Frequency of the time-stamp counter, by KVM_GET_TSC_KHZ.
pub fn tsc_khz(config: &VmConfig) -> Result<Option<u32>, String> {
    Ok(parts(config)?.vcpu.tsc_khz())
}
