//! `vmm template`: what `vmm run --template` has kept.

use anyhow::anyhow;

use super::super::saved;
use super::super::wait::for_each;
use super::templates;
use vmm_command::{Code, Failure};

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
            saved::print(all.iter().map(|template| (&template.saved, Some(template.used))), json)
        }
        Command::Rm { template: names, all } => {
            let all = if all { templates.list().map_err(failed)? } else { Vec::new() };
            let names = names.into_iter().chain(all.into_iter().map(|template| template.saved.name));
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
