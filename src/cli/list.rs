//! `vmm list`: the running virtual machines, and what is kept of others.

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use super::detached::record::{Record, Records};
use vmm_command::{Code, Failure, pretty, print};
use vmm_monitor::api::client::{Client, Listed};
use vmm_monitor::api::registry::Registry;
use vmm_monitor::api::{Error, Status};
use vmm_monitor::config::Size;
use vmm_monitor::error_chain;

/// The options of `vmm list`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Add those that ran in the background (vmm run -d) and have ended
    #[arg(short, long)]
    all: bool,
}

/// How long to wait for the answers, of all that run together.
const PATIENCE: Duration = Duration::from_secs(2);

/// `vmm list`.
pub fn list(options: Options) -> Result<Code, Failure> {
    let registry = Registry::of_user();
    let mut rows = Client::ask_all(&registry, registry.names()?, PATIENCE);
    // It ended while we were looking.
    rows.retain(|row| !matches!(row.answer, Err(Error::NoSuchVm(_))));
    let ended = if options.all { ended(&registry, &rows)? } else { Vec::new() };
    print(&if options.json { json(&rows, &ended)? } else { table(&rows, &ended) })?;
    Ok(Code::Success)
}

/// The records whose names nobody has.
fn ended(registry: &Registry, running: &[Listed]) -> Result<Vec<Record>, Failure> {
    let records = Records::of_user()?;
    records.sweep(registry)?;
    let mut records = records.list()?;
    records.retain(|record| running.iter().all(|row| row.name != record.name()));
    Ok(records)
}

/// A row of `--json`.
#[derive(Serialize)]
#[serde(untagged)]
enum Row<'a> {
    Status(&'a Status),
    Error { name: &'a str, pid: Option<u32>, error: String },
    Ended { name: &'a str, state: &'static str, exit_code: Option<u8>, ended_at: Option<u64> },
}

fn json(rows: &[Listed], ended: &[Record]) -> Result<String, Failure> {
    let rows = rows.iter().map(|row| match &row.answer {
        Ok(status) => Row::Status(status),
        Err(error) => Row::Error { name: &row.name, pid: row.pid, error: error_chain(error) },
    });
    let ended = ended.iter().map(|record| {
        let (name, end) = (record.name(), record.end());
        Row::Ended {
            name,
            state: record.fate(),
            exit_code: end.map(|end| end.code),
            ended_at: end.map(|end| end.at),
        }
    });
    pretty(&rows.chain(ended).collect::<Vec<_>>())
}

fn table(rows: &[Listed], ended: &[Record]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<24} {:>8} {:<9} {:>9} {:>4} {:>7}  KERNEL",
        "NAME", "PID", "STATE", "UPTIME", "CPUS", "MEMORY"
    );
    for Listed { name, pid, answer } in rows {
        let pid = pid.map_or("-".to_owned(), |pid| pid.to_string());
        // Writing to a String does not fail.
        let _ = match answer {
            Ok(s) => writeln!(
                text,
                "{name:<24} {:>8} {:<9} {:>9} {:>4} {:>7}  {}",
                s.pid,
                s.state,
                uptime(s.uptime_seconds),
                s.cpus,
                Size::from_bytes(s.memory_bytes).to_string(),
                s.kernel.as_ref().map_or("-".into(), |path| path.display().to_string()),
            ),
            Err(Error::NoAnswer(_)) => {
                writeln!(text, "{name:<24} {pid:>8} {:<9} {:>9} {:>4} {:>7}  -", "no answer", "-", "-", "-")
            }
            Err(error) => writeln!(text, "{name:<24} {pid:>8} {}", error_chain(error)),
        };
    }
    for record in ended {
        let state = record.end().map_or(record.fate().to_owned(), |end| format!("exit {}", end.code));
        let _ =
            writeln!(text, "{:<24} {:>8} {state:<9} {:>9} {:>4} {:>7}  -", record.name(), "-", "-", "-", "-");
    }
    text
}

/// Seconds as people say them: `7s`, `12m03s`, `3h05m`, `2d04h`.
pub fn uptime(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{:02}h", s / 86400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn uptimes() {
        let times = [(0.9, "0s"), (59.0, "59s"), (61.0, "1m01s"), (3599.0, "59m59s"), (90061.0, "1d01h")];
        for (seconds, text) in times {
            assert_eq!(super::uptime(seconds), text);
        }
    }
}
