//! A snapshot is made: a folder under another name, which gets its own once all is on the disk.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{Error, Header, MAGIC, VERSION, file, memory};
use crate::config::VmConfig;
use crate::machine::{Handle, Paused, Phase};
use crate::output;

/// Saves `machine`, which was built as `config` says, into the new `folder`. It stands still meanwhile, also while
/// `saved` is called once it is done, and goes on if it ran.
///
/// # Errors
/// [`Error`]; nothing is left behind.
pub fn create(machine: &Handle, config: &VmConfig, folder: &Path, saved: impl FnOnce()) -> Result<(), Error> {
    supported(config)?;
    let runs = machine.phase() == Phase::Running;
    let paused = machine.pause()?;
    let made = match machine.has_other_devices() {
        true => Err(Error::Unsupported("devices that came or went while it ran")),
        false => save(machine, &paused, config, folder).inspect(|()| saved()),
    };
    drop(paused);
    if runs {
        // It has ended meanwhile, or somebody else resumed it.
        let _ = machine.resume();
    }
    made
}

/// What has a life of its own outside.
fn supported(config: &VmConfig) -> Result<(), Error> {
    let what = match config {
        _ if config.disk.iter().any(|disk| !disk.readonly) => "disks that the guest may write to",
        _ if config.firmware.is_some() => "a machine with firmware",
        _ if config.net.iter().any(|net| net.is_served_elsewhere()) => {
            "a network that others serve (vhost, vhost-user)"
        }
        _ if config.vsock.iter().any(|vsock| vsock.vhost) => "sockets that the host's kernel serves (vhost)",
        _ if config.mem.hugepages.is_some() => "huge pages",
        _ => return Ok(()),
    };
    Err(Error::Unsupported(what))
}

fn save(machine: &Handle, paused: &Paused<'_>, config: &VmConfig, folder: &Path) -> Result<(), Error> {
    let name = folder.file_name().ok_or_else(|| {
        file("name", folder)(io::Error::new(io::ErrorKind::InvalidInput, "it is not a folder's name"))
    })?;
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}", std::process::id()));
    let hidden = parent.join(hidden);
    output::folder(&hidden).map_err(file("make", &hidden))?;
    let made = fill(machine, paused, config, &hidden).and_then(|()| {
        let renamed = renameat_with(CWD, &hidden, CWD, folder, RenameFlags::NOREPLACE);
        renamed.map_err(|error| file("make", folder)(error.into()))?;
        let synced = File::open(parent).and_then(|parent| parent.sync_all());
        synced.map_err(|error| {
            let _ = fs::remove_dir_all(folder);
            file("write", parent)(error)
        })
    });
    if made.is_err() {
        // What it says is more than that this fails, too.
        let _ = fs::remove_dir_all(&hidden);
    }
    made
}

fn fill(machine: &Handle, paused: &Paused<'_>, config: &VmConfig, folder: &Path) -> Result<(), Error> {
    let path = folder.join("config.json");
    let text = serde_json::to_vec_pretty(config).map_err(|error| file("write", &path)(error.into()))?;
    let config = crc32fast::hash(&text);
    write(&path, &[&text])?;

    let state = machine.save(paused).map_err(Box::new)?;
    let path = folder.join("memory");
    let ram = output::create(&path).map_err(file("make", &path))?;
    let checksum = memory::write(machine.memory(), &ram).map_err(file("write", &path))?;

    let path = folder.join("state");
    let encoded = |error: postcard::Error| file("write", &path)(io::Error::other(error));
    let state = postcard::to_stdvec(&state).map_err(encoded)?;
    let size = machine.memory().size();
    let header = Header { config, state: crc32fast::hash(&state), memory: checksum, size };
    let header = postcard::to_stdvec(&header).map_err(encoded)?;
    write(&path, &[&MAGIC, &VERSION.to_le_bytes(), &header, &state])?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(file("write", folder))
}

fn write(path: &Path, parts: &[&[u8]]) -> Result<(), Error> {
    let write = || {
        let mut new = output::create(path)?;
        parts.iter().try_for_each(|part| new.write_all(part))?;
        new.sync_all()
    };
    write().map_err(file("write", path))
}
