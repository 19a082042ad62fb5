//! Runs a machine in a child process, so that this one can use the result without ever having had a guest.

use std::io;
use std::process;

use anyhow::{Context, anyhow};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, getppid, kill_process, set_parent_process_death_signal, waitpid,
};
use signal_hook::consts::SIGCHLD;
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Sent};

use super::flags::with_flags;
use vmm_command::{Code, Failure};
use vmm_monitor::threads::ORDERS;

/// Does `work` in a child and waits for it, passing on signals that are orders. The child dies with this process. Call it while this
/// process has one thread.
///
/// # Errors
/// The host is out of processes. The child prints its own errors.
pub fn apart(work: impl FnOnce() -> Result<Code, Failure>) -> Result<Code, Failure> {
    let host = |error: anyhow::Error| Failure::new(Code::Host, error);
    let parent = getpid();
    // SAFETY: this process has one thread, so that the child has all that it has.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let _ = set_parent_process_death_signal(Some(Signal::KILL));
        // The one whose end it would be told of may have been gone by then.
        let code = if getppid() == Some(parent) { done(work) } else { Code::Killed };
        process::exit(code.number().into());
    }
    let begun = Pid::from_raw(child.max(0)).ok_or_else(io::Error::last_os_error);
    let child = begun.context("cannot start a process").map_err(host)?;
    await_end(child).context("cannot wait for the process of the machine").map_err(host)
}

fn done(work: impl FnOnce() -> Result<Code, Failure>) -> Code {
    work().unwrap_or_else(|failure| {
        failure.print(with_flags);
        failure.code
    })
}

/// What this process did on [`ORDERS`]. Dropping this puts it back, because signal-hook leaves its handlers installed.
struct Before([libc::sigaction; 3]);

impl Before {
    fn now() -> Self {
        Self(ORDERS.map(|signal| {
            // SAFETY: all zeroes is an action, which is overwritten.
            let mut action = unsafe { std::mem::zeroed() };
            // SAFETY: no new action, and a place for the old one.
            unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
            action
        }))
    }
}

impl Drop for Before {
    fn drop(&mut self) {
        for (signal, action) in ORDERS.iter().zip(&self.0) {
            // SAFETY: the action was the process's before.
            unsafe { libc::sigaction(*signal, action, std::ptr::null_mut()) };
        }
    }
}

fn await_end(child: Pid) -> anyhow::Result<Code> {
    let _before = Before::now();
    let mut signals = SignalsInfo::<WithOrigin>::new(ORDERS.into_iter().chain([SIGCHLD]))?;
    loop {
        if let Some((_, status)) = waitpid(Some(child), WaitOptions::NOHANG)? {
            if let Some(code) = status.exit_status() {
                return Ok(Code::Other(u8::try_from(code).unwrap_or(u8::MAX)));
            }
            let signal = status.terminating_signal().unwrap_or_default();
            return Err(anyhow!("it was ended by signal {signal}"));
        }
        for told in signals.wait() {
            // What a terminal says it says to both.
            if told.signal != SIGCHLD
                && matches!(told.cause, Cause::Sent(Sent::User | Sent::TKill | Sent::Queue))
                && let Some(signal) = Signal::from_named_raw(told.signal)
            {
                let _ = kill_process(child, signal);
            }
        }
    }
}
