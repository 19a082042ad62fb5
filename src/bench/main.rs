//! The program `vmm-bench`, which `vmm bench` runs.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use vmm_bench::command;
use vmm_command::{Code, Failure, log_output};

/// Measure virtual machines against containers and other monitors.
#[derive(Debug, Parser)]
#[command(name = "vmm bench", version, max_term_width = 110)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    work: Option<Command>,
    #[command(flatten)]
    options: command::Options,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Do the work that is measured
    #[command(hide = true)]
    Work(command::work::Options),
}

fn main() -> ExitCode {
    log_output::start(0);
    log_output::serve();
    let result = match Cli::try_parse() {
        Ok(Cli { work: Some(Command::Work(options)), .. }) => command::work::work(options),
        Ok(Cli { options, .. }) => command::bench(options),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            let _ = error.print();
            Ok(Code::Success)
        }
        Err(error) => Err(Failure::usage(&error)),
    };
    result
        .unwrap_or_else(|failure| {
            failure.print(|text| text.into());
            failure.code
        })
        .into()
}
