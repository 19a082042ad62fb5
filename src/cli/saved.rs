//! Saved machines as `vmm snapshot list` and `vmm template list` show them.

use std::fmt::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::list::uptime;
use vmm_command::{Code, Failure, pretty};
use vmm_monitor::config::{Size, VmConfig};
use vmm_monitor::printable;
use vmm_monitor::snapshot::Saved;

/// A row of `--json`. Times are seconds since 1970.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    bytes: u64,
    made_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    used_at: Option<u64>,
    config: &'a VmConfig,
}

/// Prints them, each with the time of its last use, if that is known.
///
/// # Errors
/// Nobody takes it.
pub fn print<'a>(
    all: impl Iterator<Item = (&'a Saved, Option<SystemTime>)>,
    json: bool,
) -> Result<Code, Failure> {
    let all: Vec<_> = all.collect();
    vmm_command::print(&if json { as_json(&all)? } else { table(&all) })?;
    Ok(Code::Success)
}

fn as_json(all: &[(&Saved, Option<SystemTime>)]) -> Result<String, Failure> {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let rows = all.iter().map(|(saved, used)| Row {
        name: &saved.name,
        bytes: saved.bytes,
        made_at: seconds(saved.made),
        used_at: used.map(seconds),
        config: &saved.config,
    });
    pretty(&rows.collect::<Vec<_>>())
}

fn table(all: &[(&Saved, Option<SystemTime>)]) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{:<24} {:>7} {:>7} {:>7} {:>7}  OF", "NAME", "SIZE", "AGE", "USED", "MEMORY");
    for (saved, used) in all {
        let ago = |time: SystemTime| uptime(time.elapsed().unwrap_or_default().as_secs_f64());
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "{:<24} {:>7} {:>7} {:>7} {:>7}  {}",
            printable::text(&saved.name),
            format!("{}M", saved.bytes.div_ceil(1 << 20)),
            ago(saved.made),
            used.map_or("-".to_owned(), ago),
            Size::from_bytes(saved.config.mem.size.bytes()).to_string(),
            printable::text(&of(&saved.config)),
        );
    }
    text
}

/// What was booted: its files by their names.
fn of(config: &VmConfig) -> String {
    let disks = config.disk.iter().map(|disk| &disk.path);
    let files = config.kernel.iter().chain(&config.initrd).chain(disks);
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    files.filter_map(|path| name(path)).collect::<Vec<_>>().join(" ")
}
