//! The end of the machine: stop what still runs, make the disks safe, report the exit code, power off.

use crate::console::{complain, drain, say};
use crate::kernel::{signal_all_others, write_port};
use crate::mounts::{Text, read_file};
use crate::orders::{End, Orders, Report};
use crate::watch::{Event, Watch};
use rustix::fs::{Mode, OFlags, open, sync};
use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use rustix::system::{RebootCommand, reboot};

/// The code that is reported when the command could not even be started.
pub const NOT_RUN: i32 = 126;

/// How long programs have to act on SIGTERM, in milliseconds.
const GRACE_MS: u32 = 10_000;

/// How the command went, and what shall become of the machine.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; `None` while it still runs.
    pub code: Option<i32>,
    /// How to end.
    pub end: End,
    /// The command, if it still runs.
    pub child: Option<Pid>,
}

/// Ends the machine.
pub fn finish(orders: &Orders<'_>, outcome: Outcome, watch: &Watch) -> ! {
    let code = stop_all(outcome.child, orders.command.is_none(), watch).or(outcome.code).unwrap_or(NOT_RUN);
    sync();
    // A disk as root ends clean; an initramfs does not mind.
    let _ = mount_remount(c"/", MountFlags::RDONLY, c"");
    drain();
    if let Some(report) = orders.report {
        send(report, code);
    }
    let command = match outcome.end {
        End::PowerOff => RebootCommand::PowerOff,
        End::Reboot => RebootCommand::Restart,
        End::Halt => RebootCommand::Halt,
    };
    if let Err(error) = reboot(command) {
        complain(b"end", b"the machine", error);
    }
    // PID 1 must not return: the kernel would panic.
    loop {
        let _ = rustix::event::poll(&mut [], None);
    }
}

/// Asks all other processes to end, waits, then kills the rest. The exit code of `child`, if it ended here.
fn stop_all(child: Option<Pid>, is_shell: bool, watch: &Watch) -> Option<i32> {
    let mut code = None;
    if reap_all(child, &mut code) {
        return code;
    }
    signal_all_others(Signal::TERM);
    // An interactive shell ignores SIGTERM, and passes SIGHUP on to its jobs. Nobody else gets that: it would cut short
    // what they do on SIGTERM.
    if let (true, Some(shell)) = (is_shell, child) {
        let _ = kill_process(shell, Signal::HUP);
    }
    signal_all_others(Signal::CONT);
    let mut left = GRACE_MS;
    while left > 0 {
        if reap_all(child, &mut code) {
            return code;
        }
        const STEP_MS: u32 = 100;
        // Other events come quickly; counting them too lets even a stream of them end.
        let passed = if watch.next(Some(STEP_MS)) == Event::Timeout { STEP_MS } else { 1 };
        left = left.saturating_sub(passed);
    }
    say(&[b"guest-init: killing what did not end"]);
    signal_all_others(Signal::KILL);
    while let Ok(Some(ended)) = wait(WaitOptions::empty()) {
        note(ended, child, &mut code);
    }
    code
}

/// Reaps what has ended. True if no child is left.
fn reap_all(child: Option<Pid>, code: &mut Option<i32>) -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(ended)) => note(ended, child, code),
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

fn note((pid, status): (Pid, WaitStatus), child: Option<Pid>, code: &mut Option<i32>) {
    if Some(pid) == child {
        *code = Some(crate::watch::exit_code(status));
    }
}

fn send(report: Report<'_>, code: i32) {
    match report {
        Report::IoPort(port) => {
            if !write_port(port, code as u8) {
                say(&[b"guest-init: no access to the port of vmm.exit"]);
            }
        }
        Report::VirtioPort(name) => {
            let mut line = Text::<12>::decimal(code as u32);
            line.push(b"\n");
            match virtio_port(name) {
                Some(device) => {
                    let written = open(device.bytes(), OFlags::WRONLY, Mode::empty())
                        .and_then(|port| rustix::io::write(&port, line.bytes()));
                    if let Err(error) = written {
                        complain(b"report to", device.bytes(), error);
                    }
                }
                None => {
                    say(&[b"guest-init: no virtio console port named ", name]);
                }
            }
        }
    }
}

/// The device of a named virtio console port. No udev makes /dev/virtio-ports here, so sysfs is asked for the names.
pub fn virtio_port(name: &[u8]) -> Option<Text<64>> {
    let names = open(c"/sys/class/virtio-ports", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).ok()?;
    let mut buffer = [core::mem::MaybeUninit::uninit(); 1024];
    let mut entries = rustix::fs::RawDir::new(&names, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        let entry = entry.file_name().to_bytes();
        let mut path = Text::<128>::new();
        for part in [&b"/sys/class/virtio-ports/"[..], entry, b"/name\0"] {
            path.push(part);
        }
        let mut buffer = [0; 256];
        let path = core::ffi::CStr::from_bytes_with_nul(path.bytes()).ok()?;
        if read_file(path, &mut buffer).trim_ascii() == name {
            let mut device = Text::new();
            device.push(b"/dev/");
            device.push(entry);
            return Some(device);
        }
    }
    None
}
