//! Makes a guest that is a copy another one: its random numbers, its clock and its names, then whatever its programs want to do anew.
//!
//! A kernel's generator is not all that two copies have in common: programs have seeds, keys and identifiers of their own. They
//! find the copy's generation in a file, and what is to be run for them in a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;

use vmm_agent::protocol::{GENERATION, Reason, Renewal};

use crate::orders;
use crate::process::{self, DEFAULT_PATH, RENEW, Refusal, said};

/// Where the copy's generation is, in hexadecimal digits and the end of a line.
const FILE: &str = "run/vmm/generation";
/// The programs that are run, in the order of their names, with the generation as their argument.
const PROGRAMS: &str = "etc/vmm/generation.d";
/// machine-id(5).
const MACHINE_ID: &str = "etc/machine-id";
/// A new one each time, of the kernel's generator.
const UUID: &str = "/proc/sys/kernel/random/uuid";

/// A generation as text.
pub fn text(generation: &[u8; GENERATION]) -> String {
    generation.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is done before anything else, by the agent's own process: the seed has to stay off command lines.
///
/// # Errors
/// The guest's kernel refuses.
pub fn first(renewal: &Renewal) -> Result<(), Refusal> {
    let refused = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| (Reason::Refused, format!("the guest cannot {what}: {error}"))
    };
    orders::reseed(&renewal.seed).map_err(refused("mix in a seed"))?;
    orders::correct_time(renewal.time).map_err(refused("set its clock"))?;
    if renewal.hostname.is_empty() {
        return Ok(());
    }
    orders::set_hostname(&renewal.hostname).map_err(refused("set its host name"))
}

/// All of it. Returns when it is done: by a process of its own only where there are programs to run.
///
/// # Errors
/// Not all could be done.
pub fn complete(renewal: &Renewal) -> Result<(), Refusal> {
    first(renewal)?;
    let (root, generation) = (Path::new("/"), text(&renewal.generation));
    let complaints = match programs(&root.join(PROGRAMS)) {
        Ok(programs) if programs.is_empty() => files(root, generation.as_bytes(), renewal.machine_id),
        _ => process::run_own(&[RENEW, generation.as_bytes(), said(renewal.machine_id)])?,
    };
    match complaints.is_empty() {
        true => Ok(()),
        false => {
            let complaints = complaints.join("; ");
            let what = format!("the agent could not make the guest a machine of its own: {complaints}");
            Err((Reason::Refused, what))
        }
    }
}

/// The rest, below `root`, by a process of its own. Says on standard error what fails, and does all the same what does not.
pub fn run(root: &Path, generation: &[u8], machine_id: bool) -> ExitCode {
    let mut failures = files(root, generation, machine_id);
    match programs(&root.join(PROGRAMS)) {
        Ok(programs) => {
            failures.extend(programs.iter().filter_map(|program| run_program(program, generation).err()));
        }
        Err(error) => failures.push(format!("cannot read /{PROGRAMS}: {error}")),
    }
    failures.iter().for_each(|failure| eprintln!("{failure}"));
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Writes what there is of files below `root`. Says what fails.
fn files(root: &Path, generation: &[u8], machine_id: bool) -> Vec<String> {
    let mut failures = Vec::new();
    if let Err(error) = write(&root.join(FILE), &[generation, b"\n"].concat()) {
        failures.push(format!("cannot write /{FILE}: {error}"));
    }
    if machine_id && let Err(error) = renew_machine_id(root) {
        failures.push(format!("cannot write a new /{MACHINE_ID}: {error}"));
    }
    failures
}

/// Whoever reads it finds all of it or what was there before.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let part = path.with_extension("vmm-agent");
    fs::write(&part, content)?;
    fs::rename(&part, path).inspect_err(|_| _ = fs::remove_file(&part))
}

fn renew_machine_id(root: &Path) -> io::Result<()> {
    let uuid = fs::read_to_string(UUID)?;
    write(&root.join(MACHINE_ID), uuid.replace('-', "").as_bytes())
}

/// What may be run in `folder`, by name. A folder that is not there has nothing.
fn programs(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    let is_program = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let mut programs: Vec<_> = paths.into_iter().filter(is_program).collect();
    programs.sort();
    Ok(programs)
}

fn run_program(program: &Path, generation: &[u8]) -> Result<(), String> {
    let mut command = Command::new(program);
    command.arg(OsStr::from_bytes(generation)).stdin(Stdio::null());
    command.env_clear().env("PATH", OsStr::from_bytes(DEFAULT_PATH));
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{}: {status}", program.display())),
        Err(error) => Err(format!("{}: {error}", program.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root whose programs note that they ran: names, modes and exit codes as given.
    fn root(programs: &[(&str, u32, u8)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join(PROGRAMS)).unwrap();
        for (name, mode, code) in programs {
            let path = root.path().join(PROGRAMS).join(name);
            let noted = root.path().join("noted");
            let file = root.path().join(FILE);
            let script = format!(
                "#!/bin/sh\necho \"${{0##*/}} $1 $(cat {})\" >>{}\nexit {code}\n",
                file.display(),
                noted.display()
            );
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).unwrap();
        }
        root
    }

    fn noted(root: &tempfile::TempDir) -> String {
        fs::read_to_string(root.path().join("noted")).unwrap_or_default()
    }

    #[test]
    fn programs_run_by_name_once_the_generation_is_there_and_one_that_fails_holds_up_none() {
        let root = root(&[("20-b", 0o755, 0), ("10-a", 0o755, 3), ("30-no-program", 0o644, 0)]);
        assert_eq!(run(root.path(), b"0123", false), ExitCode::FAILURE);
        assert_eq!(noted(&root), "10-a 0123 0123\n20-b 0123 0123\n");
        assert!(!root.path().join(MACHINE_ID).exists());
    }

    #[test]
    fn each_renewal_has_its_generation_and_machine_id() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let mut ids = Vec::new();
        for generation in ["00ff", "00fe"] {
            assert_eq!(run(root.path(), generation.as_bytes(), true), ExitCode::SUCCESS);
            assert_eq!(fs::read_to_string(root.path().join(FILE)).unwrap(), format!("{generation}\n"));
            ids.push(fs::read_to_string(root.path().join(MACHINE_ID)).unwrap());
        }
        let fine = |id: &String| id.len() == 33 && id.trim_end().bytes().all(|byte| byte.is_ascii_hexdigit());
        assert!(ids[0] != ids[1] && ids.iter().all(fine), "{ids:?}");
    }

    #[test]
    fn a_generation_is_written_as_hexadecimal_digits() {
        let mut generation = [0; GENERATION];
        (generation[0], generation[15]) = (0xa5, 1);
        assert_eq!(text(&generation), format!("a5{}01", "0".repeat(28)));
    }
}
