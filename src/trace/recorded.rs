//! [`Recorded`]: a recording of all machines of a session.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use vmm_monitor::api::Pty;
use vmm_monitor::config::VmConfig;
use vmm_monitor::machine::{self, Machine, Outcome};
use vmm_monitor::recorder::Recorder;
use vmm_monitor::session::Observer;

use crate::file::{self, Header};
use crate::recording::{Recording, Start};

/// Records what the machines of a session do, reboots included, to one file. The monitor's own steps from here on belong to it.
#[derive(Debug)]
pub struct Recorded<'a> {
    config: &'a VmConfig,
    file: PathBuf,
    recorder: Arc<Recorder>,
    start: Start,
    recording: Option<Recording>,
}

impl<'a> Recorded<'a> {
    /// A recording of the session of `config`'s machines that writes to `recorder`.
    pub fn new(config: &'a VmConfig, file: PathBuf, recorder: Arc<Recorder>) -> Self {
        recorder.set_on(true);
        Self { config, file, recorder, start: Start::now(), recording: None }
    }

    /// Completes the file, once the session's run is over.
    ///
    /// # Errors
    /// Not all of it could be written.
    pub fn finish(self) -> Result<(), file::Error> {
        self.recording.map_or(Ok(()), Recording::finish)
    }
}

impl Observer for Recorded<'_> {
    fn built(&mut self, machine: &Machine, _: &[Pty]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let handle = machine.handle();
        let ram = handle.ram().clone();
        match &mut self.recording {
            Some(recording) => recording.resume(ram),
            None => {
                let header = Header::of(self.config, handle.inventory());
                let (recorder, counters) = (self.recorder.clone(), machine.counters());
                self.recording =
                    Some(Recording::start(&self.file, header, recorder, self.start, counters, ram)?);
            }
        }
        Ok(())
    }

    fn ended(&mut self, _: &Result<Outcome, machine::Error>, reboots: bool) {
        if let (true, Some(recording)) = (reboots, &mut self.recording) {
            recording.pause();
        }
    }
}
