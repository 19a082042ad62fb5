//! The monitor's own standard input and output as a host end: a terminal, pipes, files or sockets.
//!
//! Raw mode and the escape sequence are for a terminal on standard input; everything else is passed through byte for
//! byte, and the end of standard input is not the end of the VM.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::OFlags;
use rustix::termios::{isatty, tcgetwinsize};

use super::escape::Escape;
use super::poll::{EventFlags, Poll, Watch};
use super::stream::{Descriptor, Stream};
use super::terminal::Terminal;
use super::{Host, Interest, WindowSize};
use crate::event_loop::EventLoop;

/// Standard input and output.
pub struct Stdio {
    /// Its input is absent if that is a terminal.
    stream: Stream,
    terminal: Option<Terminal>,
    keys_watch: Watch,
    resized_watch: Watch,
}

impl Stdio {
    /// Takes them over; a terminal goes into raw mode, and its keys are read by `events`.
    pub fn open(events: &EventLoop) -> io::Result<Self> {
        let output = Descriptor::shared(io::stdout().as_fd(), OFlags::WRONLY, "standard output")?;
        let mut stream = Stream { input: None, output: Some(output) };
        let mut terminal = None;
        if isatty(io::stdin()) {
            terminal = Some(Terminal::attach(events)?);
        } else {
            stream.input = Some(Descriptor::shared(io::stdin().as_fd(), OFlags::RDONLY, "standard input")?);
        }
        Ok(Self { stream, terminal, keys_watch: None, resized_watch: None })
    }
}

impl Host for Stdio {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        match &self.terminal {
            Some(terminal) => terminal.read(buf),
            None => self.stream.read(buf),
        }
    }

    fn write(&mut self, data: &[u8]) -> usize {
        self.stream.write(data)
    }

    fn service(&mut self) {
        if let Some(terminal) = &self.terminal {
            terminal.acknowledge_resize();
        }
    }

    fn watch(&mut self, poll: &Poll, want: Interest) -> bool {
        if let Some(terminal) = &self.terminal {
            let keys = want.input.then_some(EventFlags::IN);
            let resized = Some(EventFlags::IN);
            let result = poll
                .set(terminal.available().as_fd(), &mut self.keys_watch, keys)
                .and_then(|()| poll.set(terminal.resized().as_fd(), &mut self.resized_watch, resized));
            if let Err(error) = result {
                log::error!("terminal: wait: {error}");
            }
        }
        self.stream.watch(poll, want)
    }

    fn size(&self) -> Option<WindowSize> {
        let size = match (isatty(io::stdout()), &self.terminal) {
            (true, _) => tcgetwinsize(io::stdout()),
            (false, Some(_)) => tcgetwinsize(io::stdin()),
            (false, None) => return None,
        };
        // A terminal that does not know its size says zero.
        let size = size.ok().filter(|size| size.ws_col > 0 && size.ws_row > 0)?;
        Some(WindowSize { columns: size.ws_col, rows: size.ws_row })
    }

    fn is_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    fn on_escape(&self, act: Box<dyn FnMut(Escape) + Send>) {
        if let Some(terminal) = &self.terminal {
            terminal.on_escape(act);
        }
    }
}
