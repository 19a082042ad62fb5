//! [`Seen`]: who looks at a machine while its exits are measured.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Who, text};
use crate::config::VmConfig;
use crate::machine::Machine;
use crate::recorder::Recorder;
use crate::trace::file::Header;
use crate::trace::kernel::KernelExits;
use crate::trace::live::watch::Live;
use crate::trace::recording::{Recording, Start};

/// How often `vmm top` asks, unless told otherwise.
const PERIOD: Duration = Duration::from_secs(1);

/// A look that lasts until [`Seen::end`].
pub enum Seen {
    /// Nobody's.
    Nobodys,
    /// A recording to a file, which goes with it.
    Recorded(Recording, PathBuf),
    /// A viewer's.
    Watched(Sender<()>, JoinHandle<()>),
}

impl Seen {
    /// What `who` wants of `machine`, which is about to run.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn by(
        who: Who,
        config: &VmConfig,
        machine: &Machine,
        recorder: Arc<Recorder>,
    ) -> Result<Self, String> {
        let handle = machine.handle();
        match who {
            Who::Bare | Who::Vmm => Ok(Self::Nobodys),
            Who::Traced => {
                let path = config.kernel.clone().unwrap_or_default().with_extension("trace");
                let (header, ram) = (Header::of(config, handle.buses()), handle.ram().clone());
                let start = Recording::start(
                    &path.clone().into(),
                    header,
                    recorder,
                    Start::now(),
                    machine.counters(),
                    ram,
                );
                Ok(Self::Recorded(start.map_err(text)?, path))
            }
            Who::Watched => {
                let live = Live::new(config.clone(), recorder, false);
                let viewer = live.attach(Some(&handle)).map_err(text)?;
                let (sender, ended) = channel();
                let ask = move || loop {
                    viewer.sample(Some(&handle));
                    if ended.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout) {
                        return;
                    }
                };
                let thread = thread::Builder::new().name("viewer".to_owned()).spawn(ask).map_err(text)?;
                Ok(Self::Watched(sender, thread))
            }
        }
    }

    /// It has been seen.
    ///
    /// # Errors
    /// Not all of it could be kept.
    pub fn end(self) -> Result<(), String> {
        match self {
            Self::Nobodys => Ok(()),
            Self::Recorded(recording, path) => {
                recording.finish().map_err(text)?;
                std::fs::remove_file(path).map_err(text)
            }
            Self::Watched(sender, thread) => {
                drop(sender);
                thread.join().map_err(|_| "the viewer panicked".to_owned())
            }
        }
    }
}

/// Whether the exits inside the kernel can be recorded here, and if not why.
pub fn tracefs() -> String {
    match KernelExits::start() {
        Ok(_) => "here it may".to_owned(),
        Err(error) => format!("here it may not: {}", text(error)),
    }
}
