//! Output files: one that may grow, or one whose size is limited; and what is said of output that finds no room.

use std::time::{Duration, Instant};

use super::poll::Poll;
use super::stream::{Descriptor, Stream};
use super::{Error, Host, Interest};
use crate::config::OutputFile;
use crate::output::{self, Rotating};

/// Opens `file` for output only: created or emptied. A named pipe must have a reader.
pub fn open(file: &OutputFile) -> Result<Box<dyn Host>, Error> {
    let failed = |source| Error::File { path: file.path.clone(), source };
    let name = file.path.display().to_string();
    if let Some(max) = file.max {
        let file = Rotating::create(&file.path, max.bytes()).map_err(failed)?;
        return Ok(Box::new(Limited { file, max: max.to_string(), name, loss: Loss::default() }));
    }
    let output = output::create(&file.path).and_then(|file| Descriptor::owned(file.into(), &name));
    Ok(Box::new(Stream { input: None, output: Some(output.map_err(failed)?) }))
}

/// A file with a limit.
struct Limited {
    file: Rotating,
    max: String,
    name: String,
    loss: Loss,
}

impl Host for Limited {
    fn read(&mut self, _: &mut [u8]) -> usize {
        0
    }

    fn write(&mut self, data: &[u8]) -> usize {
        match self.file.write(data) {
            Ok((count, drops)) => {
                if drops {
                    let Self { name, max, .. } = self;
                    log::warn!(
                        "{name}: more than {max} twice over; the oldest output is dropped from here on"
                    );
                }
                count
            }
            Err(error) => {
                self.loss.add(&self.name, &error, data.len());
                data.len()
            }
        }
    }

    fn watch(&mut self, _: &Poll, want: Interest) -> bool {
        // A file never waits.
        want.output
    }
}

/// Output that a file did not take: a full disk, a limit (RLIMIT_FSIZE). Both may end; so it goes on being tried, and what is
/// lost is counted, and said now and then.
#[derive(Debug, Default)]
pub struct Loss {
    /// Bytes so far.
    pub(super) bytes: u64,
    said: Option<Instant>,
}

impl Loss {
    /// Said at most so often.
    const PERIOD: Duration = Duration::from_secs(60);

    /// `count` bytes more are lost.
    pub fn add(&mut self, name: &str, error: &dyn std::fmt::Display, count: usize) {
        self.bytes += count as u64;
        if self.said.is_none_or(|at| at.elapsed() >= Self::PERIOD) {
            self.said = Some(Instant::now());
            log::error!("{name}: {error}; output is being lost ({} bytes so far)", self.bytes);
        }
    }
}
