//! Lessons: tiny guests of one idea each (`guest/labs`), run on this host's KVM, and what happened told from the record.
//!
//! `vmm lab` calls it. A lab runs on the ordinary machine with the ordinary recorder; `run` starts it and does the host's
//! part of it, `narrate` tells the trace beside the guest's source, `closing` says what came of it here.

mod catalogue;
mod closing;
mod facts;
mod narrate;
mod run;
mod source;

use std::time::Duration;

use facts::Facts;
use vmm_monitor::config::VmConfig;

pub use catalogue::LABS;
pub use narrate::narrate;
pub use run::{Ran, run};

/// Why a lab could not be run or told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no machine, or it could not be run.
    #[error(transparent)]
    Session(#[from] vmm_monitor::session::Error),
    /// There is no record.
    #[error(transparent)]
    Trace(#[from] crate::file::Error),
    /// The host is out of something, or the result could not be written.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// A lesson.
#[derive(Debug)]
pub struct Lab {
    /// Its name.
    pub name: &'static str,
    /// The guest's source. It begins with a comment: `# name: the idea`, then what there is to know.
    pub source: &'static str,
    /// The guest, assembled: an ELF kernel with line numbers.
    image: &'static [u8],
    /// What it needs beside a serial port and an entropy source.
    machine: fn(&mut VmConfig),
    /// What the host does meanwhile.
    host: Host,
    /// It does not end by itself for longer than this.
    limit: Duration,
    /// What came of it, in sentences.
    closing: fn(&Facts<'_>) -> Vec<String>,
}

/// What the host does while a lab's guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Host {
    /// Nothing.
    Watches,
    /// Presses the power button once the guest has written a byte to the serial port.
    PressesPowerButton,
    /// Fetches the log of dirty pages whenever the guest writes a byte to the serial port.
    FetchesDirtyLog,
}

impl Lab {
    /// The lab called `name`.
    pub fn find(name: &str) -> Option<&'static Self> {
        LABS.iter().find(|lab| lab.name == name)
    }

    /// The idea, in a few words.
    pub fn idea(&self) -> &'static str {
        let first = self.source.lines().next().unwrap_or_default();
        first.split_once(": ").map_or(first, |(_, idea)| idea)
    }

    /// The comment behind the first line, without its marks.
    fn comment(&self) -> impl Iterator<Item = &'static str> {
        let comment = self.source.lines().skip(1).map_while(|line| line.strip_prefix('#'));
        comment.map(|line| line.strip_prefix(' ').unwrap_or(line)).skip_while(|line| line.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lab_says_its_idea_and_stays_small() {
        for lab in &LABS {
            let first = lab.source.lines().next().unwrap();
            assert!(first.starts_with(&format!("# {}: ", lab.name)), "{first}");
            assert!(lab.comment().count() >= 3, "{}: a comment that teaches", lab.name);
            let (lines, longest) =
                (lab.source.lines().count(), lab.source.lines().map(str::len).max().unwrap());
            assert!(lines < 60 && longest <= 130, "{}: {lines} lines of {longest}", lab.name);
            assert!(std::ptr::eq(Lab::find(lab.name).unwrap(), lab));
        }
        assert!(Lab::find("nonsense").is_none());
    }
}
