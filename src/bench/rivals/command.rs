//! Commands: found, shown, asked for their version, run to prepare something.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Setting;

/// Where the program is, or, with the reason for its absence, its bare name to show in the command.
pub fn found(setting: &Setting, name: &str) -> (PathBuf, Result<(), String>) {
    match setting.find(name) {
        Ok(path) => (path, Ok(())),
        Err(why) => (name.into(), Err(why)),
    }
}

/// A command as a shell takes it.
pub fn shown(program: &OsStr, arguments: &[String]) -> String {
    let quoted = |word: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.to_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    let words = std::iter::once(program.to_string_lossy().into_owned()).chain(arguments.iter().cloned());
    words.map(|word| quoted(&word)).collect::<Vec<_>>().join(" ")
}

/// The first line of what a program says of its version.
pub fn version(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| !line.trim().is_empty())?.trim().to_owned();
    output.status.success().then_some(line)
}

/// Runs a command that prepares or removes something.
///
/// # Errors
/// It cannot be started, or fails: what it said.
pub fn prepare(mut command: Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output();
    let name = command.get_program().to_string_lossy().into_owned();
    let output = output.map_err(|error| format!("start {name}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        let arguments: Vec<_> =
            command.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect();
        let line = shown(command.get_program(), &arguments);
        Err(format!("{line}: {}: {}", output.status, said.trim()))
    }
}

/// Words of text, owned.
pub fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_what_a_shell_takes() {
        let arguments = words(["a b", "it's", "--x=y", ""]);
        assert_eq!(shown(OsStr::new("/bin/echo"), &arguments), r"/bin/echo 'a b' 'it'\''s' --x=y ''");
        let line = shown(OsStr::new("printf"), &[&words(["%s|"])[..], &arguments].concat());
        let output = Command::new("sh").args(["-c", &line]).output().unwrap();
        assert_eq!(output.stdout, b"a b|it's|--x=y||");
    }

    #[test]
    fn what_fails_in_preparing_is_told() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo woe >&2; exit 3"]);
        let error = prepare(command).unwrap_err();
        assert!(error.contains("woe") && error.contains('3') && error.contains("sh -c"), "{error}");
    }
}
