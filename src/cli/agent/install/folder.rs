//! Installs into a folder that is a guest's root. No symlink in it leads out of it.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, anyhow};
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, Mode, OFlags, ResolveFlags, fchmod, mkdirat, open, openat2, renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::{Content, Entry, Init, files};
use vmm_command::{Code, Failure};

/// What a file is called until it is whole.
const TEMPORARY: &str = ".vmm-agent.new";

/// Installs `program`, and what has the init of the guest start it, which is returned.
pub fn install(path: &Path, program: &[u8]) -> Result<Init, Failure> {
    let failed = |error: anyhow::Error| {
        let error = error.context(format!("install the agent into {}", path.display()));
        Failure::new(Code::BadArgument, error)
            .hint(Some("give a folder with a guest's root, which you may write to"))
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(path, flags, Mode::empty()).context("open the folder").map_err(failed)?;
    let init = Init::find(|path| inside(&root, path, OFlags::PATH).is_ok())?;
    for entry in files(program, init) {
        put(&root, entry).with_context(|| format!("write {}", entry.path)).map_err(failed)?;
    }
    Ok(init)
}

/// Opens what the guest calls `path`, where `..` and symlinks mean what they mean in the guest.
fn inside(root: &OwnedFd, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
}

/// Opens a folder, which is made if it is not there.
fn folder(root: &OwnedFd, path: &Path) -> anyhow::Result<OwnedFd> {
    let text = path.to_str().ok_or_else(|| anyhow!("no such name"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    match (inside(root, text, flags), path.parent(), path.file_name()) {
        (Err(Errno::NOENT), Some(parent), Some(name)) => {
            let parent = folder(root, parent)?;
            mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
            Ok(inside(root, text, flags)?)
        }
        (opened, ..) => Ok(opened?),
    }
}

/// Writes it beside its place, and puts it there when it is whole.
fn put(root: &OwnedFd, entry: Entry<'_>) -> anyhow::Result<()> {
    let path = Path::new(entry.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(anyhow!("it has no name"));
    };
    let parent = folder(root, parent)?;
    // Of an installation that did not come to its end.
    let _ = unlinkat(&parent, TEMPORARY, AtFlags::empty());
    let put = || -> anyhow::Result<()> {
        match entry.content {
            Content::File { bytes, mode } => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(u32::from(mode));
                let mut file = File::from(rustix::fs::openat(&parent, TEMPORARY, flags, mode)?);
                file.write_all(bytes)?;
                // Whatever the umask.
                fchmod(&file, mode)?;
                file.sync_all()?;
            }
            Content::Link(to) => symlinkat(to, &parent, TEMPORARY)?,
        }
        Ok(renameat(&parent, TEMPORARY, &parent, name)?)
    };
    put().inspect_err(|_| {
        let _ = unlinkat(&parent, TEMPORARY, AtFlags::empty());
    })
}
