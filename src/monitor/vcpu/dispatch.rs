//! [`dispatch`]: from an exit to the device that answers it, and what the vCPU does next.
//!
//! A pure function over [`Exit`] and the two buses: no KVM, no thread, no clock, so that every exit is tested with
//! plain values. Called by the run loop in [`super`] for each exit.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings as kb;

use crate::bus::{self, Bus, Effect};
use crate::config::msr;
use crate::guest_warn;
use crate::hyperv::{self, Hypercalls};
use crate::kvm::exit::{Exit, Stuck, Trap};
use crate::vm::Pins;

/// The two address spaces of a PC, and whom it may call beside.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// Who answers Hyper-V's calls, if anybody does.
    pub hypercalls: Option<Arc<Mutex<dyn Hypercalls>>>,
    /// The I/O APIC, if it is not KVM's.
    pub pins: Option<Arc<Mutex<dyn Pins>>>,
    /// Tells the machine that a device asks to be served ([`Effect::Serve`]). Does not block.
    pub serve: Option<Box<dyn Fn() + Send + Sync>>,
    unclaimed: AtomicU32,
}

impl Buses {
    /// After so many accesses that nobody answered, they are no longer logged one by one: a guest can make any
    /// number of them.
    const LOGGED: u32 = 64;

    /// Two filled buses.
    pub fn new(pio: Bus, mmio: Bus) -> Self {
        Self { pio, mmio, ..Self::default() }
    }

    fn log_unclaimed(&self, access: std::fmt::Arguments<'_>) {
        if log::log_enabled!(log::Level::Debug)
            && self.unclaimed.fetch_add(1, Ordering::Relaxed) < Self::LOGGED
        {
            log::debug!("nobody answers {access}");
        }
    }
}

impl fmt::Debug for Buses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buses").field("pio", &self.pio).field("mmio", &self.mmio).finish_non_exhaustive()
    }
}

/// What a vCPU does after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Enters the guest again.
    Again,
    /// Looks at the gate: someone wants it to leave or to park.
    Gate,
    /// Stops for the debugger.
    Trap(Trap),
    /// The machine's run is over.
    End(End),
}

/// How a run ends, as the vCPU that ended it saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The guest ended with a status.
    Exit(u8),
    /// The guest's kernel panicked, and said so: by pvpanic, or as Hyper-V's guests do.
    Panic,
    /// The program that boots a disk found nothing to boot.
    NothingToBoot,
    /// The guest's processor went into shutdown: a triple fault.
    TripleFault,
    /// KVM cannot go on.
    Stuck(Stuck),
}

/// Answers one exit. What the guest reads is put into `exit`'s data.
pub fn dispatch(exit: &mut Exit<'_>, buses: &Buses) -> Next {
    match *exit {
        Exit::PioIn { port, size, ref mut data } => {
            for element in data.chunks_mut(size) {
                if !buses.pio.read(u64::from(port), element) {
                    buses.log_unclaimed(format_args!("in {size} at port {port:#x}"));
                }
            }
            Next::Again
        }
        Exit::PioOut { port, size, data } => {
            for element in data.chunks(size) {
                match buses.pio.write(u64::from(port), element) {
                    Some(effect) => {
                        if effect.ends() {
                            let device = buses.pio.name_at(u64::from(port)).unwrap_or_default();
                            log::info!("{effect:?} by {device}, port {port:#x}");
                        }
                        match after(effect, buses) {
                            Next::Again => {}
                            next => return next,
                        }
                    }
                    None => buses.log_unclaimed(format_args!("out {size} at port {port:#x}")),
                }
            }
            Next::Again
        }
        Exit::MmioRead { address, ref mut data } => {
            if !buses.mmio.read(address, data) {
                buses.log_unclaimed(format_args!("read {} at {address:#x}", data.len()));
            }
            Next::Again
        }
        Exit::MmioWrite { address, data } => match buses.mmio.write(address, data) {
            Some(effect) => after(effect, buses),
            None => {
                buses.log_unclaimed(format_args!("write {} at {address:#x}", data.len()));
                Next::Again
            }
        },
        Exit::MsrRead { number, ref mut refused } => {
            guest_warn!("reads MSR {}, which its CPU model denies: #GP", msr::name(number));
            **refused = 1;
            Next::Again
        }
        Exit::MsrWrite { number, value, ref mut refused } => {
            guest_warn!("writes {value:#x} to MSR {}, which its CPU model denies: #GP", msr::name(number));
            **refused = 1;
            Next::Again
        }
        Exit::Synic { vcpu, synic, .. } => {
            if let Some(hypercalls) = &buses.hypercalls {
                bus::lock(hypercalls).set_synic(vcpu, synic);
            }
            Next::Again
        }
        Exit::Hypercall { input, parameters, ref mut status } => {
            **status = match &buses.hypercalls {
                Some(hypercalls) => bus::lock(hypercalls).call(input, parameters),
                None => hyperv::unanswered(input),
            };
            Next::Again
        }
        Exit::IoApicEoi(vector) => {
            if let Some(pins) = &buses.pins {
                bus::lock(pins).end_of_interrupt(vector);
            }
            Next::Again
        }
        // Local APICs are in the kernel and HLT waits there; where it does come here the vCPU just goes on, and waits inside KVM_RUN.
        Exit::Halt => Next::Again,
        Exit::Kicked => Next::Gate,
        Exit::Shutdown => Next::End(End::TripleFault),
        Exit::SystemEvent(kb::KVM_SYSTEM_EVENT_SHUTDOWN) => Next::End(End::Shutdown),
        Exit::SystemEvent(kb::KVM_SYSTEM_EVENT_RESET) => Next::End(End::Reset),
        Exit::SystemEvent(kb::KVM_SYSTEM_EVENT_CRASH) => Next::End(End::Panic),
        Exit::SystemEvent(_) => Next::End(End::Stuck(Stuck::Unexpected(kb::KVM_EXIT_SYSTEM_EVENT))),
        Exit::Debug(trap) => Next::Trap(trap),
        Exit::Stuck(why) => Next::End(End::Stuck(why)),
    }
}

fn after(effect: Effect, buses: &Buses) -> Next {
    match effect {
        Effect::None => Next::Again,
        Effect::Serve => {
            if let Some(serve) = &buses.serve {
                serve();
            }
            Next::Again
        }
        Effect::Reset => Next::End(End::Reset),
        Effect::Shutdown => Next::End(End::Shutdown),
        Effect::Exit(code) => Next::End(End::Exit(code)),
        Effect::Panic => Next::End(End::Panic),
        Effect::NothingToBoot => Next::End(End::NothingToBoot),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bus::Device;
    use crate::state::Stateless;

    /// Remembers what was written, element by element; reads count up; writing 0xee powers off, 0x5e asks for
    /// a thread.
    #[derive(Default)]
    struct Tape(Vec<(u64, Vec<u8>)>, u8);
    impl Stateless for Tape {}
    impl Device for Tape {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            self.1 += 1;
            data.fill(self.1);
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
            self.0.push((offset, data.to_vec()));
            match data[0] {
                0xee => Effect::Shutdown,
                0x5e => Effect::Serve,
                _ => Effect::None,
            }
        }
    }

    fn buses() -> (Arc<Mutex<Tape>>, Buses) {
        let tape = Arc::new(Mutex::new(Tape::default()));
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        pio.insert("tape", 0x10, 8, tape.clone()).unwrap();
        mmio.insert("tape", 0x1000, 0x1000, tape.clone()).unwrap();
        (tape, Buses::new(pio, mmio))
    }

    #[test]
    fn rep_strings_come_element_by_element() {
        let (tape, buses) = buses();
        let mut out = Exit::PioOut { port: 0x12, size: 2, data: &[1, 2, 3, 4, 5, 6] };
        assert_eq!(dispatch(&mut out, &buses), Next::Again);
        assert_eq!(tape.lock().unwrap().0, [(2, vec![1, 2]), (2, vec![3, 4]), (2, vec![5, 6])]);
        let mut data = [0; 8];
        assert_eq!(dispatch(&mut Exit::PioIn { port: 0x10, size: 4, data: &mut data }, &buses), Next::Again);
        assert_eq!(data, [1, 1, 1, 1, 2, 2, 2, 2]);
    }

    #[test]
    fn an_effect_ends_a_string_in_the_middle() {
        let (tape, buses) = buses();
        let mut out = Exit::PioOut { port: 0x10, size: 1, data: &[1, 0xee, 2] };
        assert_eq!(dispatch(&mut out, &buses), Next::End(End::Shutdown));
        assert_eq!(tape.lock().unwrap().0.len(), 2);
    }

    #[test]
    fn a_device_that_asks_to_be_served_does_not_stop_the_vcpu() {
        let (tape, mut buses) = buses();
        let asked = Arc::new(AtomicU32::new(0));
        let count = asked.clone();
        buses.serve = Some(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        let mut out = Exit::PioOut { port: 0x10, size: 1, data: &[1, 0x5e, 2] };
        assert_eq!(dispatch(&mut out, &buses), Next::Again);
        assert_eq!(dispatch(&mut Exit::MmioWrite { address: 0x1000, data: &[0x5e] }, &buses), Next::Again);
        assert_eq!((tape.lock().unwrap().0.len(), asked.load(Ordering::Relaxed)), (4, 2));
    }

    #[test]
    fn unknown_addresses_read_all_ones() {
        let (_, buses) = buses();
        for size in [1, 2, 4] {
            let mut data = [0; 4];
            dispatch(&mut Exit::PioIn { port: 0xcf8, size, data: &mut data }, &buses);
            assert_eq!(data, [0xff; 4]);
        }
        let mut data = [0; 8];
        assert_eq!(
            dispatch(&mut Exit::MmioRead { address: 0xfed0_0000, data: &mut data }, &buses),
            Next::Again
        );
        assert_eq!(data, [0xff; 8]);
        assert_eq!(dispatch(&mut Exit::MmioWrite { address: 0, data: &[1] }, &buses), Next::Again);
        assert_eq!(dispatch(&mut Exit::PioOut { port: 0x80, size: 1, data: &[1] }, &buses), Next::Again);
    }

    #[test]
    fn msrs_that_come_out_are_refused() {
        let (_, buses) = buses();
        let (mut read, mut write) = (0, 0);
        let mut exit = Exit::MsrRead { number: 0xc000_0080, refused: &mut read };
        assert_eq!(dispatch(&mut exit, &buses), Next::Again);
        let mut exit = Exit::MsrWrite { number: u32::MAX, value: u64::MAX, refused: &mut write };
        assert_eq!(dispatch(&mut exit, &buses), Next::Again);
        assert_eq!((read, write), (1, 1));
    }

    #[test]
    fn hypercalls_that_nobody_takes_have_a_status_each() {
        let (_, buses) = buses();
        for (input, expected) in [(0x5c, 0x12), (0x1_005d, 0x12), (0x8001, 2)] {
            let mut status = 0;
            let mut exit = Exit::Hypercall { input, parameters: [0; 2], status: &mut status };
            assert_eq!(dispatch(&mut exit, &buses), Next::Again);
            assert_eq!(status, expected, "{input:#x}");
        }
    }

    #[test]
    fn every_other_exit_has_its_answer() {
        const TRAP: Trap = Trap { exception: 1, pc: 2, dr6: 3 };
        let (_, buses) = buses();
        let stuck = |s| Next::End(End::Stuck(s));
        for (mut exit, next) in [
            (Exit::Halt, Next::Again),
            (Exit::Synic { vcpu: 0, msr: 0x4000_0080, synic: hyperv::Synic::default() }, Next::Again),
            (Exit::IoApicEoi(3), Next::Again),
            (Exit::Kicked, Next::Gate),
            (Exit::Shutdown, Next::End(End::TripleFault)),
            (Exit::SystemEvent(kb::KVM_SYSTEM_EVENT_SHUTDOWN), Next::End(End::Shutdown)),
            (Exit::SystemEvent(kb::KVM_SYSTEM_EVENT_RESET), Next::End(End::Reset)),
            (Exit::SystemEvent(kb::KVM_SYSTEM_EVENT_CRASH), Next::End(End::Panic)),
            (Exit::SystemEvent(99), stuck(Stuck::Unexpected(kb::KVM_EXIT_SYSTEM_EVENT))),
            (
                Exit::Stuck(Stuck::FailEntry { reason: 7, cpu: 1 }),
                stuck(Stuck::FailEntry { reason: 7, cpu: 1 }),
            ),
            (Exit::Debug(TRAP), Next::Trap(TRAP)),
            (Exit::Stuck(Stuck::Unexpected(77)), stuck(Stuck::Unexpected(77))),
        ] {
            assert_eq!(dispatch(&mut exit, &buses), next);
        }
    }
}
