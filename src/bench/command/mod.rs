//! The command line of `vmm-bench`: measures, prints, and writes the result to files.

mod options;
mod outputs;
mod progress;
mod through;
pub mod work;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, anyhow};

pub use options::Options;

use crate::host::Host;
use crate::measure::{INTERRUPTED, Plan};
use crate::result::Run;
use crate::rivals::Setting;
use crate::rivals::copy::copied;
use crate::suites;
use crate::{baseline, earlier};
use progress::Progress;
use vmm_command::Scratch;
use vmm_command::{Code, Failure, print};

/// `vmm bench`.
///
/// # Errors
/// The arguments cannot be, nothing may be written where it should be, not everything could be measured, or it is worse than
/// the baseline.
pub fn bench(options: Options) -> Result<Code, Failure> {
    if options.list {
        return print(&options::list()).map(|()| Code::Success);
    }
    outputs::check(&options)?;
    if options.compare.is_some() && !options.icount && options.from.is_empty() {
        return Err(Failure::new(Code::BadArgument, anyhow!("--compare needs a repeatable clock")).hint(
            Some("add --icount on a host whose clock counts instructions, or --from with a result of one"),
        ));
    }
    // Before minutes are spent on measuring.
    let before = options.compare.as_deref().map(read).transpose()?;
    let (run, failed) = if options.from.is_empty() {
        measure(&options)?
    } else {
        let runs = options.from.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
        (earlier::merge(runs, command()), Vec::new())
    };
    outputs::show(&options, &run)?;
    for why in &failed {
        eprintln!("vmm bench: not measured: {why}");
    }
    if options.from.is_empty() && run.interrupted {
        return Ok(Code::Killed);
    }
    if let Some(before) = &before {
        compare(&options, &run, before)?;
    }
    if failed.is_empty() {
        return Ok(Code::Success);
    }
    let error = anyhow!("not everything could be measured ({} failed)", failed.len());
    Err(Failure::new(Code::Host, error)
        .hint(Some("see the reasons above; to measure elsewhere, use --through COMMAND")))
}

/// Measures. What failed as a whole is told beside the result.
fn measure(options: &Options) -> Result<(Run, Vec<String>), Failure> {
    let host = |error: anyhow::Error| Failure::new(Code::Host, error);
    let scratch = Scratch::new("vmm-bench").map_err(host)?;
    let setting = setting(options, scratch.path()).map_err(host)?;
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    // What must repeat bit for bit comes in the order of the list; see `Plan`.
    let seed = if options.icount { 0 } else { since.map_or(1, |since| since.as_nanos() as u64 | 1) };
    let plan = Plan { samples: options.samples(), warm_up: options.warm_up(), seed, limit: options.limit() };
    interruptible().map_err(host)?;
    let elsewhere = options.through.as_ref().filter(|_| {
        let needed = !Host::look(false).hardware_virtualization;
        if !needed {
            eprintln!("vmm bench: --through is not needed: this host has hardware virtualization");
        }
        needed
    });

    let mut run = Run { command: command(), interrupted: false, suites: Vec::new() };
    let mut failed = Vec::new();
    let names = options.names();
    for (number, name) in names.iter().copied().enumerate() {
        let counted = format!("{name} ({} of {})", number + 1, names.len());
        let progress = Progress::new(counted.clone());
        let result = suites::run(name, &setting, plan, &mut |share, what| progress.show(share, what));
        drop(progress);
        let here = match result.and_then(|suite| earlier::check(&suite).map(|()| suite)) {
            Ok(suite) => {
                run.suites.push(suite);
                None
            }
            Err(why) => Some(why),
        };
        let elsewhere = elsewhere.filter(|_| name.needs_linux() && !INTERRUPTED.load(Ordering::SeqCst));
        let there = elsewhere.map(|words| {
            let place = words.0.join(" ");
            let progress = Progress::new(format!("{counted} through {place}"));
            through::measure(words, name, options, &setting, &progress)
        });
        match (here, there) {
            // What was interrupted before it had anything has nothing to tell.
            (Some(_), None) | (_, Some(Err(_))) if INTERRUPTED.load(Ordering::SeqCst) => {}
            (None, None) => {}
            (Some(why), None) => failed.push(format!("{name}: {why}")),
            (here, Some(Ok((suites, complaint)))) => {
                run.suites.extend(suites);
                if let Some(why) = here {
                    eprintln!("vmm bench: {name}: measured only in the other machine: {why}");
                }
                failed.extend(complaint.map(|why| format!("{name}, not all of it: {why}")));
            }
            (here, Some(Err(why))) => {
                failed.extend(here.map(|why| format!("{name}: {why}")));
                failed.push(format!("{name}, through another machine: {why}"));
            }
        }
        if INTERRUPTED.load(Ordering::SeqCst) {
            run.interrupted = true;
            break;
        }
    }
    Ok((run, failed))
}

fn setting(options: &Options, scratch: &Path) -> anyhow::Result<Setting> {
    let here = |name: &str| fs::canonicalize(options.guests().join(name)).ok();
    Ok(Setting {
        vmm: copied("vmm", &options.vmm()?, scratch).map_err(anyhow::Error::msg)?,
        own: std::env::current_exe().context("find this program")?,
        with: options.with.iter().cloned().collect::<BTreeMap<_, _>>(),
        kernel: here("tuned-vmlinux"),
        bzimage: here("tuned-bzImage"),
        stock: here("stock-bzImage").zip(here("stock.cpio")),
        agent: here("tuned.cpio"),
        scratch: scratch.to_owned(),
        instances: options.instances,
        repeatable_clock: options.icount,
    })
}

fn command() -> Vec<String> {
    std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect()
}

fn read(path: &Path) -> Result<Run, Failure> {
    let failed = |why| Failure::new(Code::BadArgument, anyhow!("cannot read {}: {why}", path.display()));
    earlier::read(path)
        .map_err(|why| failed(why).hint(Some("use a file that vmm bench --json or --html wrote")))
}

fn compare(options: &Options, run: &Run, before: &Run) -> Result<(), Failure> {
    let path = options.compare.as_deref().unwrap_or(Path::new("")).display();
    let names: Vec<&str> = options.suites.iter().map(|name| name.text()).collect();
    let verdict = baseline::compare(run, before, &names).map_err(|why| {
        Failure::new(Code::BadArgument, anyhow!("cannot compare with {path}: {why}"))
            .hint(Some("renew the baseline: vmm bench --icount --json FILE"))
    })?;
    for change in &verdict.better {
        eprintln!("vmm bench: {change}");
    }
    if !verdict.better.is_empty() {
        eprintln!(
            "vmm bench: better than {path}: renew it to keep the gain (vmm bench --icount --json FILE)"
        );
    }
    for change in &verdict.worse {
        eprintln!("vmm bench: {change}");
    }
    if verdict.worse.is_empty() {
        eprintln!("vmm bench: none of {} medians is more than 5% worse than in {path}", verdict.compared);
        return Ok(());
    }
    let error = anyhow!("worse than the baseline {path}: {} of its figures", verdict.worse.len());
    Err(Failure::new(Code::Worse, error).hint(Some(
        "see them above; if the change is intended, renew the baseline: vmm bench --icount --json FILE",
    )))
}

/// Ctrl-C ends the measurement; what there is is shown. A second one ends the program.
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
