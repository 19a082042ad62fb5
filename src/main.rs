//! Entry of the `vmm` command: everything is in `vmm::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main()
}
