//! A trace for people and programs: one line per event, statistics, JSON, a page.

mod advice;
mod before;
mod content;
mod filter;
mod first_touches;
mod group;
mod html;
mod line;
mod meaning;
mod perfetto;
mod saved;
mod stages;
mod stats;

pub use filter::Filter;
pub use line::plain_name;
pub use stats::{COUNTERS, Stats};

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::code::Code;
use super::file::Trace;
use super::reasons::{self, Both, Reason, Shown};
use super::symbols::{self, Symbols};
use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::recorder::registers::Collector;
use vmm_monitor::recorder::{Event, Kind};

/// A trace with what is needed to tell it.
#[derive(Debug)]
pub struct Report<'a> {
    /// The events.
    pub trace: &'a Trace,
    /// The guest's names; empty if there are none.
    pub symbols: Symbols,
    code: Code,
    /// Reasons of exits inside KVM by KVM's number: what KVM calls them, and which they are.
    kernel_reasons: BTreeMap<u32, (String, Option<Reason>)>,
    /// Whose hardware reasons are told.
    pub shown: Shown,
    /// Colours, for a terminal.
    pub colour: bool,
}

impl<'a> Report<'a> {
    /// Of `trace`.
    pub fn new(trace: &'a Trace, symbols: Symbols) -> Self {
        let vendor = reasons::vendor(&trace.header.vendor);
        let known =
            |(number, name): (&u32, &String)| (*number, (name.clone(), reasons::by_kvm_name(name, vendor)));
        let kernel_reasons = trace.reasons.iter().map(known).collect();
        Self { trace, symbols, code: Code::of(trace), kernel_reasons, shown: Shown::Both, colour: false }
    }

    /// Finds out how far the guest's kernel runs from where it was linked (KASLR), as far as the record and the symbols' file
    /// tell.
    ///
    /// # Errors
    /// The symbols are another kernel's.
    pub fn find_shift(&mut self) -> Result<(), symbols::Error> {
        let guest = Symbols::of_guest(&self.trace.symbols);
        if let Some(shift) = self.symbols.find_shift(guest.as_ref(), self.code.all())? {
            log::info!("the guest's kernel runs {shift:#x} bytes from where it was linked");
        }
        Ok(())
    }

    /// One line per event that passes `filter`, to `out`; then what was lost.
    ///
    /// # Errors
    /// As `out` has them: a closed pipe, most of all.
    pub fn lines(&self, filter: &Filter, out: &mut dyn Write) -> io::Result<()> {
        for (track, event) in &self.trace.events {
            if filter.passes(self, *track, event) {
                self.line(*track, event, out)?;
            }
        }
        self.losses(out)
    }

    /// The line of one event; nothing for what belongs to another.
    ///
    /// # Errors
    /// As for [`Report::lines`].
    pub fn event(&self, track: u32, event: &Event, out: &mut dyn Write) -> io::Result<()> {
        if event.kind().is_some_and(Kind::is_detail) { Ok(()) } else { self.line(track, event, out) }
    }

    /// Where the instruction is that an exit came from.
    pub fn origin(&self, event: &Event) -> u64 {
        self.code.instruction(event).0
    }

    /// The size of the code there, 16, 32 or 64 bits, where the trace has it.
    pub fn code_size(&self, event: &Event) -> Option<u32> {
        self.code.size(self.origin(event))
    }

    /// Whose hardware reasons the trace has.
    pub fn vendor(&self) -> Vendor {
        reasons::vendor(&self.trace.header.vendor)
    }

    /// Hardware's reason of an exit inside KVM.
    pub fn reason_in_kvm(&self, event: &Event) -> Option<Reason> {
        self.kernel_reasons.get(&event.count.into())?.1
    }

    /// Hardware's reason of an exit, in both vendors' terms. None where it had no part in it, or KVM has a name that is not
    /// known here.
    pub fn hardware(&self, kind: Kind, event: &Event) -> Option<Both> {
        if kind == Kind::InKernel {
            return Some(Both::of(self.reason_in_kvm(event)?).narrowed(event.address));
        }
        let by_kind = reasons::of(kind).map(|pair| Both::of_pair(pair, self.vendor()));
        // Hardware's own word, where the kernel's trace passed it on.
        let told = event.reason.checked_sub(1).and_then(|number| self.kernel_reasons.get(&number.into()));
        let Some(own) = told.and_then(|(_, reason)| *reason) else { return by_kind };
        let mut both = Both::of(own);
        if let Some(kind) = by_kind
            && kind.other.iter().all(|other| both.other.contains(other))
        {
            both.other = kind.other;
        }
        Some(both)
    }

    /// The same as a JSON object per line.
    ///
    /// # Errors
    /// As for [`Report::lines`].
    pub fn json(&self, filter: &Filter, out: &mut dyn Write) -> io::Result<()> {
        let mut registers: BTreeMap<u32, Collector> = BTreeMap::new();
        for (track, event) in &self.trace.events {
            if event.kind() == Some(Kind::Registers) {
                registers.entry(*track).or_default().add(event);
            }
            if filter.passes(self, *track, event) {
                let own = registers.get(track).and_then(|registers| registers.at(event.time));
                serde_json::to_writer(&mut *out, &self.object(*track, event, own.as_ref()))?;
                writeln!(out)?;
            }
        }
        Ok(())
    }

    fn losses(&self, out: &mut dyn Write) -> io::Result<()> {
        for (track, count) in &self.trace.dropped {
            writeln!(out, "{}: {count} events were lost: the ring was full", self.track(*track))?;
        }
        if let Some(why) = &self.trace.stopped {
            writeln!(out, "the rest of the run was not recorded: {why}")?;
        }
        if self.trace.left_out > 0 {
            writeln!(
                out,
                "{} events that follow are not told: the record is too large",
                self.trace.left_out
            )?;
        }
        Ok(())
    }

    /// A track's name.
    fn track(&self, number: u32) -> &str {
        self.trace.tracks.get(&number).map_or("?", String::as_str)
    }
}

/// Nanoseconds in three digits or so: "1.8us".
pub fn duration(ns: f64) -> String {
    let (value, unit) = match ns.abs() {
        n if n < 1e3 => return format!("{ns:.0}ns"),
        n if n < 1e6 => (ns / 1e3, "us"),
        n if n < 1e9 => (ns / 1e6, "ms"),
        _ => (ns / 1e9, "s"),
    };
    let digits = if value.abs() < 10.0 {
        2
    } else if value.abs() < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.digits$}{unit}")
}
