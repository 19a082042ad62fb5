//! Work for a console: every line that comes is answered by one.

use std::io::{self, BufRead, StdinLock, Write};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Standard input and output; a terminal is made to pass bytes on as they are.
pub struct Ends {
    input: StdinLock<'static>,
    before: Option<Termios>,
}

impl Ends {
    /// Takes them.
    pub fn new() -> io::Result<Self> {
        let input = io::stdin().lock();
        let before = tcgetattr(&input).ok();
        if let Some(mut raw) = before.clone() {
            raw.make_raw();
            tcsetattr(&input, OptionalActions::Now, &raw)?;
        }
        Ok(Self { input, before })
    }

    /// Answers `count` lines: "pong" and what came. Returns their bytes.
    pub fn answer(&mut self, count: u64) -> io::Result<u64> {
        let mut output = io::stdout().lock();
        let (mut line, mut bytes) = (String::new(), 0);
        for _ in 0..count {
            line.clear();
            if self.input.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes += line.len() as u64;
            // One write: each is a request to a virtio console.
            output.write_all(format!("pong {line}").as_bytes())?;
            output.flush()?;
        }
        Ok(bytes)
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // There is nobody left to tell.
            let _ = tcsetattr(&self.input, OptionalActions::Now, before);
        }
    }
}
