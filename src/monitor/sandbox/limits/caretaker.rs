//! The process that removes the cgroup of a machine whose last process has gone, however it went.
//!
//! A process cannot remove the cgroup that it is in, and a confined monitor must not be able to leave its own. So a small process stays
//! outside: forked at the start, before there is anything of a guest's, in a session of its own, with one descriptor.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use super::super::process::close_all_but;
use super::Care;
use super::cgroup::Made;
use crate::config::Size;

/// The other end is the caretaker's: it is closed when this process has gone.
static LIFE: OnceLock<OwnedFd> = OnceLock::new();

/// From the last descriptor's end to the end of the process it may take a moment.
const MOMENT: Duration = Duration::from_millis(1);
/// Until others that have entered the cgroup are looked for again.
const OTHERS: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Starts it, for the cgroups that were `made`, outermost first, of which the last is this process's.
pub(super) fn start(made: &Made, memory_max: Option<Size>, care: &Care) -> io::Result<()> {
    let (end, life) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread, so that the child has all that it has.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(life);
            attend(end, made.paths(), memory_max, care);
            // SAFETY: nothing of this process's is to be put back: all that it has is its parent's.
            unsafe { libc::_exit(0) }
        }
        _ => {
            let _ = LIFE.set(life);
            Ok(())
        }
    }
}

fn attend(end: OwnedFd, made: &[PathBuf], memory_max: Option<Size>, care: &Care) {
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"vmm-cgroup");
    let _ = rustix::process::chdir("/");
    let nothing = File::options().read(true).write(true).open("/dev/null");
    if let Ok(nothing) = &nothing {
        let _ = rustix::stdio::dup2_stdin(nothing);
        let _ = rustix::stdio::dup2_stdout(nothing);
        if care.is_detached {
            let _ = rustix::stdio::dup2_stderr(nothing);
        }
    }
    close_all_but(&mut [end.as_raw_fd(), 0, 1, 2]);
    let mut end = File::from(end);
    // Nothing is written to it.
    while matches!(end.read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::Interrupted) {}
    let Some(cgroup) = made.last() else { return };
    if let Some(most) = memory_max.filter(|_| was_out_of_memory(cgroup)) {
        let text = (care.out_of_memory)(most);
        // Nobody is there to be told that it cannot be said.
        let _ = match &care.messages {
            Some(path) => {
                File::options().append(true).open(path).and_then(|mut file| file.write_all(text.as_bytes()))
            }
            None => io::stderr().write_all(text.as_bytes()),
        };
    }
    // Who waits for the end of what the run says waits no longer.
    if let Ok(nothing) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stderr(nothing);
    }
    for cgroup in made.iter().rev() {
        remove(cgroup);
    }
}

/// Removes `cgroup` once it is empty. One that has got children stays.
fn remove(cgroup: &Path) {
    loop {
        match fs::remove_dir(cgroup) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            _ => return,
        }
        // The kernel tells of the change from the moment on when the file was read (cgroup-v2.rst, "populated").
        let Ok(mut events) = File::open(cgroup.join("cgroup.events")) else { return };
        let mut text = String::new();
        let populated = events.read_to_string(&mut text).is_ok() && text.contains("populated 1");
        match populated {
            true => _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&OTHERS)),
            // Children, or the moment between.
            false if has_children(cgroup) => return,
            false => std::thread::sleep(MOMENT),
        }
    }
}

fn has_children(cgroup: &Path) -> bool {
    let is_folder = |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.path().is_dir());
    fs::read_dir(cgroup).is_ok_and(|mut entries| entries.any(is_folder))
}

/// Whether the kernel killed somebody in `cgroup` because that reached its limit.
fn was_out_of_memory(cgroup: &Path) -> bool {
    let events = fs::read_to_string(cgroup.join("memory.events")).unwrap_or_default();
    let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    killed.is_some_and(|count| count.trim() != "0")
}
