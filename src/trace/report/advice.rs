//! Advice: what a boot spends its exits on for nothing, what that cost, and what to change.
//!
//! Each rule looks at the record alone, so what it says was measured; the gain is at most the cost that it names.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::{Report, duration};
use crate::devices;
use vmm_monitor::recorder::{Event, Kind};

/// One piece of advice.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// What was seen.
    pub what: String,
    /// Exits that it took.
    pub exits: usize,
    /// Nanoseconds that the monitor, or KVM, took for them. Leaving and entering the guest comes on top.
    pub cost: f64,
    /// What to do, for a person.
    pub change: String,
    /// Words for the kernel's command line.
    pub words: &'static [&'static str],
}

/// Fewer exits of a kind than this are not worth a word.
const FEW: usize = 4;
/// As many reads in a row that see the same are waiting, and not looking.
const POLLS: usize = 50;
/// From as many on it is a storm.
const STORM: usize = 1000;

/// Exits that a rule is about.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum {
    pub exits: usize,
    pub cost: f64,
}

/// Reads in a row that see the same.
#[derive(Clone, Copy)]
struct Run<'e> {
    first: &'e Event,
    sum: Sum,
}

impl Report<'_> {
    /// All that the rules find, the costliest first.
    pub fn advice(&self) -> Vec<Advice> {
        let mut advice: Vec<Advice> = [
            self.serial(),
            self.ports(
                "i8042",
                0x60..=0x64,
                "probes an 8042 keyboard controller",
                &["i8042.noaux", "i8042.nokbd", "i8042.nopnp"],
            ),
            self.ports("nobody", 0xcf8..=0xcff, "scans for PCI, which is not there", &["pci=off"]),
            self.ports("nobody", 0x40..=0x43, "looks for a PIT to calibrate its clock by", &["tsc=reliable"]),
            self.ports("nobody", 0x70..=0x71, "asks for an RTC, which is not there", &[]),
            self.ports(
                "nobody",
                0x2e8..=0x3ff,
                "looks for serial ports that are not there",
                &["8250.nr_uarts=0"],
            ),
            self.polling(),
            self.storm(),
            self.page_faults(),
            self.one_by_one(),
        ]
        .into_iter()
        .flatten()
        .collect();
        advice.sort_by(|a, b| b.cost.total_cmp(&a.cost));
        advice
    }

    /// [`Report::advice`] as text, and the command line that follows from it.
    ///
    /// # Errors
    /// As `out` has them.
    pub fn write_advice(&self, out: &mut dyn Write) -> io::Result<()> {
        let advice = self.advice();
        if advice.is_empty() {
            writeln!(out, "nothing to say: the record holds no exits that a change of options would save")?;
        }
        for Advice { what, exits, cost, change, .. } in &advice {
            // Those inside KVM are not always seen.
            let (cost, exits) = match exits {
                0 => ("?".to_owned(), String::new()),
                _ => (duration(*cost), format!(": {exits} exits")),
            };
            writeln!(out, "{cost:>8}  {what}{exits}\n          {change}")?;
        }
        let old = self.trace.header.cmdline.as_deref().unwrap_or_default();
        let has = |word: &str| old.split_whitespace().any(|known| known == word);
        let new: Vec<&str> =
            advice.iter().flat_map(|advice| advice.words).copied().filter(|word| !has(word)).collect();
        if !new.is_empty() {
            let all: Vec<&str> = old.split_whitespace().chain(new).collect();
            writeln!(out, "\n`cmdline='{}'`", all.join(" "))?;
        }
        Ok(())
    }

    fn exits(&self) -> impl Iterator<Item = (u32, &Event)> {
        self.trace
            .events
            .iter()
            .filter(|(_, e)| e.kind().is_some_and(Kind::is_exit))
            .map(|(track, e)| (*track, e))
    }

    fn sum<'e>(&self, events: impl Iterator<Item = &'e Event>) -> Sum {
        events.fold(Sum::default(), |sum, event| Sum {
            exits: sum.exits + 1,
            cost: sum.cost + self.trace.ns(event.handled.into()),
        })
    }

    /// Console output through a 16550: two exits a character.
    fn serial(&self) -> Option<Advice> {
        let at_serial = |event: &&Event| devices::name(&self.trace.header, event) == Some("serial");
        let all = self.sum(self.exits().map(|(_, event)| event).filter(at_serial));
        let written = |event: &&Event| event.kind() == Some(Kind::PioOut) && event.address.is_multiple_of(8);
        let bytes = self.exits().map(|(_, event)| event).filter(at_serial).filter(written).count();
        (all.exits >= 100).then(|| Advice {
            what: format!("the guest writes {bytes} characters to a serial port, one at a time"),
            exits: all.exits,
            cost: all.cost,
            change: "let it say less (quiet), or write to hvc0, which takes whole lines (console=hvc0, without `serial=`)".to_owned(),
            words: &["quiet"],
        })
    }

    /// Accesses to ports that answer to `device`.
    fn ports(
        &self,
        device: &str,
        ports: std::ops::RangeInclusive<u64>,
        what: &str,
        words: &'static [&'static str],
    ) -> Option<Advice> {
        let is_port = |event: &&Event| matches!(event.kind(), Some(Kind::PioIn | Kind::PioOut));
        let here = |event: &&Event| {
            ports.contains(&event.address) && devices::name(&self.trace.header, event) == Some(device)
        };
        let all = self.sum(self.exits().map(|(_, event)| event).filter(is_port).filter(here));
        (all.exits >= FEW).then(|| Advice {
            what: format!("the guest {what}"),
            exits: all.exits,
            cost: all.cost,
            change: match words {
                [] => "a kernel without that driver would not".to_owned(),
                words => format!("tell it not to: {}", words.join(" ")),
            },
            words,
        })
    }

    /// A driver that reads the same again and again and learns nothing.
    fn polling(&self) -> Option<Advice> {
        let mut runs: BTreeMap<u32, Run<'_>> = BTreeMap::new();
        let mut longest: Option<Run<'_>> = None;
        for (track, event) in self.exits() {
            if !matches!(event.kind(), Some(Kind::PioIn | Kind::MmioRead)) {
                runs.remove(&track);
                continue;
            }
            let fresh = Run { first: event, sum: Sum::default() };
            let run = runs.entry(track).or_insert(fresh);
            if (run.first.rip, run.first.address, run.first.value) != (event.rip, event.address, event.value)
            {
                *run = fresh;
            }
            run.sum.exits += 1;
            run.sum.cost += self.trace.ns(event.handled.into());
            if longest.is_none_or(|longest| longest.sum.exits < run.sum.exits) {
                longest = Some(*run);
            }
        }
        let Run { first, sum } = longest.filter(|run| run.sum.exits >= POLLS)?;
        let answer = devices::tell(&self.trace.header, first).unwrap_or_default();
        let place = self.symbols.name(self.code.instruction(first).0);
        Some(Advice {
            what: format!("{place} polls: {answer}, {} times in a row", sum.exits),
            exits: sum.exits,
            cost: sum.cost,
            change: "give it an interrupt, or a driver that waits for one; or leave the device out"
                .to_owned(),
            words: &[],
        })
    }

    /// One function behind most of the exits.
    fn storm(&self) -> Option<Advice> {
        let mut by_symbol: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
        let mut count = 0;
        for (_, event) in self.exits() {
            count += 1;
            if let Some((name, _)) = self.symbols.find(self.code.instruction(event).0) {
                by_symbol.entry(name).or_default().push(event);
            }
        }
        let (name, events) = by_symbol.into_iter().max_by_key(|(_, events)| events.len())?;
        (events.len() >= STORM && events.len() * 3 > count).then(|| {
            let all = self.sum(events.into_iter());
            Advice {
                what: format!("{name} makes {} of 100 exits to the monitor", all.exits * 100 / count.max(1)),
                exits: all.exits,
                cost: all.cost,
                change: format!("see who calls it: vmm trace report FILE `symbol={name}`"),
                words: &[],
            }
        })
    }

    /// Exits inside KVM for guest memory that it has not mapped yet.
    pub(super) fn page_faults_in_kvm(&self) -> Sum {
        let fault = |event: &&Event| {
            let reason = self.trace.reasons.get(&event.count.into()).map(String::as_str);
            event.kind() == Some(Kind::InKernel) && matches!(reason, Some("npf" | "EPT_VIOLATION"))
        };
        self.sum(self.trace.events.iter().map(|(_, event)| event).filter(fault))
    }

    /// Guest memory that is touched for the first time, a small page at a time.
    fn page_faults(&self) -> Option<Advice> {
        let all = self.page_faults_in_kvm();
        // Memory that comes from a file is what it is.
        (all.exits >= STORM && self.saved().is_none()).then(|| Advice {
            what: "memory is given to the guest page by page as it is first touched".to_owned(),
            exits: all.exits,
            cost: all.cost,
            change: "if the host has memory to spare: `mem=SIZE,thp` or `mem=SIZE,hugepages=2M`".to_owned(),
            words: &[],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{Header, Range, Trace};
    use crate::symbols::Symbols;

    fn event(kind: Kind, address: u64, value: u64) -> (u32, Event) {
        (
            0,
            Event {
                kind: kind as u8,
                address,
                value,
                size: 1,
                count: 1,
                handled: 1000,
                rip: 0x1000,
                ..Event::default()
            },
        )
    }

    fn trace(events: impl IntoIterator<Item = (u32, Event)>) -> Trace {
        let range = |name: &str, base, size| Range { name: name.to_owned(), base, size };
        let mut trace = Trace::default();
        trace.header = Header {
            ports: vec![range("i8042", 0x60, 5), range("serial", 0x3f8, 8)],
            cmdline: Some("console=ttyS0 quiet".to_owned()),
            ..Header::default()
        };
        trace.events = events.into_iter().collect();
        trace
    }

    fn told(trace: &Trace) -> (Vec<String>, String) {
        let report = Report::new(trace, Symbols::default());
        let mut text = Vec::new();
        report.write_advice(&mut text).unwrap();
        (report.advice().into_iter().map(|advice| advice.what).collect(), String::from_utf8(text).unwrap())
    }

    #[test]
    fn each_waste_is_found_and_a_quiet_boot_is_left_alone() {
        let chatter = (0..200u64)
            .map(|n| event(if n % 2 == 0 { Kind::PioOut } else { Kind::PioIn }, 0x3f8 + n % 2 * 5, n));
        let (what, text) = told(&trace(chatter));
        assert_eq!(what, ["the guest writes 100 characters to a serial port, one at a time"]);
        assert!(!text.contains("`cmdline="), "it is quiet already: {text}");

        let (what, text) = told(&trace((0..6).map(|n| event(Kind::PioIn, 0x64, n))));
        assert_eq!(what, ["the guest probes an 8042 keyboard controller"]);
        assert!(
            text.contains("`cmdline='console=ttyS0 quiet i8042.noaux i8042.nokbd i8042.nopnp'`"),
            "{text}"
        );

        let (what, _) = told(&trace((0..60).map(|_| event(Kind::MmioRead, 0xfe00_0060, 0))));
        assert_eq!(what, ["0x1000 polls: nobody -> 0x0, 60 times in a row"]);

        let (what, _) = told(&trace((0..8).map(|n| event(Kind::PioOut, 0xcf8, n))));
        assert_eq!(what, ["the guest scans for PCI, which is not there"]);

        let mut faults = trace((0..2000).map(|n| event(Kind::InKernel, 0, n)));
        faults.reasons.insert(1, "npf".to_owned());
        assert!(told(&faults).0[0].starts_with("memory is given"));

        let (what, text) = told(&trace([event(Kind::PioOut, 0x3f8, 1), event(Kind::PioIn, 0x64, 0)]));
        assert!(what.is_empty() && text.contains("nothing to say"), "{text}");
    }
}
