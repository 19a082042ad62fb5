//! `vmm cp`: files into a guest and out of it, as `docker cp` does it. They travel as tar streams, made and unpacked by the agent there
//! and by this process here.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::anyhow;

use super::agent::Reach;
use vmm_agent::client::{Session, Streams, run};
use vmm_agent::protocol::{Exit, Request};
use vmm_agent::tar::{self, Policy};
use vmm_command::{Code, Failure};

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
    /// What to copy: PATH, NAME:PATH in a guest, or - for a tar stream on standard input. A folder's content alone: PATH/.
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
            out_of(start(name, request)?, to, archive)?;
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
        return words.judge(run(session, streams(Box::new(io::stdin())))?);
    };
    let (reader, writer) = io::pipe().map_err(|error| Failure::new(Code::Host, error))?;
    let (path, name) = (path.to_vec(), name_of(path));
    let packer = thread::spawn(move || tar::pack(&path, &name, writer));
    let exit = run(session, streams(Box::new(reader)))?;
    match joined(packer) {
        // Who reads no more has a reason, which counts more than ours for not writing.
        result @ (Ok(()) | Err(tar::Error::Stream(..))) => words.judge(exit).and(result.map_err(failed)),
        // An archive that was cut short is what the guest complains of.
        Err(error) => Err(failed(error)),
    }
}

fn out_of(session: Session, to: End<'_>, owners: bool) -> Result<(), Failure> {
    let words = Words::default();
    let streams = |stdout| Streams { stdin: None, stdout, stderr: Box::new(words.clone()) };
    let End::Host(path) = to else {
        return words.judge(run(session, streams(Box::new(io::stdout())))?);
    };
    let (reader, writer) = io::pipe().map_err(|error| Failure::new(Code::Host, error))?;
    let path = path.to_vec();
    // What comes out of a guest is a stranger's: no device of theirs becomes one here.
    let policy = Policy { owners, devices: false, rename: true };
    let unpacker = thread::spawn(move || tar::unpack(reader, &path, policy));
    let exit = run(session, streams(Box::new(writer)));
    let (exit, unpacked) = (exit?, joined(unpacker));
    match unpacked {
        // Why it was cut short is for the other end to say.
        result @ (Ok(()) | Err(tar::Error::Cut)) => words.judge(exit).and(result.map_err(failed)),
        // That nobody read on is what the guest complains of.
        Err(error) => Err(failed(error)),
    }
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
    fn judge(&self, exit: Exit) -> Result<(), Failure> {
        if exit == Exit::Code(0) {
            return Ok(());
        }
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let words = String::from_utf8_lossy(&words);
        let error = match (words.trim(), exit) {
            ("", Exit::Signal(signal)) => anyhow!("the agent's copying was ended by signal {signal}"),
            ("", Exit::Code(code)) => anyhow!("the agent's copying ended with code {code}"),
            (words, _) => anyhow!("in the guest: {words}"),
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
