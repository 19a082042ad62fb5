//! `vmm run --template`: a machine that boots once, and from then on goes on from where its guest was ready; and a command after
//! `--`, which is all that the machine is there for.

mod list;
mod task;

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::anyhow;

use super::agent::renewal::{Changes, CopyOptions};
use super::exec::{How, no_command, not_run};
use super::options;
use super::run::{self, Place, RunOptions, live};
use task::{Command, Signs, Work};
use vmm_command::{Code, Failure, print};
use vmm_monitor::config::{CharTarget, Console, OutputFile, Overlay, VmConfig, Vsock};
use vmm_monitor::snapshot::{self, Found, Templates};

pub use list::{Options as ListOptions, template};
pub use task::Task;

/// The options of `vmm run`.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct Options {
    #[command(flatten)]
    options: options::Options,
    /// Boot once, until the guest is ready, and keep it as it is then; from then on the same command line goes on from there, and does
    /// not boot. A guest is ready once its agent answers (--vsock), or says so (--boot-marks: it writes 123 to port 0x80). What it
    /// writes to disks is thrown away at the end. What was changed is booted anew: kernel, initrd, disks, options, host, vmm
    #[arg(long, overrides_with = "no_template")]
    template: bool,
    /// Boot, as without --template
    #[arg(long, overrides_with = "template")]
    no_template: bool,
    /// With --template: boot, and keep that in place of what is there
    #[arg(long, requires = "template")]
    rebuild: bool,
    #[command(flatten, next_help_heading = "Options of a command in the guest")]
    how: How,
    #[command(flatten, next_help_heading = "Options of a command in the guest")]
    changes: Changes,
    /// What the guest's agent is to run, with this process's streams, signals and exit code; the machine is killed when it has ended.
    /// Implies --vsock; the consoles are not on this terminal
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Options {
    /// How much is to be logged.
    pub fn verbose(&self) -> u8 {
        self.options.verbose
    }

    /// Runs it.
    ///
    /// # Errors
    /// The machine or its template cannot be; the command was not run.
    pub fn run(self) -> Result<Code, Failure> {
        let has_command = !self.command.is_empty();
        if !has_command && (self.how != How::default() || !self.changes.are_none()) {
            return Err(no_command());
        }
        if !self.template && !has_command {
            return run::run(self.options);
        }
        let result = self.begin();
        if has_command { result.map_err(not_run) } else { result }
    }

    fn begin(self) -> Result<Code, Failure> {
        let Self { mut options, template, rebuild, how, changes, command, .. } = self;
        let has_command = !command.is_empty();
        refuse_contradictions(&options, template, has_command)?;
        if options.detach && !options.detached {
            return run::run(options);
        }
        let (mut run_options, place) = (RunOptions::of(&options)?, Place::of(&options));
        let is_dry = std::mem::take(&mut options.dry_run);
        let mut config = options.resolve()?;
        if has_command {
            make_room_for_command(&mut config);
        }
        if template {
            throw_writes_away(&mut config)?;
        }
        let signs = Signs::of(&config, has_command)?;
        if is_dry {
            print(&super::plan::plan(config)?)?;
            return Ok(Code::Success);
        }
        let command = match has_command {
            true => Some(Command::begin(how.exec(command)?, changes)?),
            false => None,
        };
        let mut work = Work { new: None, boots: true, signs, command };
        if template {
            match templates()?.find(&config, rebuild)? {
                Found::Nothing(new) => work.new = Some(*new),
                Found::Template(template) => {
                    // The rest is as it is said here: only host's ends may differ.
                    config.disk.clone_from(&template.config.disk);
                    work.boots = false;
                    let renewal = (!has_command).then(CopyOptions::default);
                    run_options.go_on_from(*template, renewal);
                }
            }
        }
        run_options.fit(&mut config, None, &place)?;
        if work.has_any() {
            run_options.set_task(Task::new(work));
        }
        live(config, run_options, None)
    }
}

fn refuse_contradictions(
    options: &options::Options,
    template: bool,
    has_command: bool,
) -> Result<(), Failure> {
    let (what, hint) = match () {
        () if has_command && options.detach => (
            "a command has this terminal, and -d gives it up",
            "drop -d; or drop the command, and use vmm exec",
        ),
        () if options.gdb.is_some() && template => {
            ("gdb waits for the first instruction, and a template is not begun there", "drop --template")
        }
        () if options.gdb.is_some() => ("a guest that waits for gdb runs no command", "drop --gdb"),
        () => return Ok(()),
    };
    Err(Failure::new(Code::BadArgument, anyhow!(what)).hint(Some(hint)))
}

/// The command has the terminal, and is reached by the socket device.
fn make_room_for_command(config: &mut VmConfig) {
    config.vsock.get_or_insert_with(Vsock::default);
    let nowhere = || CharTarget::File(OutputFile { path: "/dev/null".into(), max: None });
    let mut console = config.console();
    let ends = [&mut console, &mut config.serial].into_iter();
    let ends = ends.chain(config.port.iter_mut().map(|port| &mut port.to));
    ends.filter(|end| **end == CharTarget::Stdio).for_each(|end| *end = nowhere());
    config.console = Console(Some(console));
}

/// Disks are as they were when the guest was ready, each time.
fn throw_writes_away(config: &mut VmConfig) -> Result<(), Failure> {
    for disk in config.disk.iter_mut().filter(|disk| !disk.readonly) {
        if let Some(Overlay::Kept(path)) = &disk.overlay {
            let error = anyhow!(
                "each run from a template has its disks anew, and overlay={} would keep them",
                path.display()
            );
            let hint = "write overlay without a file, or drop --template";
            return Err(Failure::new(Code::BadArgument, error).hint(Some(hint)));
        }
        disk.overlay = Some(Overlay::Temporary);
    }
    if let Some(network) = snapshot::network_of_one(config) {
        let error = anyhow!("its network is {network}, which one virtual machine can be on");
        return Err(Failure::new(Code::BadArgument, error).hint(Some("give it another: --net user")));
    }
    Ok(())
}

/// Those of this user: in `$XDG_CACHE_HOME/vmm/templates` or `~/.cache/vmm/templates`; root without a home has `/var/cache`.
fn templates() -> Result<Templates, Failure> {
    let place = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || place("HOME").map(|home| home.join(".cache"));
    let of_root = || rustix::process::geteuid().is_root().then(|| PathBuf::from("/var/cache"));
    let hint = "name a directory of your own: export XDG_CACHE_HOME=$(mktemp -d)";
    let failed = |error: anyhow::Error| Failure::new(Code::Host, error).hint(Some(hint));
    let cache = place("XDG_CACHE_HOME").or_else(home).or_else(of_root);
    let folder = cache
        .ok_or_else(|| failed(anyhow!("there is no place for templates: no HOME")))?
        .join("vmm/templates");
    let what = format!("cannot keep templates in {}", folder.display());
    Templates::at(folder).map_err(|error| failed(anyhow::Error::new(error).context(what)))
}
