//! [`Observer`]: the run loop's body when the recorder is on: the same run and dispatch, recorded as an [`Event`].

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use super::Shared;
use super::dispatch::{Next, dispatch};
use super::x86_64::{linear, registers};
use crate::bus::lock;
use crate::kvm::exit::{Exit, Stuck};
use crate::kvm::{Counters, Error, Vcpu};
use crate::memory::GuestRam;
use crate::recorder::registers::SYSTEM_NAMES;
use crate::recorder::{Event, Kind, Registers, Track, clock};

/// Places whose code has been recorded lately, by the low bits of their address.
const SEEN: usize = 1024;

/// The vCPUs that are or were recorded, for viewers.
#[derive(Debug, Default)]
pub struct Observed(Mutex<BTreeMap<u32, ObservedVcpu>>);

/// Where a viewer finds the figures of a recorded vCPU.
#[derive(Debug)]
pub struct ObservedVcpu {
    /// Its thread.
    pub thread: i32,
    /// KVM's counters of it, where this KVM has them.
    pub counters: Option<Counters>,
}

impl Observed {
    /// To be called by the vCPU's own thread, once: KVM answers nobody else while the guest runs.
    fn insert(&self, vcpu: &Vcpu) {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        lock(&self.0)
            .entry(vcpu.id())
            .or_insert_with(|| ObservedVcpu { thread, counters: vcpu.counters().ok() });
    }

    /// All of them by number, for as long as the guard lives.
    pub fn get(&self) -> MutexGuard<'_, BTreeMap<u32, ObservedVcpu>> {
        lock(&self.0)
    }
}

/// What a vCPU thread keeps while it records.
#[derive(Debug, Default)]
pub struct Observer(Option<Observing>);

#[derive(Debug)]
struct Observing {
    track: Track,
    /// RIPs whose code stands in the record.
    seen: Box<[u64; SEEN]>,
    /// For whom they do: [`Recorder::wanted`](crate::recorder::Recorder::wanted).
    wanted: u8,
    has_rip: bool,
}

impl Observer {
    /// Whether it has something to put back.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.0.is_some()
    }

    /// Runs the guest until its next exit, answers that, and records it; if that is no longer wanted, has KVM stop what it
    /// does for the recorder first.
    pub fn turn(&mut self, vcpu: &mut Vcpu, shared: &Shared) -> Result<Next, Error> {
        if !shared.recorder.is_on() {
            vcpu.keep_registers(false);
            self.0 = None;
            return vcpu.run().map(|mut exit| dispatch(&mut exit, &shared.buses));
        }
        let wanted = shared.recorder.wanted();
        let this = self.0.get_or_insert_with(|| Observing::begin(vcpu, shared, wanted));
        if this.wanted != wanted {
            if wanted & !this.wanted != 0 {
                this.seen.fill(0);
            }
            this.wanted = wanted;
        }
        let entered = clock::ticks();
        let (regs, mut exit) = vcpu.run_observed()?;
        let time = clock::ticks();
        let rip = regs.rip;
        let mut event = Event { time, guest: time.wrapping_sub(entered), rip, ..before(&exit) };
        let next = dispatch(&mut exit, &shared.buses);
        // What was read is there only now.
        event.value = value(&exit).unwrap_or(event.value);
        event.handled = u32::try_from(clock::ticks().wrapping_sub(time)).unwrap_or(u32::MAX);
        if this.has_rip {
            let wanted = event.kind().is_some_and(Kind::has_instruction);
            let system = if wanted { this.code(vcpu, &shared.ram, &event) } else { None };
            if system.is_some() || shared.recorder.wants_all_registers() {
                let registers = Registers { general: registers::general(&regs), system };
                registers.events(time).for_each(|event| this.track.write(event));
            }
        }
        this.track.write(event);
        Ok(next)
    }
}

impl Observing {
    /// Begins a record with where the vCPU stands: of one that goes on from a snapshot, or has run for long, and whose exits KVM
    /// answers, that may be all that tells where its kernel has its page tables.
    fn begin(vcpu: &mut Vcpu, shared: &Shared, wanted: u8) -> Self {
        shared.observed.insert(vcpu);
        let mut track = shared.recorder.track(&format!("vcpu{}", vcpu.id()));
        if let (Ok(regs), Ok(sregs)) = (vcpu.regs(), vcpu.sregs()) {
            let system = Some(registers::system(&sregs));
            let registers = Registers { general: registers::general(&regs), system };
            registers.events(clock::ticks()).for_each(|event| track.write(event));
        }
        Self { track, seen: Box::new([0; SEEN]), wanted, has_rip: vcpu.keep_registers(true) }
    }

    /// Records the code at the event's RIP, unless that was done lately. Gives the system registers, which it took.
    fn code(&mut self, vcpu: &Vcpu, ram: &GuestRam, event: &Event) -> Option<[u64; SYSTEM_NAMES.len()]> {
        let seen = &mut self.seen[(event.rip as usize ^ (event.rip >> 12) as usize) % SEEN];
        if *seen == event.rip {
            return None;
        }
        *seen = event.rip;
        let sregs = vcpu.sregs().ok()?;
        // KVM's emulator is done with an instruction that writes before it leaves: RIP is behind it then.
        let written = matches!(event.kind(), Some(Kind::PioOut | Kind::MmioWrite | Kind::MsrWrite));
        let before = event.rip.checked_sub(linear::MAX_INSTRUCTION as u64).filter(|_| written);
        for rip in before.into_iter().chain([event.rip]) {
            let mut bytes = [0; 16];
            let at = registers::code(&sregs, rip);
            let count = linear::read(vcpu, ram, at, &mut bytes[..linear::MAX_INSTRUCTION]) as u8;
            let [address, value] =
                [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i])));
            let (time, kind) = (event.time, Kind::Code as u8);
            self.track.write(Event {
                time,
                rip,
                address,
                value,
                kind,
                size: registers::bits(&sregs),
                count,
                ..Event::default()
            });
        }
        Some(registers::system(&sregs))
    }
}

/// What is known before the exit is answered.
fn before(exit: &Exit<'_>) -> Event {
    let event = |kind: Kind, address: u64, value: u64| Event {
        kind: kind as u8,
        address,
        value,
        count: 1,
        ..Event::default()
    };
    let elements = |data: &[u8], size: usize| (data.len() / size.max(1)).min(255) as u8;
    match exit {
        Exit::PioIn { port, size, data } => {
            let count = elements(data, *size);
            Event { size: *size as u8, count, ..event(Kind::PioIn, (*port).into(), 0) }
        }
        Exit::PioOut { port, size, data } => {
            let (count, value) = (elements(data, *size), number(&data[..*size.min(&data.len())]));
            Event { size: *size as u8, count, ..event(Kind::PioOut, (*port).into(), value) }
        }
        Exit::MmioRead { address, data } => {
            Event { size: data.len() as u8, ..event(Kind::MmioRead, *address, 0) }
        }
        Exit::MmioWrite { address, data } => {
            Event { size: data.len() as u8, ..event(Kind::MmioWrite, *address, number(data)) }
        }
        Exit::MsrRead { number, .. } => {
            Event { size: 8, count: 0, ..event(Kind::MsrRead, (*number).into(), 0) }
        }
        Exit::MsrWrite { number, value, .. } => {
            Event { size: 8, count: 0, ..event(Kind::MsrWrite, (*number).into(), *value) }
        }
        Exit::Synic { msr, synic, .. } => {
            // SIEFP and SIMP follow SCONTROL at 2 and 3.
            let value = match msr & 3 {
                2 => synic.events,
                3 => synic.messages,
                _ => synic.control,
            };
            Event { size: 8, ..event(Kind::MsrWrite, (*msr).into(), value) }
        }
        Exit::Hypercall { input, .. } => Event { size: 8, ..event(Kind::Hypercall, *input, 0) },
        Exit::Halt => event(Kind::Halt, 0, 0),
        Exit::Shutdown => event(Kind::Shutdown, 0, 0),
        Exit::SystemEvent(number) => event(Kind::SystemEvent, (*number).into(), 0),
        Exit::Stuck(Stuck::FailEntry { reason, .. }) => event(Kind::FailEntry, 0, *reason),
        Exit::Stuck(Stuck::InternalError { suberror, .. }) => {
            event(Kind::InternalError, (*suberror).into(), 0)
        }
        Exit::Debug(_) => event(Kind::Debug, 0, 0),
        Exit::IoApicEoi(vector) => event(Kind::IoApicEoi, (*vector).into(), 0),
        Exit::Kicked => event(Kind::Kicked, 0, 0),
        Exit::Stuck(Stuck::Unexpected(number)) => event(Kind::Other, (*number).into(), 0),
    }
}

/// What a read was answered with.
fn value(exit: &Exit<'_>) -> Option<u64> {
    match exit {
        Exit::PioIn { size, data, .. } => Some(number(&data[..*size.min(&data.len())])),
        Exit::MmioRead { data, .. } => Some(number(data)),
        Exit::Hypercall { status, .. } => Some(**status),
        _ => None,
    }
}

/// Up to 8 bytes as a little-endian number.
fn number(bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    let len = bytes.len().min(8);
    all[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(all)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::bus::Bus;
    use crate::kvm::Kvm;
    use crate::kvm::regs::{Entry, FLAT};
    use crate::memory::Memory;
    use crate::recorder::Recorder;
    use crate::vcpu::dispatch::Buses;
    use crate::vcpu::gate::Gate;

    #[test]
    fn kvm_leaves_registers_in_its_page_only_while_somebody_records() {
        let kvm = Path::new("/dev/kvm");
        if let Err(error) = File::options().read(true).write(true).open(kvm) {
            eprintln!("SKIP: kvm_leaves_registers_in_its_page: no /dev/kvm: {error}");
            return;
        }
        let memory = Memory::new(&"2M".parse().unwrap()).unwrap();
        // mov edx, 0x1234; out dx, eax; jmp to the out.
        let code = [0xba, 0x34, 0x12, 0x00, 0x00, 0xef, 0xeb, 0xfd];
        memory.ram().write_slice(&code, GuestAddress(0x1000)).unwrap();
        let kvm = Kvm::open(kvm).unwrap();
        let vm = kvm.create_vm(&memory, crate::kvm::Controllers::LocalApics).unwrap();
        let cpu = crate::config::Cpu::default();
        let mut vcpu = vm.create_vcpu(0, 1, &cpu, &kvm.processor().unwrap()).unwrap();
        vcpu.enter_at(&Entry { rip: 0x1000, ..FLAT }).unwrap();
        vcpu.bind();
        let shared = Shared {
            buses: Buses::new(Bus::default(), Bus::default()),
            gate: Gate::new(1),
            ram: memory.ram().clone(),
            recorder: Arc::<Recorder>::default(),
            observed: Observed::default(),
            reset_flag: false,
            holds_on_panic: false,
            debugger: std::sync::OnceLock::new(),
        };
        let mut observer = Observer::default();
        let exits = || {
            let mut exits = Vec::new();
            shared.recorder.drain(&mut |taken| {
                let own = taken.events.iter().filter(|event| event.kind().is_some_and(Kind::is_exit));
                exits.extend(own.map(|event| (event.address, event.rip)));
            });
            exits
        };
        for _ in 0..2 {
            assert!(!observer.is_active() && !vcpu.is_keeping_registers());
            shared.recorder.set_on(true);
            for _ in 0..3 {
                assert!(matches!(observer.turn(&mut vcpu, &shared), Ok(Next::Again)));
            }
            assert!(observer.is_active() && vcpu.is_keeping_registers());
            let seen = exits();
            assert_eq!(seen.len(), 3);
            // At the instruction, or behind it where KVM's emulator has finished it.
            assert!(
                seen.iter().all(|(port, rip)| *port == 0x1234 && (0x1005..=0x1006).contains(rip)),
                "{seen:x?}"
            );
            shared.recorder.set_on(false);
            // What was recorded last, and this turn is none of it.
            assert!(matches!(observer.turn(&mut vcpu, &shared), Ok(Next::Again)));
            assert_eq!(exits(), []);
        }
    }
}
