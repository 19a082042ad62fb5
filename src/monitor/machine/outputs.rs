//! Finds outputs that are already a file of the same run: the guest's disk as its console's log, say. Compares
//! device and inode, so the path does not matter, nor do symlinks and hard links. Called before anything is
//! opened, since opening an output empties it.

use std::fs;
use std::io::ErrorKind;
use std::iter;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::{CharTarget, Firmware, VmConfig};
use crate::output::older;

/// The most symlinks in a row to a file that is not there yet.
const MAX_LINKS: usize = 16;

/// An output would overwrite something.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the output of {output} is {other}, too: {path}", path = path.display())]
pub struct Clash {
    /// Whose output.
    output: String,
    /// What is there.
    other: String,
    path: PathBuf,
}

impl Clash {
    /// What to try.
    pub const HINT: &'static str = "give each output a file of its own";
}

/// A file of the run, by what it is for.
pub type Named<'a> = (&'a str, &'a Path);

/// Checks `config`'s outputs and those of `outputs` against each other and against every file that the run
/// reads: `config`'s, and `inputs`.
///
/// # Errors
/// The first [`Clash`].
pub fn check(config: &VmConfig, inputs: &[Named], outputs: &[Named]) -> Result<(), Clash> {
    let mut taken: Vec<(Identity, String)> = Vec::new();
    let mut inputs = inputs.to_vec();
    inputs.extend(config.kernel.as_deref().map(|path| ("kernel", path)));
    inputs.extend(config.initrd.as_deref().map(|path| ("initrd", path)));
    if let Some(Firmware::File(path)) = &config.firmware {
        inputs.push(("firmware", path));
    }
    inputs.extend(config.option_rom.iter().map(|path| ("option ROM", path.as_path())));
    for (what, path) in config.disk.iter().flat_map(|disk| disk.files()) {
        inputs.push((what, path));
    }
    for (what, path) in inputs {
        taken.extend(identity(path).map(|identity| (identity, format!("the run's {what}"))));
    }
    let console = config.console();
    let ports = config.port.iter().map(|port| (format!("port {}", port.name), &port.to));
    let ends = [("the console".to_owned(), &console), ("the serial port".to_owned(), &config.serial)];
    let files = ends.into_iter().chain(ports).filter_map(|(what, place)| match place {
        CharTarget::File(file) => Some((what, file)),
        _ => None,
    });
    let files = files.chain(config.net_dump.as_ref().map(|file| ("the network dump".to_owned(), file)));
    // One with a limit takes a second name.
    let files = files.flat_map(|(what, file)| {
        let older = file.max.map(|_| (format!("{what}, when it is full,"), older(&file.path)));
        iter::once((what, file.path.clone())).chain(older)
    });
    // Standard output may be a file as well.
    let stdio = console == CharTarget::Stdio || config.serial == CharTarget::Stdio;
    let stdio = stdio.then(|| ("standard output".to_owned(), "/proc/self/fd/1".into()));
    let outputs = outputs.iter().map(|(what, path)| ((*what).to_owned(), (*path).to_owned()));
    for (what, path) in files.chain(stdio).chain(outputs) {
        let Some(identity) = identity(&path) else { continue };
        if let Some((_, other)) = taken.iter().find(|(known, _)| *known == identity) {
            return Err(Clash { output: what, other: other.clone(), path });
        }
        taken.push((identity, format!("that of {what}")));
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Identity {
    /// Device and inode.
    File(u64, u64),
    /// A block device's number.
    Disk(u64),
    /// A file that is not there yet: its folder's device and inode, and its name.
    New(u64, u64, PathBuf),
}

/// None of what any number of writers can share: terminals, /dev/null, pipes. And of what cannot be opened
/// anyway.
fn identity(path: &Path) -> Option<Identity> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::metadata(&path) {
            Ok(found) if found.is_file() => return Some(Identity::File(found.dev(), found.ino())),
            Ok(found) if found.file_type().is_block_device() => return Some(Identity::Disk(found.rdev())),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            _ => return None,
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match fs::read_link(&path) {
            // A link to what is not there: opening it for writing makes that.
            Ok(target) => path = folder.join(target),
            Err(_) => {
                let found = fs::metadata(folder).ok()?;
                return Some(Identity::New(found.dev(), found.ino(), path.file_name()?.into()));
            }
        }
    }
    None
}
