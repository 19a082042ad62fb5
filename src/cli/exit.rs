//! How a command ends: its exit code, and what is said when it fails.

use std::borrow::Cow;
use std::io::Write;
use std::process::ExitCode;

use anyhow::anyhow;
use serde::Serialize;

use crate::{api, config};

/// The exit codes. All are even, because those of the debug-exit device are odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The guest powered off or rebooted, or the command did what it should.
    Success,
    /// The command line or a file that it names cannot be used.
    BadArgument,
    /// The host lacks something or refused it.
    Host,
    /// The guest crashed.
    GuestCrash,
    /// KVM gave up.
    Internal,
    /// Stopped from outside, hard.
    Killed,
    /// `bench --compare` found something worse than the baseline.
    Worse,
    /// What the guest wrote to the debug-exit port, as the device makes it: odd.
    Guest(u8),
}

impl Code {
    /// The code as `--help` explains it.
    const TABLE: [(Self, &str); 7] = [
        (Self::Success, "the guest powered off or rebooted; or the command did what was asked"),
        (
            Self::BadArgument,
            "an argument, or a file that it names, cannot be used; nothing on the disks can be booted",
        ),
        (Self::Host, "the host lacks or refused something: KVM, memory, a running VM of that name"),
        (Self::GuestCrash, "the guest crashed (triple fault)"),
        (Self::Internal, "KVM could not run the guest (internal error, failed entry)"),
        (Self::Killed, "the VM was stopped hard: kill, a second signal, a stop's timeout, Ctrl-A x"),
        (Self::Worse, "vmm bench --compare: more than 5% worse than the baseline"),
    ];

    /// The number.
    pub fn number(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::BadArgument => 2,
            Self::Host => 4,
            Self::GuestCrash => 6,
            Self::Internal => 8,
            Self::Killed => 10,
            Self::Worse => 12,
            Self::Guest(code) => code,
        }
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code.number())
    }
}

/// The table of exit codes, for `--help`.
pub fn table() -> String {
    let mut text = "Exit codes:\n".to_owned();
    for (code, meaning) in Code::TABLE {
        text.push_str(&format!("  {:<3} {meaning}\n", code.number()));
    }
    text.push_str("  odd with --debug-exit: what the guest wrote, times two, plus one\n");
    text
}

/// A command that failed: what is said, what to try, and the exit code.
#[derive(Debug)]
pub struct Failure {
    error: anyhow::Error,
    hint: Option<Cow<'static, str>>,
    /// The process's exit code.
    pub code: Code,
}

impl Failure {
    /// A failure of kind `code`.
    pub fn new(code: Code, error: impl Into<anyhow::Error>) -> Self {
        Self { error: error.into(), hint: None, code }
    }

    /// The same with something to try.
    pub fn hint(mut self, hint: Option<impl Into<Cow<'static, str>>>) -> Self {
        self.hint = hint.map(Into::into);
        self
    }

    /// What clap has to say, in the form of our own errors.
    pub fn usage(error: &clap::Error) -> Self {
        let text = error.to_string();
        // "error: WHAT", some lines of detail, perhaps "tip: ...", then the usage. The details belong to WHAT.
        let mut lines = text.lines().map(str::trim);
        let first = lines.next().unwrap_or_default();
        let mut what = first.strip_prefix("error: ").unwrap_or(first).to_owned();
        let mut hint = None;
        for line in lines {
            if let Some(tip) = line.strip_prefix("tip: ") {
                hint.get_or_insert_with(|| tip.to_owned());
            } else if line.starts_with("Usage:") || line.starts_with("For more information") {
                break;
            } else if !line.is_empty() {
                what = format!("{what} {line}");
            }
        }
        let hint = hint.unwrap_or_else(|| "vmm --help and vmm run --help tell what there is".to_owned());
        Self { error: anyhow!(what), hint: Some(hint.into()), code: Code::BadArgument }
    }

    /// Says it on stderr.
    pub fn print(&self) {
        let mut text = format!("vmm: error: {:#}\n", self.error);
        if let Some(hint) = &self.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        // One write, so that it stays in one piece. If stderr is gone there is nobody to tell.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl From<config::Invalid> for Failure {
    fn from(error: config::Invalid) -> Self {
        let hint = error.hint;
        Self::new(Code::BadArgument, error).hint(Some(hint))
    }
}

impl From<api::Error> for Failure {
    fn from(error: api::Error) -> Self {
        let hint = error.hint();
        Self::new(Code::Host, error).hint(hint)
    }
}

/// A command's result as JSON.
pub fn pretty(value: &impl Serialize) -> String {
    // What is printed here has string keys and finite numbers only, so it cannot fail.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}

/// Writes a command's result to stdout. A reader that has gone away (`| head`) is no error.
///
/// # Errors
/// stdout does not take it: a full disk, say.
pub fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Code::Host, anyhow::Error::new(error).context("write to stdout")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_never_those_of_the_debug_exit_device() {
        let numbers: Vec<u8> = Code::TABLE.iter().map(|(code, _)| code.number()).collect();
        assert!(numbers.iter().all(|n| n % 2 == 0));
        assert!(numbers.windows(2).all(|w| w[0] < w[1]));
    }
}
