//! What virtualization costs a program that lives in memory: bandwidth, and the latency of loads that miss cache and TLB.

use super::super::measure::{Plan, Quantity};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::{Setting, Size};
use super::super::work::{self, Step};
use super::places::{self, Measured};

const TRIAD: Quantity =
    Quantity { name: "triad bandwidth", unit: Unit::MebibytesPerSecond, better: Better::Higher };
const CHASE: Quantity = Quantity { name: "random access", unit: Unit::Nanoseconds, better: Better::Lower };

/// The suite.
///
/// # Errors
/// The work cannot even be done natively.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let rounds = places::enough(setting, 1, &Step::Triad)?;
    let steps = places::enough(setting, 20_000, &Step::Chase)?;
    let work = || {
        let bandwidth = |step: &Step, seconds: f64| match step {
            Step::Triad(rounds) => (rounds * work::TRIAD_BYTES) as f64 / f64::from(1 << 20) / seconds,
            _ => f64::NAN,
        };
        let latency = |step: &Step, seconds: f64| match step {
            Step::Chase(steps) => seconds * 1e9 / *steps as f64,
            _ => f64::NAN,
        };
        vec![
            Measured { step: Step::Triad(rounds), quantity: TRIAD, value: bandwidth },
            Measured { step: Step::Chase(steps), quantity: CHASE, value: latency },
        ]
    };
    let method = vec![
        format!(
            "Bandwidth: STREAM's triad, {rounds} times over three arrays of 32 MiB, counted as two reads and a write. Random \
             access: {steps} loads, each of which says where the next is, all over 64 MiB."
        ),
        "All memory is touched before the time starts. 4 KiB pages, unless the host's or the guest's kernel makes larger ones by \
         itself."
            .to_owned(),
        places::CLOCK.to_owned(),
    ];
    let titles = ("mem", "Memory: native, container, VM");
    places::suite(titles, setting, Size { cpus: 1, mib: 512 }, &work, method, plan, progress)
}
