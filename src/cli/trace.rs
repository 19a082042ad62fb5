//! `vmm trace`: records a run and reports it, or reports an earlier recording.

use std::ffi::OsString;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{CommandFactory, FromArgMatches, Parser};

use super::apart::apart;
use super::{options, restore, run, step, top};
use crate::flags::with_flags;
use vmm_command::Scratch;
use vmm_command::{Code, Failure};
use vmm_monitor::config::OutputFile;
use vmm_monitor::config::VmConfig;
use vmm_monitor::machine::outputs::{self, Clash};
use vmm_monitor::output;
use vmm_monitor::recorder::Kind;
use vmm_trace::file::Trace;
use vmm_trace::reasons::Shown;
use vmm_trace::report::{Filter, Report};
use vmm_trace::symbols::Symbols;

/// The options of `vmm trace`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Options {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    view: View,
    /// Keep the recording in this file: FILE[,max=SIZE]
    #[arg(long, value_name = "FILE", value_parser = options::output_file())]
    keep: Option<OutputFile>,
    /// Watch a running virtual machine, as vmm top does [without NAME: the only one]
    #[arg(long, value_name = "NAME", num_args = 0..=1, conflicts_with_all = ["keep", "View", "StepOptions"])]
    live: Option<Option<String>>,
    #[command(flatten)]
    step: step::StepOptions,
    /// What to run: options of vmm run, or restore and its own, after -- or from the first that is none of the above
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
    /// Report a recording that `vmm --trace FILE ...` made
    Report {
        /// The recording
        #[arg(value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        view: View,
    },
}

/// What to show, and how.
#[derive(Debug, Clone, clap::Args)]
struct View {
    /// Only exits of these kinds: pio, mmio, halt, kvm (answered inside KVM), virtio, net (frames),
    /// other; separated by commas
    #[arg(long, value_name = "KINDS", value_delimiter = ',', value_parser = kinds)]
    only: Vec<Kinds>,
    /// Only accesses to this port or range of ports: 0x3f8, 0x3f8-0x3ff
    #[arg(long, value_name = "PORT", value_parser = ports)]
    port: Option<RangeInclusive<u64>>,
    /// Only what this device answered: serial, virtio-console, nobody and so on
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Only this vCPU
    #[arg(long, value_name = "N")]
    vcpu: Option<u32>,
    /// Only what happened at least so many milliseconds after the start
    #[arg(long, value_name = "MS")]
    after: Option<f64>,
    /// Only exits from functions whose names contain this
    #[arg(long, value_name = "TEXT")]
    symbol: Option<String>,
    /// Whose exit reasons to show: intel (VT-x), amd (AMD-V) or both, this host's first
    #[arg(long, value_name = "WHOSE", default_value = "both")]
    vendor: Shown,
    /// Print counts, shares, percentiles and histograms instead of lines
    #[arg(long)]
    stats: bool,
    /// Print which exits were wasted, what they cost, and what to change
    #[arg(long, conflicts_with_all = ["stats", "json"])]
    advise: bool,
    /// Print JSON: an object per line, or with --stats one object
    #[arg(long)]
    json: bool,
    /// Write a file for ui.perfetto.dev (Chromium's trace events)
    #[arg(long, value_name = "FILE")]
    perfetto: Option<PathBuf>,
    /// Write a page for any browser: a timeline, lanes, and the story of each exit
    #[arg(long, value_name = "FILE", conflicts_with = "perfetto")]
    html: Option<PathBuf>,
    /// The guest's symbols: a vmlinux, a System.map or a copy of /proc/kallsyms; without FILE, those in or beside the kernel that
    /// the record names [default: the guest's own; for a run just recorded also those beside its kernel]
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    symbols: Option<Option<PathBuf>>,
    /// How far the guest's kernel runs from its link address (KASLR) [default: detected]
    #[arg(long, value_name = "BYTES", value_parser = number)]
    kaslr_offset: Option<u64>,
}

impl View {
    fn symbols_file(&self) -> Option<&Path> {
        self.symbols.as_ref()?.as_deref()
    }
}

/// What a word of `--only` stands for.
#[derive(Debug, Clone, Copy)]
struct Kinds(&'static [Kind]);

fn kinds(word: &str) -> Result<Kinds, &'static str> {
    Filter::kinds(word).map(Kinds).ok_or("expected pio, mmio, halt, kvm, virtio, net or other")
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "expected a number, or 0x...".to_owned())
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
        let symbols = view.symbols_file().map(|path| ("symbols", path));
        let read: Vec<_> = symbols.into_iter().chain([("record", file.as_path())]).collect();
        outputs::check(&VmConfig::default(), &read, &written)
            .map_err(|clash| Failure::new(Code::BadArgument, clash).hint(Some(Clash::HINT)))?;
        tell(&file, &view, false)?;
        return Ok(Code::Success);
    }
    if let Some(name) = options.live {
        return top::top(top::Options { name, looks: top::Looks::default() });
    }
    let mut record = run_options(options.run)?;
    if options.step.step {
        return step::step(&options.step, record, options.view.symbols.flatten().as_deref());
    }
    let scratch = Scratch::new("vmm-trace").map_err(|error| Failure::new(Code::Host, error))?;
    let file = options.keep.unwrap_or_else(|| scratch.path().join("record").into());
    record.trace = Some(file.clone());
    record.outputs = options.view.html.iter().chain(&options.view.perfetto).cloned().collect();
    record.symbols = options.view.symbols_file().map(Path::to_owned);
    let ended = apart(|| run::run(record));
    let told = if file.path.is_file() { tell(&file.path, &options.view, true) } else { Ok(()) };
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
    if arguments.first().is_some_and(|word| word == "restore") {
        #[derive(Parser)]
        #[command(name = "vmm trace --")]
        struct Restore {
            #[command(flatten)]
            options: restore::Options,
        }
        let parsed =
            Restore::command().try_get_matches_from(arguments).and_then(|m| Restore::from_arg_matches(&m));
        return parsed.map_err(|error| Failure::usage(&error))?.options.into_run();
    }
    let parsed = Run::command().try_get_matches_from(arguments).and_then(|m| Run::from_arg_matches(&m));
    parsed.map(|run| run.options).map_err(|error| Failure::usage(&error))
}

/// Tells the record in `file` on standard output. `ours`: it was made just now, and the user named the kernel. Nothing that
/// another record names is opened unless the user wants it.
fn tell(file: &Path, view: &View, ours: bool) -> Result<(), Failure> {
    let trace = Trace::read(file)?;
    // What the guest itself said of its kernel is the right kernel's, and at the right place.
    let own = || Symbols::of_guest(&trace.symbols);
    let wanted = ours || view.symbols.is_some();
    let beside = || trace.header.kernel.as_deref().filter(|_| wanted).and_then(Symbols::beside);
    let (symbols, own) = match (&view.symbols, view.kaslr_offset) {
        (Some(Some(path)), _) => (Symbols::read(path)?, false),
        (Some(None), _) => (beside().ok_or_else(|| nothing_beside(&trace))?, false),
        (None, None) => own().map(|own| (own, true)).or_else(|| Some((beside()?, false))).unwrap_or_default(),
        (None, Some(_)) => (beside().unwrap_or_default(), false),
    };
    if !own
        && symbols.source.is_none()
        && let (false, Some(kernel)) = (wanted, &trace.header.kernel)
    {
        log::info!("no symbols; the record names {}: --symbols without FILE looks there", kernel.display());
    }
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
            Err(error) if !matches!(view.symbols, Some(Some(_))) => {
                log::warn!("{error}");
                report.symbols = Symbols::default();
            }
            found => found?,
        },
    }
    report.shown = view.vendor;
    report.colour = io::stdout().is_terminal();
    if let Some(path) = view.html.as_ref().or(view.perfetto.as_ref()) {
        let context = || format!("cannot write {}", path.display());
        let file = output::create(path).map_err(|error| {
            let hint = output::hint(path, &error, "report");
            Failure::new(Code::BadArgument, anyhow!(error).context(context())).hint(Some(hint))
        })?;
        let mut out = BufWriter::new(file);
        let written = match view.html {
            Some(_) => report.html(&filter, &mut out),
            None => report.perfetto(&filter, &mut out),
        };
        let written = written.and_then(|()| out.flush()).with_context(context);
        return written.map_err(|error| Failure::new(Code::Host, error));
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match (view.stats, view.json) {
        _ if view.advise => {
            let mut advice = Vec::new();
            let written = report.write_advice(&mut advice);
            written.and_then(|()| out.write_all(with_flags(&String::from_utf8_lossy(&advice)).as_bytes()))
        }
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
        result => result
            .map_err(|error| Failure::new(Code::Host, anyhow!(error).context("cannot write the report"))),
    }
}

fn nothing_beside(trace: &Trace) -> Failure {
    let error = match &trace.header.kernel {
        Some(kernel) => anyhow!("there are no symbols in or beside {}", kernel.display()),
        None => anyhow!("the record names no kernel to look for symbols beside"),
    };
    Failure::new(Code::BadArgument, error).hint(Some("name a file: --symbols vmlinux"))
}
