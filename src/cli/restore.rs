//! `vmm restore`: a run that begins where a saved machine stopped.

use std::path::PathBuf;

use vmm_command::Failure;
use vmm_monitor::snapshot::Snapshot;

use super::options;

const EXAMPLES: &str = "\
Examples:
  vmm snapshot create web web.snap
  vmm restore web.snap
      a virtual machine that goes on where web was, on this terminal
  vmm restore -d --name web2 web.snap
      another, in the background
";

/// The options of `vmm restore`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[group(skip)]
pub struct Options {
    /// The folder that vmm snapshot create made
    #[arg(value_name = "FOLDER")]
    snapshot: PathBuf,
    #[command(flatten)]
    options: options::Options,
}

impl Options {
    /// How much is to be logged.
    pub fn verbose(&self) -> u8 {
        self.options.verbose
    }

    /// As options of a run.
    ///
    /// # Errors
    /// The folder is no snapshot.
    pub fn into_run(mut self) -> Result<options::Options, Failure> {
        self.options.snapshot = Some(Snapshot::open(&self.snapshot)?);
        Ok(self.options)
    }
}
