//! A child process on a pseudo-terminal of its own, which the test kills, stops, types at and resizes.
//!
//! The child is this test binary again, running [`child`] alone.

use std::env;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcsetwinsize};

use super::*;
use crate::chardev::{Endpoint, Interest};
use crate::config::CharTarget;

/// Names what the child is to do.
pub(crate) const SCENARIO: &str = "TERMINAL_TEST_SCENARIO";

const CHILD: &str = "chardev::terminal::tests::child";

/// What the child does with standard input as its terminal.
#[test]
#[ignore = "run by the other tests, on a terminal of its own"]
fn child() {
    let Ok(scenario) = env::var(SCENARIO) else { return };
    let endpoint = Endpoint::open(&CharTarget::Stdio, &crate::event_loop::running()).unwrap();
    let say = |text: &str| assert_eq!(endpoint.write(text.as_bytes()), text.len());
    let (sender, escapes) = mpsc::channel();
    endpoint.on_escape(move |escape| sender.send(escape).unwrap());
    assert!(
        Endpoint::open(&CharTarget::Stdio, &crate::event_loop::running()).is_err(),
        "there is one standard input"
    );
    say("[ready]");
    match scenario.as_str() {
        "drop" => drop(endpoint),
        "panic" => {
            let _ = thread::spawn(|| panic!("on purpose")).join();
            thread::sleep(Duration::from_secs(60));
        }
        "exit" => {
            restore();
            restore();
            std::process::exit(7);
        }
        "busy" => {
            // Nobody reads the keys: the guest is stuck.
            say(&format!("[{:?}]", escapes.recv().unwrap()));
            drop(endpoint);
        }
        "echo" => loop {
            endpoint.want(Interest { input: true, output: false });
            poll(&mut [PollFd::new(&endpoint, PollFlags::IN)], None).unwrap();
            let before = endpoint.size();
            endpoint.service();
            let mut keys = [0; 64];
            let len = endpoint.read(&mut keys);
            if len == 0 {
                let size = endpoint.size().or(before).unwrap();
                say(&format!("[{}x{}]", size.columns, size.rows));
            } else {
                say(&format!("{:?}", &keys[..len]));
            }
            while let Ok(escape) = escapes.try_recv() {
                say(&format!("[{escape:?}]"));
            }
        },
        "background" => {
            for tick in 0.. {
                endpoint.want(Interest { input: true, output: false });
                poll(
                    &mut [PollFd::new(&endpoint, PollFlags::IN)],
                    Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }),
                )
                .unwrap();
                endpoint.service();
                let mut keys = [0; 64];
                match endpoint.read(&mut keys) {
                    0 => say(&format!("[tick {tick}]")),
                    len if keys[..len].contains(&b'q') => break,
                    len => say(&format!("{:?}", &keys[..len])),
                }
            }
        }
        other => panic!("no scenario {other}"),
    }
}

/// A child process on a terminal, and this end of that.
pub(crate) struct OnTerminal {
    pub(crate) master: File,
    slave: OwnedFd,
    child: Child,
    seen: String,
}

impl OnTerminal {
    /// Runs the ignored test `test` of this binary, which says when it is ready.
    pub(crate) fn start(test: &str, scenario: &str) -> Self {
        Self::start_by(&[], test, scenario)
    }

    /// The same by a command that gets the child's as its last arguments: a shell.
    fn start_by(command: &[&str], test: &str, scenario: &str) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap();
        let slave = open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        fcntl_setfl(&master, fcntl_getfl(&master).unwrap() | OFlags::NONBLOCK).unwrap();
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        // A session of its own, with the terminal as its controlling one: signals come as in a shell.
        let child = Command::new("setsid")
            .arg("--ctty")
            .args(command)
            .arg(env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(SCENARIO, scenario)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .expect("setsid, of util-linux");
        let mut this = Self { master: master.into(), slave, child, seen: String::new() };
        this.expect("[ready]");
        this
    }

    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for `text`; returns what came before it.
    pub(crate) fn expect(&mut self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.seen.contains(text) {
            assert!(Instant::now() < end, "no {text:?} in {:?}", self.seen);
            let mut buf = [0; 4096];
            match self.master.read(&mut buf) {
                Ok(len) => self.seen.push_str(&String::from_utf8_lossy(&buf[..len])),
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        }
        let (before, after) = self.seen.split_once(text).unwrap();
        let (before, after) = (before.to_owned(), after.to_owned());
        self.seen = after;
        before
    }

    /// Waits until the terminal is raw, or not.
    fn expect_raw(&self, raw: bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while tcgetattr(&self.slave).unwrap().local_modes.contains(LocalModes::ICANON) == raw {
            assert!(Instant::now() < end, "the terminal should be {}", if raw { "raw" } else { "restored" });
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn kill(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All that can be told of a terminal's modes.
fn modes(terminal: &OwnedFd) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}

#[test]
fn every_way_to_end_gives_the_terminal_back() {
    for scenario in ["drop", "exit"] {
        let mut child = OnTerminal::start(CHILD, scenario);
        let code = child.child.wait().unwrap().code();
        assert_eq!(code, Some(if scenario == "exit" { 7 } else { 0 }));
        child.expect_raw(false);
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut child = OnTerminal::start(CHILD, "busy");
        child.expect_raw(true);
        child.kill(signal);
        let status = child.child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(signal.as_raw()));
        child.expect_raw(false);
    }
}

#[test]
fn a_panic_gives_the_terminal_back_before_its_message() {
    let mut child = OnTerminal::start(CHILD, "panic");
    child.expect("on purpose");
    child.expect_raw(false);
}

#[test]
fn the_modes_come_back_exactly_and_raw_mode_keeps_nothing_to_itself() {
    let mut child = OnTerminal::start(CHILD, "busy");
    child.expect_raw(true);
    let raw = modes(&child.slave);
    child.kill(Signal::TSTP);
    let (_, status) = waitpid(Some(child.pid()), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(status.stopped());
    child.expect_raw(false);
    // It was a fresh terminal before, and another fresh one shows what it was like.
    let fresh = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    assert_eq!(modes(&child.slave), modes(&fresh));
    // And it comes back to the guest when the shell says "fg".
    child.kill(Signal::CONT);
    child.expect_raw(true);
    assert_eq!(modes(&child.slave), raw);
    child.master.write_all(b"\x01x").unwrap();
    child.expect("[Quit]");
    child.expect_raw(false);
    assert!(child.child.wait().unwrap().success());
}

#[test]
fn escapes_work_while_nobody_takes_the_keys() {
    let mut child = OnTerminal::start(CHILD, "busy");
    child.master.write_all(&[b'k'; 3000]).unwrap();
    child.master.write_all(b"\x01h\x01p").unwrap();
    child.expect("power button");
    child.expect("[PowerButton]");
}

#[test]
fn a_job_in_the_background_leaves_the_keys_alone_until_it_comes_to_the_foreground() {
    const SHELL: &str = r#"set -m; "$@" & read line; echo "[shell $line]"; read line; fg"#;
    let mut child = OnTerminal::start_by(&["bash", "-c", SHELL, "bash"], CHILD, "background");
    child.master.write_all(b"hello\n").unwrap();
    child.expect("[shell hello]");
    // It would have been stopped by now, had it read.
    child.expect("[tick ");
    let tick: u64 = child.expect("]").parse().unwrap();
    child.expect(&format!("[tick {}]", tick + 50));
    child.expect_raw(false);
    // Running, it gets no signal.
    child.master.write_all(b"go\n").unwrap();
    child.expect_raw(true);
    child.master.write_all(b"x").unwrap();
    child.expect("[120]");
    child.master.write_all(b"q").unwrap();
    assert!(child.child.wait().unwrap().success());
    child.expect_raw(false);
}

#[test]
fn keys_pass_and_the_window_tells_its_size() {
    let mut child = OnTerminal::start(CHILD, "echo");
    child.master.write_all(b"a\x03\x04\x01a\r\n\x1a").unwrap();
    let keys: Vec<u8> = b"a\x03\x04\x01\r\n\x1a".to_vec();
    // However they are cut into pieces: the sum of what is shown.
    let mut shown = Vec::new();
    while shown.len() < keys.len() {
        child.expect("[");
        let list = child.expect("]");
        shown.extend(list.split(", ").map(|n| n.parse::<u8>().unwrap()));
    }
    assert_eq!(shown, keys);
    for (columns, rows) in [(132, 43), (80, 24)] {
        child.resize(columns, rows);
        child.expect(&format!("[{columns}x{rows}]"));
    }
    child.master.write_all(b"\x01xq").unwrap();
    child.expect("[Quit]");
}
