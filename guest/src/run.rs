//! Runs the standard tools that do the heavy work, with errors that show the command and what it said. Called by all
//! that build; knows nothing of what they build.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// A command in the making.
#[derive(Debug)]
pub struct Tool(Command);

impl Tool {
    /// `program` from PATH, with /usr/sbin and /sbin added: Debian users lack them there, and mke2fs and depmod live there.
    pub fn new(program: &str) -> Self {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C").stdin(Stdio::null());
        Self(command)
    }

    /// As root: by sudo if we are not.
    pub fn as_root(program: &str) -> Self {
        if rustix::process::geteuid().is_root() { Self::new(program) } else { Self::new("sudo").arg(program) }
    }

    /// Adds one argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.0.arg(argument);
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.0.args(arguments);
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Sets its working directory.
    pub fn dir(mut self, dir: &Path) -> Self {
        self.0.current_dir(dir);
        self
    }

    /// Runs it; its standard output.
    pub fn output(self) -> Result<String> {
        let bytes = self.filter(&[])?;
        String::from_utf8(bytes).context("output is not UTF-8")
    }

    /// Runs it, its output kept back unless it fails.
    pub fn quiet(self) -> Result<()> {
        self.filter(&[]).map(drop)
    }

    /// Runs it with its output going to our standard error.
    pub fn loud(mut self) -> Result<()> {
        let name = self.describe();
        let status = self.0.stdout(std::io::stderr()).status().with_context(|| format!("run `{name}`"))?;
        if !status.success() {
            bail!("`{name}` failed ({status})");
        }
        Ok(())
    }

    /// Runs it with `input` as its standard input; its standard output.
    pub fn filter(mut self, input: &[u8]) -> Result<Vec<u8>> {
        let name = self.describe();
        if !input.is_empty() {
            self.0.stdin(Stdio::piped());
        }
        let mut child = self
            .0
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run `{name}`"))?;
        let stdin = child.stdin.take();
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                // A tool that stops reading early says why by its exit code.
                stdin.map(|mut stdin| stdin.write_all(input))
            });
            child.wait_with_output()
        })
        .with_context(|| format!("run `{name}`"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("`{name}` failed ({}): {}", output.status, last_lines(&said, 15));
        }
        Ok(output.stdout)
    }

    /// The command itself, for those who want to read its output as it comes.
    pub fn into_command(self) -> Command {
        self.0
    }

    fn describe(&self) -> String {
        let mut text = self.0.get_program().to_string_lossy().into_owned();
        for argument in self.0.get_args() {
            text.push(' ');
            text.push_str(&argument.to_string_lossy());
        }
        text
    }
}

/// The end of a longer text.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Progress, on standard error: results go to standard output.
pub fn say(text: impl std::fmt::Display) {
    eprintln!("guest: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_a_pipe_holds_goes_through() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(Tool::new("cat").filter(&input).unwrap(), input);
    }

    #[test]
    fn a_failure_shows_the_command_and_its_words() {
        let error = Tool::new("sh").args(["-c", "echo broken >&2; exit 3"]).quiet().unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains("broken") && error.contains('3'), "{error}");
        let error = Tool::new("no-such-program").quiet().unwrap_err().to_string();
        assert!(error.contains("no-such-program"), "{error}");
    }
}
