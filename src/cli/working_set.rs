//! What the first machine that goes on from a folder touches at its start is written down there, for those that follow.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vmm_monitor::machine::{Handle, Outcome};
use vmm_monitor::session::{Built, End, Observer};
use vmm_monitor::snapshot::Unrecorded;

/// A start is over then, unless the machine ends before.
const START: Duration = Duration::from_secs(1);

/// Sees to it that it is written down, once.
pub struct FirstStart {
    folder: Arc<Mutex<Option<Unrecorded>>>,
    machine: Option<Handle>,
}

impl FirstStart {
    /// From this folder.
    pub fn new(folder: Unrecorded) -> Self {
        Self { folder: Arc::new(Mutex::new(Some(folder))), machine: None }
    }
}

fn record(folder: &Mutex<Option<Unrecorded>>, machine: &Handle) {
    let Some(folder) = folder.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    match folder.record(machine) {
        Ok(set) => {
            let [read, written] = [false, true].map(|written| set.count(written));
            log::info!(
                "the next start of this snapshot fetches {written} pages to write to and {read} to read"
            );
        }
        Err(error) => log::info!("what this start touched is not written down: {error}"),
    }
}

impl Observer for FirstStart {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        // What comes after a reboot has other memory.
        if self.machine.is_none() {
            let (folder, machine) = (self.folder.clone(), built.machine.handle());
            self.machine = Some(machine.clone());
            built.machine.later(START, move || record(&folder, &machine));
        }
        Ok(())
    }

    fn ended(&mut self, end: &End<'_>) {
        // One that was killed may not have come far.
        if let Some(machine) = &self.machine
            && matches!(end.outcome, Ok(Outcome::Shutdown | Outcome::Exit(_) | Outcome::Reset))
        {
            record(&self.folder, machine);
        }
    }
}
