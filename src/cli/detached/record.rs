//! What is kept of a detached virtual machine: its console, what its monitor said, and how it ended.
//!
//! A folder each, in the user's state directory. Whoever has the name in the registry may change its record; of one whose name
//! nobody has, the run is over.

use std::env;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use serde::{Deserialize, Serialize};

use vmm_command::{Code, Failure};
use vmm_monitor::api::registry::{Registry, generate_name, of_pool};
use vmm_monitor::config::host_path::quoted;
use vmm_monitor::output;

/// Bytes of the file that tells how a run ended: its numbers at their longest, and blanks.
const END_ROOM: usize = 64;

/// All records of this user.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
}

/// The record of one virtual machine. Need not be there.
#[derive(Debug)]
pub struct Record {
    name: String,
    folder: PathBuf,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The exit code of its monitor.
    pub code: u8,
    /// When: seconds since 1970.
    pub at: u64,
}

impl Records {
    /// Those in `$XDG_STATE_HOME/vmm` or `~/.local/state/vmm`; root without a home has `/var/lib/vmm`.
    ///
    /// # Errors
    /// This user has no home.
    pub fn of_user() -> Result<Self, Failure> {
        let place = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || place("HOME").map(|home| home.join(".local/state"));
        let of_root = || rustix::process::geteuid().is_root().then(|| PathBuf::from("/var/lib"));
        let state = place("XDG_STATE_HOME").or_else(home).or_else(of_root);
        let state = state.ok_or_else(|| {
            let error = anyhow!("there is no place for what is kept of detached virtual machines: no HOME");
            Failure::new(Code::Host, error).hint(Some("name a directory: export XDG_STATE_HOME=$(mktemp -d)"))
        })?;
        Ok(Self { path: state.join("vmm") })
    }

    /// The folder that they are in.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// That of `name`.
    pub fn of(&self, name: &str) -> Record {
        Record { name: name.to_owned(), folder: self.path.join(name) }
    }

    /// That of `name`, if there is one. Those of pools and their spares, whose names have a `@`, are theirs alone.
    pub fn find(&self, name: &str) -> Option<Record> {
        let fine = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '@']);
        Some(self.of(name)).filter(|record| fine && record.folder.is_dir())
    }

    /// All, by name.
    ///
    /// # Errors
    /// They are there and cannot be read.
    pub fn list(&self) -> Result<Vec<Record>, Failure> {
        Ok(self.names()?.iter().filter_map(|name| self.find(name)).collect())
    }

    fn names(&self) -> Result<Vec<String>, Failure> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| self.failure(error))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| name.chars().all(|c| c.is_ascii_graphic())).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Removes those of runs that were to leave nothing (`--rm`), and of pools and their spares, where the processes were killed before
    /// they could see to that.
    ///
    /// # Errors
    /// They cannot be read or removed.
    pub fn sweep(&self, registry: &Registry) -> Result<(), Failure> {
        for name in self.names()? {
            if let Some((pool, _)) = name.split_once('@')
                && !name.starts_with('.')
                && !registry.alive(&of_pool(pool))?
                && !registry.alive(&name)?
            {
                self.of(&name).remove_all()?;
            }
        }
        for record in self.list()? {
            if !record.transient_file().exists() || registry.alive(&record.name)? {
                continue;
            }
            // With its name: none that starts meanwhile is to lose its record. Who has got it first sees to the record, too.
            if let Ok(_ours) = registry.register(Some(&record.name))
                && record.transient_file().exists()
            {
                record.remove_all()?;
            }
        }
        Ok(())
    }

    /// A new one, under a name that no other record and no running virtual machine has.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn reserve(&self, registry: &Registry) -> Result<Record, Failure> {
        loop {
            let record = self.of(&generate_name());
            if registry.alive(&record.name)? {
                continue;
            }
            match self.make(&record) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                made => return made.map(|()| record).map_err(|error| self.failure(error)),
            }
        }
    }

    /// Begins `record` anew, for who has its name now. What is there is kept aside, until [`Record::keep`] or [`Record::give_up`].
    ///
    /// # Errors
    /// It cannot be made, or what is there cannot be moved.
    pub fn begin(&self, record: &Record) -> Result<(), Failure> {
        record.keep()?;
        match fs::rename(&record.folder, record.earlier()) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(self.failure(error)),
            _ => {}
        }
        self.make(record).map_err(|error| {
            record.give_up();
            self.failure(error)
        })
    }

    /// Has `record`, whose run goes on as `name`, be the one of that name, in place of an earlier one.
    ///
    /// # Errors
    /// They cannot be moved.
    pub fn pass_on(&self, record: &Record, name: &str) -> Result<Record, Failure> {
        let to = self.of(name);
        to.remove_all()?;
        fs::rename(&record.folder, &to.folder).map_err(|error| self.failure(error))?;
        Ok(to)
    }

    fn make(&self, record: &Record) -> io::Result<()> {
        output::own_folder(&self.path)?;
        output::folder(&record.folder)
    }

    fn failure(&self, error: io::Error) -> Failure {
        let what = format!("cannot keep a record in {}", self.path.display());
        let hint = "name a directory of your own: export XDG_STATE_HOME=$(mktemp -d)";
        Failure::new(Code::Host, anyhow::Error::new(error).context(what)).hint(Some(hint))
    }
}

impl Record {
    /// Whose it is.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the guest wrote to its console; what is older is in [`output::older`] of it.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// What the monitor said.
    pub fn messages(&self) -> PathBuf {
        self.folder.join("vmm.log")
    }

    /// There while the run is not to be kept.
    fn transient_file(&self) -> PathBuf {
        self.folder.join("transient")
    }

    /// Nothing of it is to stay, also if its monitor is killed: [`Records::sweep`].
    ///
    /// # Errors
    /// That cannot be noted.
    pub fn set_transient(&self) -> io::Result<()> {
        output::create(&self.transient_file()).map(drop)
    }

    fn end_file(&self) -> PathBuf {
        self.folder.join("end.json")
    }

    /// How the run ended; `None` if it runs, or ended without a word (SIGKILL).
    pub fn end(&self) -> Option<End> {
        serde_json::from_slice(&fs::read(self.end_file()).ok()?).ok()
    }

    /// What became of a run that is over, in a word.
    pub fn fate(&self) -> &'static str {
        match self.end() {
            Some(_) => "ended",
            None if self.was_killed() => "killed",
            None => "unstarted",
        }
    }

    /// Whether its monitor, of a run that is over, could not say how it ended.
    pub fn was_killed(&self) -> bool {
        // The first that a monitor does once its guest runs is to have its messages kept.
        self.end().is_none() && self.messages().exists()
    }

    /// The file for the end of the run, and the room that it needs: a run that fills its disk has an end, too. Until then it is blank.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn take_end_room(&self) -> io::Result<File> {
        let mut file = output::create(&self.end_file())?;
        file.write_all(&[b' '; END_ROOM])?;
        Ok(file)
    }

    /// Removes it. Nothing happens if it is not there.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self) -> Result<(), Failure> {
        remove(&self.folder)
    }

    /// [`Record::remove`], and an earlier record that a start which was killed has left aside.
    ///
    /// # Errors
    /// One of them cannot be removed.
    pub fn remove_all(&self) -> Result<(), Failure> {
        self.remove()?;
        self.keep()
    }

    /// Where an earlier record of this name is while this one is not sure to stay: no name of a virtual machine begins so.
    fn earlier(&self) -> PathBuf {
        self.folder.with_file_name(format!(".{}", self.name))
    }

    /// It stays: the earlier one goes.
    ///
    /// # Errors
    /// That cannot be removed.
    pub fn keep(&self) -> Result<(), Failure> {
        remove(&self.earlier())
    }

    /// Removes it, and brings an earlier one of this name back.
    pub fn give_up(&self) {
        if self.remove().is_ok() {
            let _ = fs::rename(self.earlier(), &self.folder);
        }
    }
}

/// Keeps in `room` that the run ended with `code`, now. Names no file: whoever ends a process at once may not be able to.
///
/// # Errors
/// It cannot be written.
pub fn set_end(room: &File, code: u8) -> io::Result<()> {
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut text = serde_json::to_vec(&End { code, at })?;
    text.resize(text.len().max(END_ROOM), b' ');
    room.write_all_at(&text, 0)
}

fn remove(folder: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            let what = format!("cannot remove {}", folder.display());
            let hint = format!("see what is there, and remove it: ls -ld {}", quoted(folder));
            Err(Failure::new(Code::Host, anyhow::Error::new(error).context(what)).hint(Some(hint)))
        }
        _ => Ok(()),
    }
}
