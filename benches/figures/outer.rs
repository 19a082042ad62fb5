//! The three measurements as a user starts them, from where they run to their tables.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::guests::{self, Guest, RAM_MIB};
use crate::monitors::Monitor;
use crate::options::Options;
use crate::run::{self, Times};
use crate::smaps::Weight;
use crate::table::{Table, ms, quantile, spread};

/// The tiny guest on this host's KVM.
pub fn tiny(options: &Options) -> Result<Table, String> {
    fs::File::options().read(true).write(true).open("/dev/kvm").map_err(|e| format!("/dev/kvm: {e}"))?;
    let dir = tempfile::tempdir().map_err(|e| format!("make a folder: {e}"))?;
    let guest = Guest::tiny(dir.path())?;
    let mut monitors = Monitor::all(options);
    // One that cannot run this guest here is left out, loudly.
    monitors.retain(|monitor| match run::once(monitor, &guest, |_| Ok(())) {
        Ok(_) => true,
        Err(error) => {
            eprintln!("figures: SKIPPED: {error}");
            false
        }
    });
    let count = options.samples.unwrap_or(20);
    let times = run::series(&monitors, &guest, count)?;
    let mut table = Table {
        title: format!("A guest of 5 instructions, {RAM_MIB} MiB, 1 vCPU: ms, median (p10-p90) of {count}"),
        head: heads(&["monitor", "exec to first output", "exec to exit"]),
        rows: Vec::new(),
        notes: host(&monitors),
    };
    rows(&mut table, &monitors, &times);
    Ok(table)
}

/// Linux by wall clock, and the monitors' memory.
pub fn boot(options: &Options) -> Result<Table, String> {
    let monitors = Monitor::all(options);
    let count = options.samples.unwrap_or(10);
    let mut command = rig(options, &["--timeout", "3600"]);
    inside(&mut command, options)?.args(["--samples", &count.to_string()]);
    let (mut times, weights) = parse(&output(&mut command)?)?;
    let times: Vec<_> = monitors.iter().map(|m| times.remove(m.name).unwrap_or_default()).collect();
    if times.iter().any(Vec::is_empty) {
        return Err("a monitor is missing from the results".to_owned());
    }
    let mut table = Table {
        title: format!(
            "Linux to its first line in user space, {RAM_MIB} MiB, 1 vCPU: ms, median (p10-p90) of {count}"
        ),
        head: heads(&["monitor", "exec to marker", "exec to exit"]),
        rows: Vec::new(),
        notes: host(&monitors),
    };
    rows(&mut table, &monitors, &times);
    let titles = ["beyond guest RAM, KiB: resident", "of it private", "peak"];
    table.head.extend(titles.map(str::to_owned));
    for (row, monitor) in table.rows.iter_mut().zip(&monitors) {
        let weights = weights.get(monitor.name).map(Vec::as_slice).unwrap_or_default();
        if weights.is_empty() {
            return Err("a monitor was not weighed".to_owned());
        }
        let middle = |kib: fn(&Weight) -> u64| quantile(&weights.iter().map(kib).collect::<Vec<_>>(), 0.5);
        row.extend(
            [middle(|w| w.resident), middle(|w| w.private), middle(|w| w.peak)].map(|k| k.to_string()),
        );
    }
    Ok(table)
}

/// Linux by the repeatable clock: each monitor in a machine of its own, all of it twice.
pub fn icount(options: &Options) -> Result<Table, String> {
    let folder = guests::folder(options.guests.as_deref())?;
    let monitors = Monitor::all(options);
    let mut table = Table {
        title: format!(
            "Linux on the repeatable clock (1 instruction = 1 ns), {RAM_MIB} MiB, 1 vCPU: virtual ms"
        ),
        head: heads(&[
            "monitor",
            "exec to marker",
            "exec to exit",
            "second start: marker",
            "exit",
            "repeats",
        ]),
        rows: Vec::new(),
        notes: host(&monitors),
    };
    table.notes.push("First and second start in a machine just booted; `repeats`: the same to the nanosecond in another such machine.".to_owned());
    for monitor in &monitors {
        let measure = || {
            let mut flags = vec!["--icount".to_owned(), "--timeout".to_owned(), "3600".to_owned()];
            let guest = guests::FILES.map(|name| folder.join(name));
            for file in monitor.files().iter().chain(&guest) {
                flags.extend(["--with".to_owned(), file.display().to_string()]);
            }
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let mut command = rig(options, &flags);
            inside(&mut command, options)?.args(["--only", monitor.name]);
            let (mut times, _) = parse(&output(&mut command)?)?;
            times
                .remove(monitor.name)
                .filter(|times| times.len() == 2)
                .ok_or("two starts expected".to_owned())
        };
        let (first, again) = (measure()?, measure()?);
        let cells = first.iter().flat_map(|times| [ms(times.marker), ms(times.exit)]);
        let mut row: Vec<String> = [monitor.name.to_owned()].into_iter().chain(cells).collect();
        row.push(if first == again { "yes".to_owned() } else { format!("no: {}", ms(again[0].marker)) });
        table.rows.push(row);
    }
    Ok(table)
}

/// The rig as a command, to which the command that it runs is added.
fn rig(options: &Options, flags: &[&str]) -> Command {
    let mut command = match &options.rig {
        Some(rig) => Command::new(rig),
        None => {
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
            cargo.args(["run", "--quiet", "--package", "rig", "--"]);
            cargo
        }
    };
    command.args(flags).arg("--");
    command
}

/// Adds this program, as it is to run inside.
fn inside<'a>(command: &'a mut Command, options: &Options) -> Result<&'a mut Command, String> {
    let program = std::env::current_exe().map_err(|e| format!("find this program: {e}"))?;
    command.arg(program).arg("inside").arg("--guests").arg(guests::folder(options.guests.as_deref())?);
    for monitor in Monitor::all(options) {
        let program = fs::canonicalize(monitor.program()).map_err(|e| format!("{}: {e}", monitor.name))?;
        command.arg(if monitor.name == "vmm" { "--vmm" } else { "--qemu" }).arg(program);
    }
    Ok(command)
}

fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|e| format!("run {command:?}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

type Figures = (BTreeMap<String, Vec<Times>>, BTreeMap<String, Vec<Weight>>);

/// Reads what [`run::inside`] says.
fn parse(text: &str) -> Result<Figures, String> {
    let (mut times, mut weights): Figures = Default::default();
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let numbers: Option<Vec<u64>> = fields.iter().skip(2).map(|field| field.parse().ok()).collect();
        match (fields[0], fields.get(1), numbers.as_deref()) {
            ("time", Some(name), Some(&[marker, exit])) => {
                let times = times.entry((*name).to_owned()).or_default();
                times.push(Times { marker: Duration::from_nanos(marker), exit: Duration::from_nanos(exit) });
            }
            ("weight", Some(name), Some(&[resident, private, peak])) => {
                weights.entry((*name).to_owned()).or_default().push(Weight { resident, private, peak });
            }
            _ => return Err(format!("not a result: {line}")),
        }
    }
    Ok((times, weights))
}

fn heads(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// One row a monitor, and one with the last's medians over the first's.
fn rows(table: &mut Table, monitors: &[Monitor], times: &[Vec<Times>]) {
    let columns = |times: &[Times]| {
        let column = |part: fn(&Times) -> Duration| times.iter().map(part).collect::<Vec<_>>();
        [column(|t| t.marker), column(|t| t.exit)]
    };
    for (monitor, times) in monitors.iter().zip(times) {
        let cells = columns(times).map(|column| spread(&column));
        table.rows.push([monitor.name.to_owned()].into_iter().chain(cells).collect());
    }
    if let ([first, .., last], [a, .., b]) = (monitors, times) {
        let medians = |times: &[Times]| columns(times).map(|column| quantile(&column, 0.5).as_secs_f64());
        let (a, b) = (medians(a), medians(b));
        table.notes.push(format!(
            "{} / {}: {:.2} to the first output, {:.2} to exit.",
            last.name,
            first.name,
            b[0] / a[0],
            b[1] / a[1]
        ));
    }
}

/// What was measured, and the machine that the program was started on.
fn host(monitors: &[Monitor]) -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("?", |l| l.1);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let versions: Vec<String> = monitors.iter().map(Monitor::version).collect();
    let cpus = std::thread::available_parallelism().map_or(0, |n| n.get());
    vec![
        format!("{}.", versions.join("; ")),
        format!("Host: {cpu}, {cpus} CPUs, Linux {}, load {load} at the end.", kernel.trim()),
    ]
}
