//! The options of `vmm bench`, and its help.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use crate::earlier::MOST_SAMPLES;
use crate::suites::Name;

/// The end of `vmm bench --help`.
const EXAMPLES: &str = "\
Examples:
  vmm bench
      everything that can be measured here, as a table
  vmm bench boot exits --samples 50 --html page.html
      two suites, and a page with every sample drawn
  vmm bench boot --with firecracker=./firecracker --json result.json
      with a rival that is not in PATH; and the result, to keep
  vmm bench --from result.json --from other.json --html page.html --csv samples.csv
      results of earlier runs, or of other machines, put together; a page can be read too
  vmm bench --through 'cargo rig --quiet --'
      what needs hardware virtualization, in a machine that has it: the command gets this one appended
  vmm bench --icount --json counts.json; vmm bench --icount --compare counts.json
      on a clock that counts instructions: a baseline, and later the comparison with it

Ctrl-C ends the measurement and shows what there is. Whatever cannot be measured is told with its reason.

Exit codes: 0 done; 2 bad arguments or files; 4 of a suite nothing could be measured; 10 interrupted;
12 more than 5% worse than the baseline (--compare)";

/// The options of `vmm bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// What to measure: boot, memory, image, exits, cpu, mem, block, console, scale [default: all]
    #[arg(value_name = "NAME")]
    pub suites: Vec<Name>,
    /// Tell what the suites are, and measure nothing
    #[arg(long, exclusive = true)]
    pub list: bool,
    /// Samples of each contender, up to 10000 [default: 20; 1 with --icount]
    #[arg(long, value_name = "N", value_parser = samples)]
    samples: Option<usize>,
    /// Runs of each contender before those, which count for nothing [default: 2; 0 with --icount]
    #[arg(long, value_name = "N", value_parser = warm_up)]
    warm_up: Option<usize>,
    /// Take no more samples of a contender when those that it has (three or more) took so many seconds together
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    at_most: Option<u64>,
    /// The most idle instances that the memory suite starts of each contender
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub instances: usize,
    /// A rival's binary: firecracker, cloud-hypervisor, lkvm, qemu-system-x86_64, crun, runc, bwrap, podman ...
    #[arg(long, value_name = "RIVAL=FILE", value_parser = rival)]
    pub with: Vec<(String, PathBuf)>,
    /// The vmm to measure [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    vmm: Option<PathBuf>,
    /// The folder with the guests' kernels (tuned-vmlinux, tuned-bzImage, stock-bzImage, stock.cpio), as `cargo guest
    /// bundle` makes it [default: target/guests]
    #[arg(long, value_name = "FOLDER", value_parser = folder)]
    guests: Option<PathBuf>,
    /// The host's clock counts instructions: measure only what repeats bit for bit, in a fixed order [default NAME: boot]
    #[arg(long)]
    pub icount: bool,
    /// Measure what needs a KVM with hardware virtualization by COMMAND too if this host's has none. COMMAND is split at
    /// blanks, gets a `vmm bench` command line appended, and must see the same files
    #[arg(long, value_name = "COMMAND", value_parser = words)]
    pub through: Option<Words>,
    /// Show results of earlier runs (JSON, or pages) in place of measuring; more than one are put together
    #[arg(long, value_name = "FILE", conflicts_with_all = ["suites", "samples", "warm_up", "at_most", "instances", "with", "guests", "icount", "through"])]
    pub from: Vec<PathBuf>,
    /// Fail if anything is more than 5% (and a tick of 4 ms) worse than in this result; both from a repeatable clock (with
    /// --icount or --from)
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
    /// Write the result as JSON (- for standard output)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the samples as CSV (- for standard output)
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write a page with every sample drawn, in one file that needs no other (- for standard output)
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// A command, split at blanks: never empty.
#[derive(Debug, Clone)]
pub struct Words(pub Vec<String>);

impl Options {
    /// Samples of each contender.
    pub fn samples(&self) -> usize {
        self.samples.unwrap_or(if self.icount { 1 } else { 20 })
    }

    /// Runs before those.
    pub fn warm_up(&self) -> usize {
        self.warm_up.unwrap_or(if self.icount { 0 } else { 2 })
    }

    /// What a contender's samples may take together.
    pub fn limit(&self) -> Option<Duration> {
        self.at_most.map(Duration::from_secs)
    }

    /// The suites to measure.
    pub fn names(&self) -> Vec<Name> {
        let mut names = self.suites.clone();
        // Twice would be two results of one name.
        let mut seen = Vec::new();
        names.retain(|name| {
            !seen.contains(name) && {
                seen.push(*name);
                true
            }
        });
        match (names.is_empty(), self.icount) {
            (false, _) => names,
            (true, true) => vec![Name::Boot],
            (true, false) => Name::ALL.to_vec(),
        }
    }

    /// The vmm to measure.
    ///
    /// # Errors
    /// It is not where it should be.
    pub fn vmm(&self) -> anyhow::Result<PathBuf> {
        let beside = || Ok::<_, std::io::Error>(std::env::current_exe()?.with_file_name("vmm"));
        let vmm = self.vmm.clone().map_or_else(beside, Ok).context("find this program")?;
        vmm.canonicalize()
            .with_context(|| format!("find {} (build it, or give it by --vmm FILE)", vmm.display()))
    }

    /// The folder with the guests' kernels.
    pub fn guests(&self) -> &Path {
        self.guests.as_deref().unwrap_or(Path::new("target/guests"))
    }
}

/// A line about each suite, for `--list`.
pub fn list() -> String {
    let about = |name| match name {
        Name::Boot => "start to first output and to exit: processes, containers, VMs, other monitors",
        Name::Memory => "what 1 to 100 idle instances cost in memory",
        Name::Image => "what instances on one image cost on disk, and how long making them takes",
        Name::Exits => "round trips of VM exits, and the monitor's share (tiny guests: any /dev/kvm)",
        Name::Cpu => "integer and floating-point work: natively, in a container, in a VM",
        Name::Mem => "memory bandwidth and latency",
        Name::Block => "disk I/O",
        Name::Console => "ping-pong through the console",
        Name::Scale => "many VMs at once, many vCPUs, much memory",
    };
    Name::ALL.iter().map(|name| format!("{:8} {}\n", name.text(), about(*name))).collect()
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "a whole number is wanted".to_owned())
}

fn samples(text: &str) -> Result<usize, String> {
    let samples = number(text)?;
    if (1..=MOST_SAMPLES).contains(&samples) {
        Ok(samples)
    } else {
        Err(format!("from 1 to {MOST_SAMPLES} can be taken"))
    }
}

fn warm_up(text: &str) -> Result<usize, String> {
    number(text)
        .and_then(|runs| if runs <= MOST_SAMPLES { Ok(runs) } else { Err(format!("at most {MOST_SAMPLES}")) })
}

fn rival(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() => {
            // It is started in other folders, too.
            let found = std::fs::canonicalize(path).map_err(|error| format!("{path}: {error}"))?;
            if found.is_file() { Ok((name.to_owned(), found)) } else { Err(format!("{path} is not a file")) }
        }
        _ => Err("give it as RIVAL=FILE".to_owned()),
    }
}

fn folder(text: &str) -> Result<PathBuf, String> {
    let found = std::fs::canonicalize(text).map_err(|error| error.to_string())?;
    if found.is_dir() { Ok(found) } else { Err("not a folder".to_owned()) }
}

fn words(text: &str) -> Result<Words, String> {
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    if words.is_empty() { Err("there is no command in it".to_owned()) } else { Ok(Words(words)) }
}
