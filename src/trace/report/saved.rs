//! The memory of a machine that goes on from a saved one: what of it the guest touched, and how it came there.

use std::io::{self, Write};

use serde::Serialize;

use super::advice::Advice;
use super::{Report, duration};
use vmm_monitor::recorder::{Event, Kind, Step};

/// Fewer pages than this are not worth a word.
const FEW: u64 = 64;

/// Pages of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// That the guest wrote to, each of which was copied then or fetched.
    pub written: u64,
    /// That it read, with those around them that the host's kernel mapped at the same time.
    pub read: u64,
    /// Of those that it wrote to: copied at once, because an earlier start touched them.
    pub copied_ahead: u64,
    /// That were read ahead of the guest, if the host did not have them in memory.
    pub read_ahead: u64,
    /// Page faults of the monitor's process while the guest ran, also for what was copied ahead.
    pub faults: u64,
    /// Those of them that waited for a disk.
    pub from_disk: u64,
}

impl Report<'_> {
    /// None if the machine began otherwise, or did not end.
    pub(super) fn saved(&self) -> Option<Saved> {
        let find = |wanted: &dyn Fn(&Event) -> bool| {
            self.trace.events.iter().map(|(_, event)| event).find(|event| wanted(event))
        };
        let pages = find(&|event| event.kind() == Some(Kind::Pages))?;
        let is_fetch =
            |event: &Event| event.kind() == Some(Kind::Step) && event.address == Step::Fetch as u64;
        let counts = find(&is_fetch).map_or(0, |event| event.guest);
        let (read_ahead, copied_ahead) = (counts & u64::from(u32::MAX), counts >> 32);
        let (read, written) = (pages.address, pages.value);
        let copied_ahead = copied_ahead.min(written);
        Some(Saved { written, read, copied_ahead, read_ahead, faults: pages.guest, from_disk: pages.rip })
    }

    /// What the monitor did before the guest ran, and what became of saved memory.
    pub(super) fn write_start(&self, out: &mut dyn Write) -> io::Result<()> {
        let rows = self.before();
        if !rows.is_empty() {
            writeln!(out, "before the guest ran:")?;
        }
        for row in rows {
            let (from, took) = (duration(row.from as f64), duration(row.took as f64));
            let who = self.track(row.track);
            writeln!(out, "  +{from:<8} {took:>8}  {:<14} {:<8} {}", row.name, who, row.what)?;
        }
        let Some(saved) = self.saved() else { return Ok(()) };
        let Saved { written, read, copied_ahead, read_ahead, faults, from_disk } = saved;
        writeln!(
            out,
            "saved memory: the guest wrote to {written} pages, {copied_ahead} of them copied ahead, and has {read} more to read; \
             {read_ahead} read ahead; {faults} page faults, {from_disk} from a disk"
        )
    }

    /// Pages of saved memory that came one at a time.
    pub(super) fn one_by_one(&self) -> Option<Advice> {
        let saved = self.saved()?;
        let single = saved.written - saved.copied_ahead;
        if single < FEW || saved.copied_ahead > single {
            return None;
        }
        let all = self.page_faults_in_kvm();
        let change = match saved.copied_ahead {
            0 => {
                "the first start from a folder of yours writes down what it touches, and the next ones fetch that at once: start it again"
            }
            _ => {
                "an earlier start touched others: remove working-set from the folder, and the next start writes down its own"
            }
        };
        Some(Advice {
            what: format!(
                "{single} pages of saved memory were copied one at a time, as the guest first wrote to them"
            ),
            exits: all.exits,
            cost: all.cost,
            change: change.to_owned(),
            words: &[],
        })
    }
}
