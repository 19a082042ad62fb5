//! `vmm snapshot`: virtual machines in folders.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf, absolute};
use std::sync::PoisonError;

use anyhow::anyhow;
use clap::Subcommand;

use super::control::{GRACE, connect};
use super::plan::plan;
use super::wait::for_each;
use super::{saved, tree, undo};
use vmm_command::{Code, Failure, print};
use vmm_monitor::api::protocol;
use vmm_monitor::config::host_path::quoted;
use vmm_monitor::snapshot::{self, Below, Folder, Saving, Snapshot};

const EXAMPLES: &str = "\
Examples:
  vmm snapshot create web web.snap
      it stands still for a moment, and runs on
  vmm snapshot create --stop web web.snap
      it ends with that
  vmm snapshot create web later.snap --base web.snap
      what differs from web.snap alone: it is small, and restored where web.snap is
  vmm snapshot verify web.snap
  vmm restore web.snap
  vmm snapshot list; vmm snapshot tree
      those in this folder; and which lie over which
  vmm snapshot rm later.snap web.snap
      one that others need is removed with them, or with --force
";

/// The options of `vmm snapshot`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Save a running virtual machine in a new folder
    Create(CreateOptions),
    /// Show what machine was saved, as vmm run --dry-run does
    Show(FolderOptions),
    /// Check the saved state and memory against their checksums (disks have none)
    Verify(FolderOptions),
    /// List the snapshots in a folder
    #[command(visible_alias = "ls")]
    List {
        /// Where they are
        #[arg(default_value = ".")]
        folder: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show which snapshots lie over which (create --base), and what each has of its own
    Tree(tree::Options),
    /// Remove snapshots, and nothing that is none; not what others beside it or in this folder lie over
    Rm(RemoveOptions),
}

#[derive(Debug, clap::Args)]
struct CreateOptions {
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// The folder to make
    folder: PathBuf,
    /// Kill it once it is saved
    #[arg(long)]
    stop: bool,
    /// Compress its memory: smaller, and expanded by vmm restore when it is touched (docs/snapshot.md)
    #[arg(long)]
    compress: bool,
    /// Leave out memory that is as in this snapshot, which the new one needs from then on
    #[arg(long, value_name = "FOLDER")]
    base: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct RemoveOptions {
    /// Folders that vmm snapshot create made
    #[arg(value_name = "FOLDER", required = true)]
    folders: Vec<PathBuf>,
    /// Remove what others lie over, too: they cannot be restored any more
    #[arg(short, long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct FolderOptions {
    /// The folder that vmm snapshot create made
    folder: PathBuf,
}

/// `vmm snapshot`.
///
/// # Errors
/// The virtual machine refuses; or the folder is no snapshot.
pub fn snapshot(options: Options) -> Result<Code, Failure> {
    match options.command {
        Command::Create(options) => create(&options),
        Command::Show(FolderOptions { folder }) => {
            print(&plan(Snapshot::open(&folder)?.config)?)?;
            Ok(Code::Success)
        }
        Command::Verify(FolderOptions { folder }) => {
            Snapshot::open(&folder)?.verify()?;
            Ok(Code::Success)
        }
        Command::List { folder, json } => {
            let all = snapshot::list(&folder).map_err(|error| {
                let what = format!("cannot read folder {}", folder.display());
                Failure::new(Code::BadArgument, anyhow::Error::new(error).context(what))
                    .hint(Some("name one that has snapshots in it"))
            })?;
            let printed = saved::print(all.iter().map(|saved| (saved, None)), json);
            tree::warn_of_damage(&folder);
            printed
        }
        Command::Tree(options) => tree::tree(&options),
        Command::Rm(options) => Ok(remove(options)),
    }
}

/// Removes them, first those that lie over others.
fn remove(RemoveOptions { mut folders, force }: RemoveOptions) -> Code {
    if !force {
        folders.sort_by_cached_key(|folder| Reverse(height(folder)));
    }
    for_each(&folders, |folder| {
        let needed = if force { Vec::new() } else { needed_by(folder) };
        match needed.is_empty() {
            true => Ok(snapshot::remove(folder)?),
            false => Err(needed_failure(folder, &needed)),
        }
    })
}

/// How many snapshots it lies over.
fn height(folder: &Path) -> usize {
    let below = snapshot::family(&[folder.to_owned()]).unwrap_or_default();
    below.iter().filter(|relative| relative.over().is_some()).count()
}

/// Those that lie over the one in `folder` and are beside it or in the current folder, where `vmm snapshot tree` shows them.
fn needed_by(folder: &Path) -> Vec<PathBuf> {
    let Ok(folder) = folder.canonicalize() else { return Vec::new() };
    let beside = folder.parent().map(Path::to_owned);
    // A place that cannot be read has none in sight.
    let places = beside.into_iter().chain([PathBuf::from(".")]);
    let all = places.flat_map(|place| snapshot::family(&[place]).unwrap_or_default()).collect::<Vec<_>>();
    let mut needed: Vec<_> =
        snapshot::above(&all, &folder).iter().map(|it| tree::short(&it.folder)).collect();
    needed.sort();
    needed.dedup();
    needed
}

fn needed_failure(folder: &Path, needed: &[PathBuf]) -> Failure {
    let words = |separator| needed.iter().map(|it| quoted(it)).collect::<Vec<_>>().join(separator);
    let folder = quoted(folder);
    let error = anyhow!(
        "cannot remove {folder}: {} over it",
        match needed.len() {
            1 => format!("{} lies", words(", ")),
            _ => format!("{} lie", words(", ")),
        }
    );
    let hint =
        format!("remove all of them: vmm snapshot rm {} {folder}; or lose those, with --force", words(" "));
    Failure::new(Code::BadArgument, error).hint(Some(hint))
}

fn create(options: &CreateOptions) -> Result<Code, Failure> {
    let absolute = |path: &PathBuf| absolute(path).map_err(|error| Failure::new(Code::Host, error));
    let (folder, base) = (absolute(&options.folder)?, options.base.as_ref().map(absolute).transpose()?);
    let mut client = connect(&options.name)?;
    let below = base.map(|base| Below::open(&base, &folder)).transpose()?;
    let names = client.files()?;
    // It has no name yet, and is to leave nothing.
    let hidden = undo::at_signals(|hidden: &mut Option<PathBuf>| _ = hidden.take().map(fs::remove_dir_all));
    let hidden = hidden.map_err(|error| Failure::new(Code::Host, error))?;
    let folder = {
        let mut hidden = hidden.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = Folder::begin(&folder, &names)?;
        *hidden = Some(folder.hidden().to_owned());
        folder
    };
    client.snapshot(&folder, below, Saving { compress: options.compress, stay: options.stop })?;
    // It goes on if this fails: the connection ends with this command.
    folder.name()?;
    if options.stop {
        client.ask(protocol::Command::Kill)?;
        client.wait_for_end(GRACE)?;
    }
    Ok(Code::Success)
}
