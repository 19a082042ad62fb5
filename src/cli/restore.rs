//! `vmm restore`: a run that begins where a saved machine stopped, and whose guest is told so.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use vmm_command::Failure;
use vmm_monitor::config::VmConfig;
use vmm_monitor::machine::Handle;
use vmm_monitor::memory::Way;
use vmm_monitor::pool::Wanted;
use vmm_monitor::session::{Built, End, Observer};
use vmm_monitor::snapshot::Snapshot;
use vmm_monitor::threads::{self, Role};
use vmm_monitor::vsock::Dialer;

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
    /// How memory gets into the machine: map (its file is mapped, and shared with others that are restored from it), copy (all of it
    /// first), lazy (what is touched, by userfaultfd) or auto: map, of a compressed snapshot lazy where that is allowed, else copy,
    /// and into huge pages copy
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = way)]
    memory: Way,
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
        let mut snapshot = Snapshot::open(&self.snapshot)?;
        snapshot.go_by(self.memory);
        self.options.snapshot = Some(snapshot);
        self.options.renewal = Some(self.renewal);
        Ok(self.options)
    }
}

/// As `--memory` has it.
fn way(text: &str) -> Result<Way, String> {
    Ok(match text {
        "auto" => Way::Auto,
        "map" => Way::Map,
        "copy" => Way::Copy,
        "lazy" => Way::Lazy,
        _ => return Err("auto, map, copy or lazy".to_owned()),
    })
}

/// Has the agent of the guest make it another machine as soon as it runs. On a thread: the run waits for no guest.
pub struct Renewer<'a> {
    /// None once it is done.
    options: Option<CopyOptions>,
    name: Option<String>,
    config: &'a VmConfig,
    machine: Option<(Handle, Option<Dialer>)>,
}

impl<'a> Renewer<'a> {
    /// For the session of this name, or for one that stands ready and has none yet, of the machine that `config` describes.
    pub fn new(options: CopyOptions, name: Option<&str>, config: &'a VmConfig) -> Self {
        Self { options: Some(options), name: name.map(str::to_owned), config, machine: None }
    }

    fn begin(&mut self) -> io::Result<()> {
        let Some(name) = self.name.take() else { return Ok(()) };
        // A machine that comes after a reboot is no copy.
        let Some(options) = self.options.take() else { return Ok(()) };
        let Some((machine, dialer)) = self.machine.clone() else { return Ok(()) };
        let config = self.config.clone();
        let renew = move || {
            if let Err(failure) = options.apply_here(&name, &config, dialer, || machine.kill()) {
                if options.is_required() { failure.print(with_flags) } else { failure.warn(with_flags) }
            }
        };
        threads::spawn(Role::Owner("renewal"), renew).map(drop)
    }
}

impl Observer for Renewer<'_> {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.machine = Some((built.machine.handle(), built.dialer.clone()));
        Ok(self.begin()?)
    }

    fn taken(&mut self, wanted: &Wanted) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.name = wanted.renew.then(|| wanted.name.clone());
        Ok(self.begin()?)
    }

    fn ended(&mut self, _: &End<'_>) {}
}
