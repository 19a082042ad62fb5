//! Statistics: what a run's exits were, who caused them and what they cost.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;

use super::first_touches::FirstTouches;
use super::line::plain_name;
use super::saved::Saved;
use super::{Filter, Report, before, duration};
use crate::reasons::Both;
use crate::{devices, reasons};
use vmm_monitor::recorder::Kind;

/// Counts and costs of the exits that pass a filter.
#[derive(Debug, Serialize)]
pub struct Stats {
    /// Nanoseconds from the first event to the last.
    pub span: f64,
    /// What the monitor did before the guest ran.
    pub before: Vec<before::Row>,
    /// The memory of a machine that goes on from a saved one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved_memory: Option<Saved>,
    /// Guest memory as it was first touched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_touches: Option<FirstTouches>,
    /// By vCPU: where its time went.
    pub vcpus: Vec<Share>,
    /// By reason.
    pub reasons: Vec<Row>,
    /// Exits that KVM answered by itself, by reason.
    pub in_kernel: Vec<Row>,
    /// By device.
    pub devices: Vec<Row>,
    /// By the guest's function.
    pub symbols: Vec<Row>,
}

/// A vCPU's time, in nanoseconds.
#[derive(Debug, Serialize)]
pub struct Share {
    /// Its name.
    pub name: String,
    /// In KVM_RUN: in the guest, halted, or in KVM.
    pub guest: f64,
    /// In the monitor.
    pub monitor: f64,
}

/// Exits that have something in common.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What.
    pub name: String,
    /// Of a reason: hardware's, by the vendors that are shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hardware: Option<String>,
    /// How many.
    pub count: usize,
    /// Share of all handling time, 0 to 1.
    pub share: f64,
    /// Median handling time, nanoseconds.
    pub p50: f64,
    /// 99th percentile of it.
    pub p99: f64,
    /// How many took less than 1, 2, 4, 8 ... microseconds; the last: longer.
    pub histogram: Vec<usize>,
}

/// Of KVM's counters, those that tell of exits (arch/x86/include/asm/kvm_host.h, struct kvm_vcpu_stat).
pub const COUNTERS: [&str; 14] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_exits",
    "irq_window_exits",
    "nmi_window_exits",
    "signal_exits",
    "request_irq_exits",
    "hypercalls",
    "irq_injections",
    "pf_taken",
    "insn_emulation",
    "tlb_flush",
];

/// Steps of a histogram.
const STEPS: usize = 12;
/// Rows of a table at most.
const TOP: usize = 20;

impl Report<'_> {
    /// Works them out.
    pub fn stats(&self, filter: &Filter) -> Stats {
        let mut by_reason: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let mut by_kernel: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let mut by_device: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let mut by_symbol: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let (mut hardware, mut kernel_hardware) = (BTreeMap::new(), BTreeMap::new());
        let mut vcpus: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
        let (mut first, mut last) = (None, 0.0);
        for (track, event) in &self.trace.events {
            let Some(kind) = event.kind().filter(|_| filter.passes(self, *track, event)) else { continue };
            let took = self.trace.ns(event.handled.into());
            if kind == Kind::InKernel {
                let reason = self.trace.reasons.get(&event.count.into()).map_or("?", String::as_str);
                by_kernel.entry(reason.to_owned()).or_default().push(took);
                if let Some(own) = self.reason_in_kvm(event) {
                    kernel_hardware.entry(reason.to_owned()).or_insert_with(|| Both::of(own));
                }
            }
            if !kind.is_exit() {
                continue;
            }
            last = self.trace.since_start(event.time);
            first.get_or_insert(last);
            let vcpu = vcpus.entry(*track).or_default();
            vcpu.0 += self.trace.ns(event.guest);
            vcpu.1 += took;
            by_reason.entry(plain_name(kind).to_owned()).or_default().push(took);
            if let Some(pair) = reasons::of(kind) {
                let both = || Both::of_pair(pair, self.vendor());
                hardware.entry(plain_name(kind).to_owned()).or_insert_with(both);
            }
            if let Some(name) = devices::name(&self.trace.header, event) {
                by_device.entry(name.to_owned()).or_default().push(took);
            }
            let symbol =
                self.symbols.find(self.code.instruction(event).0).map_or("(no symbol)", |(name, _)| name);
            by_symbol.entry(symbol.to_owned()).or_default().push(took);
        }
        let all: f64 = by_reason.values().flatten().sum();
        Stats {
            span: last - first.unwrap_or(last),
            before: self.before(),
            saved_memory: self.saved(),
            first_touches: self.first_touches(),
            vcpus: vcpus
                .into_iter()
                .map(|(track, (guest, monitor))| Share { name: self.track(track).to_owned(), guest, monitor })
                .collect(),
            reasons: self.with_hardware(rows(by_reason, all), &hardware),
            in_kernel: {
                let all = by_kernel.values().flatten().sum();
                self.with_hardware(rows(by_kernel, all), &kernel_hardware)
            },
            devices: rows(by_device, all),
            symbols: rows(by_symbol, all),
        }
    }

    /// `rows` with hardware's reasons, as they are shown.
    fn with_hardware(&self, mut rows: Vec<Row>, hardware: &BTreeMap<String, Both>) -> Vec<Row> {
        for row in &mut rows {
            row.hardware = hardware.get(&row.name).map(|both| both.text(self.shown));
        }
        rows
    }

    /// [`Report::stats`] as tables.
    ///
    /// # Errors
    /// As `out` has them.
    pub fn write_stats(&self, filter: &Filter, out: &mut dyn Write) -> io::Result<()> {
        let stats = self.stats(filter);
        self.write_start(out)?;
        let exits: usize = stats.reasons.iter().map(|row| row.count).sum();
        writeln!(out, "{exits} exits reached the monitor in {}", duration(stats.span))?;
        for Share { name, guest, monitor } in &stats.vcpus {
            let share = 100.0 * monitor / (guest + monitor).max(1.0);
            writeln!(
                out,
                "{name}: {} in KVM_RUN, {} in the monitor ({share:.1}%)",
                duration(*guest),
                duration(*monitor)
            )?;
        }
        writeln!(out, "exits inside KVM: {}", self.trace.header.in_kernel)?;
        for (vcpu, counters) in &self.trace.counters {
            let counted =
                |name: &&str| Some(format!("{name} {}", counters.get(*name).filter(|count| **count > 0)?));
            let shown: Vec<_> = COUNTERS.iter().filter_map(counted).collect();
            writeln!(out, "KVM's own count, {vcpu}: {}", shown.join(", "))?;
        }
        for (title, rows) in [
            ("reason", &stats.reasons),
            ("device", &stats.devices),
            ("guest function", &stats.symbols),
            ("inside KVM (share of that)", &stats.in_kernel),
        ] {
            if rows.is_empty() {
                continue;
            }
            let name = |row: &Row| match &row.hardware {
                Some(hardware) => format!("{} ({hardware})", row.name),
                None => row.name.clone(),
            };
            let longest = rows.iter().take(TOP).map(|row| name(row).chars().count()).max().unwrap_or(0);
            let width = longest.max(40);
            writeln!(
                out,
                "\n{title:<width$} {:>8} {:>6} {:>8} {:>8}  histogram: <1us, <2us, <4us ...",
                "count", "share", "p50", "p99"
            )?;
            for row in rows.iter().take(TOP) {
                writeln!(
                    out,
                    "{:<width$} {:>8} {:>5.1}% {:>8} {:>8}  {}",
                    name(row),
                    row.count,
                    100.0 * row.share,
                    duration(row.p50),
                    duration(row.p99),
                    bars(&row.histogram)
                )?;
            }
            if rows.len() > TOP {
                writeln!(out, "... and {} more", rows.len() - TOP)?;
            }
        }
        if let Some(touches) = &stats.first_touches {
            self.write_first_touches(touches, out)?;
        }
        self.losses(out)
    }
}

/// The costliest first.
fn rows(groups: BTreeMap<String, Vec<f64>>, all: f64) -> Vec<Row> {
    let mut rows: Vec<Row> = groups
        .into_iter()
        .map(|(name, mut took)| {
            took.sort_by(f64::total_cmp);
            let at = |share: f64| took[((took.len() - 1) as f64 * share).round() as usize];
            let mut histogram = vec![0; STEPS];
            for ns in &took {
                let step = (ns / 1e3).max(1.0).log2().ceil() as usize;
                histogram[step.min(STEPS - 1)] += 1;
            }
            let share = if all > 0.0 { took.iter().sum::<f64>() / all } else { 0.0 };
            Row { name, hardware: None, count: took.len(), share, p50: at(0.5), p99: at(0.99), histogram }
        })
        .collect();
    rows.sort_by(|a, b| b.share.total_cmp(&a.share).then(b.count.cmp(&a.count)));
    rows
}

/// A histogram as a row of bars.
fn bars(histogram: &[usize]) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = histogram.iter().copied().max().unwrap_or(0).max(1);
    histogram.iter().map(|count| BARS[(count * 8).div_ceil(most)]).collect()
}
