//! `vmm pool take`: copies that run from then on, or one that is there for a command.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use vmm_command::{Code, Failure, print};
use vmm_monitor::api::client::Client;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::config::check_name;
use vmm_monitor::pool::MAX_TAKEN;

use crate::agent::renewal::{CopyOptions, renew_and_exec};
use crate::exec::{Carrier, How, leave, no_command, not_run};
use crate::flags::with_flags;
use crate::wait::{for_each, worse};

const EXAMPLES: &str = "\
Examples:
  vmm pool take web
      web-1: it runs at once, and another copy is made ready
  vmm pool take web --count 5 --name try
      try-1 to try-5
  vmm pool take web -- make -C /src test
      a command in a copy of its own, which is gone when that has ended
";

/// The options of `vmm pool take`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[group(skip)]
pub struct Options {
    /// The pool's name, as vmm pool list shows it
    #[arg(value_name = "POOL")]
    pool: String,
    /// How many; more than stand ready are made while it waits
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_TAKEN)))]
    count: u32,
    /// The name of one, or of several NAME-1 and so on, by the next free numbers [default: POOL-1 and so on]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    renewal: CopyOptions,
    #[command(flatten, next_help_heading = "Options of a command in the guest")]
    how: How,
    /// Wait so many seconds for the agent to answer
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        requires = "command",
        help_heading = "Options of a command in the guest"
    )]
    timeout: u32,
    /// What the guest's agent is to run, with this process's streams, signals and exit code; implies --renew. The copy is killed when
    /// this process ends, and nothing is kept of it
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "count")]
    command: Vec<OsString>,
}

/// `vmm pool take`.
///
/// # Errors
/// There is no such pool, or it has no machines; what the guests' agents are to do is not done.
pub fn take(options: Options) -> Result<Code, Failure> {
    let named = options.name.as_deref().map_or(Ok(()), check_name).map_err(Failure::from);
    if !options.command.is_empty() {
        return named.and_then(|()| run(options)).map_err(not_run);
    }
    named?;
    if options.how != How::default() {
        return Err(no_command());
    }
    let Options { pool, count, name, renewal, .. } = options;
    let mut client = Client::connect_pool(&Registry::of_user(), &pool)?;
    let taken = client.take(count, name, !renewal.is_required(), false)?;
    let mut code = for_each(&taken.names, |name| {
        renewal.await_required(name)?;
        print(&format!("{name}\n"))
    });
    if let Some(error) = taken.error {
        let missing = count as usize - taken.names.len().min(count as usize);
        let failure = not_taken(anyhow!("{missing} of {count} could not be taken: {error}"));
        failure.print(with_flags);
        code = worse(code, failure.code);
    }
    Ok(code)
}

fn not_taken(error: anyhow::Error) -> Failure {
    Failure::new(Code::Host, error).hint(Some("see how the pool is: vmm pool list"))
}

/// Takes one for the command.
fn run(Options { pool, name, renewal, how, timeout, command, .. }: Options) -> Result<Code, Failure> {
    let mut exec = how.exec(command)?;
    let changes = renewal.into_changes();
    let carrier = Carrier::begin(&mut exec, leave)?;
    let registry = Registry::of_user();
    // The machine ends with this connection.
    let mut client = Client::connect_pool(&registry, &pool)?;
    let taken = client.take(1, name, false, true)?;
    let Some(name) = taken.names.first() else {
        let why = taken.error.unwrap_or_else(|| "it has ended".to_owned());
        return Err(not_taken(anyhow!("no copy could be taken: {why}")));
    };
    let socket = registry.vsock(name);
    let dial = || {
        UnixStream::connect(&socket).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                let error = anyhow!("its machines have no vsock device, by which their agents are reached");
                let hint = "make a pool of one that has: vmm run --vsock --kernel ...";
                Failure::new(Code::Host, error).hint(Some(hint))
            }
            _ => Failure::new(Code::Host, anyhow::Error::new(error).context(format!("cannot reach {name}"))),
        })
    };
    let deadline = Instant::now() + Duration::from_secs(timeout.into());
    carrier.carry(renew_and_exec(dial, &exec, &changes, deadline)?)
}
