//! A temporary folder, removed when the command ends.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use vmm_monitor::output;

/// See the module's text.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new folder among the temporary ones, its name beginning with `prefix`. Nobody else can have made it, nor look into it or
    /// put anything there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(prefix: &str) -> anyhow::Result<Self> {
        // Process ids repeat where machines share a temporary folder.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let path = std::env::temp_dir().join(format!("{prefix}-{}-{:x}", std::process::id(), now.as_nanos()));
        output::folder(&path).with_context(|| format!("cannot make the directory {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
