//! `vmm snapshot`: virtual machines in folders.

use std::path::{PathBuf, absolute};

use clap::Subcommand;

use super::control::{GRACE, connect};
use super::plan::plan;
use super::saved;
use super::wait::for_each;
use vmm_command::{Code, Failure, print};
use vmm_monitor::snapshot::{self, Snapshot};

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
  vmm snapshot list; vmm snapshot rm web.snap
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
    /// Read all of a folder, and say whether it is as it was saved
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
    /// Remove snapshots, and nothing that is none
    Rm {
        /// Folders that vmm snapshot create made
        #[arg(value_name = "FOLDER", required = true)]
        folders: Vec<PathBuf>,
    },
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
    /// Leave out memory that is as in this snapshot, which the new one needs from then on
    #[arg(long, value_name = "FOLDER")]
    base: Option<PathBuf>,
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
            saved::print(all.iter().map(|saved| (saved, None)), json)
        }
        Command::Rm { folders } => Ok(for_each(&folders, |folder| Ok(snapshot::remove(folder)?))),
    }
}

fn create(options: &CreateOptions) -> Result<Code, Failure> {
    let absolute = |path: &PathBuf| absolute(path).map_err(|error| Failure::new(Code::Host, error));
    let (folder, base) = (absolute(&options.folder)?, options.base.as_ref().map(absolute).transpose()?);
    let mut client = connect(&options.name)?;
    client.snapshot(&folder, base.as_deref(), options.stop)?;
    if options.stop {
        client.wait_for_end(GRACE)?;
    }
    Ok(Code::Success)
}
