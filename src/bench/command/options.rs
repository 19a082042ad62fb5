//! The options of `vmm bench`, and its help.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::earlier::MOST_SAMPLES;
use crate::suites::Name;
use anyhow::Context;
use clap::builder::{OsStringValueParser, TypedValueParser};

/// The end of `vmm bench --help`.
const EXAMPLES: &str = "\
Examples:
  vmm bench
      measure everything that this machine can, and print a table
  vmm bench boot exits --samples 50 --html page.html
      two suites, and a page that draws every sample
  vmm bench boot --with firecracker=./firecracker --json result.json
      a rival that is not in PATH, and a result to keep
  vmm bench --from result.json --from other.json --html page.html --csv samples.csv
      combine earlier results, or those of other machines; a page can be read, too
  vmm bench --through 'cargo rig --quiet --'
      measure what needs hardware virtualization in a machine that has it; this command line is appended
  vmm bench --icount --json counts.json; vmm bench --icount --compare counts.json
      on a clock that counts instructions: make a baseline, and later compare with it

Ctrl-C ends the measurement and shows the results so far. What cannot be measured is listed with the reason.

Exit codes: 0 done; 2 bad arguments or files; 4 nothing in a suite could be measured; 10 interrupted;
12 more than 5% worse than the baseline (--compare)";

/// The options of `vmm bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// What to measure: boot, fork, steps, memory, image, exits, cpu, mem, block, share, net, console, scale, neighbours [default: all]
    #[arg(value_name = "NAME")]
    pub suites: Vec<Name>,
    /// List the suites, without measuring anything
    #[arg(long, exclusive = true)]
    pub list: bool,
    /// Samples per contender, up to 10000 [default: 20; 1 with --icount]
    #[arg(long, value_name = "N", value_parser = samples)]
    samples: Option<usize>,
    /// Warm-up runs per contender, which are not counted [default: 2; 0 with --icount]
    #[arg(long, value_name = "N", value_parser = warm_up)]
    warm_up: Option<usize>,
    /// Stop sampling a contender (after three samples) once its samples have taken so many seconds in total
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    at_most: Option<u64>,
    /// Most instances per contender that the memory suite keeps idle, and that the fork suite starts at once
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub instances: usize,
    /// Path of a rival's binary: firecracker, cloud-hypervisor, alioth, lkvm, qemu-system-x86_64, crun, runc, bwrap, podman, passt ...
    #[arg(long, value_name = "RIVAL=FILE", value_parser = OsStringValueParser::new().try_map(|text| rival(&text)))]
    pub with: Vec<(String, PathBuf)>,
    /// The vmm to measure [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    vmm: Option<PathBuf>,
    /// Directory with the guests' kernels (tuned-vmlinux, tuned-bzImage, tuned.cpio, stock-bzImage, stock.cpio), as `cargo guest
    /// bundle` makes it [default: target/guests]
    #[arg(long, value_name = "FOLDER", value_parser = OsStringValueParser::new().try_map(|text| folder(&text)))]
    guests: Option<PathBuf>,
    /// The host's clock counts instructions: measure only what repeats exactly, in a fixed order [default NAME: boot]
    #[arg(long)]
    pub icount: bool,
    /// If this host lacks hardware virtualization, measure what needs it through COMMAND. COMMAND is split at blanks, has a
    /// `vmm bench` command line appended, and must see the same files
    #[arg(long, value_name = "COMMAND", value_parser = words)]
    pub through: Option<Words>,
    /// Show earlier results (JSON or pages) instead of measuring; repeat to combine several
    #[arg(long, value_name = "FILE", conflicts_with_all = ["suites", "samples", "warm_up", "at_most", "instances", "with", "guests", "icount", "through"])]
    pub from: Vec<PathBuf>,
    /// Fail if anything is more than 5% (plus a tick of 4 ms) worse than in this result; needs a repeatable clock in both
    /// (--icount, or --from with such a result)
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
    /// Write the result as JSON (- for standard output)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the samples as CSV (- for standard output)
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write a self-contained page that draws every sample (- for standard output)
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
        Name::Fork => {
            "saved machines that go on, 1 to 100 at once: to the first instruction, a command, exit; memory"
        }
        Name::Steps => "a start by its steps, beside the bare calls of the same kernel (any /dev/kvm)",
        Name::Memory => "what 1 to 100 idle instances cost in memory",
        Name::Image => "what instances on one image cost on disk, and how long making them takes",
        Name::Exits => "round trips of VM exits, and the monitor's share (tiny guests: any /dev/kvm)",
        Name::Cpu => "integer and floating-point work: natively, in a container, in a VM",
        Name::Mem => "memory bandwidth and latency",
        Name::Block => "disk I/O",
        Name::Share => "a shared folder: files and requests, native, in a VM, and behind virtiofsd",
        Name::Net => "TCP to the host: containers, VMs, other monitors, each kind of network",
        Name::Console => "ping-pong through the console",
        Name::Scale => "many VMs at once, many vCPUs, much memory",
        Name::Neighbours => "a quiet VM or container beside noisy ones, with and without limits",
    };
    Name::ALL.iter().map(|name| format!("{:8} {}\n", name.text(), about(*name))).collect()
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "expected a whole number".to_owned())
}

fn samples(text: &str) -> Result<usize, String> {
    let samples = number(text)?;
    if (1..=MOST_SAMPLES).contains(&samples) {
        Ok(samples)
    } else {
        Err(format!("expected 1 to {MOST_SAMPLES}"))
    }
}

fn warm_up(text: &str) -> Result<usize, String> {
    number(text)
        .and_then(|runs| if runs <= MOST_SAMPLES { Ok(runs) } else { Err(format!("at most {MOST_SAMPLES}")) })
}

fn rival(text: &OsStr) -> Result<(String, PathBuf), String> {
    let bytes = text.as_bytes();
    let parts = bytes.iter().position(|byte| *byte == b'=').map(|at| (&bytes[..at], &bytes[at + 1..]));
    let (name, path) = parts.filter(|(name, _)| !name.is_empty()).ok_or("expected RIVAL=FILE")?;
    let path = Path::new(OsStr::from_bytes(path));
    // It is started in other folders, too.
    let found = std::fs::canonicalize(path).map_err(|error| format!("{}: {error}", path.display()))?;
    if found.is_file() {
        Ok((String::from_utf8_lossy(name).into_owned(), found))
    } else {
        Err(format!("{} is not a file", path.display()))
    }
}

fn folder(path: &OsStr) -> Result<PathBuf, String> {
    let found = std::fs::canonicalize(path).map_err(|error| error.to_string())?;
    if found.is_dir() { Ok(found) } else { Err("not a directory".to_owned()) }
}

fn words(text: &str) -> Result<Words, String> {
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    if words.is_empty() { Err("no command given".to_owned()) } else { Ok(Words(words)) }
}
