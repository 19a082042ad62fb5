//! `rig COMMAND`: runs COMMAND where /dev/kvm boots real guests, with the host's root, working
//! directory and environment, and returns its output and exit code. Tests and `make` call it.
//!
//! `host` tells what this host's KVM is and runs commands on it; otherwise `packages` installs
//! and fetches, `boot_files` keeps the cache, `machine` starts QEMU (by `snapshot` when one is there)
//! and `session` carries the command's input, output and end. `init/` is the other side.

mod boot_files;
mod host;
mod machine;
mod memory_root;
mod options;
mod packages;
mod process;
mod qmp;
mod session;
mod snapshot;
mod terminal;

use clap::Parser;
use options::{Options, Place};
use rig_init::EXIT_RIG;

fn main() {
    let options = Options::parse();
    let code = run(&options).unwrap_or_else(|error| {
        options::warn(format!("error: {error:#}"));
        EXIT_RIG
    });
    process::end_all();
    std::process::exit(code);
}

fn run(options: &Options) -> anyhow::Result<i32> {
    let on_host = match options.place {
        Place::Host => true,
        Place::Rig => false,
        Place::Auto => host::kvm_runs_linux(),
    };
    if on_host {
        options.say("running on this host's own KVM");
        return host::run(options);
    }
    packages::ensure_tools(options)?;
    let files = boot_files::prepare(options)?;
    session::run(options, &files)
}
