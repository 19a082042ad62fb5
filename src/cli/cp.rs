//! `vmm cp`: files into a guest and out of it, as `docker cp` does it. They travel as tar streams, made and unpacked by the agent there
//! and by this process here.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use anyhow::anyhow;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::agent::Reach;
use vmm_agent::client::{Session, Streams, run};
use vmm_agent::protocol::{Exit, Request};
use vmm_agent::tar::{self, Policy};
use vmm_command::{Code, Failure};
use vmm_monitor::api::signals::is_ignored;

/// The most that is kept of what the guest's end says about its failure.
const MAX_WORDS: usize = 4096;

/// The options of `vmm cp`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Keep owners, set-user-ID bits and all attributes; else all belongs to whom it is copied to
    #[arg(short, long)]
    archive: bool,
    #[command(flatten)]
    reach: Reach,
    /// What to copy: PATH, NAME:PATH in a guest, or - for a tar stream on standard input. PATH/. is a folder's content alone
    #[arg(value_name = "SRC")]
    from: OsString,
    /// Where to: NAME:PATH in a guest, PATH, or - for a tar stream on standard output
    #[arg(value_name = "DST")]
    to: OsString,
}

/// One end of a copy.
enum End<'a> {
    Guest(&'a str, &'a [u8]),
    Host(&'a [u8]),
    Stream,
}

impl<'a> End<'a> {
    /// `NAME:PATH` unless there is a slash before the colon.
    fn of(text: &'a OsStr) -> Self {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Self::Stream;
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        let name = colon.map(|at| &bytes[..at]).filter(|name| !name.is_empty() && !name.contains(&b'/'));
        match (name.and_then(|name| std::str::from_utf8(name).ok()), colon) {
            (Some(name), Some(at)) => Self::Guest(name, &bytes[at + 1..]),
            _ => Self::Host(bytes),
        }
    }
}

/// `vmm cp`.
///
/// # Errors
/// Something was not copied.
pub fn cp(options: Options) -> Result<Code, Failure> {
    let Options { archive, reach, from, to } = options;
    let start = |name, request| {
        let guest = reach.guest(name)?;
        guest.start(request).map_err(|error| guest.failure(error))
    };
    match (End::of(&from), End::of(&to)) {
        (End::Guest(name, path), to @ (End::Host(_) | End::Stream)) => {
            let request = Request::Pack { path: absolute(path), name: name_of(path) };
            return out_of(start(name, request)?, to, archive);
        }
        (from @ (End::Host(_) | End::Stream), End::Guest(name, path)) => {
            let rename = matches!(from, End::Host(_));
            if let End::Host(path) = from {
                // Before the guest is asked for anything.
                let path = Path::new(OsStr::from_bytes(path));
                std::fs::symlink_metadata(path).map_err(|error| {
                    let error = anyhow::Error::new(error).context(format!("cannot read {}", path.display()));
                    Failure::new(Code::BadArgument, error)
                })?;
            }
            let request = Request::Unpack { path: absolute(path), owners: archive, rename };
            into(start(name, request)?, from)?;
        }
        _ => {
            let error = anyhow!("one of the two must be in a guest, and the other here");
            let hint = "vmm cp FILE NAME:/path, or vmm cp NAME:/path FILE";
            return Err(Failure::new(Code::BadArgument, error).hint(Some(hint)));
        }
    }
    Ok(Code::Success)
}

/// In a guest there is no folder to be in but the root.
fn absolute(path: &[u8]) -> Vec<u8> {
    if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() }
}

/// What an archive calls what is at `path`: its last name; `.` for a folder's content alone.
fn name_of(path: &[u8]) -> Vec<u8> {
    if path.ends_with(b"/.") || path == b"." {
        return b".".to_vec();
    }
    let path = Path::new(OsStr::from_bytes(path));
    let path = match path.file_name() {
        Some(_) => path.to_owned(),
        // `..` has a name only where it leads.
        None => path.canonicalize().unwrap_or_default(),
    };
    path.file_name().map_or_else(|| b".".to_vec(), |name| name.to_owned().into_vec())
}

fn into(session: Session, from: End<'_>) -> Result<(), Failure> {
    let words = Words::default();
    let streams = |stdin: Box<dyn Read + Send>| Streams {
        stdin: Some(stdin),
        stdout: Box::new(io::sink()),
        stderr: Box::new(words.clone()),
    };
    let End::Host(path) = from else {
        return words.judge(run(session, streams(Box::new(io::stdin())))?, Ok(()));
    };
    let (reader, writer) = io::pipe().map_err(|error| Failure::new(Code::Host, error))?;
    let (path, name) = (path.to_vec(), name_of(path));
    let packer = thread::spawn(move || tar::pack(&path, &name, writer));
    let exit = run(session, streams(Box::new(reader)))?;
    match joined(packer) {
        // An archive that was cut short is what the guest complains of.
        Err(error @ (tar::Error::File { .. } | tar::Error::Format(_))) => Err(failed(error)),
        // Who reads no more has a reason, which counts more than ours for not writing.
        result => words.judge(exit, result),
    }
}

fn out_of(session: Session, to: End<'_>, owners: bool) -> Result<Code, Failure> {
    let words = Words::default();
    let streams = |stdout| Streams { stdin: None, stdout, stderr: Box::new(words.clone()) };
    let End::Host(path) = to else {
        words.judge(run(session, streams(Box::new(io::stdout())))?, Ok(()))?;
        return Ok(Code::Success);
    };
    let host = |error| Failure::new(Code::Host, error);
    let signal = end_on_signals(session.connection().map_err(host)?).map_err(host)?;
    let (reader, writer) = io::pipe().map_err(host)?;
    let path = path.to_vec();
    // What comes out of a guest is a stranger's: no device of theirs becomes one here.
    let policy = Policy { owners, devices: false, rename: true };
    let unpacker = thread::spawn(move || tar::unpack(reader, &path, policy));
    let exit = run(session, streams(Box::new(writer)));
    // However the stream has ended: who unpacks it takes away what is not whole.
    let unpacked = joined(unpacker);
    if let Some(signal) = signal.get() {
        return Ok(Code::Command(128 + signal));
    }
    let exit = exit?;
    match unpacked {
        // Why it was cut short is for the other end to say.
        result @ (Ok(()) | Err(tar::Error::Cut | tar::Error::Left { .. })) => words.judge(exit, result)?,
        // That nobody read on is what the guest complains of.
        Err(error) => return Err(failed(error)),
    }
    Ok(Code::Success)
}

/// Ends the session on `connection` by the first signal that asks this process to end, whose number is then there; the second ends
/// the process at once.
fn end_on_signals(connection: UnixStream) -> io::Result<Arc<OnceLock<u8>>> {
    let mut signals =
        Signals::new([SIGHUP, SIGINT, SIGTERM].into_iter().filter(|signal| !is_ignored(*signal)))?;
    let first = Arc::new(OnceLock::new());
    let told = first.clone();
    thread::spawn(move || {
        for signal in signals.forever() {
            if told.set(signal as u8).is_err() {
                std::process::exit(128 + signal);
            }
            // Of one that is over already nothing is left to end.
            let _ = connection.shutdown(Shutdown::Both);
        }
    });
    Ok(first)
}

fn joined(thread: thread::JoinHandle<Result<(), tar::Error>>) -> Result<(), tar::Error> {
    // A panic has ended the process.
    thread.join().unwrap_or(Ok(()))
}

fn failed(error: tar::Error) -> Failure {
    Failure::new(Code::Host, error)
}

/// What the guest's end says.
#[derive(Debug, Clone, Default)]
struct Words(Arc<Mutex<Vec<u8>>>);

impl Write for Words {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MAX_WORDS.saturating_sub(words.len());
        words.extend_from_slice(&bytes[..bytes.len().min(room)]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Words {
    /// What came of both ends' work. The guest's failure counts more than what `ours` is; that a file was left out is told beside it.
    fn judge(&self, exit: Exit, ours: Result<(), tar::Error>) -> Result<(), Failure> {
        if exit == Exit::Code(0) {
            return ours.map_err(failed);
        }
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let words = String::from_utf8_lossy(&words);
        let error = match (words.trim(), exit) {
            ("", Exit::Signal(signal)) => anyhow!("the agent's copying was ended by signal {signal}"),
            ("", Exit::Code(code)) => anyhow!("the agent's copying ended with code {code}"),
            (words, _) => anyhow!("in the guest: {words}"),
        };
        let error = match ours {
            Err(left @ tar::Error::Left { .. }) => anyhow!("{error}; and here: {left}"),
            _ => error,
        };
        Err(Failure::new(Code::Host, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_have_the_last_name_of_a_path() {
        for (path, name) in [("/a/b", "b"), ("a/b/", "b"), ("a/b/.", "."), (".", "."), ("/", "."), ("b", "b")]
        {
            assert_eq!(name_of(path.as_bytes()), name.as_bytes(), "{path}");
        }
    }

    #[test]
    fn a_colon_after_a_slash_is_no_guest() {
        assert!(matches!(End::of(OsStr::new("web:/a")), End::Guest("web", b"/a")));
        assert!(matches!(End::of(OsStr::new("./web:/a")), End::Host(_)));
        assert!(matches!(End::of(OsStr::new(":a")), End::Host(_)));
        assert!(matches!(End::of(OsStr::new("-")), End::Stream));
    }
}
