//! What the page knows of a trace: the events as columns of numbers, each string once, and what was counted of all of them.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::before;
use super::first_touches::FirstTouches;
use super::group::{Group, Row, STEPS, costliest};
use super::line::{monitor, plain_name, worker};
use super::meaning::{self, Class};
use super::stages::{Phase, Stages, Use};
use super::stats::COUNTERS;
use super::{Filter, Report};
use crate::reasons::{Both, Shown};
use crate::{devices, reasons};
use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::recorder::registers::{self, Collector};
use vmm_monitor::recorder::{Event, Kind, Registers};

/// Events that are told one by one. Of what comes after them, the page has counts and times.
const DETAIL: usize = 200_000;
/// Steps of time in which events are counted for the picture of the whole.
const BINS: usize = 600;
/// Events whose registers the page has.
const REGISTERS: usize = 20_000;

/// All that the page knows. Times are nanoseconds since the start of the recording.
#[derive(Debug, Default, Serialize)]
pub struct Data {
    run: Run,
    /// Where the last event ends.
    end: i64,
    /// Events that pass the filter: to the monitor, in KVM, of workers.
    totals: [usize; 3],
    tracks: Vec<Track>,
    reasons: Vec<Reason>,
    density: Vec<[u32; Class::COUNT]>,
    by_reason: Vec<Row>,
    by_device: Vec<Row>,
    by_symbol: Vec<Row>,
    before: Vec<before::Row>,
    touches: Option<FirstTouches>,
    phases: Vec<Phase>,
    uses: Vec<Use>,
    strings: Vec<String>,
    events: Columns,
    registers: Sets,
}

/// The registers of those events that have them.
#[derive(Debug, Default, Serialize)]
struct Sets {
    names: Vec<&'static str>,
    /// Numbers of the events, from 0, in order.
    events: Vec<usize>,
    /// As hexadecimal numbers: a script's own do not hold 64 bits.
    values: Vec<Vec<String>>,
}

impl Sets {
    fn add(&mut self, event: usize, registers: &Registers) {
        if self.events.len() < REGISTERS {
            let all = registers.general.iter().chain(registers.system.iter().flatten());
            self.events.push(event);
            self.values.push(all.map(|value| format!("{value:x}")).collect());
        }
    }
}

#[derive(Debug, Default, Serialize)]
struct Run {
    vmm: String,
    kernel: Option<String>,
    cmdline: Option<String>,
    vendor: String,
    amd: bool,
    in_kernel: String,
    has_kernel: bool,
    symbols: Option<String>,
    lost: Vec<(String, u64)>,
    /// Why the end is missing, if it is.
    stopped: Option<String>,
    /// KVM's own, by vCPU.
    counters: BTreeMap<String, Vec<(&'static str, u64)>>,
    /// Not all events were asked for.
    filtered: bool,
    steps: usize,
}

/// A vCPU or a worker, with where its time went.
#[derive(Debug, Default, Serialize)]
struct Track {
    name: String,
    vcpu: bool,
    from: i64,
    to: i64,
    guest: f64,
    kvm: f64,
    halted: f64,
    monitor: f64,
    /// To the monitor, in KVM; of a worker: all.
    counts: [usize; 2],
}

/// Why events happened, told once for all of them.
#[derive(Debug, Serialize)]
struct Reason {
    name: String,
    class: u8,
    /// 0: to the monitor, 1: in KVM, 2: a worker's.
    place: u8,
    vtx: String,
    svm: String,
    what: &'static str,
    kvm: &'static str,
    exit: &'static str,
    /// Of an exit in KVM: what the processor says that the trace was made on.
    #[serde(skip)]
    own: Option<reasons::Reason>,
}

/// Where in the guest an event came from: numbers of strings.
#[derive(Debug)]
struct Place<'a> {
    address: u64,
    symbol: &'a str,
    name: usize,
    rip: usize,
    code: usize,
}

/// The events: a column for each property. `t` is the difference to the event before.
#[derive(Debug, Default, Serialize)]
struct Columns {
    t: Vec<i64>,
    /// Handling time.
    took: Vec<i64>,
    /// Time in the guest before.
    guest: Vec<i64>,
    track: Vec<u32>,
    reason: Vec<usize>,
    // Of the strings; 0 is none.
    place: Vec<usize>,
    rip: Vec<usize>,
    code: Vec<usize>,
    detail: Vec<usize>,
    answer: Vec<usize>,
    device: Vec<usize>,
}

/// The strings, each once.
#[derive(Debug)]
struct Strings(HashMap<String, usize>, Vec<String>);

impl Strings {
    fn add(&mut self, text: String) -> usize {
        if let Some(known) = self.0.get(&text) {
            return *known;
        }
        self.1.push(text.clone());
        self.0.insert(text, self.1.len() - 1);
        self.1.len() - 1
    }
}

impl Report<'_> {
    /// Of everything that passes `filter`.
    pub(super) fn data(&self, filter: &Filter) -> Data {
        let header = &self.trace.header;
        let mut strings = Strings(HashMap::new(), Vec::new());
        strings.add(String::new());
        let mut data = Data { run: self.run(filter), ..Data::default() };
        let (mut numbers, mut known) = (BTreeMap::new(), HashMap::new());
        let (mut by_device, mut by_symbol) = (BTreeMap::<_, Group>::new(), BTreeMap::<_, Group>::new());
        let mut by_reason: BTreeMap<usize, Group> = BTreeMap::new();
        let mut places = HashMap::new();
        let last = |(_, event): &(u32, Event)| self.at(event).saturating_add(self.took(event));
        data.end = self.trace.events.iter().map(last).max().unwrap_or(0).max(1);
        let mut stages = Stages::new(data.end);
        let mut density = vec![[0u32; Class::COUNT]; BINS];
        let mut number = 0;
        let mut before = 0;
        // By track: where its last event ended.
        let mut ended: BTreeMap<u32, i64> = BTreeMap::new();
        let mut seen: BTreeMap<u32, Collector> = BTreeMap::new();
        data.registers.names = registers::NAMES.into_iter().chain(registers::SYSTEM_NAMES).collect();
        for (track, event) in &self.trace.events {
            if event.kind() == Some(Kind::Registers) {
                seen.entry(*track).or_default().add(event);
            }
            let Some(kind) = event.kind().filter(|kind| !kind.is_detail()) else { continue };
            let (t, took) = (self.at(event), self.took(event));
            let place = place_of(kind);
            let away = rounded(self.trace.ns(event.guest));
            let mut guest = match (ended.insert(*track, t.saturating_add(took)), place) {
                (_, 2) => 0,
                (Some(end), 0) => t.saturating_sub(end).clamp(0, away.max(0)),
                (Some(end), _) => t.saturating_sub(end).max(0),
                // Another processor waits in KVM first, until the guest starts it.
                (None, 0) if self.track(*track) == "vcpu0" => away,
                (None, _) => 0,
            };
            // Nothing was before the recording.
            guest = guest.min(t.max(0));
            let passes = filter.passes(self, *track, event);
            let slot = *numbers.entry(*track).or_insert_with(|| {
                let name = self.track(*track).to_owned();
                let from = t.saturating_sub(guest).max(0);
                data.tracks.push(Track { name, vcpu: place < 2, from, ..Track::default() });
                data.tracks.len() - 1
            });
            let reason =
                *known.entry((event.kind, if place == 1 { event.count } else { 0 })).or_insert_with(|| {
                    data.reasons.push(self.reason_of(kind, event));
                    data.reasons.len() - 1
                });
            let own = &mut data.tracks[slot];
            own.to = t.saturating_add(took);
            own.guest += guest as f64;
            let halted = place == 1 && is_halt(&data.reasons[reason]);
            *(match place {
                1 if halted => &mut own.halted,
                1 => &mut own.kvm,
                _ => &mut own.monitor,
            }) += took as f64;
            let at = places
                .entry((event.rip, event.kind, event.size))
                .or_insert_with(|| self.place(place, event, &mut strings));
            stages.see(self, (number + 1, t, guest), *track, event, at.address);
            if !passes {
                continue;
            }
            number += 1;
            own.counts[usize::from(place == 1)] += 1;
            data.totals[usize::from(place)] += 1;
            let bin = ((t.max(0) as f64 / data.end as f64) * BINS as f64) as usize;
            density[bin.min(BINS - 1)][usize::from(data.reasons[reason].class)] += 1;
            let side = usize::from(place == 1);
            by_reason.entry(reason).or_default().add(side, took);
            let device = match place {
                0 => devices::name(header, event),
                1 => None,
                _ => Some(self.track(*track)),
            };
            if let Some(device) = device.filter(|_| place == 0) {
                by_device.entry(device).or_default().add(side, took);
            }
            if place < 2 && !halted {
                by_symbol.entry(at.symbol).or_default().add(side, took);
            }
            if number > DETAIL {
                continue;
            }
            if let Some(registers) =
                seen.get(track).and_then(|seen| seen.at(event.time)).filter(|_| place == 0)
            {
                data.registers.add(number - 1, &registers);
            }
            let columns = &mut data.events;
            columns.t.push(t.saturating_sub(std::mem::replace(&mut before, t)));
            columns.took.push(took);
            columns.guest.push(guest);
            columns.track.push(slot as u32);
            columns.reason.push(reason);
            columns.place.push(at.name);
            columns.rip.push(at.rip);
            columns.code.push(at.code);
            columns.detail.push(
                strings.add(match place {
                    1 => data.reasons[reason]
                        .own
                        .map_or_else(String::new, |own| meaning::detail(own, event.address, event.value)),
                    _ => reasons::qualification(event).unwrap_or_default(),
                }),
            );
            columns.answer.push(strings.add(match place {
                0 => devices::tell(header, event).unwrap_or_else(|| monitor(kind).to_owned()),
                1 => String::new(),
                _ => worker(kind, event),
            }));
            columns.device.push(strings.add(device.unwrap_or_default().to_owned()));
        }
        data.density = density;
        let name = |reason: usize| data.reasons[reason].name.clone();
        data.by_reason = by_reason.into_iter().map(|(at, group)| group.row(name(at), Some(at))).collect();
        (data.by_device, data.by_symbol) = (costliest(by_device), costliest(by_symbol));
        (data.phases, data.uses) = stages.end(self);
        data.before = self.before();
        data.touches = self.first_touches();
        data.strings = strings.1;
        data
    }

    fn run(&self, filter: &Filter) -> Run {
        let header = &self.trace.header;
        let lost = self.trace.dropped.iter().filter(|(_, count)| **count > 0);
        Run {
            vmm: header.vmm.clone(),
            kernel: header.kernel.as_ref().map(|path| path.display().to_string()),
            cmdline: header.cmdline.clone(),
            vendor: header.vendor.clone(),
            amd: self.vendor() == Vendor::Amd,
            in_kernel: header.in_kernel.clone(),
            has_kernel: self.trace.events.iter().any(|(_, event)| event.kind() == Some(Kind::InKernel)),
            symbols: self.symbols.source.clone(),
            stopped: self.trace.stopped.clone(),
            lost: lost.map(|(track, count)| (self.track(*track).to_owned(), *count)).collect(),
            counters: self.trace.counters.iter().map(|(vcpu, all)| (vcpu.clone(), counted(all))).collect(),
            filtered: filter.is_set(),
            steps: STEPS,
        }
    }

    fn at(&self, event: &Event) -> i64 {
        rounded(self.trace.since_start(event.time))
    }

    fn took(&self, event: &Event) -> i64 {
        rounded(self.trace.ns(event.handled.into()))
    }

    fn reason_of(&self, kind: Kind, event: &Event) -> Reason {
        let text = |class: Class, place, name: &str, exit| Reason {
            name: name.to_owned(),
            class: class as u8,
            place,
            vtx: String::new(),
            svm: String::new(),
            what: meaning::of_kind(kind),
            kvm: "",
            exit,
            own: None,
        };
        if kind == Kind::InKernel {
            let name = self.trace.reasons.get(&event.count.into()).map_or("?", String::as_str);
            let Some(own) = self.reason_in_kvm(event) else { return text(Class::Kvm, 1, name, "") };
            let (class, what, kvm) =
                meaning::of(own).map_or((Class::Kvm, "", ""), |found| (found.class, found.what, found.kvm));
            let name = match own.vendor {
                Vendor::Intel => reasons::vtx_name(own.number).to_owned(),
                Vendor::Amd => reasons::svm_name(own.number),
            };
            let [vtx, svm] = self.names(&Both::of(own));
            return Reason { vtx, svm, what, kvm, own: Some(own), ..text(class, 1, &name, "") };
        }
        let (class, exit) = match kind {
            Kind::PioIn | Kind::PioOut => (Class::Port, "KVM_EXIT_IO"),
            Kind::MmioRead | Kind::MmioWrite => (Class::Mmio, "KVM_EXIT_MMIO"),
            Kind::Queue | Kind::Source | Kind::Frame => (Class::Worker, ""),
            Kind::Interrupt => (Class::Notify, ""),
            Kind::Halt => (Class::Monitor, "KVM_EXIT_HLT"),
            Kind::Shutdown => (Class::Monitor, "KVM_EXIT_SHUTDOWN"),
            Kind::SystemEvent => (Class::Monitor, "KVM_EXIT_SYSTEM_EVENT"),
            Kind::FailEntry => (Class::Monitor, "KVM_EXIT_FAIL_ENTRY"),
            Kind::InternalError => (Class::Monitor, "KVM_EXIT_INTERNAL_ERROR"),
            Kind::Debug => (Class::Monitor, "KVM_EXIT_DEBUG"),
            Kind::IoApicEoi => (Class::Monitor, "KVM_EXIT_IOAPIC_EOI"),
            Kind::MsrRead => (Class::Monitor, "KVM_EXIT_X86_RDMSR"),
            Kind::MsrWrite => (Class::Monitor, "KVM_EXIT_X86_WRMSR, or of Hyper-V's MSRs KVM_EXIT_HYPERV"),
            Kind::Hypercall => (Class::Monitor, "KVM_EXIT_HYPERV"),
            Kind::Kicked => (Class::Monitor, "KVM_EXIT_INTR"),
            _ => (Class::Monitor, "another reason"),
        };
        let mut reason = text(class, place_of(kind), plain_name(kind), exit);
        if let Some(pair) = reasons::of(kind) {
            [reason.vtx, reason.svm] = self.names(&Both::of_pair(pair, self.vendor()));
            if class == Class::Mmio && !reason.vtx.is_empty() {
                reason.vtx += &format!(" (the first time: 48 {})", reasons::vtx_name(48));
            }
        }
        reason
    }

    /// VT-x's and AMD-V's names for a reason; empty where they are not to be shown.
    fn names(&self, both: &Both) -> [String; 2] {
        [Vendor::Intel, Vendor::Amd].map(|vendor| match self.shown {
            Shown::Only(only) if only != vendor => String::new(),
            _ => both.name(vendor),
        })
    }

    fn place(&self, place: u8, event: &Event, strings: &mut Strings) -> Place<'_> {
        let (address, code) = if place == 0 { self.code.instruction(event) } else { (event.rip, None) };
        let known = place < 2 && address != 0;
        let text = |text: String| if known { text } else { String::new() };
        Place {
            address,
            symbol: self.symbols.find(address).map_or("(no symbol)", |(name, _)| name),
            name: strings.add(text(self.symbols.name(address))),
            rip: strings.add(text(format!("{address:#x}"))),
            code: strings.add(code.unwrap_or_default()),
        }
    }
}

/// 0: to the monitor, 1: in KVM, 2: a worker's.
fn place_of(kind: Kind) -> u8 {
    match kind {
        Kind::InKernel => 1,
        kind if kind.is_exit() => 0,
        _ => 2,
    }
}

/// Those that tell of exits, and are not 0.
fn counted(all: &BTreeMap<String, u64>) -> Vec<(&'static str, u64)> {
    let known = COUNTERS.into_iter().filter_map(|name| Some((name, *all.get(name)?)));
    known.filter(|(_, count)| *count > 0).collect()
}

fn is_halt(reason: &Reason) -> bool {
    reason.class == Class::Halt as u8
}

/// What a JavaScript number holds exactly.
fn rounded(ns: f64) -> i64 {
    const MOST: f64 = (1u64 << 52) as f64;
    ns.clamp(-MOST, MOST) as i64
}
