//! The terminal that init and its command speak through, and init's own messages on it.

use crate::mounts::{Text, wait_for_path};
use rustix::fd::BorrowedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io;

/// Writes the parts as one line to standard error; false if there is none yet.
pub fn say(parts: &[&[u8]]) -> bool {
    let mut line = Text::<512>::new();
    for part in parts {
        line.push(part);
    }
    line.push(b"\n");
    io::write(stdio(2), line.bytes()).is_ok()
}

/// Says what failed with which errno.
pub fn complain(what: &[u8], name: &[u8], error: io::Errno) {
    say(&[
        b"guest-init: ",
        what,
        b" ",
        name,
        b": errno ",
        Text::<12>::decimal(error.raw_os_error() as u32).bytes(),
    ]);
}

/// Makes the console standard input, output and error: the one that `console=` named last, waiting a little for it (a
/// virtio console appears when its driver is done), else hvc0 if there is one, else /dev/console.
pub fn open(named: Option<&[u8]>) {
    let mut path = Text::<64>::new();
    path.push(b"/dev/");
    path.push(named.unwrap_or(b"hvc0"));
    let found = match named {
        Some(_) => wait_for_path(path.bytes(), 2_000),
        None => wait_for_path(path.bytes(), 0),
    };
    let path = if found { path.bytes() } else { b"/dev/console" };
    match rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()) {
        Ok(console) => {
            let _ = rustix::stdio::dup2_stdin(&console);
            let _ = rustix::stdio::dup2_stdout(&console);
            let _ = rustix::stdio::dup2_stderr(&console);
            if rustix::fd::AsRawFd::as_raw_fd(&console) <= 2 {
                core::mem::forget(console);
            }
        }
        Err(error) => complain(b"open", path, error),
    }
}

/// Waits until all output has left the terminal's buffers.
pub fn drain() {
    let _ = rustix::termios::tcdrain(stdio(1));
}

/// Standard input, output or error.
pub fn stdio(number: i32) -> BorrowedFd<'static> {
    // SAFETY: these three stay what they are from `open` on; before that, a call on one that is not open fails cleanly.
    unsafe { BorrowedFd::borrow_raw(number) }
}
