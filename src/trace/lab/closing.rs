//! What came of each lab, in sentences: only what the record of this run shows.

use super::facts::{Facts, Reasons};
use crate::devices;
use vmm_monitor::memory::layout;
use vmm_monitor::recorder::{Event, Kind};
use vmm_monitor::virtio::doorbells::EXITS;

const HLT: Reasons = &[12];
const CPUID: Reasons = &[10];
const MSR: Reasons = &[31, 32];
const CALL: Reasons = &[18];
/// A control register is read or written.
const CONTROL: Reasons = &[28];
/// The second page table has no entry, or not for this access.
const FAULT: Reasons = &[48, 49];
/// An interrupt of the host.
const EXTERNAL: Reasons = &[1];
/// BAR0 of function 00:01.0.
const BAR0: u64 = layout::PCI_ECAM + (1 << 15) + 0x10;
/// The local APIC, where hardware plays a part in it.
const APIC: Reasons = &[44, 45, 48, 49, 56];

pub fn pio(facts: &Facts<'_>) -> Vec<String> {
    let all = facts.exits(|kind, _| matches!(kind, Kind::PioIn | Kind::PioOut)).len();
    vec![
        format!(
            "{all} accesses to ports, {all} exits to the monitor: {} answered by the serial port, {} by nobody, and the last one \
             ended the run.",
            facts.answered("serial"),
            facts.answered("nobody")
        ),
        format!("On its other end the serial port gave {:?}.", facts.ran.output[0]),
    ]
}

pub fn rep_outs(facts: &Facts<'_>) -> Vec<String> {
    let serial = |kind: Kind| {
        let exits =
            facts.exits(|k, e| k == kind && devices::name(&facts.ran.trace.header, e) == Some("serial"));
        (exits.len(), exits.iter().map(|event| usize::from(event.count)).sum::<usize>())
    };
    let (outs, sent) = serial(Kind::PioOut);
    let (ins, got) = serial(Kind::PioIn);
    let trips = |count| if count == 1 { "one round trip".to_owned() } else { format!("{count} round trips") };
    vec![
        format!("REP OUTSB sent {sent} bytes in {} to the monitor.", trips(outs)),
        format!("REP INSB got {got} bytes in {}.", trips(ins)),
    ]
}

pub fn mmio(facts: &Facts<'_>) -> Vec<String> {
    let all = facts.exits(|kind, _| matches!(kind, Kind::MmioRead | Kind::MmioWrite));
    let memory = all.iter().filter(|event| event.address < 32 << 20).count();
    vec![
        format!(
            "{} accesses reached the monitor: {} were the virtio device's, {} nobody's. The load from 0x200000, where there is \
             memory, made {}.",
            all.len(),
            facts.answered("virtio-rng"),
            all.len() - facts.answered("virtio-rng"),
            if memory == 0 { "no exit to the monitor" } else { "an exit to the monitor as well" }
        ),
        facts.in_kvm("Memory that was touched for the first time", FAULT),
    ]
}

pub fn halt(facts: &Facts<'_>) -> Vec<String> {
    let mut text = Vec::new();
    if let [signal] = facts.exits(|kind, _| kind == Kind::Kicked)[..] {
        text.push(format!(
            "The vCPU's thread was in KVM_RUN for {} on end. The one thing that the monitor heard is the signal with which it took \
             the vCPU out.",
            facts.span(0, signal.guest)
        ));
    }
    text.push(facts.in_kvm("HLT", HLT));
    text
}

pub fn cpuid(facts: &Facts<'_>) -> Vec<String> {
    let mut text = Vec::new();
    if let [(_, present), (_, name), (_, number)] = facts.notes()[..] {
        let name = String::from_utf8_lossy(&(name as u32).to_le_bytes()).into_owned();
        let there = if present == 1 { "a hypervisor is there" } else { "there is no hypervisor" };
        text.push(format!(
            "The guest was told: {there}, its name begins with {name:?}, and this is processor {number}."
        ));
    }
    text.push(facts.in_kvm("CPUID", CPUID));
    text
}

pub fn msr(facts: &Facts<'_>) -> Vec<String> {
    let notes = facts.notes();
    let fault = match notes.last() {
        Some((_, 0x0d)) => {
            "The register that is none raised #GP in the guest, whose handler noted its vector, 0xd."
        }
        _ => "The register that is none did not lead to the guest's #GP handler.",
    };
    vec![facts.in_kvm("RDMSR and WRMSR", MSR), fault.to_owned()]
}

pub fn hypercall(facts: &Facts<'_>) -> Vec<String> {
    let notes = facts.notes();
    let mut text = vec![match notes[..] {
        [(_, poll), (_, unknown)] => {
            format!(
                "Both calls came back: with {poll}, and for nobody's number with {}.",
                unknown as u32 as i32
            )
        }
        _ => format!(
            "Of two calls {} came back: the guest never got past the instruction.",
            if notes.is_empty() { "none" } else { "one" }
        ),
    }];
    text.push(facts.in_kvm("The hypercalls", CALL));
    text
}

pub fn longmode(facts: &Facts<'_>) -> Vec<String> {
    let notes = facts.exits(|kind, event| kind == Kind::PioOut && event.address == 0x80);
    let sizes =
        notes.iter().map(|event| facts.report.code_size(event).map_or("?".to_owned(), |n| n.to_string()));
    vec![
        format!("The notes came from code of {} bits.", sizes.collect::<Vec<_>>().join(", ")),
        facts.in_kvm("The writes to control registers", CONTROL),
        facts.in_kvm("EFER", MSR),
    ]
}

pub fn interrupt(facts: &Facts<'_>) -> Vec<String> {
    let mut text = Vec::new();
    if let (Some((pressed, _)), Some((noted, _))) = (facts.ran.acts.first(), facts.notes().first()) {
        text.push(format!(
            "From the write to the eventfd until the guest's handler had its note out: {}.",
            facts.span(*pressed, *noted)
        ));
    }
    text.push(facts.in_kvm("HLT", HLT));
    text.push(facts.in_kvm("The local APIC and fresh memory", APIC));
    text
}

pub fn apic_timer(facts: &Facts<'_>) -> Vec<String> {
    let mut text = Vec::new();
    if let [(set, _), (rang, _)] = facts.notes()[..] {
        text.push(format!("20 ms were set; from one note to the other it was {}.", facts.span(set, rang)));
    }
    text.push(facts.in_kvm("HLT", HLT));
    text.push(facts.in_kvm("The local APIC and fresh memory", APIC));
    text
}

pub fn triple_fault(facts: &Facts<'_>) -> Vec<String> {
    let shutdowns = facts.exits(|kind, _| kind == Kind::Shutdown).len();
    vec![match shutdowns {
        1 => "The shutdown reached the monitor as one exit. None of the three exceptions before it did."
            .to_owned(),
        _ => "No shutdown reached the monitor.".to_owned(),
    }]
}

pub fn sipi(facts: &Facts<'_>) -> Vec<String> {
    let notes = facts.exits(|kind, event| kind == Kind::PioOut && event.address == 0x80);
    let by = |number: u64| notes.iter().find(|event| event.value == number);
    let mut text = Vec::new();
    if let (Some(second), Some(_)) = (by(1), by(2)) {
        let size = facts.report.code_size(second).map_or("?".to_owned(), |bits| bits.to_string());
        text.push(format!("vCPU 1 woke in code of {size} bits, and vCPU 0 saw its sign."));
    }
    text.push(facts.in_kvm("The writes to the interrupt command register, and fresh memory", APIC));
    text
}

pub fn doorbell(facts: &Facts<'_>) -> Vec<String> {
    let trace = &facts.ran.trace;
    let rings = |device: &str| {
        let base =
            trace.header.addresses.iter().find(|range| range.name == device).map(|range| range.base + 0x50);
        facts.exits(|kind, event| kind == Kind::MmioWrite && Some(event.address) == base)
    };
    // When, and how many.
    let served = |device: &str| {
        let of = |track: &u32| trace.tracks.get(track).is_some_and(|name| name == device);
        let turns =
            trace.events.iter().filter(|(track, event)| of(track) && event.kind() == Some(Kind::Queue));
        turns.map(|(_, event)| (event.time, event.value)).collect::<Vec<_>>()
    };
    let all = |turns: &[(u64, u64)]| turns.iter().map(|(_, count)| count).sum::<u64>();
    let (entropy, console) = (served("virtio-rng"), served("virtio-console"));
    let kicks = rings("virtio-console");
    let during = |time: u64| {
        kicks.iter().any(|exit| (exit.time..=exit.time + u64::from(exit.handled)).contains(&time))
    };
    let inside: Vec<_> = console.iter().copied().filter(|(time, _)| during(*time)).collect();
    vec![
        format!(
            "The entropy source's doorbell was rung {} times and made {} exits to the monitor. Its worker completed {} requests.",
            EXITS + 2,
            rings("virtio-rng").len(),
            all(&entropy)
        ),
        format!(
            "The console's was rung twice and made {} exits to the monitor, for {} requests. The console shows {:?}.",
            kicks.len(),
            all(&console),
            facts.ran.output[1]
        ),
        format!(
            "Within those exits the vCPU's own thread served {} of them; the worker finds the first if it is quicker.",
            all(&inside)
        ),
        facts.in_kvm("The entropy source's doorbell, and fresh memory", FAULT),
    ]
}

pub fn msix(facts: &Facts<'_>) -> Vec<String> {
    // What reads back of all ones, without the bits that are no address.
    let sized = facts.exits(|kind, event| kind == Kind::MmioRead && event.address == BAR0);
    let size = |event: &&Event| (!(event.value as u32 & !0xf)).wrapping_add(1) >> 10;
    let mut text = Vec::new();
    if let Some(size) = sized.get(1).map(size) {
        text.push(format!("The function's memory is {size} KiB large."));
    }
    // The interrupt's own record is made once the worker is back from the eventfd, when the vector may be there already.
    let mut events = facts.ran.trace.events.iter().map(|(_, event)| event);
    let served = events.find(|event| event.kind() == Some(Kind::Queue) && event.value > 0);
    if let (Some(served), [(noted, vector), ..]) = (served, &facts.notes()[..]) {
        let span = facts.span(served.time, *noted);
        text.push(format!(
            "The device's worker raised message 1, and it came as vector {vector:#x}. From the worker's turn to the handler's note: {span}."
        ));
        let between = |event: &&&Event| (served.time..=*noted).contains(&event.time);
        text.push(match (facts.traced(), facts.inside(EXTERNAL).iter().filter(between).count()) {
            (false, _) => "Whether KVM posted it or took the processor out of the guest for it was not recorded here.".to_owned(),
            (true, 0) => "No interrupt of the host took the processor out of the guest for it: it was posted, or the processor was outside just then.".to_owned(),
            (true, count) => format!(
                "Exits for interrupts of the host meanwhile: {count}. With one of them KVM took the processor out of the guest, and \
                 gave it the vector with the next entry."
            ),
        });
    }
    text.push(facts.in_kvm("The local APIC and fresh memory", APIC));
    text
}

pub fn dirty_log(facts: &Facts<'_>) -> Vec<String> {
    let mut text =
        vec![format!("The log was fetched {} times, and began anew each time.", facts.ran.acts.len())];
    // The page that labs lie in.
    if facts.ran.acts.iter().any(|(_, act)| act.contains("0x1000000")) {
        text.push(
            "The guest's own code, at 0x1000000, is in it though the guest never wrote there: KVM gave it that page, when it was \
             first touched, with the right to write, and could not know from then on."
                .to_owned(),
        );
    }
    text.push(facts.in_kvm("Writes to pages that were not to be written to yet, and fresh memory", FAULT));
    text
}
