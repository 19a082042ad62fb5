//! The steps before the guest runs, as events: one per [`Step`].

use super::event::{Event, Kind};
use super::{Recorder, Track, clock};

/// A step on the way to the first entry. The numbers stand in files, so they do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Opens the KVM device.
    Open = 0,
    /// Reserves guest memory.
    Memory = 1,
    /// Creates the VM, its memory slots and interrupt controllers; beside [`Step::Load`] and [`Step::Processor`].
    Vm = 2,
    /// Reads kernel and initrd into guest memory, writes tables.
    Load = 3,
    /// Devices, their host ends, their interrupts and doorbells.
    Devices = 4,
    /// vCPUs and their registers.
    Vcpus = 5,
    /// The record itself: the file, the kernel's trace events.
    Recorder = 6,
    /// Asks KVM what it offers of the processor.
    Processor = 7,
    /// Devices, vCPUs and the VM take over what was saved.
    State = 8,
    /// The guest's clocks go on.
    Clocks = 9,
    /// Fetches the pages of saved memory that the guest needs first, beside the others: how many that it reads, and that it writes
    /// to.
    Fetch = 10,
}

impl Step {
    /// All of them, by their numbers.
    pub const ALL: [Self; 11] = [
        Self::Open,
        Self::Memory,
        Self::Vm,
        Self::Load,
        Self::Devices,
        Self::Vcpus,
        Self::Recorder,
        Self::Processor,
        Self::State,
        Self::Clocks,
        Self::Fetch,
    ];

    /// That of this number.
    pub fn of(number: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }
}

/// A stopwatch for steps that follow each other. It stands still while the recorder is off.
#[derive(Debug)]
pub struct Steps(Option<(Track, u64)>);

impl Steps {
    /// The first step begins now. `thread` is the track's name.
    pub fn begin(recorder: &Recorder, thread: &str) -> Self {
        Self(recorder.is_on().then(|| (recorder.track(thread), clock::ticks())))
    }

    /// `step` is done, and the next one begins.
    pub fn done(&mut self, step: Step) {
        self.done_with(step, [0; 2]);
    }

    /// The same of a step that has `counts`.
    pub fn done_with(&mut self, step: Step, [first, second]: [u32; 2]) {
        if let Some((track, since)) = &mut self.0 {
            let now = clock::ticks();
            let (address, value) = (step as u64, now.wrapping_sub(*since));
            let kind = Kind::Step as u8;
            let guest = u64::from(second) << 32 | u64::from(first);
            track.write(Event { time: *since, guest, address, value, kind, ..Event::default() });
            *since = now;
        }
    }

    /// The next step begins only now.
    pub fn skip(&mut self) {
        if let Some((_, since)) = &mut self.0 {
            *since = clock::ticks();
        }
    }
}
