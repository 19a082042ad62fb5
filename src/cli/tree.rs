//! `vmm snapshot tree`: which snapshots lie over which.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::Serialize;

use super::list::uptime;
use vmm_command::{Code, Failure, pretty, print};
use vmm_monitor::printable;
use vmm_monitor::snapshot::{Relative, Tie, family};

/// The options of `vmm snapshot tree`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Snapshots, or folders with snapshots in them
    #[arg(value_name = "FOLDER", default_value = ".")]
    folders: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A node of `--json`. Times are seconds since 1970.
#[derive(Serialize)]
struct Node<'a> {
    folder: &'a Path,
    bytes: u64,
    made_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<Base<'a>>,
    /// Those that lie over it.
    above: Vec<Node<'a>>,
}

#[derive(Serialize)]
struct Base<'a> {
    folder: &'a Path,
    state: &'static str,
}

/// `vmm snapshot tree`.
///
/// # Errors
/// A folder cannot be read.
pub fn tree(options: &Options) -> Result<Code, Failure> {
    let all = family(&options.folders)?;
    let roots = || all.iter().filter(|relative| relative.over().is_none());
    if options.json {
        print(&pretty(&roots().map(|root| node(&all, root)).collect::<Vec<_>>())?)?;
        return Ok(Code::Success);
    }
    let mut text = format!("{:>7} {:>7}  {}\n", "SIZE", "AGE", "NAME");
    roots().for_each(|root| lines(&all, root, "", "", &mut text));
    print(&text)?;
    Ok(Code::Success)
}

/// `folder` as one in the current folder writes it.
pub fn short(folder: &Path) -> PathBuf {
    let here = std::env::current_dir().and_then(|here| here.canonicalize());
    let below = here.ok().and_then(|here| folder.strip_prefix(here).ok().map(Path::to_owned));
    below.filter(|below| !below.as_os_str().is_empty()).unwrap_or_else(|| folder.to_owned())
}

fn over<'a>(all: &'a [Relative], base: &Relative) -> impl Iterator<Item = &'a Relative> + use<'a> {
    let folder = base.folder.clone();
    all.iter().filter(move |relative| relative.over() == Some(folder.as_path()))
}

fn node<'a>(all: &'a [Relative], relative: &'a Relative) -> Node<'a> {
    let base = relative.base.as_ref().map(|(folder, tie)| Base {
        folder,
        state: match tie {
            Tie::Whole => "whole",
            Tie::Gone => "gone",
            Tie::Changed => "changed",
            Tie::TooHigh => "too-high",
        },
    });
    Node {
        folder: &relative.folder,
        bytes: relative.bytes,
        made_at: relative.made.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        damage: relative.damage.as_deref(),
        base,
        above: over(all, relative).map(|above| node(all, above)).collect(),
    }
}

/// Adds the line of `relative`, whose name stands behind `branch`, and of those over it, whose branches grow from `trunk`.
fn lines(all: &[Relative], relative: &Relative, branch: &str, trunk: &str, text: &mut String) {
    let size = format!("{}M", relative.bytes.div_ceil(1 << 20));
    let age = uptime(relative.made.elapsed().unwrap_or_default().as_secs_f64());
    let name = short(&relative.folder).display().to_string();
    let line = format!("{size:>7} {age:>7}  {branch}{}{}", printable::text(&name), remark(relative));
    text.push_str(&line);
    text.push('\n');
    let mut above = over(all, relative).peekable();
    while let Some(next) = above.next() {
        let (branch, grown) = if above.peek().is_some() { ("├─ ", "│  ") } else { ("└─ ", "   ") };
        lines(all, next, &format!("{trunk}{branch}"), &format!("{trunk}{grown}"), text);
    }
}

/// Names what in `folder` would be listed, and cannot be restored.
pub fn warn_of_damage(folder: &Path) {
    for relative in family(&[folder.to_owned()]).unwrap_or_default() {
        let remark = remark(&relative);
        if !remark.is_empty() {
            log::warn!("{}{remark}", short(&relative.folder).display());
        }
    }
}

/// What is wrong with it.
fn remark(relative: &Relative) -> String {
    let base = |folder: &Path| printable::text(&short(folder).display().to_string()).into_owned();
    match (&relative.damage, &relative.base) {
        (Some(damage), _) => format!(" (damaged: {})", printable::text(damage)),
        (None, Some((folder, Tie::Gone))) => format!(" (its base, {}, is gone)", base(folder)),
        (None, Some((folder, Tie::Changed))) => format!(" (its base, {}, is not what it was)", base(folder)),
        (None, Some((folder, Tie::TooHigh))) => {
            format!(" (over {}, among too many that lie over each other)", base(folder))
        }
        _ => String::new(),
    }
}
