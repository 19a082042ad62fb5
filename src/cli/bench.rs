//! `vmm bench`: measures, shows, and writes the result where it is wanted.

use std::collections::BTreeMap;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context, anyhow};

use super::exit::{Code, Failure, print};
use crate::bench::measure::{INTERRUPTED, Plan};
use crate::bench::render;
use crate::bench::result::Run;
use crate::bench::rivals::Setting;
use crate::bench::suites::{self, Name};

/// The options of `vmm bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// What to measure: boot, memory, image, exits, cpu, mem, block, console, scale [default: all]
    #[arg(value_name = "NAME")]
    suites: Vec<Name>,
    /// Samples of each contender
    #[arg(long, value_name = "N", default_value_t = 20)]
    samples: usize,
    /// Runs of each contender before those, which count for nothing
    #[arg(long, value_name = "N", default_value_t = 2)]
    warm_up: usize,
    /// A rival's binary: firecracker, cloud-hypervisor, lkvm, qemu-system-x86_64, crun, runc, bwrap, podman ...
    #[arg(long, value_name = "RIVAL=FILE", value_parser = rival)]
    with: Vec<(String, PathBuf)>,
    /// The folder with the guests' kernels (tuned-vmlinux, tuned-bzImage, stock-bzImage, stock.cpio), as `cargo guest bundle` makes it
    #[arg(long, value_name = "FOLDER", default_value = "target/guests")]
    guests: PathBuf,
    /// The host's clock counts instructions: measure only what repeats bit for bit, once
    #[arg(long)]
    icount: bool,
    /// Write the result as JSON (- for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the samples as CSV (- for standard output)
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a page with distributions, in one file that needs no other
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

fn rival(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && Path::new(path).is_file() => {
            Ok((name.to_owned(), path.into()))
        }
        Some((_, path)) => Err(format!("{path} is not a file")),
        None => Err("give it as RIVAL=FILE".to_owned()),
    }
}

/// `vmm bench`.
pub fn bench(options: Options) -> Result<Code, Failure> {
    let host = |error: anyhow::Error| Failure::new(Code::Host, error);
    let scratch = Scratch::new().map_err(host)?;
    let setting = setting(&options, &scratch.0).map_err(host)?;
    let names = if options.suites.is_empty() { Name::ALL.to_vec() } else { options.suites.clone() };
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |since| since.as_nanos() as u64);
    let plan = Plan { samples: options.samples.max(1), warm_up: options.warm_up, seed };
    interruptible().map_err(host)?;

    let mut run = Run { command: std::env::args().collect(), interrupted: false, suites: Vec::new() };
    let mut failed = Vec::new();
    for name in names {
        let mut progress = Progress::new(name);
        let result = suites::run(name, &setting, plan, &mut |share, what| progress.show(share, what));
        progress.clear();
        match result {
            Ok(suite) => run.suites.push(suite),
            Err(why) => failed.push(format!("{name}: {why}")),
        }
        if INTERRUPTED.load(Ordering::SeqCst) {
            run.interrupted = true;
            break;
        }
    }
    show(&options, &run)?;
    for why in &failed {
        eprintln!("vmm bench: not measured: {why}");
    }
    if run.interrupted {
        return Ok(Code::Killed);
    }
    if failed.is_empty() {
        Ok(Code::Success)
    } else {
        Err(host(anyhow!("{} of the suites could not run", failed.len())))
    }
}

fn setting(options: &Options, scratch: &Path) -> anyhow::Result<Setting> {
    let here = |name: &str| {
        let path = options.guests.join(name);
        fs::canonicalize(path).ok()
    };
    Ok(Setting {
        vmm: std::env::current_exe().context("find this program")?,
        with: options.with.iter().cloned().collect::<BTreeMap<_, _>>(),
        kernel: here("tuned-vmlinux"),
        bzimage: here("tuned-bzImage"),
        stock: here("stock-bzImage").zip(here("stock.cpio")),
        scratch: scratch.to_owned(),
        repeatable_clock: options.icount,
    })
}

fn show(options: &Options, run: &Run) -> Result<(), Failure> {
    let json = || serde_json::to_string_pretty(run).unwrap_or_default() + "\n";
    let mut on_stdout = false;
    let mut write = |path: &Option<PathBuf>, text: &dyn Fn() -> String| -> Result<(), Failure> {
        match path {
            None => Ok(()),
            Some(path) if path.as_os_str() == "-" => {
                on_stdout = true;
                print(&text())
            }
            Some(path) => fs::write(path, text())
                .with_context(|| format!("write {}", path.display()))
                .map_err(|error| Failure::new(Code::Host, error)),
        }
    };
    write(&options.json, &json)?;
    if on_stdout { Ok(()) } else { print(&render::table(run)) }
}

/// The folder for what is made on the way.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        // Process ids repeat where several machines share the folder.
        for number in 0.. {
            let path = std::env::temp_dir().join(format!("vmm-bench-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("make {}", path.display())),
            }
        }
        Err(anyhow!("no name is left for a folder in {}", std::env::temp_dir().display()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Ctrl-C ends the measurement after the sample at hand; what there is is shown. A second one ends the program.
fn interruptible() -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGINT, libc::SIGTERM])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in &mut signals {
            if INTERRUPTED.swap(true, Ordering::SeqCst) {
                std::process::exit(128 + signal);
            }
            eprintln!("\nvmm bench: interrupted; showing what there is");
        }
    })?;
    Ok(())
}

/// One line on a terminal, rewritten; nothing where stderr is none.
struct Progress {
    name: Name,
    on: bool,
}

impl Progress {
    fn new(name: Name) -> Self {
        Self { name, on: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, share: f64, what: &str) {
        if self.on {
            let _ = write!(std::io::stderr(), "\r\x1b[K{} {:3.0}%  {what}", self.name, share * 100.0);
        }
    }

    fn clear(&mut self) {
        if self.on {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
