//! The command line: one file per command, and what they share.
//!
//! `main` picks the command, starts logging, runs it and turns what comes back into an exit code. Everything that
//! must be put back (terminal, control socket) is put back by destructors before the error is printed.

mod agent;
mod apart;
mod bench;
mod control;
mod cp;
mod detached;
mod device;
mod exec;
mod flags;
mod fork;
mod forward;
mod lab;
mod limits;
mod list;
mod logs;
mod options;
mod plan;
mod pool;
mod restore;
mod run;
mod saved;
mod silence;
mod slack;
mod snapshot;
mod step;
mod template;
mod top;
mod trace;
mod tree;
mod undo;
mod wait;
mod working_set;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::stdio::stdin;

use vmm_command::{Code, Failure, log_output};
use vmm_monitor::session;

/// The examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  vmm --kernel vmlinux --initrd initramfs.cpio --mem 512M
      boot a kernel and its initramfs, on this terminal
  vmm --kernel bzImage --disk root.img --cpus 2 --cmdline 'console=hvc0 root=/dev/vda rw'
      two CPUs, and a root file system on a disk
  vmm --disk debian.img --mem 1G
      boot the system installed on a disk; if it has several kernels, a menu waits for a second
  vmm --config vm.json --mem 2G --name web
      a configuration file, with more memory and a name
  vmm --kernel vmlinux --serial stdio --cmdline 'console=ttyS0 earlyprintk=serial'
      see the output of a kernel that dies early
  vmm --kernel vmlinux --dry-run
      show what would run, and the guest's memory map
  vmm trace --stats -- --kernel vmlinux --serial stdio
      run it, then show what its exits were and what they cost (vmm trace --help)
  vmm top web
      watch it from another terminal (vmm top --help)
  vmm trace --step --count 60 -- --kernel vmlinux
      show its first instructions: the mode of each, and what it changed
  vmm --gdb unix:gdb.sock --kernel vmlinux --cmdline 'console=hvc0 nokaslr'
      debug it from its first instruction: gdb vmlinux -ex 'target remote gdb.sock'
  vmm run -d --name web --disk debian.img --mem 1G; vmm logs -f web
      run it in the background, and follow its console
  vmm exec -it web top; vmm cp web:/etc/hosts .; vmm forward web 8080:80
      work in it, if it has the agent and --vsock (docs/agent.md)
  vmm device add web disk=data.img; vmm device remove web virtio-blk1
      another disk while it runs, and without it again, if it has --transport pci
  vmm snapshot create web web.snap; vmm restore web.snap
      save it in a folder, and start another where it was (docs/snapshot.md)
  vmm run --template --kernel vmlinux --initrd initramfs.cpio -- uname -a
      run a command in a machine of its own: the first time it boots, from then on it goes on from where it was ready
  vmm fork web --count 3
      three more that go on from where it is, as web-1, web-2 and web-3
  vmm pool start web ./web.snap --size 10; vmm pool take web
      ten copies that stand ready, of which one runs at once, as web-1 (docs/snapshot.md)
  vmm list; vmm pause web; vmm resume web; vmm stop web
      control it from another terminal
";

/// The keys of the console.
const KEYS: &str = "\
Keys, if the console or the serial port is this terminal:
  Ctrl-A x  kill the virtual machine
  Ctrl-A p  press its power button
  Ctrl-A a  send Ctrl-A to the guest (Ctrl-A Ctrl-A too)
  Ctrl-A h  show these keys
";

/// Run virtual machines on KVM.
///
/// `vmm --kernel FILE ...` is short for `vmm run --kernel FILE ...`; `vmm run --help` lists every option.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, arg_required_else_help = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a virtual machine and stay attached until it ends, or leave it in the background with -d
    Run(Box<template::Options>),
    /// Show every exit of a virtual machine as a sentence: what the guest did, who answered, what it cost
    Trace(Box<trace::Options>),
    /// Learn from tiny guests with one idea each: every exit explained, as it happened on this host
    Lab(lab::Options),
    /// Watch a running virtual machine: exits by reason, vCPU time, devices, hottest functions
    Top(Box<top::Options>),
    /// Measure virtual machines against containers and other monitors
    Bench(bench::Options),
    /// List running virtual machines
    #[command(visible_alias = "ps")]
    List(list::Options),
    /// Show the status of a virtual machine
    Status(control::StatusOptions),
    /// Pause a virtual machine: stop its CPUs and quiesce its devices
    Pause(control::AllOptions),
    /// Resume a paused virtual machine
    Resume(control::AllOptions),
    /// Press the power button of a virtual machine and wait until it has ended
    Stop(control::StopOptions),
    /// Kill a virtual machine, without asking its guest
    Kill(control::AllOptions),
    /// Add devices to a running virtual machine, remove them, or list them
    Device(device::Options),
    /// Save a running virtual machine in a folder, or look at one that was saved
    Snapshot(snapshot::Options),
    /// Start a virtual machine where a saved one stopped
    Restore(Box<restore::Options>),
    /// Start copies of a running or saved virtual machine, in the background
    Fork(Box<fork::Options>),
    /// Keep copies of a virtual machine ready, and take them when they are needed
    Pool(Box<pool::Options>),
    /// List or remove what vmm run --template keeps
    Template(template::ListOptions),
    /// Show what the guest of a virtual machine in the background wrote to its console
    Logs(logs::Options),
    /// Wait until virtual machines have ended, and print their exit codes
    Wait(wait::Options),
    /// Remove what is kept of virtual machines that ran in the background
    Rm(wait::RemoveOptions),
    /// Run a command in a guest that has the agent, with streams, terminal, signals and exit code
    Exec(exec::Options),
    /// Open a login shell in a guest that has the agent
    Shell(exec::ShellOptions),
    /// Copy files into a guest that has the agent, or out of it
    Cp(cp::Options),
    /// Forward ports of this host to a guest that has the agent, until it is interrupted
    Forward(forward::Options),
    /// Put the agent into a guest's disk image, or set a running guest's clock, seed, names and network
    Agent(agent::command::Options),
    /// Connect standard input and output to a guest's ssh server: ssh -o ProxyCommand='vmm ssh-proxy NAME' root@NAME
    SshProxy(forward::ProxyOptions),
}

/// Runs the command that the process was started with.
fn main() -> ExitCode {
    slack::share_heap();
    let command = match parse(std::env::args_os().collect()) {
        Ok(command) => command,
        Err(code) => return code,
    };
    session::end_on_panic(log_output::say);
    raise_file_limit();
    make_room_for_files();
    log_output::start(match &command {
        Command::Run(options) => options.verbose(),
        Command::Restore(options) => options.verbose(),
        Command::Fork(options) => options.verbose(),
        Command::Pool(options) => options.verbose(),
        _ => 0,
    });
    let result = match command {
        Command::Run(options) => options.run(),
        Command::Trace(options) => trace::trace(*options),
        Command::Lab(options) => lab::lab(options),
        Command::Top(options) => top::top(*options),
        Command::Bench(options) => bench::bench(&options),
        Command::List(options) => list::list(options),
        Command::Status(options) => control::status(options),
        Command::Pause(options) => control::pause(options),
        Command::Resume(options) => control::resume(options),
        Command::Stop(options) => control::stop(options),
        Command::Kill(options) => control::kill(options),
        Command::Device(options) => device::device(options),
        Command::Snapshot(options) => snapshot::snapshot(options),
        Command::Restore(options) => options.into_run().and_then(run::run),
        Command::Fork(options) => fork::fork(*options),
        Command::Pool(options) => pool::pool(*options),
        Command::Template(options) => template::template(options),
        Command::Logs(options) => logs::logs(options),
        Command::Wait(options) => wait::wait(options),
        Command::Rm(options) => wait::remove(options),
        Command::Exec(options) => exec::exec(options),
        Command::Shell(options) => exec::shell(options),
        Command::Cp(options) => cp::cp(options),
        Command::Forward(options) => forward::forward(options),
        Command::Agent(options) => agent::command::agent(options),
        Command::SshProxy(options) => forward::ssh_proxy(options),
    };
    let code = result.unwrap_or_else(|failure| {
        let failure = wait::ended(failure);
        failure.print(flags::with_flags);
        failure.code
    });
    // What was logged and has not been written yet.
    log_output::say("");
    code.into()
}

/// Raises the soft limit on open files to the hard one: the usual soft limit exists for programs that call select(2), and this one
/// does not. If that fails, whoever needs one descriptor too many reports it.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Has the kernel make room for as many open files as most machines come to. It makes more where that is needed, but in a process
/// of several threads nobody can open one until an RCU grace period is over (expand_fdtable, fs/file.c): 10 ms and more.
fn make_room_for_files() {
    const ROOM: i32 = 256;
    // The number is free again at once; the room stays. Without it all goes on, in its time.
    let _ = fcntl_dupfd_cloexec(stdin(), ROOM - 1);
}

/// The options of the command that `arguments` begin with, if they are in order and ask for no help.
fn alone<T: Args>(arguments: &[OsString]) -> Option<T> {
    let command = T::augment_args(clap::Command::new("vmm"));
    T::from_arg_matches(&command.try_get_matches_from(arguments.get(1..)?).ok()?).ok()
}

/// Reads the arguments. Prints what there is to say about them; an error is the exit code.
fn parse(mut arguments: Vec<OsString>) -> Result<Command, ExitCode> {
    let first = arguments.get(1).and_then(|argument| argument.to_str()).unwrap_or_default().to_owned();
    if first.starts_with('-') && !["-h", "--help", "-V", "--version"].contains(&first.as_str()) {
        arguments.insert(1, "run".into());
    }
    // Building all commands with their help costs a tenth of the time in which a small guest starts, and a third of that of a
    // command in a guest, so it is left for when there is something to say.
    let quick = match arguments.get(1).and_then(|argument| argument.to_str()) {
        Some("run") => alone(&arguments).map(|options| Command::Run(Box::new(options))),
        Some("exec") => alone(&arguments).map(Command::Exec),
        Some("restore") => alone(&arguments).map(|options| Command::Restore(Box::new(options))),
        Some("fork") => alone(&arguments).map(|options| Command::Fork(Box::new(options))),
        Some("pool") => alone(&arguments).map(|options| Command::Pool(Box::new(options))),
        _ => None,
    };
    if let Some(command) = quick {
        return Ok(command);
    }
    // No command was run, whose code could be this one.
    let has_command = arguments.iter().any(|argument| argument == "--");
    let wrong = match first.as_str() {
        "exec" | "shell" => Code::Command(Code::NOT_RUN),
        "run" if has_command => Code::Command(Code::NOT_RUN),
        option if option.starts_with('-') && has_command => Code::Command(Code::NOT_RUN),
        _ => Code::BadArgument,
    };
    let after = format!("{EXAMPLES}\n{}\n{KEYS}", vmm_command::table());
    let command = Cli::command().after_help(after.clone()).mut_subcommand("run", |run| run.after_help(after));
    let parsed = command.try_get_matches_from(arguments).and_then(|m| Cli::from_arg_matches(&m));
    parsed.map(|cli| cli.command).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            Code::Success.into()
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            wrong.into()
        }
        _ => {
            Failure::usage(&error).print(flags::with_flags);
            wrong.into()
        }
    })
}
