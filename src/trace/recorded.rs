//! [`Recorded`]: a recording of all machines of a session.

use std::error::Error;
use std::sync::Arc;

use vmm_monitor::config::{OutputFile, VmConfig};
use vmm_monitor::machine::Outcome;
use vmm_monitor::recorder::Recorder;
use vmm_monitor::session::{Built, End, Observer};

use crate::file::{self, Header};
use crate::recording::{Ended, Recording, SEARCH, Start};
use crate::saved_memory::SavedMemory;

/// Records what the machines of a session do, reboots included, to one file. The monitor's own steps from here on belong to it.
#[derive(Debug)]
pub struct Recorded<'a> {
    config: &'a VmConfig,
    file: OutputFile,
    recorder: Arc<Recorder>,
    start: Start,
    recording: Option<Recording>,
    /// Once the last machine's run is over.
    ended: Option<Result<Ended, file::Error>>,
    killed: bool,
    saved: Option<SavedMemory>,
}

impl<'a> Recorded<'a> {
    /// A recording of the session of `config`'s machines that writes to `recorder`.
    pub fn new(config: &'a VmConfig, file: OutputFile, recorder: Arc<Recorder>) -> Self {
        recorder.set_on(true);
        Self {
            config,
            file,
            recorder,
            start: Start::now(),
            recording: None,
            ended: None,
            killed: false,
            saved: None,
        }
    }

    /// The first machine goes on from a saved one.
    pub fn goes_on(&mut self, saved: SavedMemory) {
        self.saved = Some(saved);
    }

    /// Completes the file, once the session's run is over. The guest's symbols are searched for only until `interrupted`, and
    /// not for long if the machine was killed: those of an honest kernel are found all the same.
    ///
    /// # Errors
    /// Not all of it could be written.
    pub fn finish(self, interrupted: &dyn Fn() -> bool) -> Result<(), file::Error> {
        let Some(ended) = self.ended else { return Ok(()) };
        ended?.analyse(if self.killed { SEARCH / 48 } else { SEARCH }, interrupted)
    }
}

impl Observer for Recorded<'_> {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let machine = &*built.machine;
        let handle = machine.handle();
        let ram = handle.ram().clone();
        self.saved.iter_mut().for_each(|saved| saved.begins(handle.clone()));
        match &mut self.recording {
            Some(recording) => recording.resume(ram),
            None => {
                let header = Header::of(self.config, &handle.inventory());
                let (recorder, counters) = (self.recorder.clone(), machine.counters());
                self.recording =
                    Some(Recording::start(&self.file, header, recorder, self.start, counters, ram)?);
            }
        }
        Ok(())
    }

    fn ended(&mut self, end: &End<'_>) {
        if let Some(mut saved) = self.saved.take() {
            saved.ends(&self.recorder);
        }
        match &mut self.recording {
            Some(recording) if end.reboots => recording.pause(end.interrupted),
            _ => self.ended = self.recording.take().map(Recording::stop),
        }
        self.killed = matches!(end.outcome, Ok(Outcome::Killed));
    }
}
