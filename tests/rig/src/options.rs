//! The command line of `rig`, and nothing about how it is carried out.

use clap::{Parser, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  rig -- cargo test --test boot        run tests where /dev/kvm boots Linux
  rig --tty -- target/debug/vmm --kernel bzImage
  rig --icount -- sh -c 'date +%N; target/release/vmm --kernel bzImage; date +%N'

Exit codes: the command's own; 128+N when signal N ended it; 124 when it ran out of time;
125 when the rig itself failed; 126 and 127 when the command cannot be executed or found.";

/// Runs COMMAND where /dev/kvm boots real guests: on this host when its KVM does, otherwise in a
/// machine emulated by QEMU that sees the host's whole root, working directory and environment.
#[derive(Debug, Parser)]
#[command(name = "rig", version, after_help = EXAMPLES)]
pub struct Options {
    /// Where to run the command.
    #[arg(long = "where", value_enum, default_value_t = Place::Auto, env = "RIG_WHERE")]
    pub place: Place,

    /// Memory of the emulated machine, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(512..=65536))]
    pub mem: u32,

    /// Processors of the emulated machine. With several it is quicker, and now and then its kernel crashes (README, Limits).
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub smp: u8,

    /// Give the emulated machine a repeatable clock: one instruction is one nanosecond. Implies
    /// --cold and --smp 1. The machine then sees copies of the command, of files and commands among
    /// the words of its arguments, of their libraries and of what --with names, instead of the
    /// host's root.
    #[arg(long)]
    pub icount: bool,

    /// With --icount: a further file, program or folder that the command needs.
    #[arg(long, value_name = "PATH", requires = "icount")]
    pub with: Vec<PathBuf>,

    /// With --icount: what the machine's random numbers begin with. Runs with another seed are other runs, each of which
    /// repeats (README, Limits: why one may have to be).
    #[arg(long, value_name = "N", default_value_t = 42, requires = "icount")]
    pub seed: u32,

    /// Boot the machine instead of starting it from a snapshot.
    #[arg(long)]
    pub cold: bool,

    /// Load kvm_amd in the machine without nested paging (shadow paging).
    #[arg(long)]
    pub no_npt: bool,

    /// Pass the caller's standard input to the command; otherwise it is /dev/null.
    #[arg(long, conflicts_with = "tty")]
    pub stdin: bool,

    /// Give the command a terminal, connected to the caller's.
    #[arg(long)]
    pub tty: bool,

    /// Seconds the command may run; 0: for ever [default: 600; with --icount 3600; with --tty 0].
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,

    /// Keep the machine's console log in FILE.
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,

    /// Say nothing but errors and retries.
    #[arg(long, short, env = "RIG_QUIET", value_parser = clap::builder::BoolishValueParser::new())]
    pub quiet: bool,

    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Where a command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Place {
    /// On the host when its KVM runs Linux, otherwise in the rig's machine.
    Auto,
    /// On the host.
    Host,
    /// In the rig's machine.
    Rig,
}

impl Options {
    /// The command's time in seconds, if it is bounded.
    pub fn time(&self) -> Option<u64> {
        let time = self.timeout.unwrap_or(match (self.tty, self.icount) {
            (true, _) => 0,
            (false, true) => 3600,
            (false, false) => 600,
        });
        (time != 0).then_some(time)
    }

    /// Tells the user `text`, unless asked to be quiet.
    pub fn say(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            warn(text);
        }
    }
}

/// Tells the user `text` in any case.
pub fn warn(text: impl std::fmt::Display) {
    eprintln!("rig: {text}");
}
