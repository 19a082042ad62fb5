//! `vmm restore`: a run that begins where a saved machine stopped, and whose guest is told so.

use std::error::Error;
use std::path::PathBuf;
use std::thread;

use vmm_command::Failure;
use vmm_monitor::session::{Built, End, Observer};
use vmm_monitor::snapshot::Snapshot;

use super::agent::renewal::CopyOptions;
use super::flags::with_flags;
use super::options;

const EXAMPLES: &str = "\
Examples:
  vmm snapshot create web web.snap
  vmm restore web.snap
      a virtual machine that goes on where web was, on this terminal
  vmm restore -d --name web2 web.snap
      another, in the background
  vmm restore -d --renew --hostname web3 --machine-id web.snap
      another with names of its own; its name is printed once the agent in its guest has done that
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
    renewal: CopyOptions,
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
        self.options.renewal = Some(self.renewal);
        Ok(self.options)
    }
}

/// Has the agent of the guest make it another machine as soon as it runs. On a thread: the run waits for no guest.
pub struct Renewer(Option<(CopyOptions, String)>);

impl Renewer {
    /// For the session of this name.
    pub fn new(options: CopyOptions, name: &str) -> Self {
        Self(Some((options, name.to_owned())))
    }
}

impl Observer for Renewer {
    fn built(&mut self, _: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        // A machine that comes after a reboot is no copy.
        if let Some((options, name)) = self.0.take() {
            thread::Builder::new().name("renewal".to_owned()).spawn(move || {
                if let Err(failure) = options.apply(&name) {
                    if options.is_required() { failure.print(with_flags) } else { failure.warn(with_flags) }
                }
            })?;
        }
        Ok(())
    }

    fn ended(&mut self, _: &End<'_>) {}
}
