//! What of a saved machine's memory the guest touches, for the record of one that goes on from it.

use std::fs;

use vmm_monitor::machine::Handle;
use vmm_monitor::memory::Pagemap;
use vmm_monitor::recorder::{Event, Kind, Recorder, clock};

/// Sees it.
#[derive(Debug)]
pub struct SavedMemory {
    pagemap: Pagemap,
    /// The machine, and the process's page faults before it ran.
    began: Option<(Handle, [u64; 2])>,
}

impl SavedMemory {
    /// By `pagemap`.
    pub fn new(pagemap: Pagemap) -> Self {
        Self { pagemap, began: None }
    }

    /// `machine` runs next. One that comes after a reboot has other memory.
    pub fn begins(&mut self, machine: Handle) {
        self.began.get_or_insert_with(|| (machine, faults().unwrap_or_default()));
    }

    /// Has it recorded by `recorder`. The machine has run.
    pub fn ends(&mut self, recorder: &Recorder) {
        let Some((machine, before)) = self.began.take() else { return };
        let Some(touched) = machine.memory().touched_pages(&self.pagemap) else { return };
        let after = faults().unwrap_or_default();
        let [guest, rip] = [0, 1].map(|which: usize| after[which].saturating_sub(before[which]));
        let mut track = recorder.track("memory");
        touched.stretches.into_iter().for_each(|pages| track.write(Event::stretch(pages, false)));
        let (time, kind) = (clock::ticks(), Kind::Pages as u8);
        let (address, value) = (touched.read, touched.written);
        track.write(Event { time, kind, address, value, guest, rip, ..Event::default() });
    }
}

/// Page faults of this process, and those of them that waited for a disk (proc_pid_stat(5), fields 10 and 12).
fn faults() -> Option<[u64; 2]> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(7);
    let minor: u64 = fields.next()?.parse().ok()?;
    let major: u64 = fields.nth(1)?.parse().ok()?;
    Some([minor + major, major])
}
