//! `vmm agent`: the agent itself, and what it does that is no command of the guest's.

use clap::Subcommand;

use super::{install, order, renewal};
use vmm_command::{Code, Failure};

/// The options of `vmm agent`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put the agent into a guest that does not run: into its disk image, or the folder that is its root
    Install(install::Options),
    /// Set a guest's clock to the host's time
    Time(order::Options),
    /// Mix fresh random bytes into a guest's pool, and have it use them at once
    Reseed(order::Options),
    /// Set a guest's host name, until it boots anew
    Hostname(order::HostnameOptions),
    /// Make a guest that is a copy another one: seed, clock, generation, and what its programs do about it
    Renew(renewal::Options),
    /// Set up a network interface of a guest (IPv4), until it boots anew
    Network(order::NetworkOptions),
}

/// `vmm agent`.
///
/// # Errors
/// Those of its commands.
pub fn agent(options: Options) -> Result<Code, Failure> {
    match options.command {
        Command::Install(options) => install::install(options),
        Command::Time(options) => order::time(&options),
        Command::Reseed(options) => order::reseed(&options),
        Command::Hostname(options) => order::hostname(options),
        Command::Renew(options) => renewal::renew(&options),
        Command::Network(options) => order::network(options),
    }
}
