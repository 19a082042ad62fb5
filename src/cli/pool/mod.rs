//! `vmm pool`: copies of a machine that stand ready, each in a process of its own, until they are taken.

mod start;
mod take;

use std::fmt::Write;

use clap::Subcommand;
use vmm_command::{Code, Failure, pretty, print};
use vmm_monitor::api::client::Client;
use vmm_monitor::api::protocol::Command as Order;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::config::Size;
use vmm_monitor::pool::PoolStatus;

use super::control::GRACE;
use super::detached::record::Records;
use super::flags::with_flags;
use super::wait::for_each;

const EXAMPLES: &str = "\
Examples:
  vmm pool start web ./web.snap --size 10
      ten copies of a machine that vmm snapshot create saved stand ready
  vmm pool take web
      web-1: it runs at once, and another copy is made ready
  vmm pool take web -- make -C /src test
      a command in a copy of its own, which is gone when that has ended
  vmm pool list
  vmm pool stop web
      what was taken runs on
";

/// The options of `vmm pool`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Have copies of a running or saved virtual machine stand ready, in the background
    Start(Box<start::Options>),
    /// Take copies that stand ready: they run at once, and are like those that vmm fork starts; or one for a command
    Take(Box<take::Options>),
    /// List the pools: how many copies stand ready, how many were taken, and what memory each that stands ready has for itself
    List(ListOptions),
    /// End pools, and the copies that stand ready; those that were taken run on
    Stop(StopOptions),
}

#[derive(Debug, clap::Args)]
struct ListOptions {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct StopOptions {
    /// The pools' names, as vmm pool list shows them
    #[arg(required = true)]
    names: Vec<String>,
}

impl Options {
    /// How much is to be logged.
    pub fn verbose(&self) -> u8 {
        match &self.command {
            Command::Start(options) => options.verbose(),
            _ => 0,
        }
    }
}

/// `vmm pool`.
///
/// # Errors
/// There is no such pool; what it is to be of is no machine; it refuses.
pub fn pool(options: Options) -> Result<Code, Failure> {
    match options.command {
        Command::Start(options) => start::start(*options),
        Command::Take(options) => take::take(*options),
        Command::List(options) => list(&options),
        Command::Stop(options) => Ok(for_each(&options.names, |name| stop(name))),
    }
}

fn list(options: &ListOptions) -> Result<Code, Failure> {
    let registry = Registry::of_user();
    let mut pools = Vec::new();
    let code = for_each(registry.pools()?, |name| {
        pools.push(Client::connect_pool(&registry, &name)?.ask_pool(Order::Status)?);
        Ok(())
    });
    // What killed ones have left.
    if let Err(failure) = Records::of_user().and_then(|records| records.sweep(&registry)) {
        failure.warn(with_flags);
    }
    print(&if options.json { pretty(&pools)? } else { table(&pools) })?;
    Ok(code)
}

fn table(pools: &[PoolStatus]) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = writeln!(
        text,
        "{:<24} {:>8} {:>6} {:>6} {:>8} {:>8}  SOURCE",
        "NAME", "PID", "READY", "SIZE", "TAKEN", "EACH"
    );
    for pool in pools {
        let PoolStatus { name, pid, source, size, ready, taken, private_bytes, failure, gave_up } = pool;
        let each = private_bytes.map_or("-".to_owned(), |bytes| Size::from_bytes(bytes).to_string());
        let _ = write!(text, "{name:<24} {pid:>8} {ready:>6} {size:>6} {taken:>8} {each:>8}  {source}");
        let _ = match failure {
            Some(failure) if *gave_up => writeln!(text, " (gave up: {failure})"),
            Some(failure) => writeln!(text, " (tries again: {failure})"),
            None => writeln!(text),
        };
    }
    text
}

fn stop(name: &str) -> Result<(), Failure> {
    let mut client = Client::connect_pool(&Registry::of_user(), name)?;
    client.ask_pool(Order::Stop { timeout_seconds: None })?;
    Ok(client.wait_for_end(GRACE)?)
}
