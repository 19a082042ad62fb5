//! The machine that is saved: started, waited for, and gone with its owner.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::super::idle::await_words;

/// Until a guest is ready to be saved, and until it is saved.
pub const LIMIT: Duration = Duration::from_secs(60);

/// It ends with this.
pub struct Source(Child);

impl Source {
    /// Starts `command`, and waits until its guest says that it is `held`.
    pub fn start(mut command: Command, held: &[u8]) -> Result<Self, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let child = command.spawn().map_err(|error| format!("start {name}: {error}"))?;
        let mut source = Self(child);
        let output = source.0.stdout.as_mut().ok_or("no pipe")?;
        await_words(output, held, 1, Instant::now() + LIMIT, &name)?;
        Ok(source)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
