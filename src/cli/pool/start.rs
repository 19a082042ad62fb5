//! `vmm pool start`: the command's own process, that of the pool, and those of its spares. Each starts this program once more for the
//! next, as it was called itself.

use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use anyhow::anyhow;
use rustix::io::fcntl_dupfd_cloexec;
use vmm_command::{Code, Failure, log_output};
use vmm_monitor::api::registry::Registry;
use vmm_monitor::config::{Console, VmConfig};
use vmm_monitor::pool::{self, MAX_SIZE, Maker, Reason, Spare};
use vmm_monitor::snapshot::{self, Parts, Snapshot};

use crate::agent::renewal::CopyOptions;
use crate::detached::record::Records;
use crate::detached::{self, Starting, leave_terminal, say_name};
use crate::{fork, options, run};

const EXAMPLES: &str = "\
Examples:
  vmm pool start web web
      the virtual machine web stands still for some milliseconds, and runs on; copies of it are ready
  vmm pool start web ./web.snap --size 10
      of one that vmm snapshot create saved
";

/// The options of `vmm pool start`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[group(skip)]
pub struct Options {
    /// What to call the pool
    #[arg(value_name = "POOL")]
    pool: String,
    /// The virtual machine's name, as vmm list shows it, or the folder that vmm snapshot create made, with a slash in its path
    #[arg(value_name = "NAME|FOLDER")]
    source: String,
    /// How many copies stand ready
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SIZE)))]
    size: u32,
    /// This is the process of a copy: its name until it is taken.
    #[arg(long, hide = true, requires = "parts")]
    spare: Option<String>,
    /// Where this process has what copies go on from.
    #[arg(long, hide = true, value_delimiter = ',')]
    parts: Vec<u32>,
    #[command(flatten)]
    options: options::Options,
}

impl Options {
    /// How much is to be logged.
    pub fn verbose(&self) -> u8 {
        self.options.verbose
    }
}

/// `vmm pool start`.
///
/// # Errors
/// What the pool is to be of is no machine, or not one of which there can be several; its first copies cannot be made.
pub fn start(options: Options) -> Result<Code, Failure> {
    match options.spare.clone() {
        Some(name) => spare(&name, options),
        None if options.parts.is_empty() => begin(options),
        None => keep(&options),
    }
}

/// The command's own process.
fn begin(options: Options) -> Result<Code, Failure> {
    vmm_monitor::config::check_name(&options.pool)?;
    let options::Options { name, dry_run, .. } = &options.options;
    let alone = [("--name", name.is_some()), ("--dry-run", *dry_run)].into_iter().find(|(_, given)| *given);
    if let Some(option) = alone.map(|(option, _)| option).or_else(|| options.options.of_one()) {
        let error = anyhow!("{option} is for one machine, and a pool has several");
        return Err(Failure::new(Code::BadArgument, error).hint(Some(format!("leave {option} out"))));
    }
    let snapshot = fork::child(fork::snapshot(&options.source)?, &options.options)?;
    // Before there are as many errors as copies.
    let limits = options.options.limits.clone();
    several(options.options.resolve_saved(&snapshot.config)?)?;
    limits.make_way()?;
    let parts = snapshot.into_parts()?.into_descriptors();
    Starting::begin(&["--parts", &fork::inherited(&parts)?])?.finish(|_| Ok(()))
}

/// That there can be several machines of `config` at a time.
fn several(mut config: VmConfig) -> Result<(), Failure> {
    config.console = Console(Some(config.console()));
    let what = match snapshot::network_of_one(&config) {
        Some(network) => format!("the network {network} is for one machine"),
        None if snapshot::child(config.clone()) != config => {
            "published ports, files and sockets of the host are for one machine".to_owned()
        }
        None => return Ok(()),
    };
    let hint =
        "leave that out: each copy has a console of its own, vmm logs; ports can be forwarded, vmm forward";
    Err(Failure::new(Code::BadArgument, anyhow!("{what}, and a pool has several")).hint(Some(hint)))
}

/// The process of the pool.
fn keep(options: &Options) -> Result<Code, Failure> {
    // Fails for who leads a session already.
    let _ = rustix::process::setsid();
    let records = Records::of_user()?;
    records.sweep(&Registry::of_user())?;
    let mut program = Program { name: options.pool.clone(), records };
    let starter = fcntl_dupfd_cloexec(io::stdout(), 3).map_err(|error| Failure::new(Code::Host, error))?;
    pool::run(&options.pool, &options.source, options.size, starter, &mut program).map_err(|error| {
        match error {
            pool::Error::Api(error) => error.into(),
            pool::Error::Config(error) => error.into(),
            pool::Error::Spare(Reason { error, hint, code }) => {
                Failure::new(code.map_or(Code::Host, Code::Other), anyhow!(error)).hint(hint)
            }
            pool::Error::Maker(error) => Failure::new(Code::Host, anyhow::Error::from_boxed(error)),
        }
    })?;
    Ok(Code::Success)
}

/// This program, as a pool needs it.
struct Program {
    name: String,
    records: Records,
}

impl Maker for Program {
    fn make(&mut self, spare: &str, socket: OwnedFd) -> io::Result<Child> {
        let mut command = detached::again(&["--spare", spare]);
        command.stdin(Stdio::from(socket)).stdout(Stdio::null()).spawn()
    }

    fn ready(&mut self) -> Result<(), Box<dyn Error + Send + Sync>> {
        say_name(&self.name)?;
        // What it says later is in its status.
        log_output::serve();
        Ok(leave_terminal()?)
    }

    fn clean_up(&mut self, spare: &str) {
        if let Err(failure) = self.records.of(spare).remove_all() {
            failure.warn(crate::flags::with_flags);
        }
    }
}

/// The process of a spare.
fn spare(name: &str, mut options: Options) -> Result<Code, Failure> {
    let socket = fcntl_dupfd_cloexec(io::stdin(), 3).map_err(|error| Failure::new(Code::Host, error))?;
    let pool = Spare::new(name, socket);
    let run = || {
        let snapshot = fork::child(Snapshot::of(Parts::inherited(&options.parts)?)?, &options.options)?;
        options.options.snapshot = Some(snapshot);
        options.options.spare = Some(pool.clone());
        options.options.renewal = Some(CopyOptions::default());
        run::run(options.options)
    };
    run().or_else(|failure| {
        let (error, hint) = failure.words(crate::flags::with_flags);
        match pool.failed(&Reason { error, hint, code: Some(failure.code.number()) }) {
            true => Ok(failure.code),
            false => Err(failure),
        }
    })
}
