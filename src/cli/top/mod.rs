//! `vmm top`: what a running virtual machine does, as a live view, or as numbers for programs.

mod screen;
mod session;
mod view;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use session::Session;
use vmm_command::{Code, Failure, print};
use vmm_monitor::api::registry::Registry;
use vmm_monitor::api::{Error, State};
use vmm_monitor::error_chain;
use vmm_trace::reasons::Shown;

/// What the columns mean: for `--help`, and for the view's own help.
const MEANING: &str = "\
exits/s    exits to the monitor; all/s: those inside KVM too (KVM's count)
monitor    time from an exit's arrival in the monitor to its answer
guest      the vCPU thread's other CPU time (schedstat): the guest's code,
           and KVM's work for it
wait       the thread was runnable, but the host had no processor for it
idle       the rest: asleep in KVM after HLT, or paused
kicks      times a device's worker served a queue, for one kick or several
bytes      through ports and registers, and in a network's frames; other
           traffic in queues is not counted
time       share of one processor spent on answering
place      the guest function (or address) that exits came from
KVM/s      KVM's own counters (KVM_GET_STATS_FD), all vCPUs together";

/// The end of `--help`.
fn after_help() -> String {
    format!(
        "\
Columns:
{}

Keys: q quit, p pause the view, s sort by count or time, h help

The recorder runs only while somebody watches; an exit then costs a few percent more (docs/trace.md).

Examples:
  vmm top                          watch the only virtual machine that runs
  vmm top web --interval 500ms     watch web, updated twice a second
  vmm top web --once               print one interval as text; needs no terminal
  vmm top web --once --json        the same numbers for a program
  vmm top web --json | jq .exits   one object a second until web ends
",
        indented(MEANING)
    )
}

fn indented(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(|line| format!("  {line}")).collect();
    lines.join("\n")
}

/// The options of `vmm top`.
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Options {
    /// The virtual machine's name, as vmm list shows it [default: the only one running]
    pub name: Option<String>,
    #[command(flatten)]
    pub looks: Looks,
}

/// How to look.
#[derive(Debug, clap::Args)]
pub struct Looks {
    /// Time between updates: 1s, 500ms
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Measure one interval, print it as text (or an object with --json), and exit
    #[arg(long)]
    once: bool,
    /// Print JSON: one object per interval, each on its own line
    #[arg(long)]
    json: bool,
    /// The guest's symbols: a vmlinux, a System.map or a copy of /proc/kallsyms; without FILE, those in or beside the kernel
    /// that the monitor names
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    symbols: Option<Option<PathBuf>>,
    /// Whose exit reasons to show: intel (VT-x), amd (AMD-V) or both [default: both where they fit, else this host's]
    #[arg(long, value_name = "WHOSE")]
    vendor: Option<Shown>,
}

impl Default for Looks {
    fn default() -> Self {
        Self { interval: Duration::from_secs(1), once: false, json: false, symbols: None, vendor: None }
    }
}

fn interval(text: &str) -> Result<Duration, &'static str> {
    const WORDS: &str = "expected a time from 100ms to 1h, like 500ms or 2s";
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|_| WORDS)? * unit;
    if !(0.1..=3600.0).contains(&seconds) {
        return Err(WORDS);
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// `vmm top`.
pub fn top(options: Options) -> Result<Code, Failure> {
    let Looks { interval, once, json, symbols, vendor } = options.looks;
    let on_terminal = !once && !json;
    if on_terminal && !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        let error = anyhow!("the view needs a terminal on standard input and output");
        return Err(Failure::new(Code::BadArgument, error)
            .hint(Some("for text: vmm top --once; for programs: vmm top --json")));
    }
    let name = match options.name {
        Some(name) => name,
        None => only_one()?,
    };
    let session = Session::attach(&name, symbols)?;
    if on_terminal {
        return screen::run(session, interval, vendor);
    }
    numbers(session, interval, (once, json), vendor)
}

/// The name of the virtual machine that runs, if there is one.
fn only_one() -> Result<String, Failure> {
    let mut names = Registry::of_user().names()?;
    match (names.pop(), names.len()) {
        (Some(name), 0) => Ok(name),
        (None, _) => Err(Failure::new(Code::Host, anyhow!("no virtual machine is running"))
            .hint(Some("start one in another terminal: vmm --name web --kernel vmlinux"))),
        (Some(last), _) => {
            names.push(last);
            let error = anyhow!("{} virtual machines are running: {}", names.len(), names.join(", "));
            Err(Failure::new(Code::BadArgument, error).hint(Some("name one of them: vmm top NAME")))
        }
    }
}

/// Without a terminal.
fn numbers(
    mut session: Session,
    interval: Duration,
    (once, json): (bool, bool),
    vendor: Option<Shown>,
) -> Result<Code, Failure> {
    let mut before = session.sample()?;
    loop {
        let until = Instant::now() + interval;
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            thread::sleep(left.min(session::KEEP_ALIVE));
            if Instant::now() < until {
                session.sample()?;
            }
        }
        let now = match session.sample() {
            Err(Error::NoSuchVm(name)) if !once => {
                eprintln!("vmm: {name} has ended");
                return Ok(Code::Success);
            }
            now => now?,
        };
        let look = session.look(&before, &now);
        if json {
            // What is printed here has string keys and finite numbers only, so it cannot fail.
            let mut line = serde_json::to_string(&look).unwrap_or_default();
            line.push('\n');
            match io::stdout().write_all(line.as_bytes()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Code::Success),
                result => result.map_err(|error| Failure::new(Code::Host, error))?,
            }
        } else {
            print(&view::text(&look, vendor))?;
        }
        if once {
            return Ok(Code::Success);
        }
        before = now;
    }
}

/// Why the view ended, if not because somebody wanted it to.
fn ended(error: Error) -> Result<Code, Failure> {
    match error {
        Error::NoSuchVm(name) => {
            // Not a failure: machines end.
            let _ = writeln!(io::stderr(), "vmm: {name} has ended");
            Ok(Code::Success)
        }
        error => Err(error.into()),
    }
}

/// What a state means for the numbers.
fn remark(state: State) -> &'static str {
    match state {
        State::Paused => "vmm resume continues it",
        State::Starting => "starting",
        State::Running | State::Stopping => "",
    }
}

/// A symbols file's error in one line, for the view.
fn in_short(error: &vmm_trace::symbols::Error) -> String {
    error_chain(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_explanations_fit_into_the_view() {
        // 80 columns, less the frame and a blank on either side.
        assert!(MEANING.lines().all(|line| line.len() <= 76), "{MEANING}");
    }

    #[test]
    fn intervals() {
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(interval("2s"), interval("2"));
        for bad in ["", "0", "-1s", "99ms", "NaN", "inf", "1e9s", "soon"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
    }
}
