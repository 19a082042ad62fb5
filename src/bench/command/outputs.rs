//! Where a result goes: files that are whole or not there, and standard output.

use std::fs;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};

use super::options::Options;
use crate::render::{csv, html, json, table};
use crate::result::Run;
use vmm_command::{Code, Failure, print};

/// The hint behind a path that cannot be written.
const HINT: &str =
    "name a file in a directory that exists and that you can write to, or - for standard output";

type Render = fn(&Run) -> String;

fn wanted(options: &Options) -> impl Iterator<Item = (&PathBuf, Render)> {
    let all: [(&Option<PathBuf>, Render); 3] =
        [(&options.json, json), (&options.csv, csv::csv), (&options.html, html::page)];
    all.into_iter().filter_map(|(path, render)| Some((path.as_ref()?, render)))
}

fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Whether the result can go where it is wanted: asked before minutes are spent on measuring.
///
/// # Errors
/// Two want standard output, two the same file, or a path that cannot be written.
pub fn check(options: &Options) -> Result<(), Failure> {
    let bad = |error: anyhow::Error| Failure::new(Code::BadArgument, error).hint(Some(HINT));
    let paths: Vec<&PathBuf> = wanted(options).map(|(path, _)| path).collect();
    for (index, path) in paths.iter().enumerate() {
        if paths[..index].contains(path) {
            return Err(bad(anyhow!("{} cannot take two outputs", path.display())));
        }
        if is_stdout(path) {
            continue;
        }
        if path.is_dir() {
            return Err(bad(anyhow!("cannot write {}: it is a directory", path.display())));
        }
        let folder = folder(path);
        let meta = fs::metadata(&folder);
        let there =
            meta.with_context(|| format!("cannot write {}: directory {}", path.display(), folder.display()));
        if !there.map_err(bad)?.is_dir() {
            return Err(bad(anyhow!(
                "cannot write {}: {} is not a directory",
                path.display(),
                folder.display()
            )));
        }
        if rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK).is_err() && !path.exists() {
            return Err(bad(anyhow!(
                "cannot write {}: no permission to write to {}",
                path.display(),
                folder.display()
            )));
        }
    }
    Ok(())
}

/// Writes `run` where it is wanted, and the table to standard output unless that is taken.
///
/// # Errors
/// Which paths cannot be written. The others are, and the table is shown.
pub fn show(options: &Options, run: &Run) -> Result<(), Failure> {
    let mut failed = Vec::new();
    if !wanted(options).any(|(path, _)| is_stdout(path)) {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        print(&table::table(run, colour))?;
    }
    for (path, render) in wanted(options) {
        if is_stdout(path) {
            print(&render(run))?;
        } else if let Err(error) = write(path, &render(run)) {
            failed.push(format!("cannot write {}: {error}", path.display()));
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Code::Host, anyhow!(failed.join("; "))).hint(Some(HINT)))
}

/// Writes beside `path` and renames, so that a file that was there stays whole if this fails.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    // Through a symbolic link to its target; a device or a pipe cannot be replaced.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&path).is_ok_and(|meta| !meta.is_file()) {
        return fs::write(path, text);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = folder(&path).join(format!(".{name}.{}", std::process::id()));
    let written = || {
        let mut file = fs::File::create_new(&beside)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&beside, &path)
    };
    written().inspect_err(|_| _ = fs::remove_file(&beside))
}

fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => ".".into(),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    }
}
