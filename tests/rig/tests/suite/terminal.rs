//! `rig --tty`: the command gets a terminal of the caller's size, and the caller's terminal is
//! afterwards as it was. The test plays the caller's terminal.

use crate::support::{available, rig};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::Child;

/// The other side of a terminal with 33 rows and 101 columns.
struct Terminal {
    keyboard: File,
    line: File,
    seen: Vec<u8>,
}

impl Terminal {
    fn new() -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, vec![]).unwrap();
        let path = std::ffi::OsStr::from_bytes(name.as_bytes());
        let line = File::options().read(true).write(true).open(path).unwrap();
        let size = Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&line, size).unwrap();
        Terminal { keyboard: master.into(), line, seen: vec![] }
    }

    fn start(&self, command: &[&str]) -> Child {
        let mut rig = rig(&[&["--tty", "--timeout", "60", "--"], command].concat()).0;
        let line = || self.line.try_clone().unwrap();
        rig.stdin(line()).stdout(line()).stderr(line());
        rig.spawn().unwrap()
    }

    /// Reads until `text` has been shown; the rig's own time limit ends a vain wait.
    fn expect(&mut self, text: &str) {
        let mut buffer = [0; 1024];
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let seen = String::from_utf8_lossy(&self.seen).into_owned();
            assert!(!seen.contains("ran longer"), "no {text:?} in {seen:?}");
            let count = self.keyboard.read(&mut buffer).unwrap();
            self.seen.extend(&buffer[..count]);
        }
    }

    fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    fn mode(&self) -> String {
        format!("{:?}", tcgetattr(&self.line).unwrap())
    }
}

#[test]
fn a_command_has_a_terminal_and_the_caller_has_it_back() {
    if !available("terminal") {
        return;
    }
    let mut terminal = Terminal::new();
    let before = terminal.mode();
    let script = "tty; stty size; read line; echo got $line; exit 5";
    let mut child = terminal.start(&["sh", "-c", script]);
    terminal.expect("/dev/pts/0\r\n33 101\r\n");
    assert_ne!(terminal.mode(), before, "not raw");
    terminal.press("some words\r");
    terminal.expect("got some words\r\n");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(terminal.mode(), before);
}

#[test]
fn control_c_goes_to_the_command_and_a_signal_to_the_rig_restores_the_terminal() {
    if !available("terminal") {
        return;
    }
    let mut terminal = Terminal::new();
    let before = terminal.mode();
    let script = "trap 'echo caught' INT; echo begun; sleep 300; echo after; sleep 300";
    let mut child = terminal.start(&["sh", "-c", script]);
    terminal.expect("begun");
    // The shell may not have started the first sleep yet; a second press reaches it then.
    while !String::from_utf8_lossy(&terminal.seen).contains("after") {
        std::thread::sleep(std::time::Duration::from_millis(500));
        terminal.press("\x03");
        terminal.expect("caught");
        terminal.seen.extend(drain(&mut terminal.keyboard));
    }
    // SAFETY: kill takes numbers only.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(terminal.mode(), before);
}

/// What a terminal shows within half a second.
fn drain(terminal: &mut File) -> Vec<u8> {
    std::thread::sleep(std::time::Duration::from_millis(500));
    let mut buffer = vec![0; 1024];
    let flags = rustix::fs::fcntl_getfl(&*terminal).unwrap();
    rustix::fs::fcntl_setfl(&*terminal, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    let count = terminal.read(&mut buffer).unwrap_or(0);
    rustix::fs::fcntl_setfl(&*terminal, flags).unwrap();
    buffer.truncate(count);
    buffer
}
