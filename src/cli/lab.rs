//! `vmm lab`: lessons from tiny guests.

use std::io::{self, IsTerminal};

use anyhow::anyhow;

use crate::flags::with_flags;
use vmm_command::Scratch;
use vmm_command::{Code, Failure, print};
use vmm_trace::lab::{self, LABS, Lab};
use vmm_trace::reasons::Shown;

/// The options of `vmm lab`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The lab to run; without a name, lists them
    name: Option<String>,
    /// Print the guest's source instead of running it
    #[arg(long, requires = "name")]
    source: bool,
    /// Whose exit reasons to show: intel (VT-x), amd (AMD-V) or both, this host's first
    #[arg(long, value_name = "WHOSE", default_value = "both")]
    vendor: Shown,
}

/// `vmm lab`.
pub fn lab(options: Options) -> Result<Code, Failure> {
    let Some(name) = options.name else {
        let line = |lab: &Lab| format!("{:<14} {}\n", lab.name, lab.idea());
        print(&LABS.iter().map(line).collect::<String>())?;
        return Ok(Code::Success);
    };
    let lab = Lab::find(&name).ok_or_else(|| {
        Failure::new(Code::BadArgument, anyhow!("there is no lab {name:?}")).hint(Some("vmm lab lists them"))
    })?;
    if options.source {
        print(lab.source)?;
        return Ok(Code::Success);
    }
    let scratch = Scratch::new("vmm-lab").map_err(|error| Failure::new(Code::Host, error))?;
    let ran = lab::run(lab, scratch.path())?;
    let mut text = Vec::new();
    lab::narrate(lab, &ran, options.vendor, io::stdout().is_terminal(), &mut text)?;
    print(&with_flags(&String::from_utf8_lossy(&text)))?;
    Ok(Code::Success)
}
