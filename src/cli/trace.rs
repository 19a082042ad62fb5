//! `vmm trace`: records a run and tells it, or tells an earlier record.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{CommandFactory, FromArgMatches, Parser};

use super::exit::{Code, Failure};
use super::scratch::Scratch;
use super::{options, run, step, top};
use crate::config::VmConfig;
use crate::machine::outputs::{self, Clash};
use crate::recorder::Kind;
use crate::trace::file::{self, Trace};
use crate::trace::report::{Filter, Report};
use crate::trace::symbols::{self, Symbols};

/// The options of `vmm trace`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Options {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    view: View,
    /// Keep the record in this file
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// Watch a virtual machine that runs, as vmm top does [default: the only one]
    #[arg(long, value_name = "NAME", num_args = 0..=1, conflicts_with_all = ["keep", "View", "StepOptions"])]
    live: Option<Option<String>>,
    #[command(flatten)]
    step: step::StepOptions,
    /// What to run: the options of vmm run, from the first on that is none of these (or after --)
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required_unless_present = "live",
        conflicts_with = "live",
        value_name = "RUN OPTIONS"
    )]
    run: Vec<OsString>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Tell a record that `vmm --trace FILE ...` made
    Report {
        /// The record
        #[arg(value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        view: View,
    },
}

/// What to show, and how.
#[derive(Debug, Clone, clap::Args)]
struct View {
    /// Only these: pio, mmio, halt, kvm (exits inside it), virtio, other; with commas between
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = kinds)]
    only: Vec<Kinds>,
    /// Only accesses to this port, or ports: 0x3f8, 0x3f8-0x3ff
    #[arg(long, value_name = "PORT", value_parser = ports)]
    port: Option<RangeInclusive<u64>>,
    /// Only what this device answered: serial, virtio-console, nobody ...
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Only this vCPU
    #[arg(long, value_name = "N")]
    vcpu: Option<u32>,
    /// Only what came so many milliseconds after the start, or later
    #[arg(long, value_name = "MS")]
    after: Option<f64>,
    /// Only where the guest was in a function whose name contains this
    #[arg(long, value_name = "TEXT")]
    symbol: Option<String>,
    /// Counts, shares, percentiles and histograms in place of lines
    #[arg(long)]
    stats: bool,
    /// What the exits were spent on for nothing, what that cost, and what to change
    #[arg(long, conflicts_with_all = ["stats", "json"])]
    advise: bool,
    /// JSON: an object per line, or one with the statistics
    #[arg(long)]
    json: bool,
    /// Write the record in the format that ui.perfetto.dev opens (Chromium's trace events)
    #[arg(long, value_name = "FILE")]
    perfetto: Option<PathBuf>,
    /// Write a page about it that any browser opens: what happened when, lanes, the story of each exit
    #[arg(long, value_name = "FILE", conflicts_with = "perfetto")]
    html: Option<PathBuf>,
    /// The guest's symbols: a vmlinux, a System.map, a copy of /proc/kallsyms [default: the guest's own, or looked for beside the kernel]
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// How far the guest's kernel runs from where it was linked (KASLR) [default: found out]
    #[arg(long, value_name = "BYTES", value_parser = number)]
    kaslr_offset: Option<u64>,
}

/// What a word of `--only` stands for.
#[derive(Debug, Clone, Copy)]
struct Kinds(&'static [Kind]);

fn kinds(word: &str) -> Result<Kinds, &'static str> {
    Filter::kinds(word).map(Kinds).ok_or("it is pio, mmio, halt, kvm, virtio or other")
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "it is a number, or 0x...".to_owned())
}

fn ports(text: &str) -> Result<RangeInclusive<u64>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Ok(number(first)?..=number(last)?)
}

/// `vmm trace`.
pub fn trace(options: Options) -> Result<Code, Failure> {
    if let Some(Command::Report { file, view }) = options.command {
        let written = view.html.iter().chain(&view.perfetto).map(|path| ("the report", path.as_path()));
        let written: Vec<_> = written.collect();
        outputs::check(&VmConfig::default(), &[("record", &file)], &written)
            .map_err(|clash| Failure::new(Code::BadArgument, clash).hint(Some(Clash::HINT)))?;
        tell(&file, &view)?;
        return Ok(Code::Success);
    }
    if let Some(name) = options.live {
        return top::top(top::Options { name, looks: top::Looks::default() });
    }
    let mut record = run_options(options.run)?;
    if options.step.step {
        return step::step(&options.step, record, options.view.symbols.as_deref());
    }
    let scratch = Scratch::new("vmm-trace").map_err(|error| Failure::new(Code::Host, error))?;
    let file = options.keep.unwrap_or_else(|| scratch.path().join("record"));
    record.trace = Some(file.clone());
    record.outputs = options.view.html.iter().chain(&options.view.perfetto).cloned().collect();
    let ended = run::run(record);
    let told = if file.exists() { tell(&file, &options.view) } else { Ok(()) };
    // How the run ended matters more than that nobody read the report to its end.
    let code = ended?;
    told.map(|()| code)
}

/// What follows the `--`.
fn run_options(arguments: Vec<OsString>) -> Result<options::Options, Failure> {
    #[derive(Parser)]
    #[command(name = "vmm trace --", no_binary_name = true)]
    struct Run {
        #[command(flatten)]
        options: options::Options,
    }
    let parsed = Run::command().try_get_matches_from(arguments).and_then(|m| Run::from_arg_matches(&m));
    parsed.map(|run| run.options).map_err(|error| Failure::usage(&error))
}

/// Tells the record in `file` on standard output.
fn tell(file: &Path, view: &View) -> Result<(), Failure> {
    let trace = Trace::read(file)?;
    // What the guest itself said of its kernel is the right kernel's, and at the right place.
    let own = || Symbols::of_guest(&trace.symbols);
    let beside = || trace.header.kernel.as_deref().and_then(Symbols::beside);
    let (symbols, own) = match (&view.symbols, view.kaslr_offset) {
        (Some(path), _) => (Symbols::read(path)?, false),
        (None, None) => own().map(|own| (own, true)).or_else(|| Some((beside()?, false))).unwrap_or_default(),
        (None, Some(_)) => (beside().unwrap_or_default(), false),
    };
    let filter = Filter {
        only: view.only.iter().flat_map(|kinds| kinds.0).copied().collect(),
        port: view.port.clone(),
        device: view.device.clone(),
        vcpu: view.vcpu,
        after: view.after.map(|ms| ms * 1e6),
        symbol: view.symbol.clone(),
    };
    let mut report = Report::new(&trace, symbols);
    match view.kaslr_offset {
        Some(offset) => report.symbols.set_shift(offset),
        None if own => {}
        None => match report.find_shift() {
            Err(error) if view.symbols.is_none() => {
                log::warn!("{error}");
                report.symbols = Symbols::default();
            }
            found => found?,
        },
    }
    report.colour = io::stdout().is_terminal();
    if let Some(path) = view.html.as_ref().or(view.perfetto.as_ref()) {
        let written = File::create(path).map(BufWriter::new).and_then(|mut out| {
            match view.html {
                Some(_) => report.html(&filter, &mut out)?,
                None => report.perfetto(&filter, &mut out)?,
            }
            out.flush()
        });
        let context = || format!("write {}", path.display());
        return written.with_context(context).map_err(|error| Failure::new(Code::Host, error));
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match (view.stats, view.json) {
        _ if view.advise => report.write_advice(&mut out),
        (true, true) => serde_json::to_writer_pretty(&mut out, &report.stats(&filter))
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out)),
        (true, false) => report.write_stats(&filter, &mut out),
        (false, true) => report.json(&filter, &mut out),
        (false, false) => report.lines(&filter, &mut out),
    };
    match written.and_then(|()| out.flush()) {
        // A pager that was closed has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => {
            result.map_err(|error| Failure::new(Code::Host, anyhow!(error).context("write the report")))
        }
    }
}

impl From<file::Error> for Failure {
    fn from(error: file::Error) -> Self {
        let code = match error {
            file::Error::Io { .. } => Code::Host,
            file::Error::Format { .. } => Code::BadArgument,
        };
        Self::new(code, error).hint(Some("a trace is made by: vmm --trace FILE --kernel ..."))
    }
}

impl From<symbols::Error> for Failure {
    fn from(error: symbols::Error) -> Self {
        let hint = match error {
            symbols::Error::Read { .. } | symbols::Error::None { .. } => {
                "without --symbols the guest's own are taken, if its kernel has them, or a vmlinux or System.map beside it"
            }
            symbols::Error::OtherKernel { .. } => "with --kaslr-offset 0 they are taken as they are",
        };
        Self::new(Code::BadArgument, error).hint(Some(hint))
    }
}
