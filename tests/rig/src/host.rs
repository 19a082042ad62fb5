//! The host's own KVM: whether it runs Linux guests, and running a command on it under the same
//! rules as in the machine. Called by `main`.

use crate::options::{Options, warn};
use crate::process;
use crate::session::EXIT_TIMEOUT;
use anyhow::Result;
use rig_init::{EXIT_CANNOT_EXECUTE, EXIT_NOT_FOUND};
use std::fs;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// Whether guests that are whole Linux systems run on this host: its processors have hardware
/// virtualization, the kernel uses it (and not the software KVM `kvm_pvm`), and the caller may.
pub fn kvm_runs_linux() -> bool {
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    has_virtualization(&processors)
        && !Path::new("/sys/module/kvm_pvm").exists()
        && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

enum Event {
    Ended(io::Result<ExitStatus>),
    Signal(libc::c_int),
}

/// Runs the command that `options` names on the host; its exit code.
pub fn run(options: &Options) -> Result<i32> {
    let (sender, events) = mpsc::channel();
    let signals = sender.clone();
    process::watch_signals(move |signal| {
        let _ = signals.send(Event::Signal(signal));
    });
    let mut command = Command::new(&options.command[0]);
    command.args(&options.command[1..]);
    if !options.stdin && !options.tty {
        command.stdin(Stdio::null());
    }
    let own_group = !options.tty;
    // SAFETY: the closure only makes system calls that are safe between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // With a terminal the command stays in the caller's group, which the terminal serves.
            if own_group && libc::setpgid(0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            process::prepare_child(&[])
        })
    };
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            warn(format!("{}: {error}", options.command[0].display()));
            return Ok(match error.kind() {
                io::ErrorKind::NotFound => EXIT_NOT_FOUND,
                _ => EXIT_CANNOT_EXECUTE,
            });
        }
    };
    let pid = child.id() as libc::pid_t;
    let target = if own_group { -pid } else { pid };
    let send = |signal| {
        // SAFETY: kill takes numbers only.
        unsafe { libc::kill(target, signal) };
    };
    thread::spawn(move || sender.send(Event::Ended(child.wait())));
    let time = options.time().map_or(Duration::MAX, Duration::from_secs);
    let start = std::time::Instant::now();
    loop {
        match events.recv_timeout(time.saturating_sub(start.elapsed())) {
            Ok(Event::Ended(status)) => {
                let status = status?;
                let by_signal = status.signal().map_or(0, |signal| 128 + signal);
                return Ok(status.code().unwrap_or(by_signal));
            }
            // A terminal sends these to the whole group, the command included.
            Ok(Event::Signal(libc::SIGINT | libc::SIGQUIT | libc::SIGWINCH)) if !own_group => (),
            Ok(Event::Signal(signal)) => send(signal),
            Err(RecvTimeoutError::Timeout) => {
                send(libc::SIGKILL);
                warn(format!("the command ran longer than {} seconds: killed", time.as_secs()));
                return Ok(EXIT_TIMEOUT);
            }
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the command was lost"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::has_virtualization;

    #[test]
    fn virtualization_is_a_whole_flag_of_a_processor() {
        assert!(has_virtualization("processor: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: fpu svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu svm_lock\nbugs\t\t: vmx\n"));
        assert!(!has_virtualization("vmx flags\t: vnmi vmx\n"));
        assert!(!has_virtualization(""));
    }
}
