//! The command line: one file per command, and what they share.
//!
//! [`main`] picks the command, starts logging, runs it and turns what comes back into an exit code. Everything that
//! must be put back (terminal, control socket) is put back by destructors before the error is printed.

mod bench;
mod bench_work;
mod control;
mod exit;
mod lab;
mod list;
mod log_output;
mod options;
mod plan;
mod run;
mod scratch;
mod silence;
mod step;
mod top;
mod trace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub use exit::{Code, Failure};

/// The examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  vmm --kernel vmlinux --initrd initramfs.cpio --mem 512M
      boot a kernel to its initramfs, on this terminal
  vmm --kernel bzImage --disk root.img --cpus 2 --cmdline 'console=hvc0 root=/dev/vda rw'
      two CPUs, and the root file system on a disk
  vmm --disk debian.img --mem 1G
      a disk with an installed system: its own kernel and initrd, and a second to choose if there are several
  vmm --config vm.json --mem 2G --name web
      everything from a file, but with other memory, under a name
  vmm --kernel vmlinux --serial stdio --cmdline 'console=ttyS0 earlyprintk=serial'
      watch a kernel that dies early
  vmm --kernel vmlinux --dry-run
      show what would run, and where everything is in the guest's memory
  vmm trace --stats -- --kernel vmlinux --serial stdio
      run it, and tell what its exits were and what they cost (vmm trace --help)
  vmm top web
      watch what it does, from another terminal (vmm top --help)
  vmm trace --step --count 60 -- --kernel vmlinux
      its first instructions, with the mode of each and what it changed
  vmm --gdb tcp:1234 --kernel vmlinux --cmdline 'console=hvc0 nokaslr'
      gdb vmlinux -ex 'target remote :1234' has it from the first instruction on
  vmm list; vmm pause web; vmm resume web; vmm stop web
      from another terminal
";

/// The keys of the console.
const KEYS: &str = "\
Keys, where the console or the serial port is this terminal:
  Ctrl-A x  end the virtual machine at once
  Ctrl-A p  press its power button
  Ctrl-A a  send Ctrl-A to the guest (Ctrl-A Ctrl-A too)
  Ctrl-A h  show these keys
";

/// Run virtual machines on KVM.
///
/// `vmm --kernel FILE ...` is short for `vmm run --kernel FILE ...`; `vmm run --help` lists every option of it.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, arg_required_else_help = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a virtual machine and stay with it until it ends
    Run(Box<options::Options>),
    /// Show every exit of a virtual machine as a sentence: what the guest did, who answered, what it cost
    Trace(Box<trace::Options>),
    /// Learn from tiny guests of one idea each: every exit told, and what came of it on this host
    Lab(lab::Options),
    /// Watch what a running virtual machine does: exits by reason, vCPUs' time, devices, hottest places
    Top(Box<top::Options>),
    /// Measure virtual machines against containers and other monitors
    Bench(Box<bench::Options>),
    /// Do the work that is measured
    #[command(hide = true)]
    BenchWork(bench_work::Options),
    /// List the virtual machines that are running
    List(list::Options),
    /// Tell how a virtual machine is
    Status(control::Options),
    /// Park the CPUs of a virtual machine
    Pause(control::Options),
    /// Let a paused virtual machine run on
    Resume(control::Options),
    /// Press the power button of a virtual machine and wait until it is gone
    Stop(control::StopOptions),
    /// End a virtual machine without asking its guest
    Kill(control::Options),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let command = match parse(std::env::args_os().collect()) {
        Ok(command) => command,
        Err(code) => return code,
    };
    log_output::start(if let Command::Run(options) = &command { options.verbose } else { 0 });
    let result = match command {
        Command::Run(options) => run::run(*options),
        Command::Trace(options) => trace::trace(*options),
        Command::Lab(options) => lab::lab(options),
        Command::Top(options) => top::top(*options),
        Command::Bench(options) => bench::bench(*options),
        Command::BenchWork(options) => bench_work::bench_work(options),
        Command::List(options) => list::list(options),
        Command::Status(options) => control::status(options),
        Command::Pause(options) => control::pause(options),
        Command::Resume(options) => control::resume(options),
        Command::Stop(options) => control::stop(options),
        Command::Kill(options) => control::kill(options),
    };
    match result {
        Ok(code) => code.into(),
        Err(failure) => {
            failure.print();
            failure.code.into()
        }
    }
}

/// Reads the arguments. An error is an exit code, whatever there is to say having been said.
fn parse(mut arguments: Vec<OsString>) -> Result<Command, ExitCode> {
    let first = arguments.get(1).and_then(|argument| argument.to_str()).unwrap_or_default();
    if first.starts_with('-') && !["-h", "--help", "-V", "--version"].contains(&first) {
        arguments.insert(1, "run".into());
    }
    // Building all commands with their help costs a tenth of the time in which a small guest starts, so it is left for
    // when there is something to say.
    if arguments.get(1).is_some_and(|argument| argument == "run") {
        let run = options::Options::augment_args(clap::Command::new("vmm"));
        let parsed = run.try_get_matches_from(&arguments[1..]);
        if let Ok(options) = parsed.and_then(|m| options::Options::from_arg_matches(&m)) {
            return Ok(Command::Run(Box::new(options)));
        }
    }
    let after = format!("{EXAMPLES}\n{}\n{KEYS}", exit::table());
    let command = Cli::command().after_help(after.clone()).mut_subcommand("run", |run| run.after_help(after));
    let parsed = command.try_get_matches_from(arguments).and_then(|m| Cli::from_arg_matches(&m));
    parsed.map(|cli| cli.command).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            Code::Success.into()
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            Code::BadArgument.into()
        }
        _ => {
            Failure::usage(&error).print();
            Code::BadArgument.into()
        }
    })
}
