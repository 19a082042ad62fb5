//! `vmm agent`: the agent itself, and what it does that is no command of the guest's.

use clap::Subcommand;

use super::install;
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
}

/// `vmm agent`.
///
/// # Errors
/// Those of its commands.
pub fn agent(options: Options) -> Result<Code, Failure> {
    match options.command {
        Command::Install(options) => install::install(options),
    }
}
