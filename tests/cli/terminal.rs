//! A pseudo-terminal of 80 columns and 24 lines, with the test at its keyboard.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::place::PATIENCE;

pub struct Terminal {
    keyboard: File,
    line: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    pub fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, vec![]).unwrap();
        let path = std::ffi::OsStr::from_bytes(name.as_bytes());
        let line = File::options().read(true).write(true).open(path).unwrap();
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&line, size).unwrap();
        let keyboard = File::from(master);
        let (mut screen, seen) = (keyboard.try_clone().unwrap(), Arc::<Mutex<Vec<u8>>>::default());
        let all = seen.clone();
        // Ends with the terminal: its last line's closing is an error here.
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                all.lock().unwrap().extend(&bytes[..count]);
            }
        });
        Self { keyboard, line, seen }
    }

    /// `command` with this terminal for input and output.
    pub fn give(&self, command: &mut Command) {
        let line = || self.line.try_clone().unwrap();
        command.stdin(line()).stdout(line());
    }

    /// What has been written to it, escape sequences included.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    #[track_caller]
    pub fn expect(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen().contains(text) {
            if Instant::now() >= deadline {
                let seen = self.seen();
                let last: String = seen.chars().skip(seen.chars().count().saturating_sub(3000)).collect();
                panic!("no {text:?}; last: {last:?}");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn press(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Its mode: raw or not, and all else.
    pub fn mode(&self) -> String {
        format!("{:?}", tcgetattr(&self.line).unwrap())
    }
}
