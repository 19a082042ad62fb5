//! [`Facts`]: what a lab's record says, for the sentences at its end.

use std::collections::{BTreeMap, BTreeSet};

use super::run::Ran;
use crate::devices;
use crate::reasons::Both;
use crate::report::{Report, duration};
use vmm_monitor::recorder::{Event, Kind};

/// The port that nobody answers, which the labs' guests take notes on (`guest/labs/lab.inc`).
const NOTE: u64 = 0x80;

/// A run, and its report.
pub struct Facts<'a> {
    /// What came of it.
    pub ran: &'a Ran,
    /// How it is told.
    pub report: &'a Report<'a>,
}

/// Exit reasons of hardware, by VT-x's numbers. AMD-V's codes follow from [`PAIRS`](crate::reasons::PAIRS).
pub type Reasons = &'static [u16];

impl Facts<'_> {
    /// Whether the exits inside KVM are in the record.
    pub fn traced(&self) -> bool {
        self.ran.trace.header.in_kernel.starts_with("tracefs")
    }

    /// The exits that reached the monitor and pass `test`, in order.
    pub fn exits(&self, test: impl Fn(Kind, &Event) -> bool) -> Vec<&Event> {
        let events = self.ran.trace.events.iter().map(|(_, event)| event);
        events.filter(|event| event.kind().is_some_and(|kind| kind.is_exit() && test(kind, event))).collect()
    }

    /// How many exits `device` answered.
    pub fn answered(&self, device: &str) -> usize {
        self.exits(|_, event| devices::name(&self.ran.trace.header, event) == Some(device)).len()
    }

    /// What the guest noted: times in ticks, and values.
    pub fn notes(&self) -> Vec<(u64, u64)> {
        let notes = self.exits(|kind, event| kind == Kind::PioOut && event.address == NOTE);
        notes.into_iter().map(|event| (event.time, event.value)).collect()
    }

    /// The exits inside KVM for one of `reasons`.
    pub fn inside(&self, reasons: Reasons) -> Vec<&Event> {
        let events = self.ran.trace.events.iter().map(|(_, event)| event);
        let inside = events.filter(|event| event.kind() == Some(Kind::InKernel));
        inside.filter(|e| self.report.reason_in_kvm(e).is_some_and(|own| own.is_one_of(reasons))).collect()
    }

    /// Who answered `what`, which hardware would leave the guest for by `reasons`, and which never reaches the monitor.
    pub fn in_kvm(&self, what: &str, reasons: Reasons) -> String {
        if !self.traced() {
            return format!("{what}: nothing reached the monitor, and what KVM did was not recorded here.");
        }
        let inside = self.inside(reasons);
        let both = |event: &&Event| self.report.hardware(Kind::InKernel, event);
        // By the host's reason: all that the other vendor has for it here.
        let mut all: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for both in inside.iter().filter_map(both) {
            all.entry(both.own).or_default().extend(both.other);
        }
        let all = all.into_iter().map(|(own, other)| Both { own, other: other.into_iter().collect() });
        let names = all.map(|both| both.text(self.report.shown)).collect::<Vec<_>>().join("; ");
        let times = match inside.len() {
            0 => {
                return format!(
                    "{what}: no exit in the kernel's trace; the processor handled it in the guest."
                );
            }
            1 => "one exit".to_owned(),
            count => format!("{count} exits"),
        };
        format!(
            "{what}: {times} ({names}), answered inside KVM; the monitor's vCPU thread saw nothing of it."
        )
    }

    /// A span between two times in ticks.
    pub fn span(&self, from: u64, to: u64) -> String {
        duration(self.ran.trace.ns(to.saturating_sub(from)))
    }
}
