//! Child processes that never outlive the rig: each dies with it, by whatever it ends. Used by
//! `machine` for QEMU and virtiofsd and by `host` for the command; also watches for signals.

use anyhow::{Context, Result};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::thread;

/// Process groups to kill when the rig ends.
static GROUPS: Mutex<Vec<libc::pid_t>> = Mutex::new(Vec::new());

/// Signals that the rig answers itself.
const WATCHED: [libc::c_int; 5] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGWINCH];

/// A child in a process group of its own, killed when this value or the rig goes.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts `command`, which keeps the descriptors `inherited`. To be called from the main
    /// thread only: the child dies with the thread that started it.
    pub fn start(mut command: Command, inherited: Vec<RawFd>) -> Result<Process> {
        let name = command.get_program().to_string_lossy().into_owned();
        // SAFETY: the closure only makes system calls that are safe between fork and exec.
        unsafe {
            command.pre_exec(move || {
                check(libc::setpgid(0, 0))?;
                prepare_child(&inherited)
            })
        };
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        groups().push(child.id() as libc::pid_t);
        Ok(Process(child))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = self.0.id() as libc::pid_t;
        groups().retain(|&other| other != group);
        // SAFETY: kill takes numbers only; the group exists until its leader is waited for.
        unsafe { libc::kill(-group, libc::SIGKILL) };
        let _ = self.0.wait();
    }
}

/// What a child does before it becomes another program: die with the rig, take signals again,
/// keep `inherited` open. Only makes system calls.
pub fn prepare_child(inherited: &[RawFd]) -> io::Result<()> {
    // SAFETY: these calls take numbers and a signal set of this frame.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
        for &fd in inherited {
            check(libc::fcntl(fd, libc::F_SETFD, 0))?;
        }
    }
    Ok(())
}

/// Kills every child that is still there and waits until it is gone.
pub fn end_all() {
    for group in std::mem::take(&mut *groups()) {
        // SAFETY: both calls take numbers only; the group is a child's that nobody waited for.
        unsafe {
            libc::kill(-group, libc::SIGKILL);
            libc::waitpid(group, std::ptr::null_mut(), 0);
        }
    }
}

/// From here on `on_signal` is called, on a thread of its own, with each signal to the rig. To be
/// called before other threads start, so that they take none.
pub fn watch_signals(on_signal: impl Fn(libc::c_int) + Send + 'static) {
    let set = watched_set();
    // SAFETY: the set is valid, and the old one is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    thread::spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are to values of this closure.
            if unsafe { libc::sigwait(&set, &mut signal) } == 0 {
                on_signal(signal);
            }
        }
    });
}

fn watched_set() -> libc::sigset_t {
    // SAFETY: sigemptyset makes the zeroed set valid before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in WATCHED {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

fn groups() -> std::sync::MutexGuard<'static, Vec<libc::pid_t>> {
    GROUPS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The error of a C call that returned a negative number.
fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
