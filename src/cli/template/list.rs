//! `vmm template`: what `vmm run --template` has kept.

use std::fmt::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use serde::Serialize;

use super::super::list::uptime;
use super::super::wait::for_each;
use super::templates;
use vmm_command::{Code, Failure, pretty, print};
use vmm_monitor::config::{Size, VmConfig};
use vmm_monitor::snapshot::Template;

/// The options of `vmm template`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the templates that vmm run --template has made: those first that were used last
    #[command(visible_alias = "ls")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove templates. Virtual machines that run are not disturbed
    Rm {
        /// What vmm template list shows
        #[arg(required_unless_present = "all")]
        template: Vec<String>,
        /// All of them
        #[arg(long, conflicts_with = "template")]
        all: bool,
    },
}

/// `vmm template`.
///
/// # Errors
/// There is no place for templates, or no template of that name.
pub fn template(options: Options) -> Result<Code, Failure> {
    let templates = templates()?;
    let failed = |error: std::io::Error| {
        Failure::new(Code::Host, anyhow::Error::new(error).context("cannot look through the templates"))
    };
    match options.command {
        Command::List { json } => {
            let all = templates.list().map_err(failed)?;
            print(&if json { pretty(&all.iter().map(Row::of).collect::<Vec<_>>())? } else { table(&all) })?;
            Ok(Code::Success)
        }
        Command::Rm { template: names, all } => {
            let all = if all { templates.list().map_err(failed)? } else { Vec::new() };
            let names = names.into_iter().chain(all.into_iter().map(|template| template.name));
            Ok(for_each(names, |name| match templates.remove(&name) {
                Ok(true) => Ok(()),
                Ok(false) => {
                    let error = anyhow!("there is no template {name:?}");
                    Err(Failure::new(Code::Host, error).hint(Some("see which there are: vmm template list")))
                }
                Err(error) => {
                    let error = anyhow::Error::new(error).context(format!("cannot remove template {name}"));
                    Err(Failure::new(Code::Host, error))
                }
            }))
        }
    }
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    bytes: u64,
    /// Seconds since 1970.
    made_at: u64,
    used_at: u64,
    config: &'a VmConfig,
}

impl<'a> Row<'a> {
    fn of(Template { name, config, bytes, made, used }: &'a Template) -> Self {
        let seconds = |time: &SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { name, bytes: *bytes, made_at: seconds(made), used_at: seconds(used), config }
    }
}

fn table(all: &[Template]) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{:<16} {:>7} {:>7} {:>7} {:>7}  OF", "TEMPLATE", "SIZE", "AGE", "USED", "MEMORY");
    for Template { name, config, bytes, made, used } in all {
        let ago = |time: &SystemTime| uptime(time.elapsed().unwrap_or_default().as_secs_f64());
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "{name:<16} {:>7} {:>7} {:>7} {:>7}  {}",
            format!("{}M", bytes.div_ceil(1 << 20)),
            ago(made),
            ago(used),
            Size::from_bytes(config.mem.size.bytes()).to_string(),
            of(config),
        );
    }
    text
}

/// What was booted: its files by their names.
fn of(config: &VmConfig) -> String {
    let disks = config.disk.iter().map(|disk| &disk.path);
    let files = config.kernel.iter().chain(&config.initrd).chain(disks);
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    files.filter_map(|path| name(path)).collect::<Vec<_>>().join(" ")
}
