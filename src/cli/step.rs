//! `vmm trace --step`: symbols, start and count from the options; [`vmm_trace::debug::step`] does the steps.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::anyhow;

use super::options;
use super::run::{self, RunOptions};
use vmm_command::{Code, Failure};
use vmm_monitor::config::VmConfig;
use vmm_trace::debug::step::{LINUX_MAP, Plan, Steps, StepsEnd};
use vmm_trace::symbols::Symbols;

/// The options of `vmm trace` that are about stepping.
#[derive(Debug, clap::Args)]
pub struct StepOptions {
    /// Step through the guest instead of recording its exits: each instruction, its mode, and the registers that it changed
    #[arg(
        long,
        conflicts_with_all = ["keep", "only", "port", "device", "vcpu", "after", "symbol", "stats", "advise", "json",
            "perfetto", "html", "kaslr_offset"]
    )]
    pub step: bool,
    /// With --step: run freely to this kernel symbol or linear address, and step from there
    #[arg(long, value_name = "SYMBOL|ADDRESS", requires = "step")]
    from: Option<String>,
    /// With --step: how many instructions to show before the virtual machine is ended
    #[arg(long, value_name = "N", requires = "step", default_value_t = 100)]
    count: u64,
}

/// `vmm trace --step -- RUN OPTIONS`.
pub fn step(options: &StepOptions, run: options::Options, symbols: Option<&Path>) -> Result<Code, Failure> {
    if run.dry_run {
        return run::run(run);
    }
    if run.gdb.is_some() {
        let what = anyhow!("--step and --gdb cannot be used together");
        return Err(Failure::new(Code::BadArgument, what).hint(Some("drop one of them")));
    }
    let run_options = RunOptions::of(&run)?;
    let config = run.resolve()?;
    let symbols = match symbols {
        Some(path) => Symbols::read(path)?,
        None => config.kernel.as_deref().and_then(Symbols::beside).unwrap_or_default(),
    };
    let from = options.from.as_deref().map_or(Ok(Vec::new()), |from| addresses(from, &symbols, &config))?;
    let mut steps = Steps::new(Plan { from, count: options.count }, symbols);
    let code = run::live(config, run_options, Some(&mut steps));
    match &steps.end {
        StepsEnd::All => code.map(|_| Code::Success),
        StepsEnd::Ended => code,
        StepsEnd::NeverThere => {
            let from = options.from.as_deref().unwrap_or_default();
            log::warn!(
                "the guest ended without reaching {from}, as far as this host's KVM can tell: hardware breakpoints do nothing in \
                 some emulated machines"
            );
            code
        }
        StepsEnd::Failed(why) => {
            Err(Failure::new(Code::Host, anyhow!("cannot step through the guest: {why}")))
        }
    }
}

/// The linear addresses at which `from` may be met.
fn addresses(from: &str, symbols: &Symbols, config: &VmConfig) -> Result<Vec<u64>, Failure> {
    let bad =
        |what: String, hint: &'static str| Failure::new(Code::BadArgument, anyhow!(what)).hint(Some(hint));
    if let Some(address) = from.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
        return Ok(vec![address]);
    }
    let Some(address) = symbols.address(from) else {
        let what = match &symbols.source {
            Some(path) => format!("--from {from}: {path} has no such symbol"),
            None => format!("--from {from}: no symbols for this kernel"),
        };
        return Err(bad(
            what,
            "pass a vmlinux or System.map, --symbols FILE, or an address: --from 0x1000000",
        ));
    };
    let chooses =
        config.cmdline.as_deref().is_none_or(|cmdline| !cmdline.split(' ').any(|word| word == "nokaslr"));
    if chooses && config.kernel.as_deref().is_some_and(is_bzimage) {
        let what = format!(
            "--from {from}: a bzImage may choose where it runs (KASLR), so the symbol's address is unknown"
        );
        return Err(bad(
            what,
            "add nokaslr to --cmdline, boot the vmlinux instead, or pass an address: --from 0x1000000",
        ));
    }
    // Before it has its own page tables the kernel runs where it lies in physical memory.
    Ok([address].into_iter().chain(address.checked_sub(LINUX_MAP)).collect())
}

/// What is wrong with the file is told by who loads it.
fn is_bzimage(path: &Path) -> bool {
    let mut head = [0; 0x206];
    File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok() && head.ends_with(b"HdrS")
}
