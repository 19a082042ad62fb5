//! [`Helper`]: a process beside a contender, which serves it over a socket.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends when it is dropped.
#[derive(Debug)]
pub struct Helper(Child);

impl Helper {
    /// Starts `command`, without input and output, and waits until it listens at `socket`.
    ///
    /// # Errors
    /// It cannot be started, ends, or does not listen in time.
    pub fn start(mut command: Command, socket: &Path) -> Result<Self, String> {
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        // One of an earlier sample is no sign.
        let _ = fs::remove_file(socket);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let mut helper = Self(child.map_err(|error| format!("start {name}: {error}"))?);
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() {
            if let Ok(Some(status)) = helper.0.try_wait() {
                return Err(format!("{name} ended with {status}"));
            }
            if Instant::now() > deadline {
                return Err(format!("{name} does not listen"));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(helper)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, socket: &Path) -> Result<Helper, String> {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "sh"]).arg(socket);
        Helper::start(command, socket)
    }

    #[test]
    fn a_helper_is_waited_for_and_goes_when_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        fs::write(&socket, "of an earlier one").unwrap();
        let helper = start("sleep 0.1; echo $$ >$1.new; mv $1.new $1; exec sleep 1000", &socket).unwrap();
        let process = Path::new("/proc").join(fs::read_to_string(&socket).unwrap().trim());
        assert!(process.exists());
        drop(helper);
        assert!(!process.exists());
        assert!(start("exit 3", &socket).unwrap_err().contains("sh ended with exit status: 3"));
        let missing = Helper::start(Command::new("/none/such"), &socket).unwrap_err();
        assert!(missing.contains("start such"), "{missing}");
    }
}
