//! What the monitor did before the guest ran: its steps, as people read of them.

use serde::Serialize;

use super::Report;
use vmm_monitor::recorder::{Event, Kind, Step};

/// A step, and when. Times are nanoseconds since the start of the recording.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The track of the thread that did it.
    #[serde(skip)]
    pub track: u32,
    /// In a word or two.
    pub name: &'static str,
    /// In a sentence.
    pub what: &'static str,
    /// When it began.
    pub from: i64,
    /// How long it took.
    pub took: i64,
}

/// Steps that are told at most: a guest that is reset has them again.
const MOST: usize = 64;

fn words(step: Step) -> (&'static str, &'static str) {
    match step {
        Step::Open => ("open /dev/kvm", "the KVM device is opened and asked what it can"),
        Step::Memory => ("memory", "guest memory is reserved; its pages come when they are first touched"),
        Step::Vm => ("VM", "KVM makes a VM with its memory slots and interrupt controllers"),
        Step::Load => ("load", "kernel, initrd and tables are put into guest memory"),
        Step::Devices => ("devices", "devices are made and wired up: host ends, interrupts, doorbells"),
        Step::Vcpus => ("vCPUs", "vCPUs are made and their registers set"),
        Step::Processor => ("processor", "KVM says what of this host's processor a guest may have"),
        Step::State => ("state", "vCPUs, devices and the VM take over what was saved"),
        Step::Clocks => ("clocks", "the guest's clocks go on"),
        Step::Fetch => ("fetch", "pages that an earlier start touched are read and copied ahead"),
        Step::Recorder => ("this record", "its file, and the kernel asked for the exits inside KVM"),
    }
}

impl Report<'_> {
    /// The steps in order of time.
    pub(super) fn before(&self) -> Vec<Row> {
        let steps = self.trace.events.iter().filter(|(_, event)| event.kind() == Some(Kind::Step));
        let row = |(track, event): &(u32, Event)| {
            let (name, what) = words(Step::of(event.address)?);
            let ns = |ns: f64| ns.clamp(0.0, (1u64 << 52) as f64) as i64;
            let (from, took) = (ns(self.trace.since_start(event.time)), ns(self.trace.ns(event.value)));
            Some(Row { track: *track, name, what, from, took })
        };
        steps.filter_map(row).take(MOST).collect()
    }
}
