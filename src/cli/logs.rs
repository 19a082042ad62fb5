//! `vmm logs`: what the guest of a detached virtual machine wrote to its console.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, anyhow};

use vmm_command::{Code, Failure, print_bytes};
use vmm_monitor::api::Error;
use vmm_monitor::api::client::Client;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::output;
use vmm_monitor::threads::{self, Role};

use super::detached::record::{Record, Records};

/// How often to look for more.
const LOOK: Duration = Duration::from_millis(50);

/// The options of `vmm logs`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The virtual machine's name, as vmm list --all shows it
    name: String,
    /// Go on with what the guest writes, until it has ended
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last N lines, not with all that is kept
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<usize>,
    /// Show what the monitor said (warnings, why the run failed) in place of the console
    #[arg(long)]
    monitor: bool,
}

/// `vmm logs`.
pub fn logs(options: Options) -> Result<Code, Failure> {
    let record = find(&options.name)?;
    let path = if options.monitor { record.messages() } else { record.console() };
    // Asked for before the first look, so that nothing written before the end is missed.
    let over = options.follow.then(|| when_over(&options.name)).transpose()?;
    let failed = |error| {
        let context = format!("cannot read {}", path.display());
        Failure::new(Code::Host, anyhow::Error::new(error).context(context))
    };
    let Some((mut log, kept)) = Log::open(&path).map_err(failed)? else {
        if options.monitor {
            return Ok(Code::Success);
        }
        let error = anyhow!("nothing is kept of the console of {:?}: it goes elsewhere", options.name);
        let hint = "its --console and --serial say where";
        return Err(Failure::new(Code::BadArgument, error).hint(Some(hint)));
    };
    let mut read = print_bytes(last_lines(&kept, options.lines))?;
    while let (true, Some(over)) = (read, &over) {
        let ended = !matches!(over.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout));
        read = print_bytes(&log.more().map_err(failed)?)? && !ended;
    }
    Ok(Code::Success)
}

fn find(name: &str) -> Result<Record, Failure> {
    if let Some(record) = Records::of_user()?.find(name) {
        return Ok(record);
    }
    // Whatever runs under the name is not detached.
    Client::connect(&Registry::of_user(), name)?;
    let error = anyhow!("nothing is kept of the console of {name:?}: it was not started with -d");
    Err(Failure::new(Code::BadArgument, error)
        .hint(Some("give it a file: --console file=PATH or --serial file=PATH")))
}

/// Hears when the run of `name` is over; at once if nothing runs under this name.
fn when_over(name: &str) -> Result<Receiver<()>, Failure> {
    let (tell, told) = channel();
    let client = match Client::connect(&Registry::of_user(), name) {
        Err(Error::NoSuchVm(_)) => return Ok(told),
        client => client?,
    };
    let wait = move || {
        // However the waiting ends, there is no more to wait for.
        let _ = client.wait();
        let _ = tell.send(());
    };
    threads::spawn(Role::Errand, wait)
        .context("cannot start a thread")
        .map_err(|error| Failure::new(Code::Host, error))?;
    Ok(told)
}

/// A file that [`output::Rotating`] writes.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// The log at `path` and what is in it. `None` if there is none.
    fn open(path: &Path) -> io::Result<Option<(Self, Vec<u8>)>> {
        loop {
            let file = match File::open(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                file => file?,
            };
            let older = fs::read(output::older(path)).or_else(|error| match error.kind() {
                ErrorKind::NotFound => Ok(Vec::new()),
                _ => Err(error),
            })?;
            let mut log = Self { path: path.to_owned(), file };
            // If it has turned meanwhile, the two do not belong together.
            if !log.has_turned() {
                let mut kept = older;
                log.file.read_to_end(&mut kept)?;
                return Ok(Some((log, kept)));
            }
        }
    }

    /// The name belongs to another file.
    fn has_turned(&self) -> bool {
        let same =
            |ours: fs::Metadata, there: fs::Metadata| (ours.dev(), ours.ino()) == (there.dev(), there.ino());
        match (self.file.metadata(), fs::metadata(&self.path)) {
            (Ok(ours), Ok(there)) => !same(ours, there),
            _ => false,
        }
    }

    /// What was written since.
    fn more(&mut self) -> io::Result<Vec<u8>> {
        let mut more = Vec::new();
        // Looked at before the last read: what was written until it turned is then there.
        let turned = self.has_turned();
        self.file.read_to_end(&mut more)?;
        if turned {
            self.file = File::open(&self.path)?;
            self.file.read_to_end(&mut more)?;
        }
        Ok(more)
    }
}

/// The last `lines` lines of `text`; the last may have no end yet.
fn last_lines(text: &[u8], lines: Option<usize>) -> &[u8] {
    let Some(lines) = lines else { return text };
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let mut ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    match lines.checked_sub(1) {
        Some(before) => &text[ends.nth(before).unwrap_or(0)..],
        None => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_counted_from_the_end() {
        for (text, lines, wanted) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\n", 5, "a\nb\n"),
            ("a\n\n", 1, "\n"),
            ("a\n", 0, ""),
            ("", 1, ""),
        ] {
            assert_eq!(last_lines(text.as_bytes(), Some(lines)), wanted.as_bytes(), "{text:?} {lines}");
        }
        assert_eq!(last_lines(b"a\nb", None), b"a\nb");
    }
}
