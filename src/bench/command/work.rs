//! `vmm-bench work`: what `vmm bench` runs natively, in a container and in a guest. Not for people, so not in the help.

use anyhow::Context;

use crate::work::{self as works, Step};
use vmm_command::{Code, Failure};

/// The options of `vmm-bench work`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Work, in order: integer=N, float=N, triad=N, chase=N, random-read=N:PATH, echo=N ...
    #[arg(required = true, value_name = "STEP")]
    steps: Vec<Step>,
    /// This is PID 1 of a virtual machine: mount what is needed, and power off in the end
    #[arg(long)]
    guest: bool,
    /// With --guest: the set-up of its interface, as the kernel's ip=
    #[arg(long, value_name = "IP")]
    ip: Option<String>,
    /// With --guest: the tag of a shared folder, which is mounted at /share
    #[arg(long, value_name = "TAG")]
    share: Option<String>,
}

/// `vmm-bench work`.
pub fn work(options: Options) -> Result<Code, Failure> {
    let host = |error: anyhow::Error| Failure::new(Code::Host, error);
    if options.guest {
        works::guest::prepare(options.ip.as_deref(), options.share.as_deref())
            .context("prepare the guest")
            .map_err(host)?;
    }
    let worked = works::run(&options.steps, &mut std::io::stdout().lock()).map_err(anyhow::Error::from);
    if options.guest {
        if let Err(error) = &worked {
            // Nobody sees how PID 1 ends: the line that is missing tells that it failed, and this tells why.
            eprintln!("vmm-bench: {error:#}");
        }
        works::guest::power_off().context("power off").map_err(host)?;
    }
    worked.map_err(host)?;
    Ok(Code::Success)
}
