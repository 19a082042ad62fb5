//! Where what was fetched and built is kept: `$XDG_CACHE_HOME/vmm/guest`, else `~/.cache/vmm/guest`. An item is one
//! folder, made under a temporary name and renamed when it is whole, so that an interrupted build leaves nothing that
//! looks finished.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Names of unfinished items start so.
const UNFINISHED: &str = ".unfinished-";

/// One kind of cached items (a folder of the cache), locked against other processes for as long as this lives.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    _lock: File,
}

impl Cache {
    /// Opens (and makes) the folder for items of this kind; waits while another process works in it.
    pub fn open(kind: &str) -> Result<Self> {
        Self::open_in(&root()?.join(kind))
    }

    fn open_in(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("make the cache folder {}", folder.display()))?;
        let path = folder.join(".lock");
        let lock = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        use rustix::fs::{FlockOperation, flock};
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            crate::run::say(format_args!("waiting for another build in {}", folder.display()));
            flock(&lock, FlockOperation::LockExclusive)
                .with_context(|| format!("lock {}", path.display()))?;
        }
        // We have the lock, so an unfinished item is one whose builder was interrupted.
        for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        Ok(Self { folder: folder.to_owned(), _lock: lock })
    }

    /// The finished item of that name.
    pub fn get(&self, name: &str) -> Option<PathBuf> {
        Some(self.folder.join(name)).filter(|path| path.is_dir())
    }

    /// The item that was made last, if it is still there.
    pub fn current(&self) -> Option<PathBuf> {
        let name = fs::read_to_string(self.folder.join("current")).ok()?;
        self.get(name.trim_end())
    }

    /// A place to work in, gone when dropped, or when the next process opens the cache.
    pub fn workplace(&self) -> Result<TempDir> {
        tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&self.folder)
            .with_context(|| format!("make a folder in {}", self.folder.display()))
    }

    /// Makes `item` (a folder inside of a workplace) the finished item of that name, and the current one.
    pub fn publish(&self, item: &Path, name: &str) -> Result<PathBuf> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            bail!("{name:?} cannot name a cached item");
        }
        let path = self.folder.join(name);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("replace {}", path.display()))?;
        }
        fs::rename(item, &path).with_context(|| format!("finish {}", path.display()))?;
        self.set_current(name)?;
        Ok(path)
    }

    /// Makes a finished item the current one.
    pub fn set_current(&self, name: &str) -> Result<()> {
        let path = self.folder.join("current");
        fs::write(&path, name).with_context(|| format!("write {}", path.display()))
    }
}

fn root() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = match (variable("XDG_CACHE_HOME"), variable("HOME")) {
        (Some(caches), _) => caches,
        (None, Some(home)) => home.join(".cache"),
        (None, None) => bail!("neither XDG_CACHE_HOME nor HOME is set: no place for the cache"),
    };
    Ok(caches.join("vmm/guest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_work_is_swept_and_finished_work_found() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open_in(folder.path()).unwrap();
        assert_eq!(cache.current(), None);
        // As an interrupted process leaves it: never dropped.
        let interrupted = cache.workplace().unwrap().keep();
        let work = cache.workplace().unwrap();
        fs::create_dir(work.path().join("out")).unwrap();
        fs::write(work.path().join("out/file"), "x").unwrap();
        let path = cache.publish(&work.path().join("out"), "v1").unwrap();
        assert!(path.join("file").is_file());
        assert_eq!((cache.get("v1"), cache.current()), (Some(path.clone()), Some(path)));
        drop((cache, work));
        let cache = Cache::open_in(folder.path()).unwrap();
        assert!(!interrupted.exists());
        assert!(cache.get("v1").is_some());
        assert!(cache.publish(folder.path(), "../v2").is_err());
    }
}
