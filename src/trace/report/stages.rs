//! What happened when, in a boot: which part of the guest ran, and when each device was first used.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::Serialize;

use super::Report;
use crate::devices;
use vmm_monitor::recorder::{Event, Kind};

/// Marks that are shown one by one.
const MARKS: usize = 64;
/// Moments of a device's use that are told apart.
const MOMENTS: i64 = 2000;
/// Linux's half of the address space.
const KERNEL: u64 = 0xffff_8000_0000_0000;

/// What the device is called that firmware asks, and where firmware lies.
const FW_CFG: &str = "fw-cfg";
const ROM: Range<u64> = 0xff00_0000..0x1_0000_0000;

/// Where the program lies that finds a kernel on a disk (`firmware/disk/src/link.ld`); the kernel does not.
const DISK: Range<u64> = 0x10_0000..0x20_0000;

/// A kernel's image is not larger, as it lies in memory at first.
const IMAGE: u64 = 32 << 20;

/// A stretch of a run, up to the next. Times are nanoseconds since the start of the recording.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Phase {
    name: &'static str,
    from: i64,
    how: &'static str,
}

/// Something that was first used at some moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Use {
    name: String,
    first: i64,
    last: i64,
    count: usize,
    /// What was done first, as a sentence.
    sentence: String,
    /// Exits before it: to the monitor, in KVM.
    before: [usize; 2],
    /// The number of its event.
    number: usize,
    /// Some of the moments.
    at: Vec<i64>,
}

/// Sees the events in order of time.
#[derive(Debug, Default)]
pub struct Stages {
    length: i64,
    before: [usize; 2],
    entered: BTreeSet<u32>,
    /// Where the guest began.
    low: Option<u64>,
    /// vCPUs that have been in the kernel's half.
    high: BTreeSet<u32>,
    phases: Vec<Phase>,
    uses: Vec<Use>,
    marks: usize,
    /// Its sentence is made at the end only.
    last: Option<(Kind, Event, Use)>,
}

impl Stages {
    /// Of a recording that ends so many nanoseconds after its start.
    pub fn new(length: i64) -> Self {
        Self { length, ..Self::default() }
    }

    /// The event of that number at `t`, `guest` nanoseconds after the guest was entered, with the guest at `rip`.
    pub fn see(
        &mut self,
        report: &Report<'_>,
        (number, t, guest): (usize, i64, i64),
        track: u32,
        event: &Event,
        rip: u64,
    ) {
        let Some(kind) = event.kind() else { return };
        if !kind.is_exit() && kind != Kind::InKernel {
            return;
        }
        if self.phases.is_empty() {
            self.phases.push(Phase { name: "monitor", from: 0, how: "start of the recording" });
            let from = t.saturating_sub(guest);
            self.phases.push(Phase { name: "guest", from, how: "first entry, as its first exit tells" });
        }
        let moment = |name: String, sentence: String, before| Use {
            name,
            first: t,
            last: t,
            count: 1,
            sentence,
            before,
            number,
            at: vec![t],
        };
        if self.entered.insert(track) {
            let name = report.track(track).to_owned();
            self.uses.push(moment(name, "its first exit".to_owned(), self.before));
        }
        self.phase(track, t, rip);
        if kind == Kind::InKernel {
            self.before[1] += 1;
            return;
        }
        let device = devices::name(&report.trace.header, event);
        let until = || t.saturating_add(report.trace.ns(event.handled.into()) as i64);
        if device.is_some_and(|name| name == FW_CFG) {
            self.loader("firmware", "from the reset vector to the last that it asks fw_cfg", until());
        } else if report.trace.header.boots_disk && self.high.is_empty() && DISK.contains(&rip) {
            self.loader("disk", "finds a kernel on a disk and loads it: to the program's last exit", until());
        }
        let told = || devices::tell(&report.trace.header, event).unwrap_or_default();
        if let Some(name) = device {
            let mark = name == "boot-marks" && kind == Kind::PioOut;
            let known = self.uses.iter_mut().find(|known| known.name == name && !mark);
            if let Some(known) = known {
                (known.last, known.count) = (t, known.count + 1);
                if t.saturating_sub(known.at.last().copied().unwrap_or(0)) > self.length / MOMENTS {
                    known.at.push(t);
                }
            } else if mark && self.marks < MARKS {
                self.marks += 1;
                self.uses.push(moment(format!("mark {:#x}", event.value), told(), self.before));
            } else if !mark {
                self.uses.push(moment(name.to_owned(), told(), self.before));
            }
        }
        // That the others are called back is not how a run ends.
        if kind != Kind::Kicked {
            self.last = Some((kind, *event, moment(String::new(), String::new(), self.before)));
        }
        self.before[0] += 1;
    }

    /// What ran until now was `name`, which is not yet the kernel: nobody else makes such an exit.
    fn loader(&mut self, name: &'static str, how: &'static str, until: i64) {
        let [.., before, guest] = &mut self.phases[..] else { return };
        if guest.name != "guest" {
            return;
        }
        // The kernel's place is another.
        self.low = None;
        if before.name == name {
            guest.from = until;
            return;
        }
        (guest.name, guest.how) = (name, how);
        self.phases.push(Phase { name: "guest", from: until, how: "the kernel, or what loads it, begins" });
    }

    /// Where a kernel of Linux's making is: at low addresses first, in its own half then, in a program's half at last.
    fn phase(&mut self, track: u32, t: i64, rip: u64) {
        let last = self.phases.last().map(|phase| phase.name);
        let by_firmware = self.phases.iter().any(|phase| phase.name == "firmware");
        if by_firmware && self.low.is_none() && ROM.contains(&rip) {
            return;
        }
        let low = *self.low.get_or_insert(rip);
        // A kernel goes back there while it sets itself up, and each of its processors begins there.
        let early = rip < 1 << 20 || (low..low.saturating_add(IMAGE)).contains(&(rip | 0xf_ffff));
        let (name, how) = match last {
            _ if rip >= KERNEL && self.high.insert(track) && last == Some("guest") => {
                ("kernel", "first exit from the kernel's half of the address space")
            }
            Some("kernel") if !early && rip != 0 && rip < KERNEL && self.high.contains(&track) => {
                ("programs", "first exit from a program's half of the address space: init runs")
            }
            _ => return,
        };
        self.phases.push(Phase { name, from: t, how });
    }

    /// All of it, once the last event was seen; the last exit is the end of the run, or near it.
    pub fn end(mut self, report: &Report<'_>) -> (Vec<Phase>, Vec<Use>) {
        self.uses.extend(self.last.map(|(kind, event, last)| {
            let told = devices::tell(&report.trace.header, &event);
            let sentence = told.unwrap_or_else(|| super::line::plain_name(kind).to_owned());
            Use { name: "last exit".to_owned(), sentence, ..last }
        }));
        (self.phases, self.uses)
    }
}
