//! `vmm fork`: copies of a machine, each in a process of its own in the background.
//!
//! The machine's state and memory are files without names, or those of a folder; each child inherits them, maps the memory
//! privately, and so shares with the others what it does not write to.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::anyhow;
use rustix::io::{FdFlags, fcntl_setfd};
use vmm_command::{Code, Failure};
use vmm_monitor::api::Error;
use vmm_monitor::api::client::Client;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::snapshot::{self, Parts, Snapshot};

use super::agent::renewal::CopyOptions;
use super::control::connect;
use super::detached::Starting;
use super::flags::with_flags;
use super::wait::{for_each, worse};
use super::{options, run};

const EXAMPLES: &str = "\
Examples:
  vmm fork web
      web-1: a copy of web as it is now, with a console and sockets of its own; web stands still for some milliseconds
  vmm fork web --count 10 --name try
      try-1 to try-10
  vmm fork ./web.snap --count 2
      of a machine that vmm snapshot create saved
  vmm fork web -p 8081:80 --name second
      published ports stay with web: this one has its own
";

/// The options of `vmm fork`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[group(skip)]
pub struct Options {
    /// The virtual machine's name, as vmm list shows it, or the folder that vmm snapshot create made, with a slash in its path
    #[arg(value_name = "NAME|FOLDER")]
    source: String,
    /// How many. Each is called NAME-1, NAME-2 and so on, by the next free numbers; --name gives another NAME, or the whole name of one
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// This is the process of one of them: its name.
    #[arg(long, hide = true, requires = "parts")]
    called: Option<String>,
    /// Where this process has what it goes on from.
    #[arg(long, hide = true, value_delimiter = ',')]
    parts: Vec<u32>,
    #[command(flatten)]
    renewal: CopyOptions,
    #[command(flatten)]
    options: options::Options,
}

impl Options {
    /// How much is to be logged.
    pub fn verbose(&self) -> u8 {
        self.options.verbose
    }
}

/// `vmm fork`.
///
/// # Errors
/// The virtual machine refuses; the folder is no snapshot.
pub fn fork(mut options: Options) -> Result<Code, Failure> {
    if !options.parts.is_empty() {
        let snapshot = child(Snapshot::of(Parts::inherited(&options.parts)?)?, &options.options)?;
        (options.options.snapshot, options.options.name) = (Some(snapshot), options.called);
        options.options.renewal = Some(options.renewal);
        return run::run(options.options);
    }
    // Before there are as many errors as children.
    let snapshot = child(snapshot(&options.source)?, &options.options)?;
    let names = names(&options)?;
    if let (2.., Some(option)) = (options.count, options.options.of_one()) {
        let error = anyhow!("{option} is for one machine, and --count asks for several");
        return Err(Failure::new(Code::BadArgument, error).hint(Some(format!("leave {option} out"))));
    }
    options.options.limits.make_way()?;
    let files = snapshot.into_parts()?.into_descriptors();
    let parts = inherited(&files)?;
    let begin = |name: String| Starting::begin(&["--called", &name, "--parts", &parts]);
    let mut children = Vec::new();
    let begun = for_each(names, |name| begin(name).map(|child| children.push(child)));
    let run = children.into_iter().map(|child| {
        child.finish(|name| options.renewal.await_required(name)).unwrap_or_else(|failure| {
            failure.print(with_flags);
            failure.code
        })
    });
    Ok(run.fold(begun, worse))
}

/// Of the folder or the running machine that `source` names, for processes that will have its files.
pub fn snapshot(source: &str) -> Result<Snapshot, Failure> {
    Ok(match source.contains('/') {
        true => Snapshot::open_for_copies(Path::new(source))?,
        false => {
            let mut machine = machine(source)?;
            let disks = snapshot::unnamed_disks(&machine.files()?)?;
            let files = machine.fork(&disks)?;
            Snapshot::of(Parts::of_descriptors(files, |name| format!("the copy's {name}").into())?)?
        }
    })
}

/// The running one called `source`, which might have been meant to be a folder.
fn machine(source: &str) -> Result<Client, Failure> {
    connect(source).map_err(|error| match error {
        Error::NoSuchVm(_) if Path::new(source).is_dir() => {
            let hint = format!("to name the folder, include a slash: ./{source}");
            Failure::new(Code::Host, error).hint(Some(hint))
        }
        error => error.into(),
    })
}

/// What a child goes on from.
pub fn child(mut snapshot: Snapshot, options: &options::Options) -> Result<Snapshot, Failure> {
    snapshot.config = snapshot::child(snapshot.config);
    match snapshot::network_of_one(&snapshot.config) {
        Some(network) if !options.has_networks() => {
            let error = anyhow!("its network is {network}, which one virtual machine can be on");
            Err(Failure::new(Code::BadArgument, error).hint(Some("give its copies another: --net user")))
        }
        _ => Ok(snapshot),
    }
}

fn names(options: &Options) -> Result<Vec<String>, Failure> {
    let Options { source, count, options: options::Options { name, .. }, .. } = options;
    if let (1, Some(name)) = (*count, name) {
        return Ok(vec![name.clone()]);
    }
    let folder = || Path::new(source).file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let base = name.clone().or_else(folder).unwrap_or_default();
    let registry = Registry::of_user();
    let mut names = Vec::new();
    for number in 1u64.. {
        let name = format!("{base}-{number}");
        if !registry.alive(&name)? {
            names.push(name);
        }
        if names.len() as u32 == *count {
            break;
        }
    }
    Ok(names)
}

/// Has children inherit `files`, and tells by which numbers.
pub fn inherited(files: &[OwnedFd]) -> Result<String, Failure> {
    for file in files {
        fcntl_setfd(file, FdFlags::empty()).map_err(|error| Failure::new(Code::Host, error))?;
    }
    Ok(files.iter().map(|file| file.as_raw_fd().to_string()).collect::<Vec<_>>().join(","))
}
