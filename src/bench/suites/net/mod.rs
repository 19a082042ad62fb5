//! What a network costs a program inside: TCP between it and the host, through each monitor's networks and a container's.

mod contender;
mod counted;
mod network;
mod peer;

use super::super::host::Host;
use super::super::measure::{self, Absent, Contender, Plan, Quantity};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::{Place, Setting};
use contender::{Monitor, Networked};
use network::Kind;

const fn quantity(name: &'static str, unit: Unit, better: Better) -> Quantity {
    Quantity { name, unit, better }
}

/// In the order of [`peer::Values`].
const QUANTITIES: [Quantity; 7] = [
    quantity("TCP from inside", Unit::MebibytesPerSecond, Better::Higher),
    quantity("TCP to the inside", Unit::MebibytesPerSecond, Better::Higher),
    quantity("round trip, median", Unit::Nanoseconds, Better::Lower),
    quantity("round trip, 99th percentile", Unit::Nanoseconds, Better::Lower),
    quantity("requests, a connection each", Unit::PerSecond, Better::Higher),
    quantity("processor time per GB from inside", Unit::Milliseconds, Better::Lower),
    quantity("processor time per GB to the inside", Unit::Milliseconds, Better::Lower),
];

/// On a clock that counts instructions, in the order of [`counted::Counts`].
const COUNTED: [Quantity; 4] = [
    quantity("instructions per KiB from inside", Unit::Instructions, Better::Lower),
    quantity("instructions per KiB to the inside", Unit::Instructions, Better::Lower),
    quantity("instructions per round trip", Unit::Instructions, Better::Lower),
    quantity("instructions per request, a connection each", Unit::Instructions, Better::Lower),
];

/// Who takes part: the honest rival first, then ours beside each other's with the same back end.
const CONTENDERS: [(&str, Monitor, Kind, bool); 11] = [
    ("container: veth", Monitor::Process, Kind::Veth, false),
    ("vmm: user", Monitor::Vmm, Kind::User, false),
    ("QEMU: user", Monitor::Qemu, Kind::User, false),
    ("vmm: passt", Monitor::Vmm, Kind::Passt, false),
    ("QEMU: passt", Monitor::Qemu, Kind::Passt, false),
    ("vmm: tap", Monitor::Vmm, Kind::Tap, false),
    ("QEMU: tap", Monitor::Qemu, Kind::Tap, false),
    ("Firecracker: tap", Monitor::Firecracker, Kind::Tap, false),
    ("Cloud Hypervisor: tap", Monitor::CloudHypervisor, Kind::Tap, false),
    ("vmm: tap, vhost", Monitor::Vmm, Kind::Tap, true),
    ("QEMU: tap, vhost", Monitor::Qemu, Kind::Tap, true),
];

/// The suite.
///
/// # Errors
/// Nobody can take part here.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let (mut contenders, mut absent): (Vec<Box<dyn Contender + '_>>, Vec<Absent>) = Default::default();
    for (number, who) in (1..).zip(CONTENDERS) {
        match Networked::new(who, number, setting) {
            Ok(contender) => contenders.push(Box::new(contender)),
            Err(why) => absent.push(Absent { name: who.0.to_owned(), command: format!("{who:?}"), why }),
        }
    }
    let quantities: &[Quantity] = if setting.repeatable_clock { &COUNTED } else { &QUANTITIES };
    let (contenders, figures) = measure::series(&mut contenders, &absent, quantities, plan, progress);
    Ok(Suite {
        name: "net".to_owned(),
        title: "Network: container, VM, other monitors".to_owned(),
        host,
        seed: plan.seed,
        method: method(setting.repeatable_clock),
        contenders,
        figures,
    })
}

fn method(repeatable: bool) -> Vec<String> {
    let amounts = if repeatable {
        "Each sample is a process, or a VM, that connects to the host four times: sends 8 MiB, receives as much, echoes 500 single bytes, \
         and makes 100 requests of 64 bytes with answers of 1 KiB, a connection each; 2 MiB, 20 bytes and 20 requests before those are not \
         counted. To the inside: until all has been read there."
    } else {
        "Each sample is a process, or a VM, that connects to the host four times: sends for a second, receives for a second, echoes \
         2000 single bytes (or for a second), and makes requests of 64 bytes with answers of 1 KiB, a connection each, for a second. \
         The host has the clock: starts and ends are not in it. To the inside: until all has been read there."
    };
    let clock = if repeatable {
        "The host has one processor, and a nanosecond of its clock is an instruction, of the guest, of the monitor or of the host's \
         kernel: all are counted, the host's end of the traffic too. What is not is the time of a thread that runs when nobody else wants \
         to; while there is one, KVM does not poll for a halted guest."
    } else {
        "Processor time is that of all of the host's processors while the bytes went, the guest's and the kernel's included, per 10^9 bytes."
    };
    let guests = "All guests: the tuned kernel, one CPU, 256 MiB, one pair of queues, the monitor's own MTU and offloads.";
    [amounts, guests, clock].map(str::to_owned).into_iter().chain(Place::tick()).collect()
}
