//! How a command ends: its exit code, and the error and hint that it prints if it fails.

use std::borrow::Cow;
use std::io::Write;
use std::process::ExitCode;

use anyhow::anyhow;
use serde::Serialize;
use vmm_monitor::machine::{self, Outcome};
use vmm_monitor::printable;

use crate::log_output;
use vmm_monitor::config::ParseError;

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
    /// Killed from outside.
    Killed,
    /// `bench --compare` found something worse than the baseline.
    Worse,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The sandbox refused something, and the machine was ended.
    Sandbox,
    /// Not ours to choose: what the guest wrote to the debug-exit port, as the device makes it (odd), or the code of the process that
    /// did the work.
    Other(u8),
    /// What a command in the guest ended with, or why it was not run, as shells and docker have it.
    Command(u8),
}

impl Code {
    /// The code as `--help` explains it.
    const TABLE: [(Self, &str); 9] = [
        (Self::Success, "the guest powered off or rebooted, or the command succeeded"),
        (
            Self::BadArgument,
            "bad argument, or a file that it names cannot be used; nothing on the disks can be booted",
        ),
        (
            Self::Host,
            "the host lacks or refused something: KVM, memory, open files, a port, a VM of that name",
        ),
        (Self::GuestCrash, "the guest crashed (triple fault)"),
        (Self::Internal, "KVM could not run the guest (internal error or failed entry)"),
        (Self::Killed, "the VM was killed: vmm kill, a second signal, the timeout of a stop, Ctrl-A x"),
        (Self::Worse, "vmm bench --compare: more than 5% worse than the baseline"),
        (Self::GuestPanic, "the guest's kernel panicked"),
        (Self::Sandbox, "the sandbox refused the monitor something, and ended it"),
    ];

    /// Of `vmm exec`: the command was not run, or how it ended is not known.
    pub const NOT_RUN: u8 = 125;
    /// Of `vmm exec`: the command cannot be run.
    pub const CANNOT_RUN: u8 = 126;
    /// Of `vmm exec`: there is no such command.
    pub const NOT_FOUND: u8 = 127;

    /// What a run that ended so is to the shell.
    pub fn of(outcome: &Result<Outcome, machine::Error>) -> Self {
        match outcome {
            Ok(Outcome::Shutdown | Outcome::Reset) => Self::Success,
            Ok(Outcome::Exit(code)) => Self::Other(*code),
            Ok(Outcome::NothingToBoot) => Self::BadArgument,
            Ok(Outcome::Killed) => Self::Killed,
            Ok(Outcome::Crash(_)) => Self::GuestCrash,
            Ok(Outcome::Panic(_)) => Self::GuestPanic,
            Ok(Outcome::InternalError(_)) => Self::Internal,
            Err(error) if error.is_bad_argument() => Self::BadArgument,
            Err(_) => Self::Host,
        }
    }

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
            Self::GuestPanic => 14,
            Self::Sandbox => 16,
            Self::Other(code) | Self::Command(code) => code,
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
    text.push_str("vmm exec and vmm shell have the command's own, 128 + N where signal N ended it, and\n");
    let own = [
        (Code::NOT_RUN, "the command was not run, or the connection to it was lost"),
        (Code::CANNOT_RUN, "the command cannot be run: no permission, no such user or folder"),
        (Code::NOT_FOUND, "the guest has no such command"),
    ];
    for (code, meaning) in own {
        text.push_str(&format!("  {code} {meaning}\n"));
    }
    text
}

/// Hints for when file descriptors run out. The soft limit has been raised to the hard one by then.
const FEW_FILES: &str = "raise this shell's limit on open files: sudo prlimit --nofile=4096 --pid $$";
const FEW_FILES_AT_ALL: &str = "the whole host is out of open files: sudo sysctl -w fs.file-max=1000000";

/// A command that failed: the error, what to try, and the exit code.
#[derive(Debug)]
pub struct Failure {
    error: anyhow::Error,
    hint: Option<Cow<'static, str>>,
    /// The process's exit code.
    pub code: Code,
}

impl Failure {
    /// A failure of kind `code`. Whatever it was that found no free descriptor, it is the host that lacks them.
    pub fn new(code: Code, error: impl Into<anyhow::Error>) -> Self {
        let error = error.into();
        // By what the standard library and others write for an error number: its types differ with who wraps it.
        let met = |number: i32| format!("{error:#}").contains(&format!("(os error {number})"));
        let (code, hint) = match () {
            () if met(libc::EMFILE) => (Code::Host, Some(FEW_FILES.into())),
            () if met(libc::ENFILE) => (Code::Host, Some(FEW_FILES_AT_ALL.into())),
            () => (code, None),
        };
        Self { error, hint, code }
    }

    /// Adds a hint, unless there is one.
    pub fn hint(mut self, hint: Option<impl Into<Cow<'static, str>>>) -> Self {
        self.hint = self.hint.or(hint.map(Into::into));
        self
    }

    /// The library's error that it is, if it is one of that kind.
    pub fn cause<E: std::error::Error + Send + Sync + 'static>(&self) -> Option<&E> {
        self.error.downcast_ref()
    }

    /// An error of clap's in the form of our own.
    pub fn usage(error: &clap::Error) -> Self {
        let text = error.to_string();
        // "error: WHAT", some lines of detail, perhaps "tip: ...", then the usage. The details belong to WHAT.
        let mut lines = text.lines().map(str::trim);
        let first = lines.next().unwrap_or_default();
        let mut what = first.strip_prefix("error: ").unwrap_or(first).to_owned();
        let mut hint = None;
        for line in lines {
            if let Some(tip) = line.strip_prefix("tip: ") {
                // What looks like an option and is none was rarely meant for a value.
                if tip.starts_with("to pass ") {
                    continue;
                }
                hint.get_or_insert_with(|| tip.to_owned());
            } else if line.starts_with("Usage:") || line.starts_with("For more information") {
                break;
            } else if !line.is_empty() {
                what = format!("{what} {line}");
            }
        }
        let parsed = std::error::Error::source(error).and_then(|source| source.downcast_ref::<ParseError>());
        let hint = parsed.and_then(ParseError::hint).map(str::to_owned).or(hint);
        let hint = hint.unwrap_or_else(|| "see vmm --help, or vmm run --help for every option".to_owned());
        Self { error: anyhow!(what), hint: Some(hint.into()), code: Code::BadArgument }
    }

    /// Prints it on stderr. `spell` turns settings, which the libraries write in backquotes, into the options of the command line
    /// at hand.
    pub fn print(&self, spell: impl Fn(&str) -> Cow<'_, str>) {
        self.say("error", spell);
    }

    /// The same where what failed is not what was asked for.
    pub fn warn(&self, spell: impl Fn(&str) -> Cow<'_, str>) {
        self.say("warning", spell);
    }

    /// The error alone, for who has no use for the rest.
    pub fn into_error(self) -> anyhow::Error {
        self.error
    }

    /// The error and what to try, for who tells somebody else.
    pub fn words(&self, spell: impl Fn(&str) -> Cow<'_, str>) -> (String, Option<String>) {
        let error = spell(&format!("{:#}", self.error)).into_owned();
        (error, self.hint.as_ref().map(|hint| spell(hint).into_owned()))
    }

    fn say(&self, kind: &str, spell: impl Fn(&str) -> Cow<'_, str>) {
        let mut text = format!("vmm: {kind}: {:#}\n", self.error);
        if let Some(hint) = &self.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        log_output::say(&printable::lines(&spell(&text)));
    }
}

/// A command's result as JSON.
///
/// # Errors
/// It has something that JSON cannot say.
pub fn pretty(value: &impl Serialize) -> Result<String, Failure> {
    let context = |error| anyhow::Error::new(error).context("cannot write the result as JSON");
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Failure::new(Code::Host, context(error)))?;
    let mut text = printable::json(text);
    text.push('\n');
    Ok(text)
}

/// Writes a command's result to stdout. A reader that has gone away (`| head`) is no error.
///
/// # Errors
/// stdout does not take it: a full disk, say.
pub fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes()).map(drop)
}

/// The same for what is no text. False if the reader has gone away.
///
/// # Errors
/// As for [`print()`].
pub fn print_bytes(bytes: &[u8]) -> Result<bool, Failure> {
    let mut stdout = std::io::stdout();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            let error = anyhow::Error::new(error).context("cannot write to standard output");
            Err(Failure::new(Code::Host, error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_descriptors_are_the_hosts_affair_whoever_met_it() {
        for number in [libc::EMFILE, libc::ENFILE] {
            let error = std::io::Error::from_raw_os_error(number);
            let failure = Failure::new(Code::BadArgument, anyhow::Error::new(error).context("open disk d"));
            let failure = failure.hint(Some("check the disk"));
            assert_eq!(failure.code, Code::Host);
            assert!(failure.hint.unwrap().contains("open files"));
        }
    }

    #[test]
    fn codes_are_distinct_and_never_those_of_the_debug_exit_device() {
        let numbers: Vec<u8> = Code::TABLE.iter().map(|(code, _)| code.number()).collect();
        assert!(numbers.iter().all(|n| n % 2 == 0));
        assert!(numbers.windows(2).all(|w| w[0] < w[1]));
    }
}
