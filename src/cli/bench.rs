//! `vmm bench`: runs the program `vmm-bench` from the same folder.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context;
use vmm_command::{Code, Failure};

/// The options of `vmm bench`, which are those of `vmm-bench`.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct Options {
    /// vmm bench --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

/// `vmm bench`. Returns only if the program cannot be run.
///
/// # Errors
/// There is no such program.
pub fn bench(options: &Options) -> Result<Code, Failure> {
    let host = |error| Failure::new(Code::Host, error);
    let own = std::env::current_exe().context("find this program").map_err(host)?;
    let program = own.with_file_name("vmm-bench");
    let error = Command::new(&program).args(&options.options).exec();
    let error = anyhow::Error::new(error).context(format!("run {}", program.display()));
    Err(host(error).hint(Some("build it beside this program: cargo build --release -p vmm -p vmm-bench")))
}
