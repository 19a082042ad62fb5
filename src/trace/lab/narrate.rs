//! [`narrate`]: a lab's text, every exit of its run beside the line of source that it came from, and the result.

use std::collections::HashMap;
use std::io::{self, Write};

use super::facts::Facts;
use super::run::Ran;
use super::source::Lines;
use super::{Error, Lab};
use crate::reasons::{self, Reason, Shown};
use crate::report::Report;
use crate::symbols::Symbols;
use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::kvm;
use vmm_monitor::machine::Outcome;
use vmm_monitor::recorder::{Event, Kind};

/// So many exits that are alike, one after the other, are told.
const ALIKE: usize = 4;
/// Columns of a paragraph.
const WIDTH: usize = 126;

/// Tells `ran`, a run of `lab`, to `out`, with the hardware reasons of the vendors that are `shown`; with colours, for a
/// terminal, if `colour`.
///
/// # Errors
/// `out` does not take it.
pub fn narrate(lab: &Lab, ran: &Ran, shown: Shown, colour: bool, out: &mut dyn Write) -> Result<(), Error> {
    tell(lab, ran, shown, colour, out).map_err(|source| Error::Host { what: "write the lab's text", source })
}

fn tell(lab: &Lab, ran: &Ran, shown: Shown, colour: bool, out: &mut dyn Write) -> io::Result<()> {
    let symbols = ran.trace.header.kernel.as_deref().and_then(Symbols::beside).unwrap_or_default();
    let mut report = Report::new(&ran.trace, symbols);
    report.colour = colour;
    report.shown = shown;
    let facts = Facts { ran, report: &report };
    let [bold, plain] = if colour { ["\x1b[1m", "\x1b[0m"] } else { [""; 2] };
    writeln!(out, "{bold}{}: {}{plain}\n", lab.name, lab.idea())?;
    lab.comment().try_for_each(|line| writeln!(out, "{line}"))?;
    writeln!(out, "\n{bold}What happened here{plain}\n")?;
    host(&facts).iter().try_for_each(|text| paragraph(text, out))?;
    writeln!(out)?;
    exits(lab, &facts, out)?;
    writeln!(out, "\n{bold}Result{plain}\n")?;
    let mut closing = Vec::new();
    if let Some(text) = ending(lab, &ran.outcome) {
        closing.push(text);
    }
    closing.extend((lab.closing)(&facts));
    closing.iter().try_for_each(|text| paragraph(text, out))
}

/// What must be known of this host.
fn host(facts: &Facts<'_>) -> Vec<String> {
    let own = reasons::extension(facts.report.vendor());
    let mut text = vec![if kvm::host_has_hardware_virtualization() {
        format!("Host: {own}.")
    } else {
        "Host: no hardware virtualization (no vmx or svm flag). Its KVM emulates the guest's instructions; the reasons below are \
         those for which hardware would leave the guest."
            .to_owned()
    }];
    text.push(match facts.report.shown {
        Shown::Both => format!(
            "Exit reasons: number and name in both vendors' terms, this host's ({own}) first. The manuals list them: {}.",
            reasons::SOURCES
        ),
        Shown::Only(vendor) => {
            let name = reasons::extension(vendor);
            format!("Exit reasons: {name}'s number and name. The manuals list them: {}.", reasons::SOURCES)
        }
    });
    text.push(match facts.traced() {
        true => {
            "Exits answered inside KVM are from the kernel's trace. Those for the host's own interrupts, in which the guest has \
             no part, are left out."
                .to_owned()
        }
        false => format!("Exits answered inside KVM: {}.", facts.ran.trace.header.in_kernel),
    });
    text
}

/// Every exit, after the line of source that it came from, and what the host did, in order of time.
fn exits(lab: &Lab, facts: &Facts<'_>, out: &mut dyn Write) -> io::Result<()> {
    let (report, trace) = (facts.report, &facts.ran.trace);
    let (lines, source) = (Lines::of(lab.image), lab.source.lines().collect::<Vec<_>>());
    let mut acts = facts.ran.acts.iter().peekable();
    let mut act = |before: u64, out: &mut dyn Write| {
        while let Some((time, text)) = acts.next_if(|(time, _)| *time < before) {
            let time = format!("+{:.3}ms", trace.since_start(*time) / 1e6);
            writeln!(out, "{:<16} {time:>12}  {text}", "host")?;
        }
        Ok(())
    };
    let (mut last, mut alike) = (None, Alike::default());
    let mut sizes = HashMap::new();
    for (track, event) in &trace.events {
        let Some(kind) = event.kind().filter(|kind| !kind.is_detail()) else { continue };
        let from_guest = kind == Kind::InKernel || kind.is_exit();
        let line = lines.line(report.origin(event)).filter(|_| from_guest);
        if is_left_out(report, kind, event, line) {
            continue;
        }
        if alike.is_left_out(*track, event, out)? {
            continue;
        }
        act(event.time, out)?;
        let place = line.map(|line| (*track, line));
        if let Some((_, line)) = place.filter(|_| place != last) {
            let text = line.checked_sub(1).and_then(|index| source.get(index)).unwrap_or(&"");
            writeln!(out, "{line:>4}  {}", text.trim_end())?;
        }
        last = place.or(last);
        let size = report.code_size(event).filter(|_| kind.is_exit());
        if let Some(size) = size
            && sizes.insert(*track, size).unwrap_or(32) != size
        {
            writeln!(out, "      (code of {size} bits)")?;
        }
        report.event(*track, event, out)?;
    }
    alike.end(out)?;
    act(u64::MAX, out)
}

/// Counts exits that are alike: of one vCPU, by one instruction, for the same.
#[derive(Default)]
struct Alike {
    what: Option<(u32, u8, u64, u64, u64)>,
    count: usize,
}

impl Alike {
    /// Whether `event` is one too many.
    fn is_left_out(&mut self, track: u32, event: &Event, out: &mut dyn Write) -> io::Result<bool> {
        let what = Some((track, event.kind, event.rip, event.address, event.value));
        if what != self.what {
            self.end(out)?;
            self.what = what;
        }
        self.count += 1;
        Ok(self.count > ALIKE)
    }

    /// Says how many were left out.
    fn end(&mut self, out: &mut dyn Write) -> io::Result<()> {
        match std::mem::take(&mut self.count).saturating_sub(ALIKE) {
            0 => Ok(()),
            more => writeln!(out, "      and {more} more of these"),
        }
    }
}

/// What tells nothing of the lab: exits for the host's interrupts; a worker's looks that found nothing; vCPUs that came back from
/// KVM without having run, because a start-up IPI was on its way.
fn is_left_out(report: &Report<'_>, kind: Kind, event: &Event, line: Option<usize>) -> bool {
    match kind {
        Kind::InKernel => is_the_hosts(report, event),
        Kind::Queue | Kind::Source => event.value == 0,
        Kind::Kicked => line.is_none(),
        _ => false,
    }
}

/// Whether an exit inside KVM is for an interrupt of the host.
fn is_the_hosts(report: &Report<'_>, event: &Event) -> bool {
    // VT-x: external interrupt, SMIs. AMD-V tells an NMI from exceptions, too.
    const NMI: Reason = Reason { vendor: Vendor::Amd, number: 0x61 };
    report.reason_in_kvm(event).is_some_and(|own| own.is_one_of(&[1, 5, 6]) || own == NMI)
}

/// How it ended, if not as labs end as a rule.
fn ending(lab: &Lab, outcome: &Outcome) -> Option<String> {
    match outcome {
        Outcome::Exit(1) => None,
        Outcome::Killed => {
            Some(format!("The guest did not end by itself: vmm ended it after {} ms.", lab.limit.as_millis()))
        }
        Outcome::Crash(report) | Outcome::InternalError(report) => {
            let first = report.lines().next().unwrap_or_default();
            Some(format!("The run ended with: {first}"))
        }
        other => Some(format!("The run ended in a way that labs do not: {other:?}.")),
    }
}

/// `text` in lines of [`WIDTH`] columns at most.
fn paragraph(text: &str, out: &mut dyn Write) -> io::Result<()> {
    let mut width = 0;
    for word in text.split_whitespace() {
        let len = word.chars().count();
        if width > 0 && width + 1 + len > WIDTH {
            writeln!(out)?;
            width = 0;
        }
        if width > 0 {
            write!(out, " ")?;
            width += 1;
        }
        write!(out, "{word}")?;
        width += len;
    }
    writeln!(out)
}
